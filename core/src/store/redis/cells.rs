//! The protocol's steps as scripts on the server.

use std::sync::LazyLock;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, RedisError, RedisResult, Value};

use super::script::{Script, ScriptCall};
use super::{bytes, get_many, millis, nonsense, number, time};
use crate::bus::StreamAt;
use crate::doubts::Doubt;
use crate::error::Result;
use crate::l2::cells::{Acquired, Cells, Lease, Marks, Stored};
use crate::redis::{Servers, failure, tag_of_part};
use crate::watermark::MAX_WATERMARKS;
use crate::wire::key::system_key;

pub(super) struct RedisCells {
    servers: Servers,
    identity: String,
    watermarks: String,
    /// The keys that say, in each part of the slots, when the fleet was last seen alive, and in which life of the server.
    beats: Vec<String>,
}

macro_rules! script {
    ($name:ident, $file:literal) => {
        static $name: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!($file)));
    };
}
script!(ACQUIRE, "acquire.lua");
script!(FILL, "fill.lua");
script!(RENEW, "renew.lua");
script!(RELEASE, "release.lua");
script!(SET, "set.lua");
script!(INVALIDATE, "invalidate.lua");
script!(POLL, "poll.lua");

impl RedisCells {
    pub(super) fn new(servers: Servers, identity: String, prefix: &str) -> Self {
        let beat = system_key(prefix, "b");
        let beats = if servers.is_cluster() {
            (0..servers.parts()).map(|part| format!("{beat}:{{{}}}", tag_of_part(part))).collect()
        } else {
            vec![beat]
        };
        Self { servers, identity, watermarks: system_key(prefix, "w"), beats }
    }

    /// A step that must not happen in a life of the server which may have gone back in time.
    async fn in_settled_life(&self, call: &ScriptCall<'_>) -> Result<Value> {
        call.run(&self.servers, true).await.map_err(|error| failure(&error))
    }

    /// A step that is harmless at any time.
    async fn in_any_life(&self, call: &ScriptCall<'_>) -> Result<Value> {
        call.run(&self.servers, false).await.map_err(|error| failure(&error))
    }

    /// The beats' keys on servers that can be reached, and in which life each server is. One that cannot is either in
    /// the life it was in, or begins a new one when it is reached.
    async fn reached(&self) -> Vec<(&str, String)> {
        let mut reached = Vec::with_capacity(self.beats.len());
        for key in &self.beats {
            if let Ok(run_id) = self.servers.run_id(key).await {
                reached.push((key.as_str(), run_id));
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
        let answer = self.in_settled_life(&call).await?;
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
        Ok(self.in_settled_life(&call).await? == Value::Int(1))
    }

    async fn renew(&self, key: &str, lease: Lease, millis: u64) -> Result<bool> {
        let call = RENEW.call(key, |command| {
            command.arg(&lease.identity()[..]).arg(millis);
        });
        Ok(self.in_settled_life(&call).await? == Value::Int(1))
    }

    async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()> {
        let call = RELEASE.call(key, |command| {
            command.arg(&lease.identity()[..]).arg(hold);
        });
        self.in_any_life(&call).await.map(drop)
    }

    async fn set(&self, key: &str, cell: Bytes, ttl: Duration, deadline: u64) -> Result<Stored> {
        let call = SET.call(key, |command| {
            command.arg(&cell[..]).arg(millis(ttl)).arg(deadline);
        });
        let stored = self.in_settled_life(&call).await?;
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
        number(&self.in_any_life(&call).await?).ok_or_else(|| nonsense("INVALIDATE"))
    }

    async fn poll(&self, since: u64, known: u64) -> Result<Marks> {
        // Before the watermarks are made, where they are: who finds them finds the beats.
        let keys = self.reached().await;
        let beats = keys.iter().map(|(key, run_id)| {
            let mut beat = redis::cmd("EVAL");
            beat.arg(include_str!("beat.lua")).arg(1).arg(*key).arg(run_id);
            (*key, beat)
        });
        for failed in self.servers.commands(beats.collect(), true).await.into_iter().filter_map(RedisResult::err) {
            // The next one may succeed; one that is old by then makes a restart look worse than it was.
            tracing::debug!(error = %failed, "a beat did not reach its server");
        }
        let call = POLL.call(&self.watermarks, |command| {
            command.arg(since).arg(known);
        });
        marks(self.in_settled_life(&call).await?).ok_or_else(|| nonsense("POLL"))
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

    fn life(&self) -> Doubt {
        self.servers.lives.now()
    }

    fn is_settled(&self) -> bool {
        self.servers.lives.is_settled()
    }

    fn settle(&self, life: Doubt) {
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
            get.arg(*key);
            [(*key, get), (*key, redis::cmd("TIME"))]
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

fn is_wrong_type(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE")
}
