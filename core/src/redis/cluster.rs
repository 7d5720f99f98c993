//! Who holds which slot of a cluster, learned from its nodes and from their redirections.
//!
//! Its own, and not the client library's, because each server's life has to be watched (see `link`), and because a call
//! must fail within its caller's time instead of being retried out of sight.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis::{ErrorKind, RedisError, RedisResult, Value};

use super::config::{Host, RedisConfig};
use super::link::Link;
use crate::doubts::Doubts;
use crate::runtime::{Runtime, SharedRun, timeout};
use crate::sync::Mutex;

pub(super) const SLOTS: usize = 16_384;

/// The slot of a key: of what is between the first braces, if there is something, else of the whole.
pub(super) fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.iter().position(|byte| *byte == b'}').filter(|close| *close > 0).map(|close| &rest[..close])
    });
    let crc = tag.unwrap_or(key).iter().fold(0_u16, |crc, byte| {
        // CRC-16/XMODEM, as the cluster specification has it.
        (0..8).fold(
            crc ^ (u16::from(*byte) << 8),
            |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 },
        )
    });
    crc % SLOTS as u16
}

pub(super) struct Cluster {
    config: Arc<RedisConfig>,
    runtime: Arc<dyn Runtime>,
    lives: Arc<Doubts>,
    map: Mutex<Arc<Map>>,
    /// Something showed that the map is out of date.
    doubted: AtomicBool,
    learning: SharedRun<RedisResult<()>>,
}

#[derive(Default)]
struct Map {
    /// For each slot, one more than the index of its owner; 0 where none is known. Empty before the first map.
    owners: Vec<u16>,
    links: Vec<(Host, Arc<Link>)>,
}

impl Map {
    fn owner(&self, slot: u16) -> Option<&(Host, Arc<Link>)> {
        let index = self.owners.get(usize::from(slot)).copied().unwrap_or(0);
        self.links.get(usize::from(index).checked_sub(1)?)
    }
}

impl Cluster {
    pub(super) fn new(config: Arc<RedisConfig>, runtime: Arc<dyn Runtime>, lives: Arc<Doubts>) -> Arc<Self> {
        Arc::new(Self {
            config,
            runtime,
            lives,
            map: Mutex::default(),
            doubted: AtomicBool::new(true),
            learning: SharedRun::default(),
        })
    }

    /// The server that holds the slot, as far as is known.
    pub(super) async fn owner(self: &Arc<Self>, slot: u16) -> RedisResult<Arc<Link>> {
        if self.doubted.load(Ordering::Acquire) {
            self.learn().await?;
        }
        let map = Arc::clone(&self.map.lock());
        match map.owner(slot) {
            Some((_, link)) => Ok(Arc::clone(link)),
            None => {
                self.doubt();
                Err((ErrorKind::ClusterConnectionNotFound, "no server holds the slot", slot.to_string()).into())
            }
        }
    }

    /// The map is to be learned anew before the next call.
    pub(super) fn doubt(&self) {
        self.doubted.store(true, Ordering::Release);
    }

    /// The server at an address that another named (MOVED, ASK). An empty name stands for the one that answered.
    pub(super) fn at(&self, address: &str) -> RedisResult<Arc<Link>> {
        let host = Host::parse(address, 6379)
            .ok_or_else(|| RedisError::from((ErrorKind::Client, "a redirection to nowhere", address.to_owned())))?;
        Ok(self.link(&Arc::clone(&self.map.lock()), &host))
    }

    fn link(&self, map: &Map, host: &Host) -> Arc<Link> {
        let known = map.links.iter().find(|(known, _)| known == host).map(|(_, link)| Arc::clone(link));
        known.unwrap_or_else(|| {
            Link::new(Arc::clone(&self.config), Arc::clone(&self.runtime), Some(host.clone()), Arc::clone(&self.lives))
        })
    }

    /// Asks for the map once, whoever wants it.
    async fn learn(self: &Arc<Self>) -> RedisResult<()> {
        let cluster = Arc::clone(self);
        let learned = self.learning.join(&*self.runtime, || async move { cluster.ask_for_map().await }).await;
        learned.map_err(|error| RedisError::from((ErrorKind::Client, "cannot connect", error.to_string())))?
    }

    async fn ask_for_map(&self) -> RedisResult<()> {
        // Cleared before asking: a redirection that comes meanwhile doubts the answer as well.
        self.doubted.store(false, Ordering::Release);
        let old = Arc::clone(&self.map.lock());
        let mut failure: RedisError = (ErrorKind::ClusterConnectionNotFound, "no server of the cluster answers").into();
        let mut hosts: Vec<_> = old.links.iter().map(|(host, _)| host.clone()).collect();
        hosts.extend(self.config.hosts.iter().filter(|seed| !hosts.contains(seed)).cloned().collect::<Vec<_>>());
        for host in hosts {
            let link = self.link(&old, &host);
            let mut ask = redis::cmd("CLUSTER");
            ask.arg("SLOTS");
            let asked = timeout(&*self.runtime, self.config.connect_timeout, link.command(&ask, false)).await;
            let asked = asked.unwrap_or_else(|| Err((ErrorKind::Client, "a server of the cluster is too slow").into()));
            match asked.and_then(|answer| parse(&answer, &host)) {
                Ok(ranges) => {
                    self.install(&old, &ranges);
                    return Ok(());
                }
                Err(error) => failure = error,
            }
        }
        self.doubt();
        Err(failure)
    }

    fn install(&self, old: &Map, ranges: &[(u16, u16, Host)]) {
        let mut new = Map { owners: vec![0; SLOTS], links: Vec::new() };
        let mut indices: HashMap<&Host, u16> = HashMap::new();
        for (first, last, host) in ranges {
            let index = *indices.entry(host).or_insert_with(|| {
                new.links.push((host.clone(), self.link(old, host)));
                new.links.len() as u16
            });
            new.owners[usize::from(*first)..=usize::from(*last)].fill(index);
        }
        let moved = (0..SLOTS as u16).any(|slot| match (old.owner(slot), new.owner(slot)) {
            (Some((before, _)), Some((after, _))) => before != after,
            _ => false,
        });
        if moved {
            // Another server holds keys of ours: it may not have the last writes of the one before.
            self.lives.raise();
        }
        *self.map.lock() = Arc::new(new);
    }

    pub(super) fn close(&self) {
        let map = std::mem::take(&mut *self.map.lock());
        map.links.iter().for_each(|(_, link)| link.close());
    }
}

/// The primaries in an answer to CLUSTER SLOTS, with their slots.
fn parse(answer: &Value, asked: &Host) -> RedisResult<Vec<(u16, u16, Host)>> {
    let malformed = || RedisError::from((ErrorKind::Client, "an answer to CLUSTER SLOTS that makes no sense"));
    let number = |value: &Value| match value {
        Value::Int(number) => Some(*number),
        _ => None,
    };
    let slot = |value: &Value| {
        number(value).and_then(|slot| u16::try_from(slot).ok()).filter(|slot| usize::from(*slot) < SLOTS)
    };
    let range = |value: &Value| {
        let [first, last, primary, ..] = value.as_sequence()? else { return None };
        let [name, port, ..] = primary.as_sequence()? else { return None };
        let name = match name {
            Value::BulkString(name) if !name.is_empty() => String::from_utf8(name.clone()).ok()?,
            // Not known to the server itself: it is where we reached it.
            _ => asked.name.clone(),
        };
        let (first, last) = (slot(first)?, slot(last)?);
        let port = number(port).and_then(|port| u16::try_from(port).ok())?;
        (first <= last).then_some((first, last, Host { name, port }))
    };
    let ranges = answer.as_sequence().ok_or_else(malformed)?;
    let ranges: Option<Vec<_>> = ranges.iter().map(range).collect();
    ranges.filter(|ranges| !ranges.is_empty()).ok_or_else(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot(b"123456789"), 0x31C3);
        assert_eq!(slot(b"foo"), 12_182);
        assert_eq!(slot(b"{user1000}.following"), slot(b"user1000"));
        assert_eq!(slot(b"foo{{bar}}zap"), slot(b"{bar"));
        assert_ne!(slot(b"foo{}{bar}"), slot(b"bar"), "empty braces do not count");
    }

    #[test]
    fn an_answer_that_makes_no_sense_is_refused() {
        let host = Host { name: "h".into(), port: 1 };
        let at = |name: &str| Value::Array(vec![Value::BulkString(name.into()), Value::Int(7)]);
        let range = |first, last, at| Value::Array(vec![Value::Int(first), Value::Int(last), at]);
        let parsed = parse(&Value::Array(vec![range(0, 9, at("a")), range(10, 16_383, at(""))]), &host).unwrap();
        assert_eq!(parsed[0], (0, 9, Host { name: "a".into(), port: 7 }));
        assert_eq!(parsed[1].2.name, "h", "an empty name is the server that was asked");
        for wrong in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![range(9, 0, at("a"))]),
            Value::Array(vec![range(0, 16_384, at("a"))]),
            Value::Array(vec![range(-1, 5, at("a"))]),
            Value::Array(vec![range(0, 5, Value::Nil)]),
        ] {
            assert!(parse(&wrong, &host).is_err(), "{wrong:?}");
        }
    }
}
