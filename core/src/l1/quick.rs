use foldhash::quality::FixedState;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};

use super::{Capacity, Engine, Weigher};
use crate::key::{Key, KeyRef};

pub(crate) struct Quick<T>(Cache<Key, T, Weight<T>, FixedState>);

/// One per entry where nobody weighs. Never 0, which would pin the entry.
struct Weight<T>(Option<Weigher<T>>);

impl<T> Clone for Weight<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Weighter<Key, T> for Weight<T> {
    fn weight(&self, key: &Key, entry: &T) -> u64 {
        self.0.as_ref().map_or(1, |weigh| weigh(key, entry).max(1))
    }
}

/// For the first size of the tables, where only bytes are known.
const TYPICAL_WEIGHT: u64 = 256;

impl<T: Clone + Send + Sync + 'static> Quick<T> {
    pub(super) fn new(capacity: Capacity, weigher: Option<Weigher<T>>, seed: u64) -> Self {
        let (weight, entries) = match capacity {
            Capacity::Entries(entries) => (entries, entries),
            Capacity::Bytes(bytes) => (bytes, bytes / TYPICAL_WEIGHT),
        };
        let entries = usize::try_from(entries.max(1)).unwrap_or(usize::MAX);
        // Each shard has its part of the capacity: with too many for it, a shard would have room for nothing.
        let shards = (entries / 64).clamp(1, 64);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(entries.min(1 << 20))
            .weight_capacity(weight)
            .shards(shards)
            .build()
            .expect("both capacities are set");
        Self(Cache::with_options(options, Weight(weigher), FixedState::with_seed(seed), DefaultLifecycle::default()))
    }
}

impl<T: Clone + Send + Sync + 'static> Engine<T> for Quick<T> {
    #[inline]
    fn get(&self, key: KeyRef<'_>) -> Option<T> {
        self.0.get(&key)
    }

    fn insert(&self, key: Key, entry: T) {
        self.0.insert(key, entry);
    }

    fn remove(&self, key: KeyRef<'_>) {
        self.0.remove(&key);
    }

    fn clear(&self) {
        self.0.clear();
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn weight(&self) -> u64 {
        self.0.weight()
    }
}
