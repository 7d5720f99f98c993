use std::fmt;
use std::time::Duration;

use redis::{
    ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, TlsCertificates,
};

use crate::error::{Error, Result};

/// Where a Redis or Valkey is and how to talk to it.
///
/// | URL | what |
/// | --- | --- |
/// | `redis://host:port/db` | one server; port 6379 and database 0 where none is given |
/// | `redis+cluster://host:port,host:port` | a cluster; the hosts are where its map is asked for first |
/// | `redis+sentinel://host:port,host:port/master/db` | the primary that Sentinels know as `master`; port 26379 |
///
/// With `rediss` for `redis`, all connections use TLS. `user:password@` (percent-encoded) goes before the hosts;
/// `?connect_timeout=` and `?response_timeout=` (milliseconds) and, for Sentinels that ask for it,
/// `?sentinel_password=` and `?sentinel_username=` go behind.
#[derive(Clone)]
pub struct RedisConfig {
    pub(super) mode: Mode,
    pub(super) hosts: Vec<Host>,
    pub(super) tls: bool,
    db: i64,
    username: Option<String>,
    password: Option<String>,
    sentinel_username: Option<String>,
    sentinel_password: Option<String>,
    ca_certificate: Option<Vec<u8>>,
    client_certificate: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) connect_timeout: Duration,
    pub(super) response_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Standalone,
    Cluster,
    Sentinel { master: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) port: u16,
}

const SCHEMES: &str =
    "redis://, rediss://, redis+cluster://, rediss+cluster://, redis+sentinel:// or rediss+sentinel://";

impl RedisConfig {
    /// What the URL says.
    pub fn new(url: &str) -> Result<Self> {
        let shown = without_password(url);
        let refused = |why: &str| Error::config(format!("url = {shown:?} is not allowed: {why}"));
        let (scheme, rest) = url.split_once("://").ok_or_else(|| refused(&format!("it begins with {SCHEMES}")))?;
        let (tls, kind) = match scheme.strip_prefix("rediss") {
            Some(kind) => (true, kind),
            None => (false, scheme.strip_prefix("redis").unwrap_or("?")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.trim_end_matches('/');
        let (user, hosts) = authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
        let (mode, db, default_port) = match kind {
            "" => (Mode::Standalone, path, 6379),
            "+cluster" => (Mode::Cluster, path, 6379),
            "+sentinel" => {
                let (master, db) = path.split_once('/').unwrap_or((path, ""));
                let master = decoded(master).filter(|master| !master.is_empty());
                let master = master.ok_or_else(|| refused("name the master behind the hosts, as in /mymaster"))?;
                (Mode::Sentinel { master }, db, 26_379)
            }
            _ => return Err(refused(&format!("it begins with {SCHEMES}"))),
        };
        let db = match db {
            "" => 0,
            db => db.parse().ok().filter(|db| *db >= 0).ok_or_else(|| refused("the database is a number from 0"))?,
        };
        if mode == Mode::Cluster && db != 0 {
            return Err(refused("a cluster has only database 0"));
        }
        let hosts = hosts
            .split(',')
            .map(|host| Host::parse(host, default_port))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| refused("each host is host, host:port or [IPv6]:port"))?;
        if mode == Mode::Standalone && hosts.len() > 1 {
            return Err(refused("several hosts need redis+cluster:// or redis+sentinel://"));
        }
        let (username, password) = match user {
            None => (None, None),
            Some(user) => {
                let (name, password) = user.split_once(':').map_or((user, None), |(name, word)| (name, Some(word)));
                let text = |text: &str| decoded(text).ok_or_else(|| refused("user and password are percent-encoded"));
                let name = Some(text(name)?).filter(|name| !name.is_empty());
                (name, password.map(text).transpose()?)
            }
        };
        let mut config = Self {
            mode,
            hosts,
            tls,
            db,
            username,
            password,
            sentinel_username: None,
            sentinel_password: None,
            ca_certificate: None,
            client_certificate: None,
            connect_timeout: Duration::from_secs(1),
            response_timeout: Duration::from_secs(1),
        };
        for (name, value) in
            query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        {
            let value = decoded(value).ok_or_else(|| refused("what is behind ? is percent-encoded"))?;
            let millis = || {
                let millis = value.parse().ok().filter(|millis| (1..=3_600_000).contains(millis));
                millis
                    .map(Duration::from_millis)
                    .ok_or_else(|| refused(&format!("{name} is 1 to 3600000 milliseconds")))
            };
            match name {
                "connect_timeout" => config.connect_timeout = millis()?,
                "response_timeout" => config.response_timeout = millis()?,
                "sentinel_username" => config.sentinel_username = Some(value),
                "sentinel_password" => config.sentinel_password = Some(value),
                _ => {
                    return Err(refused(&format!(
                        "behind ? it may say connect_timeout, response_timeout, sentinel_username and sentinel_password, and it says {name}"
                    )));
                }
            }
        }
        Ok(config)
    }

    /// The certificate authority that signed the servers' certificates (PEM), instead of the public ones. For TLS.
    #[must_use]
    pub fn ca_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca_certificate = Some(pem.into());
        self
    }

    /// This client's own certificate and its key (PEM), for servers that ask for one. For TLS.
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// How long making a connection may take, TLS and login included. Default: 1 s.
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// After how long without any answer a connection is taken for dead and replaced. How long a call of the cache
    /// waits is [`Builder::l2_timeout`](crate::Builder::l2_timeout). Default: 1 s.
    #[must_use]
    pub fn response_timeout(mut self, limit: Duration) -> Self {
        self.response_timeout = limit;
        self
    }

    /// Refuses what only shows when it is used: certificates that are none, timeouts of nothing.
    pub(crate) fn checked(self) -> Result<Self> {
        for (name, limit) in [("connect_timeout", self.connect_timeout), ("response_timeout", self.response_timeout)] {
            if limit < Duration::from_millis(1) || limit > Duration::from_secs(3600) {
                return Err(Error::config(format!("{name} = {limit:?} is not allowed: give 1 ms to 1 h")));
            }
        }
        if !self.tls && (self.ca_certificate.is_some() || self.client_certificate.is_some()) {
            return Err(Error::config(
                "ca_certificate and client_certificate are not allowed without TLS: give a rediss:// URL",
            ));
        }
        if self.tls {
            // Fails where the process has chosen a provider already: then that one is used.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        self.client(&self.hosts[0])
            .map_err(|why| Error::config(format!("ca_certificate or client_certificate is not allowed: {why}")))?;
        Ok(self)
    }

    /// A client for one server.
    pub(super) fn client(&self, host: &Host) -> redis::RedisResult<redis::Client> {
        self.client_as(host, self.username.as_deref(), self.password.as_deref(), self.db)
    }

    /// A client for one Sentinel.
    pub(super) fn sentinel_client(&self, host: &Host) -> redis::RedisResult<redis::Client> {
        self.client_as(host, self.sentinel_username.as_deref(), self.sentinel_password.as_deref(), 0)
    }

    fn client_as(
        &self,
        host: &Host,
        username: Option<&str>,
        password: Option<&str>,
        db: i64,
    ) -> redis::RedisResult<redis::Client> {
        let mut login = RedisConnectionInfo::default().set_db(db).set_skip_set_lib_name();
        if let Some(username) = username {
            login = login.set_username(username);
        }
        if let Some(password) = password {
            login = login.set_password(password);
        }
        let (name, port) = (host.name.clone(), host.port);
        let address = if self.tls {
            ConnectionAddr::TcpTls { host: name, port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(name, port)
        };
        let info: ConnectionInfo = address.into_connection_info()?;
        // Nagle would hold a request back behind an unanswered one.
        let info =
            info.set_redis_settings(login).set_tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true));
        if !self.tls {
            return redis::Client::open(info);
        }
        let client_tls = self.client_certificate.clone();
        let certificates = TlsCertificates {
            client_tls: client_tls.map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key }),
            root_cert: self.ca_certificate.clone(),
        };
        redis::Client::build_with_tls(info, certificates)
    }

    /// The same text for two configurations that reach the same data.
    pub(crate) fn identity(&self) -> String {
        let mut hosts = self.hosts.clone();
        hosts.sort_unstable();
        format!("{:?} {hosts:?} {}", self.mode, self.db)
    }

    pub(crate) fn is_cluster(&self) -> bool {
        self.mode == Mode::Cluster
    }

    /// How long a reply may take before its connection is dead.
    pub(crate) fn patience(&self) -> Duration {
        self.response_timeout
    }
}

/// Without passwords.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<_> = self.hosts.iter().map(ToString::to_string).collect();
        f.debug_struct("RedisConfig")
            .field("mode", &self.mode)
            .field("hosts", &hosts)
            .field("tls", &self.tls)
            .field("db", &self.db)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl Host {
    pub(super) fn parse(text: &str, default_port: u16) -> Option<Self> {
        let (name, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (name, rest) = rest.split_once(']')?;
                (name, rest.strip_prefix(':').or_else(|| rest.is_empty().then_some(""))?)
            }
            None => text.rsplit_once(':').unwrap_or((text, "")),
        };
        let port = if port.is_empty() { default_port } else { port.parse().ok().filter(|port| *port > 0)? };
        let sound = !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || "/?#@[]".contains(c));
        sound.then(|| Self { name: name.to_owned(), port })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.contains(':') {
            write!(f, "[{}]:{}", self.name, self.port)
        } else {
            write!(f, "{}:{}", self.name, self.port)
        }
    }
}

fn decoded(text: &str) -> Option<String> {
    percent_encoding::percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

/// The URL as an error or a log may show it.
fn without_password(url: &str) -> String {
    let bounds = url.find("://").map(|at| at + 3).and_then(|from| {
        let authority = &url[from..];
        let end = authority.find(['/', '?']).unwrap_or(authority.len());
        authority[..end].rfind('@').map(|at| (from, from + at))
    });
    let shown = match bounds {
        Some((from, at)) => format!("{}***{}", &url[..from], &url[at..]),
        None => url.to_owned(),
    };
    shown.split_once('?').map_or(shown.clone(), |(front, _)| format!("{front}?..."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, port: u16) -> Host {
        Host { name: name.into(), port }
    }

    #[test]
    fn urls_say_where_and_how() {
        let config = RedisConfig::new("redis://localhost").unwrap();
        assert_eq!(
            (config.mode, config.hosts, config.db, config.tls),
            (Mode::Standalone, vec![host("localhost", 6379)], 0, false)
        );

        let config =
            RedisConfig::new("rediss://user:p%40ss@[::1]:7000/3?connect_timeout=250&response_timeout=2000").unwrap();
        assert_eq!((config.hosts, config.db, config.tls), (vec![host("::1", 7000)], 3, true));
        assert_eq!((config.username.as_deref(), config.password.as_deref()), (Some("user"), Some("p@ss")));
        assert_eq!(
            (config.connect_timeout, config.response_timeout),
            (Duration::from_millis(250), Duration::from_secs(2))
        );

        let config = RedisConfig::new("redis://:secret@a").unwrap();
        assert_eq!((config.username, config.password.as_deref()), (None, Some("secret")));

        let config = RedisConfig::new("redis+cluster://a:1,b:2").unwrap();
        assert_eq!((config.mode, config.hosts), (Mode::Cluster, vec![host("a", 1), host("b", 2)]));

        let config = RedisConfig::new("redis+sentinel://a,b:2/main/4?sentinel_password=x").unwrap();
        assert_eq!(config.mode, Mode::Sentinel { master: "main".into() });
        assert_eq!((config.hosts, config.db), (vec![host("a", 26_379), host("b", 2)], 4));
    }

    #[test]
    fn a_url_that_makes_no_sense_is_refused_without_its_password() {
        for (url, why) in [
            ("localhost", "begins with"),
            ("http://localhost", "begins with"),
            ("redis+pigeon://localhost", "begins with"),
            ("redis://", "each host"),
            ("redis://a:0", "each host"),
            ("redis://a:70000", "each host"),
            ("redis://a b", "each host"),
            ("redis://a,b", "several hosts"),
            ("redis://a/x", "database"),
            ("redis://a/-1", "database"),
            ("redis+cluster://a/1", "only database 0"),
            ("redis+sentinel://a", "name the master"),
            ("redis://u:secret@a?nonsense=1", "and it says nonsense"),
            ("redis://u:secret@a?connect_timeout=soon", "milliseconds"),
        ] {
            let error = RedisConfig::new(url).expect_err(url).to_string();
            assert!(error.contains(why), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let config = RedisConfig::new("redis://u:secret@a").unwrap();
        assert!(!format!("{config:?}").contains("secret"));
        assert!(config.ca_certificate("x").checked().is_err(), "a certificate without TLS");
        assert!(
            RedisConfig::new("rediss://a")
                .unwrap()
                .ca_certificate("no PEM")
                .client_certificate("x", "y")
                .checked()
                .is_err()
        );
    }
}
