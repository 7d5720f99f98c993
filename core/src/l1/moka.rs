use foldhash::quality::FixedState;
use moka::sync::Cache;

use super::{Capacity, Engine, Weigher};
use crate::key::{Key, KeyRef};

pub(crate) struct Moka<T>(Cache<Key, T, FixedState>);

impl<T: Clone + Send + Sync + 'static> Moka<T> {
    pub(super) fn new(capacity: Capacity, weigher: Option<Weigher<T>>, seed: u64) -> Self {
        let (Capacity::Entries(most) | Capacity::Bytes(most)) = capacity;
        let mut builder = Cache::builder().max_capacity(most);
        if let Some(weigh) = weigher {
            builder = builder.weigher(move |key, entry| u32::try_from(weigh(key, entry).max(1)).unwrap_or(u32::MAX));
        }
        Self(builder.build_with_hasher(FixedState::with_seed(seed)))
    }
}

impl<T: Clone + Send + Sync + 'static> Engine<T> for Moka<T> {
    #[inline]
    fn get(&self, key: KeyRef<'_>) -> Option<T> {
        self.0.get(&key)
    }

    fn insert(&self, key: Key, entry: T) {
        self.0.insert(key, entry);
    }

    fn remove(&self, key: KeyRef<'_>) {
        self.0.invalidate(&key);
    }

    fn clear(&self) {
        // Hides everything inserted before this instant; maintenance frees it later.
        self.0.invalidate_all();
    }

    fn len(&self) -> u64 {
        self.0.entry_count()
    }

    fn weight(&self) -> u64 {
        self.0.weighted_size()
    }

    #[cfg(test)]
    fn settle(&self) {
        self.0.run_pending_tasks();
    }
}
