mod cells;
mod script;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, Value};

use self::cells::RedisCells;
use self::script::Script;
use super::{NativeStore, Store};
use crate::error::{Error, Result};
use crate::redis::{RedisConfig, Servers, failure, tag_of_part};
use crate::runtime::{Runtime, SystemRuntime, timeout};

/// Redis or Valkey, 7.0 or later, as the shared store: one multiplexed connection to each server.
///
/// See [`RedisConfig`] for the URLs. As an L2 it keeps every promise, by scripts of a few lines that the server runs.
/// The user needs no more than these rights, for the prefix `fleetcache`:
///
/// ```text
/// ACL SETUSER cache on >password resetkeys ~fleetcache:* resetchannels -@all
///   +get +mget +set +unlink +getrange +setrange +pttl +pexpire +time +eval +evalsha +zadd +zrange +zrem +zcard
///   +info +select +multi +exec +xadd
/// ```
///
/// On a cluster also `+cluster|slots +asking`; for the bus on the same server see
/// [`RedisStreamsBus`](crate::RedisStreamsBus). [`Store::clear`] empties the whole database (`+flushdb`); the cache
/// never calls it.
#[derive(Clone)]
pub struct RedisStore {
    config: Arc<RedisConfig>,
    runtime: Arc<dyn Runtime>,
    servers: Arc<Servers>,
}

static COMPARE_AND_SET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("redis/compare_and_set.lua")));

impl RedisStore {
    /// The server or servers at `url`. Connects at the first call.
    pub fn new(url: &str) -> Result<Self> {
        Self::with_config(RedisConfig::new(url)?)
    }

    /// The same, with certificates or timeouts.
    pub fn with_config(config: RedisConfig) -> Result<Self> {
        let config = Arc::new(config.checked()?);
        let runtime: Arc<dyn Runtime> = Arc::new(SystemRuntime::current());
        let servers = Arc::new(Servers::new(&config, &runtime));
        Ok(Self { config, runtime, servers })
    }

    async fn one(&self, key: &str, command: &Cmd) -> Result<Value> {
        self.timed(async { self.servers.command(key, command, false).await.map_err(|error| failure(&error)) }).await
    }

    async fn timed<T>(&self, call: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let limit = self.config.patience();
        let outcome = timeout(&*self.runtime, limit, call).await;
        outcome.unwrap_or_else(|| Err(Error::timeout(format!("Redis did not answer within {limit:?}"))))
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisStore").field(&self.config).finish()
    }
}

/// The store as bytes, without the cache's protocol.
#[async_trait]
impl Store for RedisStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        bytes(self.one(key, redis::cmd("GET").arg(key)).await?)
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        self.timed(get_many(&self.servers, keys, false)).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        self.one(key, redis::cmd("SET").arg(key).arg(&value[..]).arg("PX").arg(millis(ttl))).await.map(drop)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.one(key, redis::cmd("UNLINK").arg(key)).await.map(drop)
    }

    async fn clear(&self) -> Result<()> {
        for part in 0..self.servers.parts() {
            let key = format!("{{{}}}", tag_of_part(part));
            self.one(&key, redis::cmd("FLUSHDB").arg("ASYNC")).await?;
        }
        Ok(())
    }

    async fn close(&self) {
        self.servers.close();
    }

    async fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Option<bool>> {
        let call = COMPARE_AND_SET.call(key, |command| {
            command
                .arg(u8::from(expected.is_some()))
                .arg(expected.unwrap_or_default())
                .arg(&value[..])
                .arg(millis(ttl));
        });
        let run = async { call.run(&self.servers, false).await.map_err(|error| failure(&error)) };
        let done = self.timed(run).await?;
        Ok(Some(done == Value::Int(1)))
    }

    async fn time(&self) -> Result<Option<u64>> {
        time(&self.one("", &redis::cmd("TIME")).await?).map(Some)
    }

    fn native(&self, prefix: &str, runtime: &Arc<dyn Runtime>) -> Option<NativeStore> {
        // Its own connections, on the cache's runtime.
        let servers = Servers::new(&self.config, runtime);
        Some(NativeStore(Box::new(RedisCells::new(servers, self.config.identity(), prefix))))
    }
}

async fn get_many(servers: &Servers, keys: &[String], settled_only: bool) -> Result<Vec<Option<Bytes>>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    if !servers.is_cluster() {
        let found = servers.command("", redis::cmd("MGET").arg(keys), settled_only).await;
        let found = found.map_err(|error| failure(&error))?;
        return found.into_sequence().map_err(|_| nonsense("MGET"))?.into_iter().map(bytes).collect();
    }
    let commands = keys.iter().map(|key| {
        let mut get = redis::cmd("GET");
        get.arg(key);
        (key.as_str(), get)
    });
    let answers = servers.commands(commands.collect(), settled_only).await;
    // A server that is out of reach leaves its keys missing, and not those of the others.
    let mut failed = None;
    let found: Vec<_> = answers
        .into_iter()
        .map(|answer| match answer {
            Ok(value) => bytes(value).ok().flatten(),
            Err(error) => {
                failed = Some(failure(&error));
                None
            }
        })
        .collect();
    match failed {
        Some(error) if found.iter().all(Option::is_none) => Err(error),
        _ => Ok(found),
    }
}

/// At least one: a key of no time at all is an error to the server.
fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 52)
}

fn bytes(value: Value) -> Result<Option<Bytes>> {
    match value {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        _ => Err(nonsense("GET")),
    }
}

fn time(value: &Value) -> Result<u64> {
    let [seconds, micros] = value.as_sequence().unwrap_or_default() else { return Err(nonsense("TIME")) };
    let (seconds, micros) = number(seconds).zip(number(micros)).ok_or_else(|| nonsense("TIME"))?;
    Ok(seconds.saturating_mul(1000).saturating_add(micros / 1000))
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        Value::BulkString(digits) => std::str::from_utf8(digits).ok()?.parse().ok(),
        _ => None,
    }
}

fn nonsense(what: &str) -> Error {
    Error::unavailable(format!("Redis gave an answer to {what} that makes no sense"))
}
