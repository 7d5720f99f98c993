//! Keys whose invalidation has not reached everyone: not read from L2 until it has.
//!
//! A repair is always a remove, never a late write, so it may happen at any time and in any order.

use std::sync::atomic::{AtomicUsize, Ordering};

use hashbrown::HashMap;

use crate::key::{Key, KeyRef};
use crate::sync::Mutex;

/// Keys the list holds. Beyond, the key's whole scope is closed to L2.
pub(crate) const MAX_REPAIRS: usize = 10_000;

#[derive(Default)]
pub(crate) struct Repairs {
    list: Mutex<List>,
    /// The list's length, read without its lock: the list is nearly always empty.
    len: AtomicUsize,
}

#[derive(Default)]
struct List {
    /// Each listing has its number, so that a key listed again during its repair stays.
    keys: HashMap<Key, u64, foldhash::fast::FixedState>,
    next: u64,
    /// A worker is at it.
    working: bool,
}

impl Repairs {
    /// Whether the key must not be read from L2.
    pub(crate) fn has(&self, key: KeyRef<'_>) -> bool {
        // Acquire pairs with the release in `add`: who was told of a listing finds it.
        self.len.load(Ordering::Acquire) > 0 && self.list.lock().keys.contains_key(&key)
    }

    /// Lists a key; false where the list is full.
    pub(crate) fn add(&self, key: KeyRef<'_>) -> bool {
        let mut list = self.list.lock();
        let number = list.next;
        if list.keys.len() >= MAX_REPAIRS && !list.keys.contains_key(&key) {
            return false;
        }
        list.next += 1;
        list.keys.insert(key.to_key(), number);
        self.len.store(list.keys.len(), Ordering::Release);
        true
    }

    /// Some of the keys, with the number of their listing.
    pub(crate) fn some(&self, most: usize) -> Vec<(Key, u64)> {
        let list = self.list.lock();
        let mut some: Vec<_> = list.keys.iter().map(|(key, number)| (key.clone(), *number)).collect();
        some.sort_unstable_by_key(|(_, number)| *number);
        some.truncate(most);
        some
    }

    /// Takes repaired keys off the list, unless they were listed again meanwhile.
    pub(crate) fn done(&self, repaired: &[(Key, u64)]) {
        let mut list = self.list.lock();
        for (key, number) in repaired {
            if list.keys.get(key) == Some(number) {
                list.keys.remove(key);
            }
        }
        self.len.store(list.keys.len(), Ordering::Release);
    }

    /// Forgets the keys of a scope, which a watermark has dealt with.
    pub(crate) fn forget_scope(&self, scope: u32, before: u64) {
        let mut list = self.list.lock();
        list.keys.retain(|key, number| key.scope != scope || *number >= before);
        self.len.store(list.keys.len(), Ordering::Release);
    }

    /// The number that the next listing will have.
    pub(crate) fn next_number(&self) -> u64 {
        self.list.lock().next
    }

    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Whether the caller has to start a worker.
    pub(crate) fn start_work(&self) -> bool {
        !std::mem::replace(&mut self.list.lock().working, true)
    }

    /// Ends the worker if `idle` still holds under the lock; what is listed later starts a new one.
    pub(crate) fn stop_work(&self, idle: impl FnOnce() -> bool) -> bool {
        let mut list = self.list.lock();
        let stop = list.keys.is_empty() && idle();
        list.working &= !stop;
        stop
    }
}
