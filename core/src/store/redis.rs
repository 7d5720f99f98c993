#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, ErrorKind as RedisErrorKind, RedisError, RedisResult, ServerErrorKind, Value};

use super::{NativeStore, Store};
use crate::bus::StreamAt;
use crate::error::{Error, Result};
use crate::l2::cells::{Acquired, Cells, Lease, Life, Marks, Stored};
use crate::redis::{RedisConfig, Servers, failure, tag_of_part};
use crate::runtime::{Runtime, SystemRuntime, timeout};
use crate::watermark::MAX_WATERMARKS;
use crate::wire::key::system_key;

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
        timed(&*self.runtime, self.config.patience(), self.servers.command(key, command, false)).await
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisStore").field(&self.config).finish()
    }
}

async fn timed(
    runtime: &dyn Runtime,
    limit: Duration,
    call: impl Future<Output = RedisResult<Value>> + Send,
) -> Result<Value> {
    let outcome = timeout(runtime, limit, call).await;
    let outcome = outcome.ok_or_else(|| Error::timeout(format!("Redis did not answer within {limit:?}")))?;
    outcome.map_err(|error| failure(&error))
}

/// The store as bytes, without the cache's protocol.
#[async_trait]
impl Store for RedisStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        bytes(self.one(key, redis::cmd("GET").arg(key)).await?)
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        let found = timeout(&*self.runtime, self.config.patience(), get_many(&self.servers, keys, false)).await;
        found.ok_or_else(|| Error::timeout("Redis did not answer in time"))?
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
        let done = timed(&*self.runtime, self.config.patience(), call.run(&self.servers, false)).await?;
        Ok(Some(done == Value::Int(1)))
    }

    async fn time(&self) -> Result<Option<u64>> {
        time(&self.one("", &redis::cmd("TIME")).await?).map(Some)
    }

    fn native(&self, prefix: &str, runtime: &Arc<dyn Runtime>) -> Option<NativeStore> {
        // Its own connections, on the cache's runtime.
        Some(NativeStore(Box::new(RedisCells {
            servers: Servers::new(&self.config, runtime),
            identity: self.config.identity(),
            prefix: prefix.into(),
            watermarks: system_key(prefix, "w"),
        })))
    }
}

/// The protocol's steps as scripts on the server.
struct RedisCells {
    servers: Servers,
    identity: String,
    prefix: Box<str>,
    watermarks: String,
}

/// A script, sent by its hash, and whole where the server does not know it yet.
struct Script {
    text: &'static str,
    hash: String,
}

macro_rules! script {
    ($name:ident, $file:literal) => {
        static $name: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!($file)));
    };
}
script!(ACQUIRE, "redis/acquire.lua");
script!(FILL, "redis/fill.lua");
script!(RENEW, "redis/renew.lua");
script!(RELEASE, "redis/release.lua");
script!(SET, "redis/set.lua");
script!(INVALIDATE, "redis/invalidate.lua");
script!(POLL, "redis/poll.lua");
script!(COMPARE_AND_SET, "redis/compare_and_set.lua");

impl Script {
    fn new(text: &'static str) -> Self {
        Self { text, hash: redis::Script::new(text).get_hash().to_owned() }
    }

    fn call<'a>(&'a self, key: &'a str, arguments: impl Fn(&mut Cmd)) -> ScriptCall<'a> {
        let command = |verb: &str, script: &str| {
            let mut command = redis::cmd(verb);
            command.arg(script).arg(1).arg(key);
            arguments(&mut command);
            command
        };
        let by_hash = command("EVALSHA", &self.hash);
        ScriptCall { key, by_hash, script: self }
    }
}

struct ScriptCall<'a> {
    key: &'a str,
    by_hash: Cmd,
    script: &'a Script,
}

impl ScriptCall<'_> {
    async fn run(&self, servers: &Servers, settled_only: bool) -> RedisResult<Value> {
        match servers.command(self.key, &self.by_hash, settled_only).await {
            Err(error) if error.kind() == RedisErrorKind::Server(ServerErrorKind::NoScript) => {
                let mut whole = redis::cmd("EVAL");
                whole.arg(self.script.text);
                for argument in self.by_hash.args_iter().skip(2) {
                    if let redis::Arg::Simple(argument) = argument {
                        whole.arg(argument);
                    }
                }
                servers.command(self.key, &whole, settled_only).await
            }
            outcome => outcome,
        }
    }
}

impl RedisCells {
    /// A step that must not happen in a life of the server which may have gone back in time.
    async fn settled(&self, call: &ScriptCall<'_>) -> Result<Value> {
        call.run(&self.servers, true).await.map_err(|error| failure(&error))
    }

    /// A step that is harmless at any time.
    async fn anyhow(&self, call: &ScriptCall<'_>) -> Result<Value> {
        call.run(&self.servers, false).await.map_err(|error| failure(&error))
    }

    /// Says in each part of the slots when the fleet was last seen alive, and in which life of the server.
    fn beat_key(&self, part: usize) -> String {
        let key = system_key(&self.prefix, "b");
        if self.servers.is_cluster() { format!("{key}:{{{}}}", tag_of_part(part)) } else { key }
    }

    /// The beats' keys on servers that can be reached, and in which life each server is. One that cannot is either in
    /// the life it was in, or begins a new one when it is reached.
    async fn reached(&self) -> Vec<(String, String)> {
        let mut reached = Vec::with_capacity(self.servers.parts());
        for part in 0..self.servers.parts() {
            let key = self.beat_key(part);
            if let Ok(run_id) = self.servers.run_id(&key).await {
                reached.push((key, run_id));
            }
        }
        reached
    }
}

#[async_trait]
impl Cells for RedisCells {
    fn fenced(&self) -> bool {
        true
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        let mut get = Cmd::with_capacity(2, 3 + key.len());
        get.arg("GET").arg(key);
        match self.servers.command(key, &get, true).await {
            Ok(value) => bytes(value),
            Err(error) if is_wrong_type(&error) => Ok(Some(Bytes::from_static(b"not a string"))),
            Err(error) => Err(failure(&error)),
        }
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        get_many(&self.servers, keys, true).await
    }

    async fn acquire(&self, key: &str, token: u64, lease: u64, seen: u64, over_hold: bool) -> Result<Acquired> {
        let call = ACQUIRE.call(key, |command| {
            command.arg(&token.to_le_bytes()).arg(lease).arg(&seen.to_le_bytes()).arg(u8::from(over_hold));
        });
        let answer = self.settled(&call).await?;
        let (code, what) = match answer {
            Value::Array(answer) => match <[Value; 2]>::try_from(answer) {
                Ok([Value::Int(code), what]) => (code, what),
                _ => return Err(nonsense("ACQUIRE")),
            },
            _ => return Err(nonsense("ACQUIRE")),
        };
        match (code, what) {
            (0, Value::BulkString(id)) => {
                let over = <[u8; 8]>::try_from(&id[..]).map_err(|_| nonsense("ACQUIRE"))?;
                Ok(Acquired::Won(Lease { token, over: u64::from_le_bytes(over) }))
            }
            (1, Value::BulkString(cell)) => Ok(Acquired::Hit(cell.into())),
            (2, Value::Int(left)) => Ok(Acquired::Wait(left.unsigned_abs())),
            (3, Value::Int(left)) => Ok(Acquired::Held(left.unsigned_abs())),
            _ => Err(nonsense("ACQUIRE")),
        }
    }

    async fn fill(&self, key: &str, lease: Lease, cell: Bytes, ttl: Duration) -> Result<bool> {
        let call = FILL.call(key, |command| {
            command.arg(&lease.identity()[..]).arg(&cell[..]).arg(millis(ttl));
        });
        Ok(self.settled(&call).await? == Value::Int(1))
    }

    async fn renew(&self, key: &str, lease: Lease, millis: u64) -> Result<bool> {
        let call = RENEW.call(key, |command| {
            command.arg(&lease.identity()[..]).arg(millis);
        });
        Ok(self.settled(&call).await? == Value::Int(1))
    }

    async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()> {
        let call = RELEASE.call(key, |command| {
            command.arg(&lease.identity()[..]).arg(hold);
        });
        self.anyhow(&call).await.map(drop)
    }

    async fn set(&self, key: &str, cell: Bytes, ttl: Duration, deadline: u64) -> Result<Stored> {
        let call = SET.call(key, |command| {
            command.arg(&cell[..]).arg(millis(ttl)).arg(deadline);
        });
        let stored = self.settled(&call).await?;
        Ok(if stored == Value::Int(1) { Stored::Yes } else { Stored::TooLate })
    }

    async fn remove(&self, keys: &[String]) -> Result<()> {
        if let ([_, _, ..], false) = (keys, self.servers.is_cluster()) {
            let removed = self.servers.command("", redis::cmd("UNLINK").arg(keys), false).await;
            return removed.map(drop).map_err(|error| failure(&error));
        }
        let commands = keys.iter().map(|key| {
            let mut unlink = redis::cmd("UNLINK");
            unlink.arg(key);
            (key.as_str(), unlink)
        });
        for removed in self.servers.commands(commands.collect(), false).await {
            removed.map_err(|error| failure(&error))?;
        }
        Ok(())
    }

    async fn invalidate(&self, members: &[String], known: u64) -> Result<u64> {
        let call = INVALIDATE.call(&self.watermarks, |command| {
            command.arg(known).arg(MAX_WATERMARKS).arg(members);
        });
        number(&self.anyhow(&call).await?).ok_or_else(|| nonsense("INVALIDATE"))
    }

    async fn poll(&self, since: u64, known: u64) -> Result<Marks> {
        // Before the watermarks are made, where they are: who finds them finds the beats.
        let keys = self.reached().await;
        let beats = keys.iter().map(|(key, run_id)| {
            let mut beat = redis::cmd("EVAL");
            beat.arg(include_str!("redis/beat.lua")).arg(1).arg(key).arg(run_id);
            (key.as_str(), beat)
        });
        for failed in self.servers.commands(beats.collect(), true).await.into_iter().filter_map(RedisResult::err) {
            // The next one may succeed; one that is old by then makes a restart look worse than it was.
            tracing::debug!(error = %failed, "a beat did not reach its server");
        }
        let call = POLL.call(&self.watermarks, |command| {
            command.arg(since).arg(known);
        });
        marks(self.settled(&call).await?).ok_or_else(|| nonsense("POLL"))
    }

    async fn restore(&self, members: &[(String, u64)]) -> Result<()> {
        let mut add = redis::cmd("ZADD");
        add.arg(&self.watermarks).arg("GT");
        members.iter().for_each(|(member, number)| {
            add.arg(*number).arg(member);
        });
        self.servers.command(&self.watermarks, &add, true).await.map(drop).map_err(|error| failure(&error))
    }

    fn parts(&self) -> usize {
        self.servers.parts()
    }

    fn part(&self, key: &str) -> usize {
        self.servers.part(key)
    }

    fn may_go_back(&self) -> bool {
        true
    }

    fn life(&self) -> Life {
        self.servers.lives.now()
    }

    fn is_settled(&self) -> bool {
        self.servers.lives.is_settled()
    }

    fn settle(&self, life: Life) {
        self.servers.lives.settle(life);
    }

    async fn lost(&self) -> Result<Option<Duration>> {
        let there = self.servers.command(&self.watermarks, redis::cmd("ZCARD").arg(&self.watermarks), false).await;
        if !matches!(there, Ok(Value::Int(1..))) {
            // No watermarks, and the poll that makes them declares everything dead that is older. Or no server, and the
            // poll fails.
            return Ok(Some(Duration::ZERO));
        }
        let keys = self.reached().await;
        let questions = keys.iter().flat_map(|(key, _)| {
            let mut get = redis::cmd("GET");
            get.arg(key);
            [(key.as_str(), get), (key.as_str(), redis::cmd("TIME"))]
        });
        let answers = self.servers.commands(questions.collect(), false).await;
        let answers = answers.into_iter().collect::<RedisResult<Vec<_>>>().map_err(|error| failure(&error))?;
        let mut longest = Some(Duration::ZERO);
        for ((_, run_id), answers) in keys.iter().zip(answers.chunks_exact(2)) {
            let [found, now] = answers else { break };
            let (found, now) = (bytes(found.clone())?, time(now)?);
            let found = found.as_deref().and_then(|found| std::str::from_utf8(found).ok());
            let silence = match found.and_then(|found| found.split_once(' ')) {
                // The same life: nothing was lost, however long ago that is.
                Some((_, life)) if life == run_id => Some(Duration::ZERO),
                Some((at, _)) => at.parse().ok().map(|at| Duration::from_millis(now.saturating_sub(at))),
                None => None,
            };
            longest = longest.zip(silence).map(|(longest, silence)| longest.max(silence));
        }
        Ok(longest)
    }

    fn carries(&self, stream: &StreamAt) -> bool {
        !self.servers.is_cluster() && stream.server == self.identity
    }

    async fn remove_and_append(&self, keys: &[String], stream: &StreamAt, message: Bytes) -> Result<()> {
        let mut both = redis::pipe();
        both.atomic();
        if !keys.is_empty() {
            both.cmd("UNLINK").arg(keys);
        }
        both.add_command(stream.append(&message));
        self.servers.transaction(&stream.key, &both).await.map_err(|error| failure(&error))
    }

    async fn close(&self) {
        self.servers.close();
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

fn marks(answer: Value) -> Option<Marks> {
    let [now, top, members] = <[Value; 3]>::try_from(answer.into_sequence().ok()?).ok()?;
    let members = members.into_sequence().ok()?;
    let members = members.chunks_exact(2).map(|pair| match pair {
        // What is not text is nobody's tag.
        [Value::BulkString(member), score] => Some((String::from_utf8_lossy(member).into_owned(), number(score)?)),
        _ => None,
    });
    Some(Marks { now: number(&now)?, top: number(&top)?, members: members.collect::<Option<_>>()? })
}

fn nonsense(what: &str) -> Error {
    Error::unavailable(format!("Redis gave an answer to {what} that makes no sense"))
}

fn is_wrong_type(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE")
}
