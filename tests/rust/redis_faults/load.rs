//! Readers and writers on some nodes over one database, and what must hold while and after their servers fail.

#![allow(clippy::disallowed_methods, reason = "the load is the test's, and not the engine's")]
#![allow(clippy::print_stderr, reason = "how long it took is worth seeing")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleetcache::{Health, HybridCache, PartHealth};
use fleetcache_services::Redis;
use fleetcache_tests::ms;
use fleetcache_tests::real::{eventually, node, now, pause, ready};

const KEYS: u64 = 60;

/// The longest that a read may take: it waits for a lease of a node that is cut off (2 s), or for a few calls that each
/// end at their deadline (250 ms), and for a loaded machine.
const LONGEST_READ: Duration = ms(5_000);

/// Within this time of a fault's end nothing stale is served: the silence that is tolerated, the longest pause between
/// two attempts to connect or to repair (2 s), and the breaker's longest wait (2 s), on a loaded machine.
const BOUND: Duration = ms(10_000);

#[derive(Default)]
struct Shared {
    /// The database: the version of each key.
    versions: Mutex<HashMap<u64, u64>>,
    running: AtomicBool,
    ended: AtomicBool,
    slowest: AtomicU64,
    reads: AtomicU64,
    failures: Mutex<Vec<String>>,
}

pub(crate) struct Load {
    nodes: Vec<HybridCache<u64>>,
    shared: Arc<Shared>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

fn name(key: u64) -> String {
    format!("key:{key}")
}

async fn read(shared: &Arc<Shared>, node: &HybridCache<u64>, key: u64) -> Result<u64, String> {
    let database = Arc::clone(shared);
    let loader = move || async move {
        let version = database.version(key);
        pause(ms(2)).await;
        Ok::<_, Infallible>(version)
    };
    let start = now();
    let outcome = node.get_with(&name(key), loader).await.map(|value| *value).map_err(|error| error.to_string());
    let took = u64::try_from(start.elapsed().as_millis()).unwrap();
    shared.slowest.fetch_max(took, Ordering::Relaxed);
    shared.reads.fetch_add(1, Ordering::Relaxed);
    outcome
}

impl Shared {
    fn version(&self, key: u64) -> u64 {
        self.versions.lock().unwrap().get(&key).copied().unwrap_or(0)
    }

    fn raise(&self, key: u64) -> u64 {
        let mut versions = self.versions.lock().unwrap();
        let version = versions.entry(key).or_insert(0);
        *version += 1;
        *version
    }

    async fn may_run(&self) -> bool {
        while !self.running.load(Ordering::SeqCst) && !self.ended.load(Ordering::SeqCst) {
            pause(ms(5)).await;
        }
        !self.ended.load(Ordering::SeqCst)
    }
}

async fn reader(shared: Arc<Shared>, node: HybridCache<u64>, mut key: u64) {
    while shared.may_run().await {
        key = (key * 31 + 7) % KEYS;
        if let Err(error) = read(&shared, &node, key).await {
            shared.failures.lock().unwrap().push(error);
        }
        pause(ms(1)).await;
    }
}

/// Writes the keys that are its own alone: the database first, then the cache.
async fn writer(shared: Arc<Shared>, node: HybridCache<u64>, index: u64, writers: u64) {
    let mut turn = 0;
    while shared.may_run().await {
        turn += 1;
        let key = (turn * writers + index) % KEYS / writers * writers + index;
        let version = shared.raise(key);
        let outcome = if turn % 4 == 0 { node.set(&name(key), version).await } else { node.remove(&name(key)).await };
        if let Err(error) = outcome {
            shared.failures.lock().unwrap().push(error.to_string());
        }
        pause(ms(4)).await;
    }
}

impl Load {
    /// A node for each URL, under load and well.
    pub(crate) async fn start(urls: &[String]) -> Self {
        let nodes: Vec<_> = urls.iter().map(|url| node(url)).collect();
        for node in &nodes {
            ready(node, nodes.len() - 1).await;
        }
        let shared = Arc::new(Shared { running: AtomicBool::new(true), ..Shared::default() });
        let mut tasks = Vec::new();
        for (index, node) in (0..).zip(&nodes) {
            for seed in 0..3 {
                tasks.push(tokio::spawn(reader(Arc::clone(&shared), node.clone(), seed * 13)));
            }
            tasks.push(tokio::spawn(writer(Arc::clone(&shared), node.clone(), index, nodes.len() as u64)));
        }
        let load = Self { nodes, shared, tasks };
        pause(ms(300)).await;
        load
    }

    pub(crate) fn health(&self, node: usize) -> Health {
        self.nodes[node].health()
    }

    /// The node's health says so of L2 and the bus.
    pub(crate) async fn node_is(&self, node: usize, state: PartHealth) {
        eventually(&format!("L2 and bus of node {node} are {state:?}"), ms(6_000), || async {
            let health = self.health(node);
            health.l2 == state && health.bus == state
        })
        .await;
    }

    pub(crate) fn resume(&self) {
        self.shared.running.store(true, Ordering::SeqCst);
    }

    /// Without writes, every key becomes what the database says on every node, and stays that.
    pub(crate) async fn settles(&self, after: &str) {
        // The load pauses: what is wrong now would stay wrong.
        self.shared.running.store(false, Ordering::SeqCst);
        let stale = || async {
            let mut stale = Vec::new();
            for (index, node) in self.nodes.iter().enumerate() {
                for key in 0..KEYS {
                    let found = read(&self.shared, node, key).await.unwrap();
                    let version = self.shared.version(key);
                    if found != version {
                        stale.push(format!("node {index}, key {key}: {found} instead of {version}"));
                    }
                }
            }
            stale
        };
        let start = now();
        let mut last = stale().await;
        while !last.is_empty() {
            assert!(start.elapsed() < BOUND, "{after}: stale after {BOUND:?}: {last:?}");
            pause(ms(20)).await;
            last = stale().await;
        }
        for _ in 0..3 {
            pause(ms(100)).await;
            assert_eq!(stale().await, [""; 0], "{after}: it comes back");
        }
    }

    /// After the fault: all is well again within the bound, and nobody was let down.
    pub(crate) async fn heals(&self, after: &str) {
        let healed = || async {
            let mut well = true;
            for node in &self.nodes {
                let _ = read(&self.shared, node, 0).await;
                well &= node.health().is_good();
            }
            well
        };
        let start = now();
        while !healed().await {
            let health: Vec<_> = self.nodes.iter().map(HybridCache::health).collect();
            assert!(start.elapsed() < BOUND, "{after}: not well after {BOUND:?}: {health:?}");
            pause(ms(20)).await;
        }
        self.settles(after).await;
        let failures = self.shared.failures.lock().unwrap().clone();
        assert!(
            failures.is_empty(),
            "{after}: {} calls failed: {:?}",
            failures.len(),
            &failures[..failures.len().min(3)]
        );
        let slowest = ms(self.shared.slowest.swap(0, Ordering::Relaxed));
        assert!(slowest < LONGEST_READ, "{after}: a read took {slowest:?}");
        eprintln!(
            "{after}: well after {:?}, slowest read {slowest:?}, {} reads",
            start.elapsed(),
            self.shared.reads.load(Ordering::Relaxed)
        );
        self.resume();
    }

    /// Nothing is left behind, neither here nor there.
    pub(crate) async fn end(self, server: &Redis) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        for node in self.nodes {
            node.close().await.unwrap();
        }
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        eventually("no task is left", ms(5_000), || async { tasks() == 0 }).await;
        eventually("no connection is left", ms(5_000), || async {
            let list = server.command(&["CLIENT", "LIST", "TYPE", "normal"]).unwrap();
            // The question itself, Sentinels, and nodes of a cluster that move slots are not ours.
            let foreign = ["cmd=client|list", "name=sentinel", "cmd=restore", "cmd=migrate", "cmd=cluster"];
            list.lines().all(|line| line.trim().is_empty() || foreign.iter().any(|foreign| line.contains(foreign)))
        })
        .await;
    }
}
