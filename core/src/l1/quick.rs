use foldhash::quality::FixedState;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

use super::{Capacity, Engine, Scale};
use crate::key::{Key, KeyRef};

pub(crate) struct Quick<T> {
    cache: Cache<Key, Held<T>, StoredWeight, FixedState, DropUnlocked>,
    scale: Scale<T>,
}

#[derive(Clone)]
struct Held<T> {
    entry: T,
    /// In 32 bits, for a smaller entry: 4 GiB is heavy enough.
    weight: u32,
}

#[derive(Clone, Copy)]
struct StoredWeight;

impl<T> Weighter<Key, Held<T>> for StoredWeight {
    #[inline]
    fn weight(&self, _: &Key, held: &Held<T>) -> u64 {
        held.weight.into()
    }
}

/// Carries what an insert drives out beyond the shard's lock, so that a value's `drop` may use the cache. The default
/// lifecycle does so for two entries and drops the others under the lock.
#[derive(Clone, Copy)]
struct DropUnlocked;

impl<T> Lifecycle<Key, Held<T>> for DropUnlocked {
    /// One is the rule, and costs no allocation.
    type RequestState = (Option<(Key, Held<T>)>, Vec<(Key, Held<T>)>);

    fn on_evict(&self, (first, others): &mut Self::RequestState, key: Key, held: Held<T>) {
        match first {
            None => *first = Some((key, held)),
            Some(_) => others.push((key, held)),
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
        self.cache.get(&key).map(|held| held.entry)
    }

    fn insert(&self, key: Key, entry: T) {
        let weight = u32::try_from(self.scale.weigh(&key, &entry)).unwrap_or(u32::MAX);
        self.cache.insert(key, Held { entry, weight });
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
