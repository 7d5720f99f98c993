//! Servers for tests in any language: reads requests on standard input, one JSON object a line, and answers each on
//! standard output. All servers end with it, and it ends with its input.
//!
//! | request | answer |
//! | --- | --- |
//! | `{"do": "start", "name": "r", "kind": "redis"}`, `redis_cluster`, `redis_sentinel` | `{"url": ..., "port": ...}` |
//! | `{"do": "proxy", "name": "p", "of": "r"}` | `{"url": ..., "port": ...}` |
//! | `{"do": "fault", "name": "p", "fault": "delay", "millis": 50}`, `none`, `blackhole`, `half_open`, `reset`, `refuse`, `cut_after` with `bytes` | `{}` |
//! | `{"do": "kill", "name": "r"}`, `restart`, `pause`, `resume`, `stop` | `{}` |
//! | `{"do": "command", "name": "r", "command": ["FLUSHALL"]}` | `{"answer": ...}` |
//!
//! What cannot be done is answered by `{"error": ...}`.

#![allow(clippy::print_stdout, reason = "its answers")]

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::time::Duration;

use fleetcache_services::{Failure, Fault, Proxy, Redis, RedisCluster, RedisSentinel};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Request {
    #[serde(rename = "do")]
    what: String,
    name: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    of: String,
    #[serde(default)]
    fault: String,
    #[serde(default)]
    millis: u64,
    #[serde(default)]
    bytes: usize,
    #[serde(default)]
    command: Vec<String>,
}

enum Service {
    Redis(Redis),
    Cluster { _runs: RedisCluster },
    Sentinel { _runs: RedisSentinel },
    Proxy(Proxy),
}

fn main() -> Result<(), Failure> {
    let mut services = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let answer =
            serde_json::from_str(&line?).map_err(Failure::from).and_then(|request| serve(&mut services, &request));
        let answer = answer.unwrap_or_else(|error| json!({ "error": error.to_string() }));
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn serve(services: &mut HashMap<String, Service>, request: &Request) -> Result<Value, Failure> {
    let name = &request.name;
    match request.what.as_str() {
        "start" => {
            let (service, answer) = start(&request.kind)?;
            services.insert(name.clone(), service);
            return Ok(answer);
        }
        "proxy" => {
            let Some(Service::Redis(redis)) = services.get(&request.of) else {
                return Err(format!("there is no single server {:?}", request.of).into());
            };
            let proxy = Proxy::start(redis.port())?;
            let answer = json!({ "url": format!("redis://127.0.0.1:{}", proxy.port()), "port": proxy.port() });
            services.insert(name.clone(), Service::Proxy(proxy));
            return Ok(answer);
        }
        "stop" => {
            services.remove(name);
            return Ok(json!({}));
        }
        _ => {}
    }
    match (request.what.as_str(), services.get(name)) {
        ("fault", Some(Service::Proxy(proxy))) => proxy.set(fault(request)?),
        ("kill", Some(Service::Redis(redis))) => redis.kill(),
        ("restart", Some(Service::Redis(redis))) => redis.restart()?,
        ("pause", Some(Service::Redis(redis))) => redis.pause(),
        ("resume", Some(Service::Redis(redis))) => redis.resume(),
        ("command", Some(Service::Redis(redis))) => {
            let command: Vec<_> = request.command.iter().map(String::as_str).collect();
            return Ok(json!({ "answer": redis.command(&command)? }));
        }
        (what, _) => return Err(format!("{what:?} cannot be done to {name:?}").into()),
    }
    Ok(json!({}))
}

fn start(kind: &str) -> Result<(Service, Value), Failure> {
    Ok(match kind {
        "redis" => {
            let redis = Redis::start()?;
            let answer = json!({ "url": redis.url(), "port": redis.port() });
            (Service::Redis(redis), answer)
        }
        "redis_cluster" => {
            let cluster = RedisCluster::start(0)?;
            let answer = json!({ "url": cluster.url() });
            (Service::Cluster { _runs: cluster }, answer)
        }
        "redis_sentinel" => {
            let fleet = RedisSentinel::start()?;
            let answer = json!({ "url": fleet.url() });
            (Service::Sentinel { _runs: fleet }, answer)
        }
        _ => return Err(format!("kind {kind:?} is not known: give redis, redis_cluster or redis_sentinel").into()),
    })
}

fn fault(request: &Request) -> Result<Fault, Failure> {
    Ok(match request.fault.as_str() {
        "none" => Fault::None,
        "delay" => Fault::Delay(Duration::from_millis(request.millis)),
        "blackhole" => Fault::Blackhole,
        "half_open" => Fault::HalfOpen,
        "reset" => Fault::Reset,
        "refuse" => Fault::Refuse,
        "cut_after" => Fault::CutAfter(request.bytes),
        fault => return Err(format!("fault {fault:?} is not known").into()),
    })
}
