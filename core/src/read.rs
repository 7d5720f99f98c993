//! The read path: L1, then one flight per key (`fly`), which asks L2, takes the lease, loads, and fills on the way back
//! up (`landing`).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;

use crate::engine::{Core, Look, Outcome, Place, SharedTier};
use crate::entry::{Entry, Freshness};
use crate::error::{Error, Result};
use crate::flight::{Boarded, Flight, Hear, Purpose, Waiting};
use crate::fly::Plan;
use crate::landing::Landing;
use crate::loader::Loader;
use crate::pilot::{Drive, Work};

impl<V: Send + Sync + 'static> Core<V> {
    /// `get_with` past the hit path.
    pub(crate) async fn load(self: &Arc<Self>, place: &Place, key: &str, loader: Loader<V>) -> Result<Arc<V>> {
        self.usable(key)?;
        loop {
            let horizon = self.marks.horizon();
            let fallback = match self.look(&place.scope, key) {
                Look::Fresh(entry) => {
                    self.counters.l1_hits.add_one();
                    return Ok(entry.value);
                }
                Look::Refresh(entry) => {
                    self.counters.stale_served.add_one();
                    self.refresh(place, key, &entry, loader);
                    return Ok(entry.value);
                }
                Look::Fallback(entry) => Some(entry),
                Look::Miss => None,
            };
            match self.board(place, key, Purpose::Load, Hear::Future) {
                Boarded::Failed(outcome) => {
                    self.counters.joined.add_one();
                    return self.answer(outcome, fallback);
                }
                Boarded::Joined(flight, seat) => {
                    self.counters.joined.add_one();
                    let waiting = Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat);
                    if let Some(entry) = fallback.filter(|_| flight.is_late()) {
                        self.counters.fallbacks_served.add_one();
                        return Ok(entry.value);
                    }
                    let outcome = waiting.await;
                    if let Ok(Some(entry)) = &outcome
                        && self.dead_on_arrival(place, entry, horizon)
                    {
                        continue;
                    }
                    return self.answer(outcome, None);
                }
                Boarded::Lead(flight, seat) => {
                    self.counters.misses.add_one();
                    let waiting = Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat);
                    let work = Plan::new(self, Arc::clone(&flight), place, key, fallback).flown(loader);
                    return self.answer(Leading::new(self, flight, work, waiting).await, None);
                }
            }
        }
    }

    fn answer(&self, outcome: Outcome<V>, fallback: Option<Entry<V>>) -> Result<Arc<V>> {
        match (outcome, fallback) {
            (Ok(Some(entry)), _) => Ok(entry.value),
            (_, Some(entry)) => {
                self.counters.fallbacks_served.add_one();
                Ok(entry.value)
            }
            (Ok(None), None) => Err(Error::new(crate::ErrorKind::Loader, "the load ended without a value")),
            (Err(error), None) => Err(error),
        }
    }

    pub(crate) fn board(
        &self,
        place: &Place,
        key: &str,
        purpose: Purpose,
        hear: Hear<Outcome<V>>,
    ) -> Boarded<Outcome<V>> {
        // The generation is read before the flight is registered: a clear in between makes the flight older than it is.
        let born = self.marks.generation();
        let not_before = self.marks.not_before(place.scope.id);
        let boarded = self.flights.board(place.at(key), purpose, self.runtime.now_ms(), born, not_before, hear);
        if let Boarded::Joined(flight, _) = &boarded {
            self.send_off(flight.pilot.hand_over());
        }
        boarded
    }

    /// Whether a flight's value was killed by a watermark that this caller already knew when it came: it then starts
    /// over. Those who came before keep the value.
    pub(crate) fn dead_on_arrival(&self, place: &Place, entry: &Entry<V>, horizon: u64) -> bool {
        entry.stamp < horizon && self.marks.dead(entry.stamp, Some(entry.read_at), &place.scope.name, entry.tags())
    }

    /// Starts a background load for a value that is still answered, unless one is under way.
    fn refresh(self: &Arc<Self>, place: &Place, key: &str, entry: &Entry<V>, loader: Loader<V>) {
        if let Some(flight) = self.board_refresh(place, key) {
            Plan::refreshing(self, flight, place, key, entry).take_off(loader);
        }
    }

    /// A flight that nobody waits for, if none is under way.
    pub(crate) fn board_refresh(&self, place: &Place, key: &str) -> Option<Arc<Flight<Outcome<V>>>> {
        if self.flights.is_loading(place.at(key), self.marks.not_before(place.scope.id)) {
            return None;
        }
        match self.board(place, key, Purpose::Load, Hear::Future) {
            Boarded::Lead(flight, seat) => {
                flight.keep_going();
                self.flights.leave(&flight, seat);
                Some(flight)
            }
            Boarded::Joined(flight, seat) => {
                self.flights.leave(&flight, seat);
                None
            }
            Boarded::Failed(_) => None,
        }
    }

    /// `get` past the hit path: L1, then L2; nothing is loaded.
    pub(crate) async fn find(self: &Arc<Self>, place: &Place, key: &str) -> Result<Option<Arc<V>>> {
        self.usable(key)?;
        loop {
            let horizon = self.marks.horizon();
            match self.look(&place.scope, key) {
                Look::Fresh(entry) => {
                    self.counters.l1_hits.add_one();
                    return Ok(Some(entry.value));
                }
                Look::Refresh(entry) => {
                    self.counters.stale_served.add_one();
                    self.look_again(place, key, &entry);
                    return Ok(Some(entry.value));
                }
                Look::Fallback(_) | Look::Miss => {}
            }
            if self.shared.is_none() {
                self.counters.misses.add_one();
                return Ok(None);
            }
            let (outcome, joined) = match self.board(place, key, Purpose::Lookup, Hear::Future) {
                Boarded::Lead(flight, seat) => {
                    let waiting = Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat);
                    let work = Plan::new(self, Arc::clone(&flight), place, key, None).looked_up();
                    (Leading::new(self, flight, work, waiting).await?, false)
                }
                Boarded::Joined(flight, seat) => (Waiting::new(Arc::clone(&self.flights), flight, seat).await?, true),
                Boarded::Failed(outcome) => return outcome.map(|entry| entry.map(|entry| entry.value)),
            };
            if joined && outcome.as_ref().is_some_and(|entry| self.dead_on_arrival(place, entry, horizon)) {
                continue;
            }
            if outcome.is_none() {
                self.counters.misses.add_one();
            }
            return Ok(outcome.map(|entry| entry.value));
        }
    }

    /// A stale value was answered without a loader at hand: L2 may have a fresh one.
    fn look_again(self: &Arc<Self>, place: &Place, key: &str, entry: &Entry<V>) {
        if self.shared.is_none() || entry.freshness(self.runtime.now_ms()) == Freshness::RefreshAhead {
            return;
        }
        match self.board(place, key, Purpose::Lookup, Hear::Future) {
            Boarded::Lead(flight, seat) => {
                flight.keep_going();
                self.flights.leave(&flight, seat);
                Plan::new(self, flight, place, key, None).look_up();
            }
            Boarded::Joined(flight, seat) => {
                self.flights.leave(&flight, seat);
            }
            Boarded::Failed(_) => {}
        }
    }

    /// Many keys: L1 for each, and one call to L2 for those missing.
    pub(crate) async fn find_many(self: Arc<Self>, place: Place, keys: Vec<Box<str>>) -> Result<Vec<Option<Arc<V>>>> {
        let mut found = Vec::with_capacity(keys.len());
        let mut missing = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            self.usable(key)?;
            let entry = match self.look(&place.scope, key) {
                Look::Fresh(entry) => {
                    self.counters.l1_hits.add_one();
                    Some(entry)
                }
                Look::Refresh(entry) => {
                    self.counters.stale_served.add_one();
                    self.look_again(&place, key, &entry);
                    Some(entry)
                }
                Look::Fallback(_) | Look::Miss => {
                    missing.push(index);
                    None
                }
            };
            found.push(entry.map(|entry| entry.value));
        }
        if self.shared.is_none() || missing.is_empty() {
            self.counters.misses.add(missing.len() as u64);
            return Ok(found);
        }
        let (mut waits, mut plans) = (Vec::new(), Vec::new());
        for index in missing {
            match self.board(&place, &keys[index], Purpose::Lookup, Hear::Future) {
                Boarded::Lead(flight, seat) => {
                    waits.push((index, Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat)));
                    plans.push(Plan::new(&self, flight, &place, &keys[index], None));
                }
                Boarded::Joined(flight, seat) => {
                    waits.push((index, Waiting::new(Arc::clone(&self.flights), flight, seat)));
                }
                Boarded::Failed(_) => {}
            }
        }
        if !plans.is_empty() {
            let core = Arc::clone(&self);
            self.spawn_owned(async move { core.look_up_many(plans).await })?;
        }
        for (index, waiting) in waits {
            found[index] = waiting.await?.map(|entry| entry.value);
            if found[index].is_none() {
                self.counters.misses.add_one();
            }
        }
        Ok(found)
    }

    async fn look_up_many(self: &Arc<Self>, plans: Vec<Plan<V>>) {
        let Some(shared) = &self.shared else { return };
        let (open, shut): (Vec<_>, Vec<_>) =
            plans.into_iter().partition(|plan| !self.closed_to_l2(&plan.place.scope, &plan.key));
        for plan in shut {
            plan.land(Landing::nothing());
        }
        let keys: Vec<_> = open.iter().map(|plan| shared.l2.key(&plan.place.scope.name, &plan.key)).collect();
        let cells = if self.in_sync(shared).await { Some(self.read_clock_then(shared, &keys).await) } else { None };
        match cells {
            Some((read_at, Ok(cells))) => {
                for (plan, bytes) in open.into_iter().zip(cells) {
                    let landing = plan.landing_of_lookup(shared, bytes, read_at);
                    plan.land(landing);
                }
            }
            _ => open.into_iter().for_each(|plan| plan.land(Landing::nothing())),
        }
    }

    pub(crate) async fn read_clock_then(
        &self,
        shared: &SharedTier<V>,
        keys: &[String],
    ) -> (u64, Result<Vec<Option<Bytes>>>) {
        let read_at = self.runtime.now_ms();
        let cells = shared.l2.get_many(keys).await.inspect_err(|_| self.counters.l2_errors.add_one());
        (read_at, cells)
    }
}

/// The caller who leads a flight: drives its work, as long as nobody else waits for it.
struct Leading<'a, V: Send + Sync + 'static> {
    core: &'a Arc<Core<V>>,
    flight: Arc<Flight<Outcome<V>>>,
    waiting: Waiting<Outcome<V>>,
}

impl<'a, V: Send + Sync + 'static> Leading<'a, V> {
    fn new(core: &'a Arc<Core<V>>, flight: Arc<Flight<Outcome<V>>>, work: Work, waiting: Waiting<Outcome<V>>) -> Self {
        core.send_off(flight.pilot.take_on(work));
        Self { core, flight, waiting }
    }
}

impl<V: Send + Sync + 'static> Future for Leading<'_, V> {
    type Output = Outcome<V>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome<V>> {
        match self.flight.pilot.drive(cx) {
            // Only the work itself answers, so only the work has to wake this caller.
            Drive::Here => return self.waiting.look(None),
            Drive::HandOver(work) => self.core.send_off(Some(work)),
            Drive::Gone => {}
        }
        self.waiting.look(Some(cx))
    }
}

impl<V: Send + Sync + 'static> Drop for Leading<'_, V> {
    fn drop(&mut self) {
        // Before the seat is left: a load that nobody wants any more has to find that out and give its lease back.
        self.core.send_off(self.flight.pilot.hand_over());
    }
}
