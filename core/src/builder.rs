//! The composition root: checks what was asked for and puts the parts together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use crate::bus::Bus;
use crate::cache::HybridCache;
use crate::codec::Codec;
use crate::engine::{BusSide, Core, Owned, Place, SharedTier};
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::flight::Flights;
use crate::key::Key;
use crate::l1::{Capacity, EngineKind, L1, Weigher};
use crate::l2::L2;
use crate::options::EntryOptions;
use crate::outbox::{Joined, Outbox};
use crate::peers::{Peers, Sender};
use crate::recent::Recent;
use crate::repair::Repairs;
use crate::runtime::{Runtime, SharedRun, SystemRuntime};
use crate::scopes::Scopes;
use crate::stats::Counters;
use crate::store::Store;
use crate::sync::Mutex;
use crate::watermark::Watermarks;

/// Builds a [`HybridCache`].
pub struct Builder<V> {
    options: EntryOptions,
    capacity: Option<u64>,
    max_bytes: Option<(u64, Weigher<Entry<V>>)>,
    engine: EngineKind,
    prefix: Box<str>,
    store: Option<Arc<dyn Store>>,
    codec: Option<Arc<dyn Codec<V>>>,
    bus: Option<Arc<dyn Bus>>,
    call_timeout: Duration,
    max_bus_silence: Duration,
    compression: bool,
    is_null: Option<fn(&V) -> bool>,
    strict: bool,
    runtime: Option<Arc<dyn Runtime>>,
}

impl<V> std::fmt::Debug for Builder<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("options", &self.options).finish_non_exhaustive()
    }
}

/// Values are compressed from this size on.
const COMPRESS_FROM: usize = 1024;

impl<V: Send + Sync + 'static> Builder<V> {
    pub(crate) fn new() -> Self {
        Self {
            options: EntryOptions::new(),
            capacity: None,
            max_bytes: None,
            engine: EngineKind::default(),
            prefix: "fleetcache".into(),
            store: None,
            codec: None,
            bus: None,
            call_timeout: Duration::from_millis(500),
            max_bus_silence: Duration::from_secs(10),
            compression: false,
            is_null: None,
            strict: false,
            runtime: None,
        }
    }

    /// How long a value is fresh; short for setting it in [`options`](Self::options). Default: 60 s.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options = EntryOptions::new().ttl(ttl).over(&self.options);
        self
    }

    /// How values are kept, where a scope or call says nothing else.
    #[must_use]
    pub fn options(mut self, options: &EntryOptions) -> Self {
        self.options = options.over(&self.options);
        self
    }

    /// How many entries this node keeps in memory, to within 2%. Default: 100,000.
    #[must_use]
    pub fn capacity(mut self, entries: u64) -> Self {
        self.capacity = Some(entries);
        self
    }

    /// How many bytes of values this node keeps in memory, as `weigh` measures them, instead of a number of entries.
    #[must_use]
    pub fn max_bytes(mut self, bytes: u64, weigh: impl Fn(&str, &V) -> u64 + Send + Sync + 'static) -> Self {
        self.max_bytes = Some((bytes, Arc::new(move |key: &Key, entry: &Entry<V>| weigh(&key.text, &entry.value))));
        self
    }

    /// The engine that keeps entries in memory.
    #[must_use]
    pub fn engine(mut self, engine: EngineKind) -> Self {
        self.engine = engine;
        self
    }

    /// What every key in the shared store begins with: nodes with the same prefix are one cache. Default: `fleetcache`.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// The shared store; values travel as MessagePack.
    #[cfg(feature = "msgpack")]
    #[must_use]
    pub fn l2(self, store: impl Store) -> Self
    where
        V: serde::Serialize + serde::de::DeserializeOwned,
    {
        self.l2_with_codec(store, crate::codec::MessagePack)
    }

    /// The shared store, and how values travel there.
    #[must_use]
    pub fn l2_with_codec(mut self, store: impl Store, codec: impl Codec<V>) -> Self {
        self.store = Some(Arc::new(store));
        self.codec = Some(Arc::new(codec));
        self
    }

    /// How long one call to the shared store may take. Default: 500 ms.
    #[must_use]
    pub fn l2_timeout(mut self, limit: Duration) -> Self {
        self.call_timeout = limit;
        self
    }

    /// What carries invalidations to the other nodes.
    #[must_use]
    pub fn bus(mut self, bus: impl Bus) -> Self {
        self.bus = Some(Arc::new(bus));
        self
    }

    /// When nothing is heard from the bus for this long, what is in memory is answered only for so long from the moment
    /// it was read or loaded. Bounds staleness for a node that is cut off. Default: 10 s.
    #[must_use]
    pub fn max_bus_silence(mut self, silence: Duration) -> Self {
        self.max_bus_silence = silence;
        self
    }

    /// Compresses values of 1 KiB and more in the shared store.
    #[cfg(feature = "lz4")]
    #[must_use]
    pub fn compression(mut self, on: bool) -> Self {
        self.compression = on;
        self
    }

    /// Which values are a null: kept for `negative_ttl`, or for as long as the loader asks, or else not at all. For an
    /// `Option`, give `Option::is_none`.
    #[must_use]
    pub fn null_when(mut self, is_null: fn(&V) -> bool) -> Self {
        self.is_null = Some(is_null);
        self
    }

    /// Makes `set`, `remove` and the like return an error when the shared store or the bus could not be reached. The
    /// repair goes on all the same, and the operation may have happened. Default: false.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Where time, tasks and chance come from. Default: the system's, and the current tokio runtime.
    #[must_use]
    pub fn runtime(mut self, runtime: Arc<dyn Runtime>) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// The cache. With a store or bus, a tokio runtime must be at hand (or be given).
    pub fn build(self) -> Result<HybridCache<V>> {
        let resolved = Arc::new(self.options.resolve()?);
        let (capacity, weigher) = match (self.capacity, self.max_bytes) {
            (Some(entries), Some((bytes, _))) => {
                return Err(Error::config(format!(
                    "capacity = {entries} is not allowed with max_bytes = {bytes}: give one"
                )));
            }
            (Some(0), None) => return Err(Error::config("capacity = 0 is not allowed: give at least 1")),
            (None, Some((0, _))) => return Err(Error::config("max_bytes = 0 is not allowed: give at least 1")),
            (None, Some((bytes, weigher))) => (Capacity::Bytes(bytes), Some(weigher)),
            (entries, None) => (Capacity::Entries(entries.unwrap_or(100_000)), None),
        };
        if self.prefix.is_empty() || self.prefix.len() > 128 {
            return Err(Error::config(format!("prefix = {:?} is not allowed: give 1 to 128 bytes", self.prefix)));
        }
        for (name, value, least) in
            [("l2_timeout", self.call_timeout, 1), ("max_bus_silence", self.max_bus_silence, 30)]
        {
            if value < Duration::from_millis(least) || value > Duration::from_secs(3600) {
                return Err(Error::config(format!("{name} = {value:?} is not allowed: give {least} ms to 1 h")));
            }
        }
        let runtime = self.runtime.unwrap_or_else(|| Arc::new(SystemRuntime::current()));
        let max_silence = self.max_bus_silence.as_millis() as u64;
        let prefix = self.prefix.clone();
        let shared = self.store.zip(self.codec).map(|(store, codec)| SharedTier {
            l2: Arc::new(L2::new(store, Arc::clone(&runtime), self.prefix, self.call_timeout)),
            codec,
            compress_from: self.compression.then_some(COMPRESS_FROM),
        });
        let bus = self.bus.map(|bus| {
            bus.open(&prefix, &runtime);
            let me = Sender { node: runtime.random(), incarnation: runtime.random() };
            let l2 = shared.as_ref().map(|shared| Arc::clone(&shared.l2));
            let joined = l2.zip(bus.stream()).filter(|(l2, stream)| l2.carries(stream));
            let joined = joined.map(|(l2, stream)| Joined { l2, stream });
            let heartbeat = max_silence / 3;
            let outbox = Outbox::new(Arc::clone(&bus), Arc::clone(&runtime), me, heartbeat, self.call_timeout, joined);
            BusSide {
                bus,
                outbox: Arc::new(outbox),
                me,
                peers: Mutex::new(Peers::default()),
                max_silence,
                heard_at: AtomicU64::new(runtime.now_ms()),
                subscribed: AtomicBool::new(false),
                silent: AtomicBool::new(false),
                lag: AtomicU64::new(u64::MAX),
            }
        });
        let scopes = Scopes::new();
        let scope = scopes.named("")?;
        let core = Arc::new(Core {
            l1: L1::new(self.engine, capacity, weigher, runtime.random()),
            flights: Arc::new(Flights::new(runtime.random())),
            marks: Watermarks::new(),
            scopes,
            repairs: Repairs::default(),
            recent: Recent::default(),
            syncing: SharedRun::default(),
            shared,
            bus,
            is_null: self.is_null,
            strict: self.strict,
            counters: Counters::default(),
            owned: Owned::default(),
            closed: AtomicBool::new(false),
            loops: Mutex::default(),
            runtime,
        });
        core.start_loops()?;
        Ok(HybridCache::from_parts(core, Place::new(scope, resolved), self.options))
    }
}
