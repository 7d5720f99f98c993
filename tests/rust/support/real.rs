//! For tests against real servers, in real time.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleetcache::{Builder, HybridCache, RedisConfig, RedisStore, RedisStreamsBus, Runtime, SystemRuntime};

use crate::ms;

/// What the tests' nodes tolerate: short, so that tests are.
pub const SILENCE: Duration = ms(600);

/// Shows the engine's log if `RUST_LOG` says so.
pub fn show_log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

/// A node on the Redis at `url`: values there, invalidations through its stream.
pub fn node(url: &str) -> HybridCache<u64> {
    node_with(url, |builder| builder)
}

/// The same, with something else asked of the builder.
pub fn node_with(url: &str, also: impl FnOnce(Builder<u64>) -> Builder<u64>) -> HybridCache<u64> {
    show_log();
    let config = || RedisConfig::new(url).expect("a good URL").connect_timeout(ms(400)).response_timeout(ms(400));
    let builder = HybridCache::builder()
        .ttl(Duration::from_secs(300))
        .l2(RedisStore::with_config(config()).expect("a good configuration"))
        .bus(RedisStreamsBus::with_config(config()).expect("a good configuration"))
        .l2_timeout(ms(250))
        .max_bus_silence(SILENCE);
    also(builder).build().expect("valid options")
}

/// Waits until `happened`, or fails after `limit` with what was waited for.
pub async fn eventually<F: Future<Output = bool>>(what: &str, limit: Duration, mut happened: impl FnMut() -> F) {
    let start = now();
    while !happened().await {
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        pause(ms(5)).await;
    }
}

/// Waits until the node hears the bus and knows `peers` others.
pub async fn ready(node: &HybridCache<u64>, peers: usize) {
    eventually("the node is well and knows its peers", Duration::from_secs(10), || async {
        // A read asks L2, so that its state is known.
        let _ = node.get("ready?").await;
        let health = node.health();
        health.is_good() && health.peers >= peers && health.bus_lag_ms.is_some()
    })
    .await;
}

/// The machine's time.
pub fn now() -> Instant {
    #[allow(clippy::disallowed_methods, reason = "real servers run in real time")]
    Instant::now()
}

/// Lets real time pass.
pub async fn pause(time: Duration) {
    SystemRuntime::current().sleep(time).await;
}

/// The runtime that real nodes run on.
pub fn runtime() -> Arc<dyn Runtime> {
    Arc::new(SystemRuntime::current())
}
