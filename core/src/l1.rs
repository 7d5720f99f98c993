//! The in-process tier: a bounded map from key to entry, behind one small trait with two engines.
//!
//! An engine decides what to keep and nothing else: deadlines are judged in `entry`, and every change of a key happens
//! under the registry's lock for it. It must be linearizable per key: after `remove` has returned, no `get` on any
//! thread finds the old entry.

#[cfg(feature = "moka")]
mod moka;
mod quick;
#[cfg(test)]
mod suite;

use std::sync::Arc;

use crate::key::{Key, KeyRef};

/// The engine that keeps entries in memory and decides which of them to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineKind {
    /// `quick_cache`: sharded, scan-resistant (S3-FIFO like). The faster of the two in every measurement; see `benches`.
    #[default]
    QuickCache,
    /// `moka`: W-TinyLFU.
    #[cfg(feature = "moka")]
    Moka,
}

/// How much L1 holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capacity {
    Entries(u64),
    /// In the units of the weigher.
    Bytes(u64),
}

/// What an entry weighs.
pub(crate) type Weigher<T> = Arc<dyn Fn(&Key, &T) -> u64 + Send + Sync>;

trait Engine<T>: Send + Sync {
    fn get(&self, key: KeyRef<'_>) -> Option<T>;
    fn insert(&self, key: Key, entry: T);
    fn remove(&self, key: KeyRef<'_>);
    fn clear(&self);
    fn len(&self) -> u64;
    fn weight(&self) -> u64;
    /// Carries out what was put off, so that a test sees it.
    #[cfg(test)]
    fn settle(&self) {}
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
    pub(crate) fn new(kind: EngineKind, capacity: Capacity, weigher: Option<Weigher<T>>, seed: u64) -> Self {
        match kind {
            EngineKind::QuickCache => Self::Quick(quick::Quick::new(capacity, weigher, seed)),
            #[cfg(feature = "moka")]
            EngineKind::Moka => Self::Moka(moka::Moka::new(capacity, weigher, seed)),
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
