use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::{Cmd, ErrorKind as RedisErrorKind, RedisError, RedisResult, Value};

use super::{Bus, Delivery, StreamAt, Subscription};
use crate::error::Result;
use crate::redis::{Connected, Identity, RedisConfig, Servers, failure};
use crate::runtime::{Runtime, SystemRuntime, jittered, timeout};
use crate::wire::key::system_key;

/// Invalidations through a Redis stream, `{prefix}:!s`: what is missed during a short outage is read afterwards.
///
/// Each node reads the whole stream on a connection of its own, from its own position; nothing of a node stays on the
/// server when it dies. On the Redis that is also the L2 (not on a cluster), a value is removed and its message appended
/// in one atomic step.
///
/// The user needs these rights, beside those of [`RedisStore`](crate::RedisStore):
///
/// ```text
/// ACL SETUSER cache +xadd +xread +xrange +xinfo|stream
/// ```
#[derive(Clone)]
pub struct RedisStreamsBus {
    config: Arc<RedisConfig>,
    length: usize,
    opened: OnceLock<Opened>,
}

#[derive(Clone)]
struct Opened {
    runtime: Arc<dyn Runtime>,
    servers: Arc<Servers>,
    stream: StreamAt,
}

/// How long the server waits for a message before it says that there is none: what shows a dead connection.
const BLOCK: Duration = Duration::from_secs(1);
/// Messages read at once.
const COUNT: usize = 128;
/// The pause before a lost connection is tried again, doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

impl RedisStreamsBus {
    /// The server or servers at `url`; see [`RedisConfig`].
    pub fn new(url: &str) -> Result<Self> {
        Self::with_config(RedisConfig::new(url)?)
    }

    /// The same, with certificates or timeouts.
    pub fn with_config(config: RedisConfig) -> Result<Self> {
        Ok(Self { config: Arc::new(config.checked()?), length: 10_000, opened: OnceLock::new() })
    }

    /// How many messages the stream keeps, roughly: a node that misses more in an outage distrusts all it has in
    /// memory. A message carries up to thousands of invalidations. Default: 10,000.
    #[must_use]
    pub fn max_length(mut self, messages: usize) -> Self {
        self.length = messages.max(1);
        self
    }

    fn opened(&self) -> &Opened {
        // A bus that is used on its own has the prefix that caches have by default.
        self.opened
            .get_or_init(|| self.open_as("fleetcache", &(Arc::new(SystemRuntime::current()) as Arc<dyn Runtime>)))
    }

    fn open_as(&self, prefix: &str, runtime: &Arc<dyn Runtime>) -> Opened {
        Opened {
            runtime: Arc::clone(runtime),
            servers: Arc::new(Servers::new(&self.config, runtime)),
            stream: StreamAt { server: self.config.identity(), key: system_key(prefix, "s"), length: self.length },
        }
    }
}

impl fmt::Debug for RedisStreamsBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStreamsBus")
            .field("config", &self.config)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl StreamAt {
    /// The command that appends a message.
    pub(crate) fn append(&self, message: &Bytes) -> Cmd {
        let mut append = Cmd::with_capacity(8, 80 + message.len());
        append.arg("XADD").arg(&self.key).arg("MAXLEN").arg("~").arg(self.length).arg("*").arg("m").arg(&message[..]);
        append
    }
}

#[async_trait]
impl Bus for RedisStreamsBus {
    fn open(&self, prefix: &str, runtime: &Arc<dyn Runtime>) {
        let _ = self.opened.set(self.open_as(prefix, runtime));
    }

    async fn publish(&self, message: Bytes) -> Result<()> {
        let Opened { servers, stream, .. } = self.opened();
        servers.command(&stream.key, &stream.append(&message), false).await.map(drop).map_err(|error| failure(&error))
    }

    async fn subscribe(&self) -> Result<Box<dyn Subscription>> {
        let mut reader = Reader {
            opened: self.opened().clone(),
            config: Arc::clone(&self.config),
            connected: None,
            last: None,
            identity: None,
            caught_up: false,
            waiting: Vec::new().into_iter(),
            retry: FIRST_RETRY,
        };
        reader.resume().await.map_err(|error| failure(&error))?;
        Ok(Box::new(reader))
    }

    async fn close(&self) {
        if let Some(opened) = self.opened.get() {
            opened.servers.close();
        }
    }

    fn stream(&self) -> Option<StreamAt> {
        Some(self.opened().stream.clone())
    }
}

/// An entry's place in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id(u64, u64);

impl Id {
    fn parse(text: &[u8]) -> Option<Self> {
        let (millis, number) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(Self(millis.parse().ok()?, number.parse().ok()?))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

struct Reader {
    opened: Opened,
    config: Arc<RedisConfig>,
    connected: Option<Connected>,
    /// The last entry taken from the stream; `None` before the first connection.
    last: Option<Id>,
    identity: Option<Identity>,
    /// Everything the stream had was read, so the next entry that is appended is the next to be read: it cannot be
    /// trimmed before.
    caught_up: bool,
    waiting: std::vec::IntoIter<(Id, Option<Bytes>)>,
    retry: Duration,
}

#[async_trait]
impl Subscription for Reader {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            if let Some((id, message)) = self.waiting.next() {
                self.last = Some(id);
                // An entry that is none of ours may stand for one that was.
                return Ok(message.map_or(Delivery::Gap, Delivery::Message));
            }
            if self.connected.is_none() {
                match self.resume().await {
                    Ok(false) => {}
                    Ok(true) => return Ok(Delivery::Gap),
                    Err(error) => {
                        tracing::debug!(%error, "the stream is out of reach");
                        let runtime = &self.opened.runtime;
                        runtime.sleep(jittered(self.retry, &**runtime)).await;
                        self.retry = (self.retry * 2).min(LONGEST_RETRY);
                        continue;
                    }
                }
            }
            match self.read().await {
                Ok(true) => {}
                Ok(false) => return Ok(Delivery::Gap),
                Err(error) => {
                    tracing::info!(%error, "the stream's connection is lost; going on where it stopped");
                    self.opened.servers.note(&error);
                    self.connected = None;
                    return Ok(Delivery::Interrupted);
                }
            }
        }
    }
}

impl Reader {
    async fn ask(&mut self, command: &Cmd, limit: Duration) -> RedisResult<Value> {
        let Some(connected) = &mut self.connected else {
            return Err((RedisErrorKind::Client, "not connected").into());
        };
        let asked = connected.connection.send_packed_command(command);
        let answer = timeout(&*self.opened.runtime, limit, asked).await;
        answer.unwrap_or_else(|| Err((RedisErrorKind::Client, "no answer in time").into()))?.extract_error()
    }

    /// Connects and finds its place again. Says whether something may have been missed.
    async fn resume(&mut self) -> RedisResult<bool> {
        let connected = self.opened.servers.connect(&self.opened.stream.key).await?;
        let identity = connected.identity.clone();
        self.connected = Some(connected);
        let found = self.find_place(&identity).await;
        if found.is_err() {
            self.connected = None;
        } else {
            self.retry = FIRST_RETRY;
            self.identity = Some(identity);
            self.caught_up = false;
        }
        found
    }

    async fn find_place(&mut self, identity: &Identity) -> RedisResult<bool> {
        let newest = self.newest().await?;
        let Some(last) = self.last else {
            self.last = Some(newest.unwrap_or(Id(0, 0)));
            return Ok(false);
        };
        // Another life of the server, or a stream that is gone or behind us: its ids may repeat, so it is read from what
        // it has now.
        let reborn = self.identity.as_ref() != Some(identity);
        if reborn || newest.is_none_or(|newest| newest < last) {
            self.last = Some(newest.unwrap_or(Id(0, 0)));
            return Ok(true);
        }
        Ok(false)
    }

    /// The id of the newest entry there ever was, or `None` where there is no stream.
    async fn newest(&mut self) -> RedisResult<Option<Id>> {
        let limit = self.config.patience();
        let mut info = redis::cmd("XINFO");
        info.arg("STREAM").arg(&self.opened.stream.key);
        let answer = match self.ask(&info, limit).await {
            Ok(answer) => answer,
            Err(error) if error.detail().is_some_and(|detail| detail.contains("no such key")) => return Ok(None),
            Err(error) => return Err(error),
        };
        let fields = answer.into_sequence().unwrap_or_default();
        let newest = fields.chunks_exact(2).find_map(|field| match field {
            [Value::BulkString(name), Value::BulkString(id)] if name == b"last-generated-id" => Id::parse(id),
            _ => None,
        });
        newest.map(Some).ok_or_else(|| nonsense("XINFO STREAM"))
    }

    /// Reads what there is, or waits for it. False where entries were trimmed before they were read.
    async fn read(&mut self) -> RedisResult<bool> {
        let last = self.last.unwrap_or(Id(0, 0));
        let (key, patience) = (self.opened.stream.key.clone(), self.config.patience());
        if !self.caught_up && last != Id(0, 0) {
            // Behind: what comes after our last entry may be trimmed away, and if it was, so was our last entry.
            // Asked afterwards: if it is there then, it was there when the others were read.
            let mut ours = redis::cmd("XRANGE");
            ours.arg(&key).arg(last.to_string()).arg(last.to_string()).arg("COUNT").arg(1);
            let entries = entries(self.ask(&read_command(&key, last, None), patience).await?)?;
            let ours = self.ask(&ours, patience).await?;
            self.caught_up = entries.len() < COUNT;
            let trimmed = ours.as_sequence().is_none_or(<[Value]>::is_empty) && !entries.is_empty();
            self.waiting = entries.into_iter();
            return Ok(!trimmed);
        }
        let answer = self.ask(&read_command(&key, last, Some(BLOCK)), BLOCK + patience).await?;
        let entries = entries(answer)?;
        if entries.is_empty() {
            // Nothing for a while. A stream that was deleted, or that a clock set back writes behind us, is silent too.
            let newest = self.newest().await?;
            if last != Id(0, 0) && newest.is_none_or(|newest| newest < last) {
                self.last = Some(Id(0, 0));
                self.caught_up = false;
                return Ok(false);
            }
        }
        self.caught_up = entries.len() < COUNT;
        self.waiting = entries.into_iter();
        Ok(true)
    }
}

fn read_command(key: &str, last: Id, block: Option<Duration>) -> Cmd {
    let mut read = redis::cmd("XREAD");
    read.arg("COUNT").arg(COUNT);
    if let Some(block) = block {
        read.arg("BLOCK").arg(block.as_millis() as u64);
    }
    read.arg("STREAMS").arg(key).arg(last.to_string());
    read
}

/// The entries of the one stream in an answer to XREAD; of each the message, if it is an entry of ours.
fn entries(answer: Value) -> RedisResult<Vec<(Id, Option<Bytes>)>> {
    let mut streams = match answer {
        Value::Nil => return Ok(Vec::new()),
        Value::Array(streams) => streams,
        _ => return Err(nonsense("XREAD")),
    };
    let stream = streams.pop().and_then(|stream| stream.into_sequence().ok()).and_then(|mut stream| stream.pop());
    let entries = stream.and_then(|entries| entries.into_sequence().ok()).ok_or_else(|| nonsense("XREAD"))?;
    let entry = |entry: Value| {
        let [id, fields] = <[Value; 2]>::try_from(entry.into_sequence().ok()?).ok()?;
        let Value::BulkString(id) = id else { return None };
        let message = fields.into_sequence().ok().and_then(|fields| match <[Value; 2]>::try_from(fields).ok()? {
            [Value::BulkString(name), Value::BulkString(message)] if name == b"m" => Some(message.into()),
            _ => None,
        });
        Some((Id::parse(&id)?, message))
    };
    entries.into_iter().map(entry).collect::<Option<_>>().ok_or_else(|| nonsense("XREAD"))
}

fn nonsense(what: &'static str) -> RedisError {
    (RedisErrorKind::Client, "an answer that makes no sense", what.to_owned()).into()
}
