//! One flight's work, from boarding to landing: find the value in L2 or get the lease, load, fill.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use crate::engine::{Core, Outcome, Place, SharedTier};
use crate::entry::{Entry, Freshness};
use crate::error::{Error, Result};
use crate::flight::{Filled, Flight};
use crate::l2::LEASE;
use crate::l2::cells::{Acquired, Lease};
use crate::landing::{How, Landing};
use crate::loader::{LoadContext, Loader};
use crate::pilot::Work;
use crate::runtime::{Either, first, jittered};
use crate::sync::Mutex;
use crate::values::Found;
use crate::wire::cell::{Cell, HOLD};

/// For how long callers share the error of a load that failed, here and, through the lease's hold, in the fleet.
pub(crate) const ERROR_BACKOFF: Duration = Duration::from_millis(200);

/// The first and the longest pause of a node that waits for another's fill. Milliseconds.
const FIRST_POLL: u64 = 4;
const LONGEST_POLL: u64 = 100;

/// One flight's work, from boarding to landing.
pub(crate) struct Plan<V> {
    pub(crate) core: Arc<Core<V>>,
    pub(crate) flight: Arc<Flight<Outcome<V>>>,
    pub(crate) place: Place,
    pub(crate) key: Box<str>,
    /// The entry that a background refresh is to replace: finding the same one in L2 is no reason to stop.
    pub(crate) refreshes: Option<u64>,
    /// The best stale value at hand.
    pub(crate) fallback: Mutex<Option<Entry<V>>>,
    /// The lease in hand, to be given back if the flight is cut short.
    lease: Mutex<Option<Lease>>,
    /// Among the work that `close` waits for.
    counted: bool,
}

impl<V> Drop for Plan<V> {
    /// Fails the flight where its work is dropped unfinished, so that nobody waits for ever.
    fn drop(&mut self) {
        if !self.flight.has_ended() {
            self.core.flights.retire(&self.flight, Err(Error::loader("it was dropped before it finished")));
        }
        if self.counted {
            self.core.owned.leave();
        }
    }
}

/// When a load began.
pub(crate) struct Begun {
    pub(crate) stamp: u64,
    pub(crate) at: u64,
}

impl<V: Send + Sync + 'static> Plan<V> {
    pub(crate) fn new(
        core: &Arc<Core<V>>,
        flight: Arc<Flight<Outcome<V>>>,
        place: &Place,
        key: &str,
        fallback: Option<Entry<V>>,
    ) -> Self {
        Self {
            core: Arc::clone(core),
            flight,
            place: place.clone(),
            key: key.into(),
            refreshes: None,
            fallback: Mutex::new(fallback),
            lease: Mutex::new(None),
            counted: false,
        }
    }

    pub(crate) fn refreshing(
        core: &Arc<Core<V>>,
        flight: Arc<Flight<Outcome<V>>>,
        place: &Place,
        key: &str,
        entry: &Entry<V>,
    ) -> Self {
        let mut plan = Self::new(core, flight, place, key, Some(entry.clone()));
        plan.refreshes = Some(entry.id);
        plan
    }

    /// Flies as a task of its own.
    pub(crate) fn take_off(self, loader: Loader<V>) {
        let core = Arc::clone(&self.core);
        core.send_off(Some(self.flown(loader)));
    }

    /// Looks the key up as a task of its own.
    pub(crate) fn look_up(self) {
        let core = Arc::clone(&self.core);
        core.send_off(Some(self.looked_up()));
    }

    /// The flight's work: finds the value or loads it.
    pub(crate) fn flown(self, loader: Loader<V>) -> Work {
        let plan = self.counted();
        Box::pin(async move { plan.fly(loader).await })
    }

    /// The flight's work: finds the value, or not.
    pub(crate) fn looked_up(self) -> Work {
        let plan = self.counted();
        Box::pin(async move {
            let core = &plan.core;
            let landing = match &core.shared {
                Some(shared) if !core.closed_to_l2(&plan.place.scope, &plan.key) && core.in_sync(shared).await => {
                    let read_at = core.runtime.now_ms();
                    match shared.l2.get(&shared.l2.key(&plan.place.scope.name, &plan.key)).await {
                        Ok(bytes) => plan.landing_of_lookup(shared, bytes, read_at),
                        Err(_) => {
                            core.counters.l2_errors.add_one();
                            Landing::nothing()
                        }
                    }
                }
                _ => Landing::nothing(),
            };
            plan.land(landing);
        })
    }

    /// From here on `close` waits for the plan.
    fn counted(mut self) -> Self {
        self.core.owned.enter();
        self.counted = true;
        self
    }

    pub(crate) fn landing_of_lookup(&self, shared: &SharedTier<V>, bytes: Option<Bytes>, read_at: u64) -> Landing<V> {
        match self.judge(shared, bytes, read_at) {
            Found::Usable(entry, Freshness::Fallback) => {
                Landing { outcome: Ok(None), keep: Some(entry), how: How::Read, list: false }
            }
            Found::Usable(entry, _) => {
                self.core.counters.l2_hits.add_one();
                Landing::read(entry)
            }
            Found::Nothing(_) => Landing::nothing(),
        }
    }

    /// The whole flight: work, timeouts, and the callers' going away.
    async fn fly(&self, loader: Loader<V>) {
        let landing = {
            let mut work = pin!(self.work(loader));
            let mut abandoned = pin!(self.flight.abandoned());
            let options = &self.place.options;
            let mut soft = options.soft_timeout.map(|limit| self.core.runtime.sleep(limit));
            let mut hard = options.hard_timeout.map(|limit| self.core.runtime.sleep(limit));
            std::future::poll_fn(|cx| {
                if let Poll::Ready(landing) = work.as_mut().poll(cx) {
                    return Poll::Ready(Some(landing));
                }
                if abandoned.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(None);
                }
                if soft.as_mut().is_some_and(|soft| soft.as_mut().poll(cx).is_ready()) {
                    soft = None;
                    self.pass_soft_timeout();
                }
                if hard.as_mut().is_some_and(|hard| hard.as_mut().poll(cx).is_ready()) {
                    let limit = options.hard_timeout.unwrap_or_default();
                    let error =
                        Error::timeout(format!("loading {:?} took longer than hard_timeout, {limit:?}", self.key));
                    return Poll::Ready(Some(self.failure(error)));
                }
                Poll::Pending
            })
            .await
        };
        let lease = self.lease.lock().take();
        // A load that nobody wants any more leaves the key free; one that failed holds the fleet off for a moment.
        let hold = if landing.is_none() { 0 } else { ERROR_BACKOFF.as_millis() as u64 };
        match landing {
            Some(landing) => self.land(landing),
            None => self.core.flights.retire(&self.flight, Err(Error::timeout("every caller went away"))),
        }
        if let (Some(lease), Some(shared)) = (lease, &self.core.shared) {
            let key = shared.l2.key(&self.place.scope.name, &self.key);
            let _ = shared.l2.release(&key, lease, hold).await;
        }
    }

    /// Callers with a stale value at hand get it; the load goes on.
    fn pass_soft_timeout(&self) {
        let fallback = self.fallback.lock().clone();
        if let Some(entry) = fallback.filter(|entry| self.is_usable(entry)) {
            self.flight.set_late();
            self.core.counters.fallbacks_served.add_one();
            self.flight.answer_waiting(&Ok(Some(entry)));
        }
    }

    pub(crate) fn is_usable(&self, entry: &Entry<V>) -> bool {
        entry.freshness(self.core.runtime.now_ms()) != Freshness::Expired
            && self.core.marks.alive(entry, self.place.scope.id, &self.place.scope.name).is_some()
    }

    async fn work(&self, loader: Loader<V>) -> Landing<V> {
        let Some(shared) = &self.core.shared else {
            return self.load_alone(loader).await;
        };
        let key = shared.l2.key(&self.place.scope.name, &self.key);
        match self.find_or_lease(shared, &key).await {
            Ok(Either::Left(landing)) => landing,
            Ok(Either::Right(lease)) => {
                *self.lease.lock() = Some(lease);
                self.flight.set_leased(lease.over);
                self.load_leased(shared, &key, lease, loader).await
            }
            Err(_) => {
                self.core.counters.l2_errors.add_one();
                self.load_alone(loader).await
            }
        }
    }

    /// Reads L2 until the value is there or the lease is ours. An error means that L2 cannot be asked about this key.
    async fn find_or_lease(&self, shared: &SharedTier<V>, key: &str) -> Result<Either<Landing<V>, Lease>> {
        let (core, l2) = (&self.core, &shared.l2);
        let mut over_hold = false;
        let mut pause = FIRST_POLL;
        if core.closed_to_l2(&self.place.scope, &self.key) || !core.in_sync(shared).await {
            return Err(Error::unavailable("the key is not read from the shared store until it is repaired"));
        }
        let mut read_at = core.runtime.now_ms();
        let mut bytes = l2.get(key).await?;
        loop {
            let mut leased_for = bytes.as_deref().and_then(|bytes| Self::leased_for(shared, bytes));
            let seen = match self.judge(shared, bytes.clone(), read_at) {
                Found::Usable(entry, freshness) => {
                    let seen = entry.id;
                    if freshness == Freshness::Fresh && self.refreshes != Some(seen) {
                        core.counters.l2_hits.add_one();
                        return Ok(Either::Left(Landing::read(entry)));
                    }
                    self.offer_stale(entry, freshness);
                    seen
                }
                Found::Nothing(seen) => seen,
            };
            if leased_for.is_none() {
                let asked_at = core.runtime.now_ms();
                match l2.acquire(key, seen, over_hold).await? {
                    Acquired::Won(lease) => return Ok(Either::Right(lease)),
                    Acquired::Hit(cell) => {
                        (bytes, read_at) = (Some(cell), asked_at);
                        continue;
                    }
                    Acquired::Wait(millis) => leased_for = Some(millis),
                    Acquired::Held(millis) => {
                        let held = self.fallback.lock().clone().filter(|entry| self.is_usable(entry));
                        if held.is_some() {
                            return Ok(Either::Left(self.failure(Error::unavailable(format!(
                                "another node's load failed; the fleet holds off for {millis} ms"
                            )))));
                        }
                        // This node has not seen the error, or it would share it: it may ask the loader once itself.
                        over_hold = true;
                        continue;
                    }
                }
            }
            // Another node loads.
            let longest = Duration::from_millis(pause.min(leased_for.unwrap_or(pause).max(1)));
            core.runtime.sleep(jittered(longest, &*core.runtime) + Duration::from_millis(1)).await;
            pause = (pause * 2).min(LONGEST_POLL);
            if core.closed_to_l2(&self.place.scope, &self.key) {
                return Err(Error::unavailable("the key is not read from the shared store until it is repaired"));
            }
            read_at = core.runtime.now_ms();
            bytes = l2.get(key).await?;
        }
    }

    /// For how long the cell is leased by somebody, who is then waited for without asking for the lease.
    fn leased_for(shared: &SharedTier<V>, bytes: &[u8]) -> Option<u64> {
        let (cell, _) = Cell::decode(bytes).ok()?;
        let now = shared.l2.now_at_most();
        (shared.l2.fenced() && cell.token > HOLD && cell.lease_runs(now)).then(|| cell.until - now)
    }

    /// A stale value was found in L2 on the way to the lease. L1 takes it, so that later callers have it at once.
    fn offer_stale(&self, entry: Entry<V>, freshness: Freshness) {
        self.core.flights.fill(&self.flight, |alive| {
            if alive && self.core.insert(&self.place.scope, &self.key, &entry) {
                return Filled::Read(entry.id);
            }
            self.step_back(&entry, true)
        });
        if freshness != Freshness::Fallback {
            self.core.counters.stale_served.add_one();
            self.flight.answer_waiting(&Ok(Some(entry.clone())));
        }
        *self.fallback.lock() = Some(entry);
    }

    pub(crate) fn context(&self) -> LoadContext<V> {
        let stale = self
            .fallback
            .lock()
            .clone()
            .filter(|entry| self.core.marks.alive(entry, self.place.scope.id, &self.place.scope.name).is_some());
        LoadContext {
            scope: Arc::clone(&self.place.scope.name),
            key: self.key.clone(),
            stale: stale.map(|entry| entry.value),
        }
    }

    pub(crate) fn begin_load(&self) -> Begun {
        // From here on a task of its own: a load goes on, and renews its lease, also where its caller is not polled.
        self.core.send_off(self.flight.pilot.hand_over());
        self.core.counters.loads.add_one();
        self.flight.set_loading();
        // Read before the loader is called: an invalidation issued after the load began has a higher number.
        Begun { stamp: self.core.marks.known(), at: self.core.runtime.now_ms() }
    }

    /// Loads without L2: there is none, or it cannot be asked about this key.
    async fn load_alone(&self, loader: Loader<V>) -> Landing<V> {
        let begun = self.begin_load();
        match loader(self.context()).await {
            Ok(loaded) => self.landing_alone(loaded, &begun),
            Err(error) => self.failure(error),
        }
    }

    async fn load_leased(&self, shared: &SharedTier<V>, key: &str, lease: Lease, loader: Loader<V>) -> Landing<V> {
        let begun = self.begin_load();
        let loaded = {
            let mut load = pin!(loader(self.context()));
            let mut renewing = true;
            loop {
                let renewal = self.core.runtime.sleep(LEASE / 3);
                match first(&mut load, renewal).await {
                    Either::Left(loaded) => break loaded,
                    Either::Right(()) if renewing => {
                        // The load goes on while the lease is renewed. A lost lease is not asked for again: the fill
                        // will be refused.
                        match first(&mut load, shared.l2.renew(key, lease)).await {
                            Either::Left(loaded) => break loaded,
                            Either::Right(renewed) => renewing = renewed.unwrap_or(true),
                        }
                    }
                    Either::Right(()) => {}
                }
            }
        };
        let made = loaded.and_then(|loaded| self.make_entry(loaded, &begun));
        let made = match made {
            Ok(made) => made,
            // The lease goes back in `fly`, with a hold.
            Err(error) => return self.failure(error),
        };
        let Some(lifetime) = made.lifetime else {
            self.give_back(shared, key, lease).await;
            return Landing { outcome: Ok(Some(made.entry)), keep: None, how: How::Written, list: false };
        };
        let mut entry = made.entry;
        let cell = match self.core.encode(shared, &mut entry, &lifetime) {
            Ok(Some(cell)) => cell,
            Ok(None) => {
                self.give_back(shared, key, lease).await;
                return Landing { outcome: Ok(Some(entry)), keep: None, how: How::Written, list: false };
            }
            Err(error) => return self.failure(error),
        };
        let accepted = shared.l2.fill(key, lease, cell, Duration::from_millis(lifetime.physical())).await;
        *self.lease.lock() = None;
        match accepted {
            Ok(true) => Landing { keep: Some(entry.clone()), outcome: Ok(Some(entry)), how: How::Written, list: false },
            Ok(false) => {
                self.core.counters.fills_refused.add_one();
                self.landing_of_refused(shared, key, entry).await
            }
            Err(_) => {
                self.core.counters.l2_errors.add_one();
                Landing { keep: Some(entry.clone()), outcome: Ok(Some(entry)), how: How::Written, list: true }
            }
        }
    }

    /// The key was invalidated or filled during the load. Where L2 has a value again, callers get that: a later call on
    /// this node may read it, and must not go back behind what an earlier one got.
    async fn landing_of_refused(&self, shared: &SharedTier<V>, key: &str, refused: Entry<V>) -> Landing<V> {
        let read_at = self.core.runtime.now_ms();
        let there = shared.l2.get(key).await.ok().flatten();
        match self.judge(shared, there, read_at) {
            Found::Usable(newer, Freshness::Fresh | Freshness::Stale) => Landing::read(newer),
            _ => Landing { outcome: Ok(Some(refused)), keep: None, how: How::Written, list: false },
        }
    }

    async fn give_back(&self, shared: &SharedTier<V>, key: &str, lease: Lease) {
        *self.lease.lock() = None;
        let _ = shared.l2.release(key, lease, 0).await;
    }
}
