//! How a flight ends: what its callers are answered, and what L1 keeps.

use std::sync::Arc;

use crate::engine::Outcome;
use crate::entry::{Entry, Lifetime};
use crate::error::{Error, Result};
use crate::flight::Filled;
use crate::fly::{Begun, ERROR_BACKOFF, Plan};
use crate::loader::Loaded;
use crate::values::checked_tags;

/// What L1 takes the entry for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// It was read from L2.
    Read,
    /// It is new.
    Written,
    /// It is the stale entry that L1 holds, to be answered for a while without a load. Where L1 holds another value by
    /// now, that one is newer.
    Throttled,
}

/// How a flight ends and what it leaves behind.
pub(crate) struct Landing<V> {
    pub(crate) outcome: Outcome<V>,
    pub(crate) keep: Option<Entry<V>>,
    pub(crate) how: How,
    /// The value was made without L2: its key goes on the repair list, in one step with its insert.
    pub(crate) list: bool,
}

impl<V> Landing<V> {
    pub(crate) fn nothing() -> Self {
        Self { outcome: Ok(None), keep: None, how: How::Written, list: false }
    }

    pub(crate) fn read(entry: Entry<V>) -> Self {
        Self { keep: Some(entry.clone()), outcome: Ok(Some(entry)), how: How::Read, list: false }
    }
}

/// A loaded value; without a lifetime where it is not to be kept.
pub(crate) struct Made<V> {
    pub(crate) entry: Entry<V>,
    pub(crate) lifetime: Option<Lifetime>,
}

impl<V: Send + Sync + 'static> Plan<V> {
    pub(crate) fn landing_alone(&self, loaded: Loaded<V>, begun: &Begun) -> Landing<V> {
        let made = match self.make_entry(loaded, begun) {
            Ok(made) => made,
            Err(error) => return self.failure(error),
        };
        Landing {
            keep: made.lifetime.is_some().then(|| made.entry.clone()),
            outcome: Ok(Some(made.entry)),
            how: How::Written,
            list: self.core.shared.is_some(),
        }
    }

    /// Ends a flight whose loader ran outside, on a host's own loop, without L2.
    pub(crate) fn land_alone(&self, outcome: Result<Loaded<V>>, begun: &Begun) -> Outcome<V> {
        let landing = match outcome {
            Ok(loaded) => self.landing_alone(loaded, begun),
            Err(error) => self.failure(error),
        };
        let outcome = landing.outcome.clone();
        self.land(landing);
        outcome
    }

    pub(crate) fn make_entry(&self, loaded: Loaded<V>, begun: &Begun) -> Result<Made<V>> {
        let stale = self.fallback.lock().clone();
        let (value, inherited) = match (loaded.value, stale) {
            (Some(value), _) => (Arc::new(value), None),
            (None, Some(stale)) => (stale.value, stale.tags),
            (None, None) => {
                return Err(Error::loader("it answered not_modified, but there was no stale value"));
            }
        };
        let options = &self.place.options;
        let is_null = self.core.is_null.is_some_and(|is_null| is_null(&value));
        let ttl = match loaded.ttl {
            Some(ttl) => Some(ttl.as_millis() as u64),
            None if is_null => options.negative_ttl,
            None => Some(options.ttl),
        };
        let tags = if loaded.tags.is_empty() { inherited } else { Some(checked_tags(loaded.tags)?) };
        let lifetime = ttl
            .filter(|ttl| *ttl > 0 && loaded.cache)
            .map(|ttl| Lifetime::new(ttl, options, || self.core.runtime.random()));
        let elapsed = self.core.runtime.now_ms().saturating_sub(begun.at);
        let entry = Entry {
            value,
            read_at: begun.at,
            deadlines: lifetime.map(|lifetime| lifetime.deadlines(elapsed, options)).unwrap_or_default(),
            stamp: begun.stamp,
            checked: self.flight.born(),
            id: 0,
            tags,
        };
        Ok(Made { entry, lifetime })
    }

    /// A failed load: the stale value, if it may serve, answered for a while without asking again; or the error, shared
    /// for a moment.
    pub(crate) fn failure(&self, error: Error) -> Landing<V> {
        self.core.counters.load_failures.add_one();
        let fallback = self.fallback.lock().clone().filter(|entry| self.is_usable(entry));
        match fallback {
            Some(entry) => {
                tracing::debug!(key = &*self.key, %error, "a load failed: the stale value is served");
                self.core.counters.fallbacks_served.add_one();
                let throttled = entry.throttled(self.core.runtime.now_ms());
                Landing { keep: Some(throttled), outcome: Ok(Some(entry)), how: How::Throttled, list: false }
            }
            None => Landing { outcome: Err(error), keep: None, how: How::Written, list: false },
        }
    }

    pub(crate) fn land(&self, landing: Landing<V>) {
        let core = &self.core;
        let now = core.runtime.now_ms();
        let share = landing.outcome.is_err().then(|| (now + ERROR_BACKOFF.as_millis() as u64, now));
        let Landing { outcome, keep, how, list } = landing;
        let answered = outcome.as_ref().ok().and_then(Clone::clone);
        core.flights.finish(&self.flight, outcome, share, |alive| {
            if list {
                // In one step with the insert: L1 keeps a value that L2 has not accepted only while its key is listed.
                core.list_for_repair(&self.place.scope, &self.key);
            }
            if how == How::Throttled {
                self.throttle(keep.filter(|_| alive));
                return Filled::Nothing;
            }
            match keep {
                Some(entry) if alive && core.insert(&self.place.scope, &self.key, &entry) => match how {
                    How::Read => Filled::Read(entry.id),
                    How::Written | How::Throttled => Filled::Written,
                },
                keep => {
                    core.counters.fills_dead.add(u64::from(keep.is_some()));
                    let in_l2 = keep.is_some_and(|entry| entry.id != 0);
                    answered.map_or(Filled::Nothing, |answered| self.step_back(&answered, in_l2))
                }
            }
        });
    }

    /// Callers get a value that L1 does not take. What L1 holds instead may be older, and must not be answered after it:
    /// L1 lets go of it, and of all that was read from L2 before now.
    pub(crate) fn step_back(&self, answered: &Entry<V>, in_l2: bool) -> Filled {
        let at = self.place.at(&self.key);
        let same = |held: &Entry<V>| Arc::ptr_eq(&held.value, &answered.value) || (in_l2 && held.id == answered.id);
        if self.core.l1.get(at).is_none_or(|held| !same(&held)) {
            self.core.l1.remove(at);
        }
        if in_l2 { Filled::Read(answered.id) } else { Filled::Unkept }
    }

    fn throttle(&self, stale: Option<Entry<V>>) {
        let held = self.core.l1.get(self.place.at(&self.key));
        if let (Some(stale), Some(held)) = (stale, held)
            && Arc::ptr_eq(&held.value, &stale.value)
        {
            self.core.insert(&self.place.scope, &self.key, &stale);
        }
    }
}
