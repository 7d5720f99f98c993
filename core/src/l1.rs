//! The in-process tier: a bounded map from key to entry, behind one small trait with two engines.
//!
//! An engine decides what to keep and nothing else: deadlines are judged elsewhere. It may drop any entry at any time,
//! but is linearizable per key: once `insert`, `remove` or `clear` has returned, no `get` on any thread finds what was
//! there before.

#[cfg(feature = "moka")]
mod moka;
mod quick;
#[cfg(test)]
mod suite;

use std::sync::Arc;

use crate::key::{Key, KeyRef};

/// The engine that holds entries in memory and decides which of them to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineKind {
    /// `quick_cache`: sharded, S3-FIFO like, resistant to scans. Its bound holds at every instant.
    #[default]
    QuickCache,
    /// `moka`: W-TinyLFU. Admits, evicts and frees in batches, so it may hold some hundred entries too many for a while.
    #[cfg(feature = "moka")]
    Moka,
}

/// How much L1 holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capacity {
    Entries(u64),
    /// In the units of the weigher; without one, every entry weighs 1.
    Bytes(u64),
}

/// What an entry weighs.
pub(crate) type Weigher<T> = Arc<dyn Fn(&Key, &T) -> u64 + Send + Sync>;

pub(crate) trait Engine<T>: Send + Sync {
    fn get(&self, key: KeyRef<'_>) -> Option<T>;
    /// An entry too heavy ever to be kept takes the place of its key all the same: the key is then absent.
    fn insert(&self, key: Key, entry: T);
    fn remove(&self, key: KeyRef<'_>);
    fn clear(&self);
    fn len(&self) -> u64;
    fn weight(&self) -> u64;
    /// Carries out what the engine has put off.
    #[cfg(test)]
    fn settle(&self) {}
}

/// Weighs an entry once, outside every lock, for the engine to store beside it: an engine that asked again would lose
/// count with a weigher that answers differently, and one that panics under a lock would poison it.
struct Scale<T>(Option<Weigher<T>>);

impl<T> Scale<T> {
    fn new(capacity: Capacity, weigher: Option<Weigher<T>>) -> Self {
        Self(weigher.filter(|_| matches!(capacity, Capacity::Bytes(_))))
    }

    /// Never 0: to `quick_cache` that is an entry which cannot be evicted.
    fn weigh(&self, key: &Key, entry: &T) -> u64 {
        self.0.as_ref().map_or(1, |weigh| weigh(key, entry).max(1))
    }
}

/// Static dispatch: a hit pays a branch that is always predicted, and no virtual call.
pub(crate) enum L1<T> {
    Quick(quick::Quick<T>),
    #[cfg(feature = "moka")]
    Moka(moka::Moka<T>),
}

macro_rules! each {
    ($self:ident, $engine:ident => $call:expr) => {
        match $self {
            L1::Quick($engine) => $call,
            #[cfg(feature = "moka")]
            L1::Moka($engine) => $call,
        }
    };
}

impl<T: Clone + Send + Sync + 'static> L1<T> {
    /// `seed` keeps who chooses the keys from choosing their hashes.
    pub(crate) fn new(kind: EngineKind, capacity: Capacity, weigher: Option<Weigher<T>>, seed: u64) -> Self {
        let scale = Scale::new(capacity, weigher);
        match kind {
            EngineKind::QuickCache => Self::Quick(quick::Quick::new(capacity, scale, seed)),
            #[cfg(feature = "moka")]
            EngineKind::Moka => Self::Moka(moka::Moka::new(capacity, scale, seed)),
        }
    }

    #[inline]
    pub(crate) fn get(&self, key: KeyRef<'_>) -> Option<T> {
        each!(self, engine => engine.get(key))
    }

    pub(crate) fn insert(&self, key: Key, entry: T) {
        each!(self, engine => engine.insert(key, entry));
    }

    pub(crate) fn remove(&self, key: KeyRef<'_>) {
        each!(self, engine => engine.remove(key));
    }

    pub(crate) fn clear(&self) {
        each!(self, engine => engine.clear());
    }

    pub(crate) fn len(&self) -> u64 {
        each!(self, engine => engine.len())
    }

    pub(crate) fn weight(&self) -> u64 {
        each!(self, engine => engine.weight())
    }

    #[cfg(test)]
    fn settle(&self) {
        each!(self, engine => engine.settle());
    }
}
