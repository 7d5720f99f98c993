//! The source of truth, and what each read may return.
//!
//! A value is the version of its key at the source; versions only grow. Every change of the source is followed by an
//! invalidation (a remove, a set, a tag), and the model knows when each began and ended, in one order of events for the
//! whole fleet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a version got into the cache's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Remove,
    Set,
    Tag,
}

/// One change of one key, and its invalidation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) how: How,
    pub(crate) node: usize,
    pub(crate) began: u64,
    pub(crate) ended: Option<(u64, u64)>,
}

/// A read that has returned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    pub(crate) node: usize,
    pub(crate) key: u64,
    /// The event and the time at which it began.
    pub(crate) began: u64,
    pub(crate) began_at: u64,
    /// Whether the value was in memory or in the store when the caller had it.
    pub(crate) kept: bool,
}

#[derive(Default)]
pub(crate) struct State {
    event: u64,
    version: u64,
    source: HashMap<u64, u64>,
    changes: HashMap<u64, Vec<Change>>,
    /// By node and key: what was returned, and at which event.
    returned: HashMap<(usize, u64), Vec<(u64, u64)>>,
    loading: HashMap<u64, u64>,
    trace: Vec<String>,
    pub(crate) violation: Option<String>,
    pub(crate) reads: u64,
}

#[derive(Clone, Default)]
pub(crate) struct Model(Arc<Mutex<State>>);

impl Model {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn event(&self) -> u64 {
        let mut state = self.state();
        state.event += 1;
        state.event
    }

    pub(crate) fn note(&self, now: u64, what: impl FnOnce() -> String) {
        let mut state = self.state();
        if state.trace.len() < 20_000 {
            let line = format!("{:>5} {now:>8} {}", state.event, what());
            state.trace.push(line);
        }
    }

    /// The source's version of a key, as a loader reads it.
    pub(crate) fn read_source(&self, key: u64) -> u64 {
        self.state().source.get(&key).copied().unwrap_or(0)
    }

    /// Changes the source; the invalidation begins now.
    pub(crate) fn change(&self, key: u64, how: How, node: usize) -> (u64, usize) {
        let mut state = self.state();
        state.event += 1;
        state.version += 1;
        let (version, began) = (state.version, state.event);
        state.source.insert(key, version);
        let changes = state.changes.entry(key).or_default();
        changes.push(Change { version, how, node, began, ended: None });
        (version, changes.len() - 1)
    }

    /// The invalidation has returned.
    pub(crate) fn changed(&self, key: u64, index: usize, now: u64) {
        let mut state = self.state();
        state.event += 1;
        let event = state.event;
        if let Some(change) = state.changes.get_mut(&key).and_then(|changes| changes.get_mut(index)) {
            change.ended = Some((event, now));
        }
    }

    /// Judges what a read has returned. `bound`: how long another node may need to hear of a change, where that is
    /// bounded in this run.
    pub(crate) fn returned(&self, read: Read, version: u64, bound: Option<u64>) {
        let Read { node, key, began, began_at, .. } = read;
        let mut state = self.state();
        state.event += 1;
        state.reads += 1;
        let event = state.event;
        let changes = state.changes.get(&key).map_or(&[][..], Vec::as_slice);
        let mut violation = None;
        for change in changes {
            let Some((ended, ended_at)) = change.ended else { continue };
            if version >= change.version || set_at_the_same_time(changes, version, change.began) {
                continue;
            }
            if change.node == node && ended < began {
                violation = Some(format!("4.3 read your own writes: {change:?} had returned on this node"));
            }
            if bound.is_some_and(|bound| ended_at + bound < began_at) {
                violation = Some(format!("4.6 bounded staleness: {change:?} returned long ago"));
            }
        }
        for (at, newer) in state.returned.get(&(node, key)).map_or(&[][..], Vec::as_slice) {
            let began_newer = changes.iter().find(|change| change.version == *newer).map_or(0, |change| change.began);
            if *at < began && *newer > version && !set_at_the_same_time(changes, version, began_newer) {
                violation = Some(format!("4.4 no going back: {newer} was returned before at event {at}"));
            }
        }
        if let Some(violation) = violation {
            state.violate(format!("node {node} key {key} returned {version} (read began at {began}): {violation}"));
        }
        // A loader may see the source ahead of the invalidation that announces the change. Where its load has lost the
        // right to be kept, its callers are answered all the same; the value counts from its invalidation on.
        if read.kept {
            state.returned.entry((read.node, read.key)).or_default().push((event, version));
        }
    }

    /// Judges what the store holds when an invalidation that reached it has returned.
    pub(crate) fn stored(&self, key: u64, version: u64, index: usize) {
        let mut state = self.state();
        let changes = state.changes.get(&key).map_or(&[][..], Vec::as_slice);
        let Some(change) = changes.get(index).copied() else { return };
        if version < change.version && !set_at_the_same_time(changes, version, change.began) {
            state
                .violate(format!("4.1 no stale fill: the store holds version {version} of key {key} after {change:?}"));
        }
    }

    /// A loader begins; `alone`: no other may run for this key anywhere.
    pub(crate) fn load_begins(&self, key: u64, alone: bool) {
        let mut state = self.state();
        let loading = state.loading.entry(key).or_default();
        *loading += 1;
        if *loading > 1 && alone {
            state.violate(format!("3.2 and 3.3 single-flight: two loads of key {key} at once"));
        }
    }

    pub(crate) fn load_ends(&self, key: u64) {
        *self.state().loading.entry(key).or_insert(1) -= 1;
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        self.state().trace.clone()
    }
}

impl State {
    pub(crate) fn violate(&mut self, what: String) {
        let event = self.event;
        self.trace.push(format!("{event:>5}          VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }
}

/// Of two sets at once the one that reaches the store last wins, whichever is newer: `version` was set by an operation
/// that had not returned when the other began.
fn set_at_the_same_time(changes: &[Change], version: u64, other_began: u64) -> bool {
    changes.iter().any(|change| {
        change.version == version && change.how == How::Set && change.ended.is_none_or(|(ended, _)| ended > other_began)
    })
}
