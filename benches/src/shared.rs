//! Through Redis: values of the shared store, and removes that travel through its stream.

use std::future::Future;
use std::time::{Duration, Instant};

use fleetcache::{HybridCache, RedisStore, RedisStreamsBus};
use fleetcache_services::Redis;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;

use crate::work::{key, table};

const KEYS: usize = 10_000;
const ROUNDS: usize = 9;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Microseconds per operation of `operations`, so many at a time.
fn at_once<F: Future<Output = ()> + Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    in_flight: usize,
    operations: usize,
    one: impl Fn(usize) -> F + Clone + Send + Sync + 'static,
) -> f64 {
    let start = Instant::now();
    runtime.block_on(async {
        let tasks: Vec<_> = (0..in_flight)
            .map(|task| {
                let one = one.clone();
                tokio::spawn(async move {
                    for number in (task..operations).step_by(in_flight) {
                        one(number).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("an operation");
        }
    });
    start.elapsed().as_secs_f64() * 1e6 / operations as f64
}

fn cache(url: &str, capacity: u64) -> HybridCache<String> {
    let builder = HybridCache::builder().ttl(Duration::from_secs(3600)).capacity(capacity);
    let builder = builder.l2(RedisStore::new(url).expect("a URL")).bus(RedisStreamsBus::new(url).expect("a URL"));
    builder.l2_timeout(Duration::from_secs(5)).build().expect("a sound cache")
}

pub fn tables() {
    let server = Redis::start().expect("redis-server");
    let runtime = runtime();
    let keys: &'static [String] = Vec::leak((0..KEYS).map(key).collect());
    // Few entries in memory, and keys in turn: each is found in the shared store.
    let cache = runtime.block_on(async { cache(&server.url(), 500) });
    let mut bare: MultiplexedConnection = runtime.block_on(async {
        let client = redis::Client::open(server.url()).expect("a URL");
        client.get_multiplexed_async_connection().await.expect("a connection")
    });
    let value = "v".repeat(200);
    runtime.block_on(async {
        for key in keys {
            cache.set(key, value.clone()).await.expect("set");
            let _: () = bare.set(format!("bare:{key}"), &value).await.expect("set");
        }
    });
    let bare_keys: &'static [String] = Vec::leak(keys.iter().map(|key| format!("bare:{key}")).collect());
    for (in_flight, operations) in [(1, 5_000), (64, 100_000), (512, 100_000)] {
        let (bare, cache) = (bare.clone(), cache.clone());
        let before = cache.stats();
        table(
            &format!("A value of 200 bytes from Redis, {in_flight} in flight"),
            "us",
            ROUNDS,
            vec![
                (
                    "redis 1.8.1 multiplexed GET",
                    Box::new(|| {
                        let bare = bare.clone();
                        at_once(&runtime, in_flight, operations, move |number| {
                            let mut bare = bare.clone();
                            async move {
                                let found: Option<String> = bare.get(&bare_keys[number % KEYS]).await.expect("get");
                                assert!(found.is_some());
                            }
                        })
                    }),
                ),
                (
                    "fleetcache `get`, missing in memory",
                    Box::new(|| {
                        let cache = cache.clone();
                        at_once(&runtime, in_flight, operations, move |number| {
                            let cache = cache.clone();
                            async move {
                                assert!(cache.get(&keys[number % KEYS]).await.expect("get").is_some());
                            }
                        })
                    }),
                ),
                (
                    "fleetcache `get_with`, missing in memory",
                    Box::new(|| {
                        let cache = cache.clone();
                        at_once(&runtime, in_flight, operations, move |number| {
                            let cache = cache.clone();
                            async move {
                                let load = || async { Err::<String, _>(std::fmt::Error) };
                                cache.get_with(&keys[number % KEYS], load).await.expect("found");
                            }
                        })
                    }),
                ),
            ],
        );
        let after = cache.stats();
        let all = (2 * ROUNDS * operations) as u64;
        assert!(after.l2_hits - before.l2_hits > all * 9 / 10, "{after:?}");
    }
    for (in_flight, operations) in [(1, 5_000), (64, 50_000)] {
        let (bare, cache) = (bare.clone(), cache.clone());
        table(
            &format!("Remove a value and tell the fleet, {in_flight} in flight"),
            "us",
            ROUNDS,
            vec![
                (
                    "redis 1.8.1 MULTI of UNLINK and XADD",
                    Box::new(|| {
                        let bare = bare.clone();
                        at_once(&runtime, in_flight, operations, move |number| {
                            let mut bare = bare.clone();
                            async move {
                                let mut both = redis::pipe();
                                both.atomic().cmd("UNLINK").arg(&bare_keys[number % KEYS]);
                                both.cmd("XADD").arg("bare-stream").arg("MAXLEN").arg("~").arg(10_000);
                                both.arg("*").arg("m").arg(&keys[number % KEYS]);
                                both.exec_async(&mut bare).await.expect("removed");
                            }
                        })
                    }),
                ),
                (
                    "fleetcache `remove`",
                    Box::new(|| {
                        let cache = cache.clone();
                        at_once(&runtime, in_flight, operations, move |number| {
                            let cache = cache.clone();
                            async move { cache.remove(&keys[number % KEYS]).await.expect("removed") }
                        })
                    }),
                ),
            ],
        );
        assert_eq!(cache.stats().bus_errors, 0);
    }
    runtime.block_on(cache.close()).expect("closed");
}
