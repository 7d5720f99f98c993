//! What the tests have in common: caches on virtual time, a store and a bus whose faults the test chooses, gates.

mod fault_bus;
mod fault_store;
mod gate;
pub mod real;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fleetcache::testing::SimRuntime;
use fleetcache::{BoxFuture, Builder, EntryOptions, HybridCache, MemoryBus, MemoryStore};

pub use self::fault_bus::{BusFaults, FaultBus};
pub use self::fault_store::{FaultStore, Op, StoreFaults};
pub use self::gate::{Gate, Held};

/// A loader's own error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

/// Counts what a loader did.
#[derive(Clone, Debug, Default)]
pub struct Count(Arc<AtomicU64>);

impl Count {
    /// Zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one and returns the new count.
    pub fn add(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Milliseconds.
pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A cache in one process, without store and bus, on virtual time.
pub fn alone(runtime: &SimRuntime, options: &EntryOptions) -> HybridCache<u64> {
    HybridCache::builder().options(options).runtime(Arc::new(runtime.clone())).build().expect("valid options")
}

/// Some nodes over one store and one bus, on virtual time, with faults to be switched on.
pub struct Fleet {
    /// The virtual time of all nodes.
    pub runtime: SimRuntime,
    /// The store without faults, to look into.
    pub store: MemoryStore,
    /// The bus without faults.
    pub bus: MemoryBus,
    /// The faults of each node's way to the store.
    pub stores: Vec<StoreFaults>,
    /// The faults of each node's way to the bus.
    pub buses: Vec<BusFaults>,
    /// The nodes.
    pub nodes: Vec<HybridCache<u64>>,
}

impl Fleet {
    /// `size` nodes with `options`, started and subscribed.
    pub async fn start(runtime: &SimRuntime, size: usize, options: &EntryOptions) -> Self {
        Self::start_with(runtime, size, options, |builder| builder).await
    }

    /// The same, with something else asked of the builder.
    pub async fn start_with(
        runtime: &SimRuntime,
        size: usize,
        options: &EntryOptions,
        also: impl Fn(Builder<u64>) -> Builder<u64>,
    ) -> Self {
        let store = MemoryStore::on(Arc::new(runtime.clone()));
        let bus = MemoryBus::new();
        let mut fleet = Self { runtime: runtime.clone(), store, bus, stores: vec![], buses: vec![], nodes: vec![] };
        for _ in 0..size {
            let (faulty_store, store_faults) = FaultStore::new(fleet.store.clone(), runtime);
            let (faulty_bus, bus_faults) = FaultBus::new(fleet.bus.clone(), runtime);
            let builder = HybridCache::builder()
                .options(options)
                .l2(faulty_store)
                .bus(faulty_bus)
                .runtime(Arc::new(runtime.clone()));
            fleet.nodes.push(also(builder).build().expect("valid options"));
            fleet.stores.push(store_faults);
            fleet.buses.push(bus_faults);
        }
        runtime.advance(ms(10)).await;
        fleet
    }

    /// What the store holds under the key, as bytes.
    pub async fn raw(&self, key: &str) -> Option<bytes::Bytes> {
        use fleetcache::Store;
        self.store.get(&format!("fleetcache::{key}")).await.expect("memory does not fail")
    }

    /// The kind of cell the store holds under the key: `V`, `L` or nothing.
    pub async fn cell(&self, key: &str) -> Option<char> {
        self.raw(key).await.map(|bytes| char::from(bytes[3]))
    }
}

/// A loader that answers `value` and counts its calls.
pub fn counting(
    count: &Count,
    value: u64,
) -> impl FnOnce() -> std::future::Ready<Result<u64, Broken>> + Send + 'static {
    let count = count.clone();
    move || {
        count.add();
        std::future::ready(Ok(value))
    }
}

/// A loader that fails and counts its calls.
pub fn failing(count: &Count) -> impl FnOnce() -> std::future::Ready<Result<u64, Broken>> + Send + 'static {
    let count = count.clone();
    move || {
        count.add();
        std::future::ready(Err(Broken("the database is down")))
    }
}

/// A loader that answers `value` once it may pass the gate, and counts its calls.
pub fn held(
    count: &Count,
    gate: &Gate,
    value: u64,
) -> impl FnOnce() -> BoxFuture<'static, Result<u64, Broken>> + Send + 'static {
    let (count, gate) = (count.clone(), gate.clone());
    move || {
        Box::pin(async move {
            count.add();
            gate.pass().await;
            Ok(value)
        })
    }
}

/// A loader that never answers.
pub fn never() -> std::future::Pending<Result<u64, Broken>> {
    std::future::pending()
}

/// Runs a test on virtual time: in order, and then in a hundred shuffled interleavings.
pub fn run(test: impl AsyncFn(SimRuntime)) {
    let runtime = SimRuntime::new();
    runtime.block_on(test(runtime.clone()));
    runtime.shut_down();
    for seed in 0..100 {
        let runtime = SimRuntime::seeded(seed);
        runtime.block_on(test(runtime.clone()));
        runtime.shut_down();
    }
}
