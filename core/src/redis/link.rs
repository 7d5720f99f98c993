//! One server's multiplexed connection, replaced when it dies, and the server's life: whether it may have lost writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, Pipeline, RedisError, RedisResult, ServerErrorKind, Value};

use super::config::{Host, Mode, RedisConfig};
use crate::doubts::Doubts;
use crate::runtime::{Runtime, SharedRun, timeout};
use crate::sync::RwLock;

/// Tells one life of a server from another: the process, and the history of its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) run_id: String,
    history: String,
}

/// A connection, and who is at its other end.
#[derive(Clone)]
pub(crate) struct Connected {
    pub(crate) connection: MultiplexedConnection,
    pub(crate) identity: Identity,
}

pub(super) struct Link {
    config: Arc<RedisConfig>,
    runtime: Arc<dyn Runtime>,
    /// The server; with Sentinels, whoever they say it is.
    host: Option<Host>,
    /// Raised where a life of the server begins: it may have gone back in time. One that restarted from an old snapshot,
    /// or took over from a primary whose last writes it never got, brings removed values back. So nothing is read or
    /// filled in a new life until the engine has dealt with that and settled it.
    lives: Arc<Doubts>,
    connecting: SharedRun<RedisResult<Arc<Live>>>,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    live: Option<Arc<Live>>,
    identity: Option<Identity>,
    closed: bool,
}

struct Live {
    connected: Connected,
    /// Since when, in the node's milliseconds, a request waits without any reply having come; 0 for not.
    unanswered_since: AtomicU64,
}

impl Link {
    pub(super) fn new(
        config: Arc<RedisConfig>,
        runtime: Arc<dyn Runtime>,
        host: Option<Host>,
        lives: Arc<Doubts>,
    ) -> Arc<Self> {
        Arc::new(Self { config, runtime, host, lives, connecting: SharedRun::default(), state: RwLock::default() })
    }

    /// Sends one command. `settled_only`: not in a life that the engine has not settled.
    pub(super) async fn command(self: &Arc<Self>, command: &Cmd, settled_only: bool) -> RedisResult<Value> {
        let live = match self.there() {
            Some(live) => live,
            None => Box::pin(self.live()).await?,
        };
        self.admit(settled_only)?;
        let watch = Watch::new(self, &live);
        // A clone is a handle on the same connection.
        let outcome = live.connected.connection.clone().send_packed_command(command).await;
        watch.end(outcome.and_then(Value::extract_error))
    }

    /// Sends a pipeline; its replies one by one, errors among them. A transaction that failed is an error as a whole.
    pub(super) async fn pipeline(self: &Arc<Self>, pipeline: &Pipeline, settled_only: bool) -> RedisResult<Vec<Value>> {
        let live = self.live().await?;
        self.admit(settled_only)?;
        let watch = Watch::new(self, &live);
        let mut connection = live.connected.connection.clone();
        let count = pipeline.len();
        let outcome = if pipeline.is_transaction() {
            connection.send_packed_commands(pipeline, count + 1, 1).await
        } else {
            connection.send_packed_commands(pipeline, 0, count).await
        };
        watch.end(outcome)
    }

    fn admit(&self, settled_only: bool) -> RedisResult<()> {
        if settled_only && !self.lives.is_settled() {
            return Err((ErrorKind::Client, "the server restarted or another took over", "not asked yet".into()).into());
        }
        Ok(())
    }

    /// Who is at the other end.
    pub(super) async fn identity(self: &Arc<Self>) -> RedisResult<Identity> {
        Ok(self.live().await?.connected.identity.clone())
    }

    fn there(&self) -> Option<Arc<Live>> {
        self.state.read().live.clone()
    }

    async fn live(self: &Arc<Self>) -> RedisResult<Arc<Live>> {
        if let Some(live) = self.there() {
            return Ok(live);
        }
        if self.state.read().closed {
            return Err((ErrorKind::Client, "the connection was closed").into());
        }
        let link = Arc::clone(self);
        let live = self.connecting.join(&*self.runtime, || async move { link.renew().await }).await;
        live.map_err(|error| RedisError::from((ErrorKind::Client, "cannot connect", error.to_string())))?
    }

    /// A new shared connection, unless somebody made one meanwhile.
    async fn renew(&self) -> RedisResult<Arc<Live>> {
        if let Some(live) = self.there() {
            return Ok(live);
        }
        let connected = self.connect().await?;
        let mut state = self.state.write();
        if state.identity.as_ref() != Some(&connected.identity) {
            state.identity = Some(connected.identity.clone());
            // Invariant: counted before the connection is there to be used, so that no command reaches a new life
            // unnoticed.
            self.lives.raise();
        }
        let live = Arc::new(Live { connected, unanswered_since: AtomicU64::new(0) });
        if !state.closed {
            state.live = Some(Arc::clone(&live));
        }
        Ok(live)
    }

    /// A connection of one's own, apart from the shared one.
    pub(super) async fn connect(&self) -> RedisResult<Connected> {
        let host = match (&self.host, &self.config.mode) {
            (Some(host), _) => host.clone(),
            (None, Mode::Sentinel { master }) => self.ask_sentinels(master).await?,
            (None, _) => self.config.hosts[0].clone(),
        };
        let limit = self.config.connect_timeout;
        let connected = timeout(&*self.runtime, limit, async {
            let mut connection = open(&self.config.client(&host)?).await?;
            let identity = self.identify(&mut connection).await?;
            Ok(Connected { connection, identity })
        });
        let outcome = connected.await.unwrap_or_else(|| Err(too_slow("connecting", &host)));
        let outcome = outcome.map_err(|error| match error.kind() {
            // Whatever a server refuses at the door, it cannot be used.
            ErrorKind::Server(_) | ErrorKind::Extension => {
                (ErrorKind::AuthenticationFailed, "the server refused the connection", error.to_string()).into()
            }
            _ => error,
        });
        if let Err(error) = &outcome {
            tracing::debug!(%host, %error, "cannot connect to Redis");
        }
        outcome
    }

    /// Refuses a replica, which may be behind, and a release that is too old.
    async fn identify(&self, connection: &mut MultiplexedConnection) -> RedisResult<Identity> {
        let mut info = redis::pipe();
        info.cmd("INFO").arg("server").cmd("INFO").arg("replication");
        let (server, replication): (String, String) = info.query_async(connection).await?;
        let field = |name: &str| {
            let mut lines = server.lines().chain(replication.lines());
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned)).unwrap_or_default()
        };
        let version = field("redis_version");
        let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        if major.is_none_or(|major| major < 7) {
            return Err(
                (ErrorKind::Client, "the server is too old", format!("{version}: 7.0 or later is needed")).into()
            );
        }
        if field("role") != "master" {
            return Err(
                (ErrorKind::Client, "the server is a replica", "values are read from primaries only".into()).into()
            );
        }
        Ok(Identity { run_id: field("run_id"), history: field("master_replid") })
    }

    async fn ask_sentinels(&self, master: &str) -> RedisResult<Host> {
        let mut failure =
            (ErrorKind::MasterNameNotFoundBySentinel, "no Sentinel knows the master", master.to_owned()).into();
        for sentinel in &self.config.hosts {
            // Half of the time for a Sentinel that does not answer, so that there is some left for the next.
            let asked = timeout(&*self.runtime, self.config.connect_timeout / 2, async {
                let mut connection = open(&self.config.sentinel_client(sentinel)?).await?;
                let mut ask = redis::cmd("SENTINEL");
                ask.arg("get-master-addr-by-name").arg(master);
                let found: Option<(String, u16)> = ask.query_async(&mut connection).await?;
                Ok(found)
            });
            match asked.await.unwrap_or_else(|| Err(too_slow("asking", sentinel))) {
                Ok(Some((name, port))) => return Ok(Host { name, port }),
                Ok(None) => {}
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Lets go of `dead`, unless it was replaced already.
    fn replace(&self, dead: &Arc<Live>) {
        let mut state = self.state.write();
        if state.live.as_ref().is_some_and(|live| Arc::ptr_eq(live, dead)) {
            state.live = None;
        }
    }

    pub(super) fn close(&self) {
        let mut state = self.state.write();
        state.closed = true;
        state.live = None;
    }
}

async fn open(client: &redis::Client) -> RedisResult<MultiplexedConnection> {
    // No deadlines of the client's: each call brings its own, and a timer for each command costs.
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(None)
        .set_response_timeout(None)
        .set_pipeline_buffer_size(1024);
    client.get_multiplexed_async_connection_with_config(&config).await
}

fn too_slow(what: &'static str, host: &Host) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, format!("{what} {host} took too long")).into()
}

/// Sees to it that a connection on which nothing is answered any more is replaced: an error says so itself, but a
/// server that is cut off says nothing. Costs two loads and at most two stores a command.
struct Watch<'a> {
    link: &'a Link,
    live: &'a Arc<Live>,
    answered: bool,
}

impl<'a> Watch<'a> {
    fn new(link: &'a Link, live: &'a Arc<Live>) -> Self {
        // Relaxed: it is a time that is compared with others a second apart.
        if live.unanswered_since.load(Ordering::Relaxed) == 0 {
            live.unanswered_since.store(link.runtime.now_ms().max(1), Ordering::Relaxed);
        }
        Self { link, live, answered: false }
    }

    fn end<T>(mut self, outcome: RedisResult<T>) -> RedisResult<T> {
        self.answered = true;
        match &outcome {
            Err(error) if is_fatal(error) => self.link.replace(self.live),
            _ => self.live.unanswered_since.store(0, Ordering::Relaxed),
        }
        outcome
    }
}

impl Drop for Watch<'_> {
    /// Dropped unanswered where its caller gave up.
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let since = self.live.unanswered_since.load(Ordering::Relaxed);
        let patience = self.link.config.response_timeout.as_millis() as u64;
        if since != 0 && self.link.runtime.now_ms().saturating_sub(since) >= patience {
            self.link.replace(self.live);
        }
    }
}

/// Whether the connection is of no use any more; also where the server has become a replica.
fn is_fatal(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown))
}
