use std::hash::{Hash, Hasher};

use equivalent::Equivalent;
use foldhash::quality::FixedState;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

use super::{Capacity, Engine, Scale};
use crate::key::{Key, KeyRef};

pub(crate) struct Quick<T> {
    cache: Cache<Weighed, T, StoredWeight, FixedState, DropUnlocked>,
    scale: Scale<T>,
}

/// A key and what its entry weighs, in the room of the key alone: 4 GiB is heavy enough.
#[derive(Clone)]
struct Weighed {
    text: Box<str>,
    scope: u32,
    weight: u32,
}

impl Weighed {
    fn key(&self) -> KeyRef<'_> {
        KeyRef { scope: self.scope, text: &self.text }
    }
}

// Two weights of one key are one key.
impl PartialEq for Weighed {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Weighed {}

impl Hash for Weighed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl Equivalent<Weighed> for KeyRef<'_> {
    fn equivalent(&self, held: &Weighed) -> bool {
        *self == held.key()
    }
}

#[derive(Clone, Copy)]
struct StoredWeight;

impl<T> Weighter<Weighed, T> for StoredWeight {
    #[inline]
    fn weight(&self, key: &Weighed, _: &T) -> u64 {
        key.weight.into()
    }
}

/// Carries what an insert drives out beyond the shard's lock, so that a value's `drop` may use the cache. The default
/// lifecycle does so for two entries and drops the others under the lock.
#[derive(Clone, Copy)]
struct DropUnlocked;

impl<T> Lifecycle<Weighed, T> for DropUnlocked {
    /// One is the rule, and costs no allocation.
    type RequestState = (Option<(Weighed, T)>, Vec<(Weighed, T)>);

    fn on_evict(&self, (first, others): &mut Self::RequestState, key: Weighed, entry: T) {
        match first {
            None => *first = Some((key, entry)),
            Some(_) => others.push((key, entry)),
        }
    }
}

const MAX_SHARDS: u64 = 64;

/// Hashing spreads keys unevenly: over smaller shards, much of the capacity would stay unused.
const MIN_SHARD_ENTRIES: u64 = 128;

/// A shard keeps no entry above 97 % of its own capacity.
const MIN_SHARD_BYTES: u64 = 8 << 20;

/// Bounds how many evicted keys are remembered: about 3 % of the capacity, which nobody counts.
const TYPICAL_BYTES: u64 = 2 << 10;

impl<T: Clone + Send + Sync + 'static> Quick<T> {
    pub(super) fn new(capacity: Capacity, scale: Scale<T>, seed: u64) -> Self {
        let (weight, entries, min_shard) = match capacity {
            Capacity::Entries(entries) => (entries, entries, MIN_SHARD_ENTRIES),
            Capacity::Bytes(bytes) => (bytes, bytes / TYPICAL_BYTES, MIN_SHARD_BYTES),
        };
        // From the capacity alone, as the number of cores would make one seed evict differently on another machine.
        let shards = 1 << (weight / min_shard).clamp(1, MAX_SHARDS).ilog2();
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(usize::try_from(entries).unwrap_or(usize::MAX))
            // Each shard's part is rounded up.
            .weight_capacity(weight - weight % shards as u64)
            .build()
            .expect("both capacities are set");
        Self { cache: Cache::with_options(options, StoredWeight, FixedState::with_seed(seed), DropUnlocked), scale }
    }
}

impl<T: Clone + Send + Sync + 'static> Engine<T> for Quick<T> {
    #[inline]
    fn get(&self, key: KeyRef<'_>) -> Option<T> {
        self.cache.get(&key)
    }

    fn insert(&self, key: Key, entry: T) {
        let weight = u32::try_from(self.scale.weigh(&key, &entry)).unwrap_or(u32::MAX);
        let Key { scope, text } = key;
        self.cache.insert(Weighed { text, scope, weight }, entry);
    }

    fn remove(&self, key: KeyRef<'_>) {
        self.cache.remove(&key);
    }

    fn clear(&self) {
        // `Cache::clear` would drop every value under its shard's lock.
        self.cache.drain().for_each(drop);
    }

    fn len(&self) -> u64 {
        self.cache.len() as u64
    }

    fn weight(&self) -> u64 {
        self.cache.weight()
    }
}
