use std::sync::atomic::{AtomicU32, Ordering};

use foldhash::quality::FixedState;
use moka::sync::Cache;

use super::{Capacity, Engine, Scale};
use crate::key::{Key, KeyRef};

/// The map changes at once; what is admitted, evicted and freed is settled later, after 64 writes or 300 ms, by
/// whichever thread comes by. Until then the map holds too much, and an entry just inserted may be turned away again.
pub(crate) struct Moka<T> {
    cache: Cache<Key, Held<T>, FixedState>,
    capacity: u64,
    scale: Scale<T>,
    /// How often the cache was cleared. An insert that began before a `clear` is lost with it.
    epoch: AtomicU32,
}

#[derive(Clone)]
struct Held<T> {
    entry: T,
    /// In moka's own width; what is heavier counts as 4 GiB.
    weight: u32,
    epoch: u32,
}

impl<T: Clone + Send + Sync + 'static> Moka<T> {
    pub(super) fn new(capacity: Capacity, scale: Scale<T>, seed: u64) -> Self {
        let (Capacity::Entries(most) | Capacity::Bytes(most)) = capacity;
        let mut builder = Cache::builder().max_capacity(most);
        if let Capacity::Bytes(_) = capacity {
            builder = builder.weigher(|_, held: &Held<T>| held.weight);
        }
        let cache = builder.build_with_hasher(FixedState::with_seed(seed));
        Self { cache, capacity: most, scale, epoch: AtomicU32::new(0) }
    }
}

impl<T: Clone + Send + Sync + 'static> Engine<T> for Moka<T> {
    #[inline]
    fn get(&self, key: KeyRef<'_>) -> Option<T> {
        let held = self.cache.get(&key)?;
        // Read after the lookup: whoever inserted the entry had seen its epoch.
        (held.epoch == self.epoch.load(Ordering::Acquire)).then_some(held.entry)
    }

    fn insert(&self, key: Key, entry: T) {
        let epoch = self.epoch.load(Ordering::Acquire);
        let weight = self.scale.weigh(&key, &entry);
        if weight > self.capacity {
            // As the new value of a key it already holds, moka would admit it and evict everything else.
            return self.remove(key.as_ref());
        }
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        self.cache.insert(key, Held { entry, weight, epoch });
    }

    fn remove(&self, key: KeyRef<'_>) {
        self.cache.invalidate(&key);
    }

    fn clear(&self) {
        // `invalidate_all` hides what was modified before this instant. That is not enough: it spares an entry of the
        // same tick of the clock, and the next insert of a key dates the old value anew just before it replaces it.
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.cache.invalidate_all();
        // Nobody else would free the entries of an idle cache.
        self.cache.run_pending_tasks();
    }

    fn len(&self) -> u64 {
        self.cache.entry_count()
    }

    fn weight(&self) -> u64 {
        self.cache.weighted_size()
    }

    #[cfg(test)]
    fn settle(&self) {
        self.cache.run_pending_tasks();
    }
}
