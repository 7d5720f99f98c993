//! The read path: L1, then one flight per key, which asks L2, takes the lease, loads and fills on the way back up.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;

use crate::engine::{Core, Look, OnDrop, Outcome, Place, SharedTier};
use crate::entry::{Deadlines, Entry, Freshness, Lifetime, clamp, part};
use crate::error::{Error, Result};
use crate::flight::{Boarded, Filled, Flight, Hear, Purpose, Waiting};
use crate::l2::LEASE;
use crate::l2::cells::{Acquired, Lease};
use crate::loader::{LoadContext, Loaded, Loader};
use crate::options::Resolved;
use crate::runtime::{Either, first};
use crate::sync::Mutex;
use crate::wire::cell::{Cell, Kind, NONE};
use crate::wire::value::{Codec as CodecId, MAX_VALUE_BYTES, ValueHeader, decode_value, encode_value};

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
}

/// What L1 takes the entry for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// It was read from L2.
    Read,
    /// It is new.
    Written,
    /// It is the stale entry that L1 holds, to be answered for a while without a load. Where L1 holds another value by
    /// now, that one is newer.
    Throttled,
}

/// How a flight ends and what it leaves behind.
struct Landing<V> {
    outcome: Outcome<V>,
    keep: Option<Entry<V>>,
    how: How,
    /// The value was made without L2: its key goes on the repair list, in one step with its insert.
    list: bool,
}

impl<V: Send + Sync + 'static> Core<V> {
    /// `get_with` past the hit path.
    pub(crate) async fn load(self: Arc<Self>, place: Place, key: Box<str>, loader: Loader<V>) -> Result<Arc<V>> {
        self.usable(&key)?;
        loop {
            let horizon = self.marks.horizon();
            let fallback = match self.look(&place.scope, &key) {
                Look::Fresh(entry) => {
                    self.counters.l1_hits.add_one();
                    return Ok(entry.value);
                }
                Look::Refresh(entry) => {
                    self.counters.stale_served.add_one();
                    self.refresh(&place, &key, &entry, loader);
                    return Ok(entry.value);
                }
                Look::Fallback(entry) => Some(entry),
                Look::Miss => None,
            };
            match self.board(&place, &key, Purpose::Load, Hear::Future) {
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
                        && self.dead_on_arrival(&place, entry, horizon)
                    {
                        continue;
                    }
                    return self.answer(outcome, None);
                }
                Boarded::Lead(flight, seat) => {
                    self.counters.misses.add_one();
                    let waiting = Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat);
                    Plan::new(&self, flight, &place, &key, fallback).take_off(loader);
                    return self.answer(waiting.await, None);
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
        self.flights.board(place.at(key), purpose, self.runtime.now_ms(), born, not_before, hear)
    }

    /// Whether a flight's value was killed by a watermark that this caller already knew when it came: it then starts
    /// over. Those who came before keep the value.
    pub(crate) fn dead_on_arrival(&self, place: &Place, entry: &Entry<V>, horizon: u64) -> bool {
        let tags = entry.tags.as_deref().unwrap_or(&[]);
        entry.stamp < horizon && self.marks.dead(entry.stamp, Some(entry.read_at), &place.scope.name, tags)
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
    pub(crate) async fn find(self: Arc<Self>, place: Place, key: Box<str>) -> Result<Option<Arc<V>>> {
        self.usable(&key)?;
        loop {
            let horizon = self.marks.horizon();
            match self.look(&place.scope, &key) {
                Look::Fresh(entry) => {
                    self.counters.l1_hits.add_one();
                    return Ok(Some(entry.value));
                }
                Look::Refresh(entry) => {
                    self.counters.stale_served.add_one();
                    self.look_again(&place, &key, &entry);
                    return Ok(Some(entry.value));
                }
                Look::Fallback(_) | Look::Miss => {}
            }
            if self.shared.is_none() {
                self.counters.misses.add_one();
                return Ok(None);
            }
            let (waiting, joined) = match self.board(&place, &key, Purpose::Lookup, Hear::Future) {
                Boarded::Lead(flight, seat) => {
                    let waiting = Waiting::new(Arc::clone(&self.flights), Arc::clone(&flight), seat);
                    Plan::new(&self, flight, &place, &key, None).look_up();
                    (waiting, false)
                }
                Boarded::Joined(flight, seat) => (Waiting::new(Arc::clone(&self.flights), flight, seat), true),
                Boarded::Failed(outcome) => return outcome.map(|entry| entry.map(|entry| entry.value)),
            };
            let outcome = waiting.await?;
            if joined && outcome.as_ref().is_some_and(|entry| self.dead_on_arrival(&place, entry, horizon)) {
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
            let guards: Vec<_> = plans.iter().map(Plan::guard).collect();
            self.spawn_owned(async move {
                let _guards = guards;
                core.look_up_many(plans).await;
            })?;
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

    async fn read_clock_then(&self, shared: &SharedTier<V>, keys: &[String]) -> (u64, Result<Vec<Option<Bytes>>>) {
        let read_at = self.runtime.now_ms();
        let cells = shared.l2.get_many(keys).await.inspect_err(|_| self.counters.l2_errors.add_one());
        (read_at, cells)
    }

    /// Makes sure that this node knows the fleet's watermarks and the store's clock before it judges a value.
    pub(crate) async fn in_sync(&self, shared: &SharedTier<V>) -> bool {
        shared.l2.is_synced() || self.sync(shared).await.is_ok()
    }

    /// Asks L2 for watermarks and the time; gives back to it what it has lost.
    pub(crate) async fn sync(&self, shared: &SharedTier<V>) -> Result<()> {
        let doubts = shared.l2.doubts();
        let known = self.marks.known();
        let marks = shared.l2.poll(0, known).await.inspect_err(|_| self.counters.l2_errors.add_one())?;
        if marks.top < known {
            shared.l2.restore(&self.marks.all()).await?;
        }
        self.marks.raise(marks.members.iter().map(|(member, number)| (member.as_str(), *number)), marks.top);
        shared.l2.settle(doubts);
        Ok(())
    }
}

/// What a cell of L2 is worth.
enum Found<V> {
    Usable(Entry<V>, Freshness),
    /// Nothing to answer; the id of what is there, for the lease to be laid over.
    Nothing(u64),
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
        }
    }

    pub(crate) fn refreshing(
        core: &Arc<Core<V>>,
        flight: Arc<Flight<Outcome<V>>>,
        place: &Place,
        key: &str,
        entry: &Entry<V>,
    ) -> Self {
        Self { refreshes: Some(entry.id), ..Self::new(core, flight, place, key, Some(entry.clone())) }
    }

    /// Fails the flight if its work is dropped unfinished, so that nobody waits for ever.
    fn guard(&self) -> OnDrop<impl FnOnce() + use<V>> {
        let (core, flight) = (Arc::clone(&self.core), Arc::clone(&self.flight));
        OnDrop(Some(move || core.flights.retire(&flight, Err(Error::loader("it was dropped before it finished")))))
    }

    /// Flies as owned work.
    pub(crate) fn take_off(self, loader: Loader<V>) {
        let guard = self.guard();
        let (core, flight) = (Arc::clone(&self.core), Arc::clone(&self.flight));
        let spawned = core.spawn_owned(async move {
            let _guard = guard;
            self.fly(loader).await;
        });
        if let Err(error) = spawned {
            core.flights.retire(&flight, Err(error));
        }
    }

    pub(crate) fn look_up(self) {
        let guard = self.guard();
        let (core, flight) = (Arc::clone(&self.core), Arc::clone(&self.flight));
        let spawned = core.spawn_owned(async move {
            let _guard = guard;
            let landing = match &self.core.shared {
                Some(shared)
                    if !self.core.closed_to_l2(&self.place.scope, &self.key) && self.core.in_sync(shared).await =>
                {
                    let keys = [shared.l2.key(&self.place.scope.name, &self.key)];
                    match self.core.read_clock_then(shared, &keys).await {
                        (read_at, Ok(mut cells)) => self.landing_of_lookup(shared, cells.pop().flatten(), read_at),
                        (_, Err(_)) => Landing::nothing(),
                    }
                }
                _ => Landing::nothing(),
            };
            self.land(landing);
        });
        if let Err(error) = spawned {
            core.flights.retire(&flight, Err(error));
        }
    }

    fn landing_of_lookup(&self, shared: &SharedTier<V>, bytes: Option<Bytes>, read_at: u64) -> Landing<V> {
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
    async fn fly(self, loader: Loader<V>) {
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

    fn is_usable(&self, entry: &Entry<V>) -> bool {
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
            // Another node loads. Half to all of the pause, so that the waiting nodes do not ask together.
            let longest = pause.min(leased_for.unwrap_or(pause).max(1));
            let jittered = longest / 2 + core.runtime.random() % (longest / 2 + 1) + 1;
            core.runtime.sleep(Duration::from_millis(jittered)).await;
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
        (shared.l2.fenced() && cell.token > crate::wire::cell::HOLD && cell.until > now).then(|| cell.until - now)
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

    /// What the bytes of a cell are worth to this node now.
    fn judge(&self, shared: &SharedTier<V>, bytes: Option<Bytes>, read_at: u64) -> Found<V> {
        let Some(bytes) = bytes else { return Found::Nothing(0) };
        let malformed = |id: u64, why: &dyn std::fmt::Display| {
            self.core.counters.malformed_values.add_one();
            tracing::warn!(key = &*self.key, %why, "an entry of the shared store cannot be read: taken for a miss");
            Found::Nothing(id)
        };
        let (cell, blob) = match Cell::decode(&bytes) {
            Ok((Cell { kind: Kind::Lease, .. }, _)) => return Found::Nothing(0),
            Ok((cell, blob)) if cell.kind == Kind::Value => (cell, blob),
            Ok(_) => return malformed(0, &"it is no value"),
            Err(why) => return malformed(0, &why),
        };
        let (header, body) = match decode_value(blob) {
            Ok(decoded) => decoded,
            Err(why) => return malformed(cell.id, &why),
        };
        if header.codec.0 != shared.codec.id() {
            return malformed(cell.id, &format_args!("codec {} is not this cache's", header.codec.0));
        }
        if self.core.marks.dead(header.stamp, None, &self.place.scope.name, &header.tags) {
            return Found::Nothing(cell.id);
        }
        let now = shared.l2.now_at_most();
        let left = |deadline: u64| deadline.saturating_sub(now);
        let remaining = Lifetime {
            fresh: left(header.fresh_until),
            stale: left(header.stale_until),
            fallback: left(header.error_until),
        };
        let whole = header.fresh_until.saturating_sub(header.created);
        let deadlines = self.deadlines_from_l2(&remaining, whole, self.core.runtime.now_ms().saturating_sub(read_at));
        let value = match shared.codec.decode(&body) {
            Ok(value) => value,
            Err(why) => return malformed(cell.id, &why),
        };
        let entry = Entry {
            value: Arc::new(value),
            read_at,
            deadlines,
            stamp: header.stamp,
            born: self.flight.born(),
            checked: 0,
            id: cell.id,
            tags: (!header.tags.is_empty()).then(|| header.tags.into()),
        };
        match entry.freshness(self.core.runtime.now_ms()) {
            Freshness::Expired => Found::Nothing(cell.id),
            Freshness::RefreshAhead => Found::Usable(entry, Freshness::Fresh),
            freshness => Found::Usable(entry, freshness),
        }
    }

    /// L1's deadlines for a value of L2: what remains of its own, refreshed ahead at a fraction of its whole life.
    fn deadlines_from_l2(&self, remaining: &Lifetime, whole: u64, elapsed: u64) -> Deadlines {
        let options = &self.place.options;
        // `deadlines` takes the fraction of what it is given, so the whole life's is worked out here.
        let plain = Resolved { refresh_ahead: None, ..(**options).clone() };
        let mut deadlines = remaining.deadlines(elapsed, &plain);
        if let Some(fraction) = options.refresh_ahead {
            let behind = whole.saturating_sub(part(whole, fraction));
            deadlines.hot = deadlines.hot.min(clamp(remaining.fresh.saturating_sub(behind).saturating_add(elapsed)));
        }
        deadlines
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

    /// Loads without L2: there is none, or it cannot be asked about this key.
    async fn load_alone(&self, loader: Loader<V>) -> Landing<V> {
        let begun = self.begin_load();
        match loader(self.context()).await {
            Ok(loaded) => self.landing_alone(loaded, &begun),
            Err(error) => self.failure(error),
        }
    }

    pub(crate) fn begin_load(&self) -> Begun {
        self.core.counters.loads.add_one();
        self.flight.set_loading();
        // Read before the loader is called: an invalidation issued after the load began has a higher number.
        Begun { stamp: self.core.marks.known(), at: self.core.runtime.now_ms() }
    }

    fn landing_alone(&self, loaded: Loaded<V>, begun: &Begun) -> Landing<V> {
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

    fn make_entry(&self, loaded: Loaded<V>, begun: &Begun) -> Result<Made<V>> {
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
            born: self.flight.born(),
            checked: 0,
            id: 0,
            tags,
        };
        Ok(Made { entry, lifetime })
    }

    /// A failed load: the stale value, if it may serve, answered for a while without asking again; or the error, shared
    /// for a moment.
    fn failure(&self, error: Error) -> Landing<V> {
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

    fn land(&self, landing: Landing<V>) {
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
    fn step_back(&self, answered: &Entry<V>, in_l2: bool) -> Filled {
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

impl<V> Landing<V> {
    fn nothing() -> Self {
        Self { outcome: Ok(None), keep: None, how: How::Written, list: false }
    }

    fn read(entry: Entry<V>) -> Self {
        Self { keep: Some(entry.clone()), outcome: Ok(Some(entry)), how: How::Read, list: false }
    }
}

/// When a load began.
pub(crate) struct Begun {
    pub(crate) stamp: u64,
    pub(crate) at: u64,
}

/// A loaded value; without a lifetime where it is not to be kept.
struct Made<V> {
    entry: Entry<V>,
    lifetime: Option<Lifetime>,
}

impl<V: Send + Sync + 'static> Core<V> {
    /// The cell for L2, under a new id, which the entry takes. `None` where the value is too large.
    pub(crate) fn encode(
        &self,
        shared: &SharedTier<V>,
        entry: &mut Entry<V>,
        lifetime: &Lifetime,
    ) -> Result<Option<Bytes>> {
        let body = shared.codec.encode(&entry.value)?;
        if body.len() > MAX_VALUE_BYTES {
            self.counters.oversized_values.add_one();
            tracing::warn!(
                bytes = body.len(),
                "a value is too large for the shared store ({MAX_VALUE_BYTES} bytes at most)"
            );
            return Ok(None);
        }
        entry.id = self.runtime.random() | 1;
        // In the store's time, at its earliest: a deadline is early rather than late.
        let created = shared.l2.now_at_least();
        let header = ValueHeader {
            codec: CodecId(shared.codec.id()),
            null: self.is_null.is_some_and(|is_null| is_null(&entry.value)),
            created,
            fresh_until: created.saturating_add(lifetime.fresh),
            stale_until: created.saturating_add(lifetime.stale),
            error_until: created.saturating_add(lifetime.fallback),
            stamp: entry.stamp,
            tags: entry.tags.as_deref().unwrap_or(&[]).to_vec(),
        };
        let cell = Cell { kind: Kind::Value, id: entry.id, token: NONE, until: 0 };
        Ok(Some(encode_value(&cell, &header, &body, shared.compress_from).into()))
    }
}

/// Refuses tags that make no sense; in order, each once.
pub(crate) fn checked_tags(mut tags: Vec<Box<str>>) -> Result<Arc<[Box<str>]>> {
    const MOST: usize = 64;
    const LONGEST: usize = 256;
    if tags.len() > MOST {
        return Err(Error::config(format!("{} tags are not allowed: give at most {MOST}", tags.len())));
    }
    if let Some(tag) = tags.iter().find(|tag| tag.is_empty() || tag.len() > LONGEST) {
        return Err(Error::config(format!("tag of {} bytes is not allowed: give 1 to {LONGEST} bytes", tag.len())));
    }
    tags.sort_unstable();
    tags.dedup();
    Ok(tags.into())
}
