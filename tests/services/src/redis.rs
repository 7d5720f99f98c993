use std::process::Command;

use tempfile::TempDir;

use crate::{Failure, Process, free_port, until};

const PACKAGE: &str = "redis-server";

/// One Redis. `FLEETCACHE_REDIS_SERVER` names another program to run, such as `valkey-server`.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    port: u16,
    tls_port: Option<u16>,
    folder: TempDir,
}

impl Redis {
    /// Without persistence.
    pub fn start() -> Result<Self, Failure> {
        Self::start_with(&[])
    }

    /// With more settings, as on its command line.
    pub fn start_with(settings: &[&str]) -> Result<Self, Failure> {
        let mut failure: Failure = "a free port could not be had".into();
        for _ in 0..5 {
            // Somebody else may take the port before the server does.
            match Self::start_on(free_port()?, settings) {
                Ok(redis) => return Ok(redis),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// With TLS on [`Self::tls_port`], asking clients for a certificate; without TLS on [`Self::port`].
    pub fn start_with_tls(certificates: &crate::Certificates) -> Result<Self, Failure> {
        let port = free_port()?;
        let (tls_port, path) = (port.to_string(), |name: &str| certificates.path(name));
        let mut redis = Self::start_with(&[
            "--tls-port",
            &tls_port,
            "--tls-cert-file",
            &path("server.pem"),
            "--tls-key-file",
            &path("server.key"),
            "--tls-ca-cert-file",
            &path("ca.pem"),
            "--tls-auth-clients",
            "yes",
        ])?;
        redis.tls_port = Some(port);
        Ok(redis)
    }

    fn start_on(port: u16, settings: &[&str]) -> Result<Self, Failure> {
        let folder = TempDir::with_prefix("fleetcache-redis-")?;
        let mut arguments: Vec<String> = ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]
            .into_iter()
            .chain(["--appendonly", "no", "--daemonize", "no", "--repl-diskless-sync-delay", "0"])
            .chain(["--dir", &folder.path().to_string_lossy()])
            .map(str::to_owned)
            .collect();
        arguments.extend(settings.iter().map(ToString::to_string));
        let program = std::env::var("FLEETCACHE_REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
        let process = Process::start(&program, arguments, PACKAGE, folder.path().join("log"))?;
        let redis = Self { process, port, tls_port: None, folder };
        redis.wait()?;
        Ok(redis)
    }

    fn wait(&self) -> Result<(), Failure> {
        let mut ended = None;
        until("Redis answers", || {
            ended = self.process.ended();
            ended.is_some()
                || redis_cli(self.port, &["PING"])
                    .is_ok_and(|answer| answer.contains("PONG") || answer.contains("NOAUTH"))
        })?;
        ended.map_or(Ok(()), |printed| Err(format!("Redis did not start: {printed}").into()))
    }

    /// The port for connections without TLS.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port for connections with TLS.
    pub fn tls_port(&self) -> Option<u16> {
        self.tls_port
    }

    /// Where its data would be.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// `redis://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// What the server answers to a command.
    pub fn command(&self, command: &[&str]) -> Result<String, Failure> {
        redis_cli(self.port, command)
    }

    /// `kill -9`: what it held is gone, unless a setting keeps it.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Starts it again on the same port.
    pub fn restart(&self) -> Result<(), Failure> {
        self.process.restart()?;
        self.wait()
    }

    /// `kill -STOP`.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// `kill -CONT`.
    pub fn resume(&self) {
        self.process.resume();
    }
}

/// A cluster of primaries, each with so many replicas.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
}

impl RedisCluster {
    /// Three primaries, then their replicas.
    pub fn start(replicas: usize) -> Result<Self, Failure> {
        let mut nodes = Vec::new();
        for _ in 0..3 * (1 + replicas) {
            let bus_port = free_port()?.to_string();
            let settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", &bus_port];
            let keep_on = ["--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"];
            nodes.push(Redis::start_with(&[&settings[..], &keep_on].concat())?);
        }
        let mut create = Command::new("redis-cli");
        create.args(["--cluster", "create"]).args(nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)));
        create.args(["--cluster-replicas", &replicas.to_string(), "--cluster-yes"]);
        let created = create.output()?;
        if !created.status.success() {
            return Err(format!("no cluster: {}", String::from_utf8_lossy(&created.stdout)).into());
        }
        let cluster = Self { nodes };
        until("every node knows the cluster", || {
            cluster.nodes.iter().all(|node| {
                let sound = node.command(&["CLUSTER", "INFO"]).is_ok_and(|info| info.contains("cluster_state:ok"));
                let linked = node
                    .command(&["INFO", "replication"])
                    .is_ok_and(|info| info.contains("role:master") || info.contains("master_link_status:up"));
                sound && linked
            })
        })?;
        Ok(cluster)
    }

    /// `redis+cluster://` and the first nodes.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().take(3).map(|node| format!("127.0.0.1:{}", node.port)).collect();
        format!("redis+cluster://{}", hosts.join(","))
    }

    /// The nodes: at first the primaries are in front.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// The node that holds the slot of `key`.
    pub fn holder(&self, key: &str) -> Result<&Redis, Failure> {
        let from = self.nodes.iter().find(|node| node.process.id().is_some()).ok_or("no node runs")?;
        let slot: u16 = from.command(&["CLUSTER", "KEYSLOT", key])?.trim().parse()?;
        let map = from.command(&["CLUSTER", "NODES"])?;
        let holds = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse().is_ok_and(|first: u16| first <= slot) && last.parse().is_ok_and(|last: u16| slot <= last)
        };
        let line = map.lines().find(|line| line.contains("master") && line.split(' ').skip(8).any(holds));
        let port = line.and_then(|line| line.split(' ').nth(1)?.split('@').next()?.rsplit(':').next());
        let port: u16 = port.ok_or("no node holds the slot")?.parse()?;
        self.nodes.iter().find(|node| node.port == port).ok_or_else(|| "a node that is none of ours".into())
    }
}

/// A primary, a replica, and three Sentinels that know the primary as `main`.
#[derive(Debug)]
pub struct RedisSentinel {
    primary: Redis,
    replica: Redis,
    sentinels: Vec<(Process, u16, TempDir)>,
}

impl RedisSentinel {
    /// All of them, agreed on who is the primary.
    pub fn start() -> Result<Self, Failure> {
        let primary = Redis::start()?;
        let replica = Redis::start_with(&["--replicaof", &format!("127.0.0.1 {}", primary.port)])?;
        until("the replica follows", || {
            replica.command(&["INFO", "replication"]).is_ok_and(|info| info.contains("master_link_status:up"))
        })?;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            let (port, folder) = (free_port()?, TempDir::with_prefix("fleetcache-sentinel-")?);
            let path = folder.path().join("sentinel.conf");
            let watched = primary.port;
            std::fs::write(
                &path,
                format!(
                    "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor main 127.0.0.1 {watched} 2\n\
                     sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 3000\n",
                    folder.path().display()
                ),
            )?;
            let (path, log) = (path.to_string_lossy().into_owned(), folder.path().join("log"));
            sentinels.push((Process::start("redis-sentinel", vec![path], "redis-sentinel", log)?, port, folder));
        }
        let fleet = Self { primary, replica, sentinels };
        until("the Sentinels know each other and the replica", || {
            fleet.sentinels.iter().all(|(_, port, _)| {
                let quorum =
                    redis_cli(*port, &["SENTINEL", "CKQUORUM", "main"]).is_ok_and(|answer| answer.starts_with("OK 3"));
                let replicas = redis_cli(*port, &["SENTINEL", "REPLICAS", "main"]);
                quorum && replicas.is_ok_and(|replicas| replicas.contains("127.0.0.1"))
            })
        })?;
        Ok(fleet)
    }

    /// `redis+sentinel://` and the Sentinels.
    pub fn url(&self) -> String {
        let hosts: Vec<_> = self.sentinels.iter().map(|(_, port, _)| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://{}/main", hosts.join(","))
    }

    /// Who was the primary at first.
    pub fn primary(&self) -> &Redis {
        &self.primary
    }

    /// Who was its replica at first.
    pub fn replica(&self) -> &Redis {
        &self.replica
    }
}

/// What a Redis on `port` answers to a command.
pub fn redis_cli(port: u16, command: &[&str]) -> Result<String, Failure> {
    // A server that is paused would keep it waiting.
    let output = Command::new("timeout").args(["5", "redis-cli", "-p", &port.to_string()]).args(command).output()?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(answer)
    } else {
        Err(format!("{answer}{}", String::from_utf8_lossy(&output.stderr)).into())
    }
}
