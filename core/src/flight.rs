//! Everything in progress that may fill a key: loads, reads of the shared store, sets.
//!
//! One flight per key and purpose; later callers join it. An invalidation takes the key's flights out of the registry
//! and marks them dead: they still answer whoever waits for them, but they fill nothing, and the next caller starts
//! anew. The registry's lock for a key is also the lock under which L1 changes for that key, so that "is my flight
//! alive?" and "put its value into L1" are one step.
//!
//! The registry knows no cache: it runs closures under its lock and hands outcomes to waiters.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;
use smallvec::SmallVec;

use crate::key::{Key, KeyRef};
use crate::pilot::Pilot;
use crate::sync::Mutex;

/// What a flight is for. Callers join only a flight of their own purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Finds the value in the shared store or makes it.
    Load,
    /// Finds the value in the shared store, without a loader.
    Lookup,
    /// Writes the value. Nobody joins it.
    Set,
}

/// One operation in progress for one key.
pub(crate) struct Flight<T> {
    key: Key,
    purpose: Purpose,
    /// The node's generation when the flight began. Callers who come after a later clear do not join.
    born: u64,
    late: AtomicBool,
    pub(crate) pilot: Pilot,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Changed only under the registry's lock for the key, so that a fill can rely on it there.
    alive: bool,
    outcome: Option<T>,
    /// Grows while the flight lasts; an index is never given twice.
    seats: SmallVec<[Option<Seat<T>>; 1]>,
    waiting: usize,
    /// Somebody other than a caller wants the result: the flight goes on without callers.
    background: bool,
    abandoned: bool,
    stage: Stage,
    driver: Option<Driver>,
}

/// How far a flight has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It reads the shared store, or waits for somebody else's fill.
    Finding,
    /// Its loader runs, without a lease.
    Loading,
    /// It holds the key's lease, laid over the value with this id, 0 for none.
    Leased(u64),
}

enum Seat<T> {
    /// A future that has not been polled, or a caller who leads and will know the outcome first.
    Idle,
    Task(Waker),
    /// Told through a host's mailbox.
    Mail(Arc<dyn Deliver<T>>, u64),
    /// Answered before the flight ended; not yet picked up.
    Answered(T),
}

/// Who sees to the flight and is told when nobody wants it any more.
enum Driver {
    Task(Waker),
    Host(Arc<dyn Abandon>, u64),
}

/// Told when a flight that a host leads has lost its last caller.
pub(crate) trait Abandon: Send + Sync {
    fn abandon(&self, ticket: u64);
}

/// Takes outcomes for waiters that are no Rust futures.
pub(crate) trait Deliver<T>: Send + Sync {
    fn deliver(&self, ticket: u64, outcome: T);
}

/// How a caller wants to hear the outcome.
pub(crate) enum Hear<T> {
    Future,
    Mail(Arc<dyn Deliver<T>>, u64),
}

/// What a flight has put into L1 when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    Nothing,
    /// A value as the shared store had it, with this id.
    Read(u64),
    /// A new value.
    Written,
    /// Nothing, but callers got a loaded value that is in neither tier.
    Unkept,
}

/// A failure that later callers share until its time has passed.
struct Failure<T> {
    until: u64,
    outcome: T,
}

struct Slot<T> {
    /// Nearly always one.
    flights: SmallVec<[Arc<Flight<T>>; 1]>,
    failure: Option<Failure<T>>,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { flights: SmallVec::new(), failure: None }
    }
}

struct Shard<T> {
    slots: HashMap<Key, Slot<T>, FixedState>,
    /// How many slots hold nothing but a failure, at most: past a bound the expired ones are swept.
    failures: usize,
    in_progress: usize,
}

/// The registry: key to flights, in shards.
pub(crate) struct Flights<T> {
    shards: Box<[Mutex<Shard<T>>]>,
    hasher: FixedState,
}

/// The result of asking for a flight.
pub(crate) enum Boarded<T> {
    /// The caller is the first: it has to see that the flight is flown and ended.
    Lead(Arc<Flight<T>>, usize),
    /// Somebody else's flight.
    Joined(Arc<Flight<T>>, usize),
    /// A flight just failed; this is its outcome.
    Failed(T),
}

const SHARDS: usize = 64;
const FAILURES_PER_SHARD: usize = 128;

impl<T: Clone> Flights<T> {
    pub(crate) fn new(seed: u64) -> Self {
        let shard = || {
            Mutex::new(Shard { slots: HashMap::with_hasher(FixedState::with_seed(seed)), failures: 0, in_progress: 0 })
        };
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), hasher: FixedState::with_seed(!seed) }
    }

    fn shard(&self, key: KeyRef<'_>) -> &Mutex<Shard<T>> {
        use std::hash::BuildHasher;
        &self.shards[self.hasher.hash_one(key) as usize % SHARDS]
    }

    /// Joins the key's flight of this purpose or starts one.
    ///
    /// `not_before` is the generation below which a flight is not joined: it began before something that this caller
    /// must see. Such a flight is cut off as an invalidation would.
    pub(crate) fn board(
        &self,
        key: KeyRef<'_>,
        purpose: Purpose,
        now: u64,
        born: u64,
        not_before: u64,
        hear: Hear<T>,
    ) -> Boarded<T> {
        let mut shard = self.shard(key).lock();
        let slot = match shard.slots.entry_ref(&key) {
            EntryRef::Occupied(entry) => entry.into_mut(),
            EntryRef::Vacant(entry) => entry.insert_with_key(key.to_key(), Slot::default()),
        };
        if let Some(position) =
            slot.flights.iter().position(|flight| flight.purpose == purpose && purpose != Purpose::Set)
        {
            let flight = Arc::clone(&slot.flights[position]);
            let mut state = flight.state.lock();
            if flight.born >= not_before && !state.abandoned {
                let seat = state.sit(hear);
                drop(state);
                return Boarded::Joined(flight, seat);
            }
            state.alive = false;
            drop(state);
            slot.flights.swap_remove(position);
        }
        if purpose == Purpose::Load
            && let Some(failure) = &slot.failure
        {
            if failure.until > now {
                return Boarded::Failed(failure.outcome.clone());
            }
            slot.failure = None;
        }
        let flight = Arc::new(Flight {
            key: key.to_key(),
            purpose,
            born,
            late: AtomicBool::new(false),
            pilot: Pilot::default(),
            state: Mutex::new(State {
                alive: true,
                outcome: None,
                seats: SmallVec::new(),
                waiting: 0,
                background: false,
                abandoned: false,
                stage: Stage::Finding,
                driver: None,
            }),
        });
        let seat = flight.state.lock().sit(hear);
        slot.flights.push(Arc::clone(&flight));
        shard.in_progress += 1;
        drop(shard);
        Boarded::Lead(flight, seat)
    }

    /// Whether a load of the key is in progress that a caller of generation `not_before` could join.
    pub(crate) fn is_loading(&self, key: KeyRef<'_>, not_before: u64) -> bool {
        let shard = self.shard(key).lock();
        shard.slots.get(&key).is_some_and(|slot| {
            slot.flights.iter().any(|flight| flight.purpose == Purpose::Load && flight.born >= not_before)
        })
    }

    /// An invalidation: marks every flight of the key dead except `spare`, forgets its failure, and runs `drop_entry`
    /// (which removes the L1 entry) before anybody can register or fill again.
    ///
    /// Invariant: a flight that was registered before this call never inserts into L1 after it. Marking, removing and
    /// every fill's check happen under the one lock.
    pub(crate) fn invalidate<R>(
        &self,
        key: KeyRef<'_>,
        spare: Option<&Arc<Flight<T>>>,
        drop_entry: impl FnOnce(bool) -> R,
    ) -> R {
        let mut shard = self.shard(key).lock();
        let mut spared_alive = false;
        let mut empty = false;
        if let Some(slot) = shard.slots.get_mut(&key) {
            slot.failure = None;
            slot.flights.retain(|flight| {
                if spare.is_some_and(|spare| Arc::ptr_eq(spare, flight)) {
                    spared_alive = true;
                    return true;
                }
                flight.state.lock().alive = false;
                false
            });
            empty = slot.flights.is_empty();
        }
        if empty {
            shard.slots.remove(&key);
        }
        drop_entry(spared_alive)
    }

    /// Changes L1 on behalf of a flight that goes on: `step` runs under the key's lock and is told whether it is alive.
    pub(crate) fn fill(&self, flight: &Arc<Flight<T>>, step: impl FnOnce(bool) -> Filled) {
        let mut shard = self.shard(flight.key.as_ref()).lock();
        let alive = flight.state.lock().alive;
        let filled = step(alive);
        shard.outrun(flight, filled);
    }

    /// Runs `step` under the key's lock.
    pub(crate) fn locked<R>(&self, key: KeyRef<'_>, step: impl FnOnce() -> R) -> R {
        let _shard = self.shard(key).lock();
        step()
    }

    /// Ends a flight: `fill` runs under the key's lock and is told whether the flight is alive, then everyone who waits
    /// is told `outcome`. With `share` (until, now), callers who come before that time get the same outcome without a
    /// load.
    pub(crate) fn finish(
        &self,
        flight: &Arc<Flight<T>>,
        outcome: T,
        share: Option<(u64, u64)>,
        fill: impl FnOnce(bool) -> Filled,
    ) {
        let mut shard = self.shard(flight.key.as_ref()).lock();
        let mut state = flight.state.lock();
        if state.outcome.is_some() {
            return;
        }
        // Invariant: L1 takes a flight's value only while the flight is alive, judged under the lock that kills it.
        let filled = fill(state.alive);
        shard.outrun(flight, filled);
        let failure =
            share.filter(|_| state.alive).map(|(until, now)| (Failure { until, outcome: outcome.clone() }, now));
        shard.unregister(flight, failure);
        state.outcome = Some(outcome.clone());
        state.alive = false;
        let seats = state.take_seats();
        drop(state);
        shard.in_progress -= 1;
        drop(shard);
        tell(seats, &outcome);
    }

    /// A caller goes away. When it was the last and nothing else wants the result, the flight is abandoned: taken out
    /// of the registry, so that the next caller starts anew, and its driver is told. Says whether it was.
    pub(crate) fn leave(&self, flight: &Arc<Flight<T>>, seat: usize) -> bool {
        // Under the registry's lock, since joining is: a caller who joins either finds the flight with this caller
        // gone and others left, or does not find it.
        let mut shard = self.shard(flight.key.as_ref()).lock();
        let mut state = flight.state.lock();
        if state.seats.get_mut(seat).and_then(Option::take).is_none() {
            return false;
        }
        state.waiting -= 1;
        if state.waiting > 0 || state.background || state.outcome.is_some() {
            return false;
        }
        state.abandoned = true;
        state.alive = false;
        let driver = state.driver.take();
        shard.unregister(flight, None);
        drop(state);
        drop(shard);
        match driver {
            Some(Driver::Task(waker)) => waker.wake(),
            Some(Driver::Host(host, ticket)) => host.abandon(ticket),
            None => {}
        }
        true
    }

    pub(crate) fn in_progress(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().in_progress).sum()
    }

    /// Counts an abandoned flight as ended; its driver calls this last.
    pub(crate) fn retire(&self, flight: &Arc<Flight<T>>, outcome: T) {
        self.finish(flight, outcome, None, |_| Filled::Nothing);
    }
}

impl<T> Shard<T> {
    /// Marks the key's other flights dead where their values may be older than what this one has put into L1.
    ///
    /// Invariant: of two operations that saw the shared store at different times, the one that ends later never
    /// replaces the other's value, because the first to end has killed it.
    fn outrun(&mut self, winner: &Arc<Flight<T>>, filled: Filled) {
        if filled == Filled::Nothing {
            return;
        }
        let Some(slot) = self.slots.get_mut(&winner.key.as_ref()) else { return };
        slot.flights.retain(|flight| {
            if Arc::ptr_eq(winner, flight) {
                return true;
            }
            let mut state = flight.state.lock();
            let ahead = match filled {
                // While a flight holds the lease, the store has the value that the lease lies over, and the flight's will
                // be newer. Where the store has another, the lease is lost.
                Filled::Read(id) => state.stage == Stage::Leased(id),
                // Otherwise no load would ever be kept while loads of one key overlap.
                Filled::Unkept => state.stage != Stage::Finding,
                Filled::Nothing | Filled::Written => false,
            };
            state.alive &= ahead;
            state.alive
        });
    }

    fn unregister(&mut self, flight: &Arc<Flight<T>>, failure: Option<(Failure<T>, u64)>) {
        let key = flight.key.as_ref();
        let Some(slot) = self.slots.get_mut(&key) else { return };
        let Some(position) = slot.flights.iter().position(|other| Arc::ptr_eq(other, flight)) else { return };
        slot.flights.swap_remove(position);
        if let Some((failure, now)) = failure {
            slot.failure = Some(failure);
            self.failures += 1;
            if self.failures > FAILURES_PER_SHARD {
                self.slots.retain(|_, slot| {
                    slot.failure.take_if(|failure| failure.until <= now);
                    !slot.flights.is_empty() || slot.failure.is_some()
                });
                self.failures = self.slots.values().filter(|slot| slot.failure.is_some()).count();
            }
        } else if slot.flights.is_empty() && slot.failure.is_none() {
            self.slots.remove(&key);
        }
    }
}

impl<T> State<T> {
    fn sit(&mut self, hear: Hear<T>) -> usize {
        self.waiting += 1;
        self.seats.push(Some(match hear {
            Hear::Future => Seat::Idle,
            Hear::Mail(mailbox, ticket) => Seat::Mail(mailbox, ticket),
        }));
        self.seats.len() - 1
    }

    fn take_seats(&mut self) -> Vec<Seat<T>> {
        let mut taken = Vec::new();
        for seat in &mut self.seats {
            match seat.take() {
                // Picked up later by its own future, which nobody has to wake.
                Some(own @ (Seat::Answered(_) | Seat::Idle)) => *seat = Some(own),
                Some(waiting) => taken.push(waiting),
                None => {}
            }
        }
        taken
    }
}

/// Outside every lock: a waker or a mailbox may do anything.
fn tell<T: Clone>(seats: Vec<Seat<T>>, outcome: &T) {
    for seat in seats {
        match seat {
            Seat::Task(waker) => waker.wake(),
            Seat::Mail(mailbox, ticket) => mailbox.deliver(ticket, outcome.clone()),
            Seat::Idle | Seat::Answered(_) => {}
        }
    }
}

impl<T: Clone> Flight<T> {
    /// Answers those who wait now; the flight goes on, and nobody's leaving ends it.
    pub(crate) fn answer_waiting(&self, outcome: &T) {
        let mut state = self.state.lock();
        if state.outcome.is_some() {
            return;
        }
        state.background = true;
        let mut told = Vec::new();
        for index in 0..state.seats.len() {
            match state.seats[index].take() {
                None => {}
                Some(mail @ Seat::Mail(..)) => {
                    state.waiting -= 1;
                    told.push(mail);
                }
                Some(answered @ Seat::Answered(_)) => state.seats[index] = Some(answered),
                Some(Seat::Task(waker)) => {
                    state.seats[index] = Some(Seat::Answered(outcome.clone()));
                    told.push(Seat::Task(waker));
                }
                Some(Seat::Idle) => state.seats[index] = Some(Seat::Answered(outcome.clone())),
            }
        }
        drop(state);
        tell(told, outcome);
    }
}

impl<T> Flight<T> {
    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    pub(crate) fn born(&self) -> u64 {
        self.born
    }

    /// The flight holds the key's lease from here on, laid over the value with this id, 0 for none.
    pub(crate) fn set_leased(&self, over: u64) {
        self.state.lock().stage = Stage::Leased(over);
    }

    /// The flight's loader runs from here on.
    pub(crate) fn set_loading(&self) {
        let mut state = self.state.lock();
        if state.stage == Stage::Finding {
            state.stage = Stage::Loading;
        }
    }

    /// Past its soft timeout: callers with a stale value do not wait for it.
    pub(crate) fn set_late(&self) {
        // Relaxed: who does not see it yet waits as before.
        self.late.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_late(&self) -> bool {
        self.late.load(Ordering::Relaxed)
    }

    /// The flight goes on without callers from here on.
    pub(crate) fn keep_going(&self) {
        self.state.lock().background = true;
    }

    /// A host leads; it is told with its ticket when every caller has gone.
    pub(crate) fn on_abandoned(&self, host: Arc<dyn Abandon>, ticket: u64) {
        self.state.lock().driver = Some(Driver::Host(host, ticket));
    }

    /// The caller in this seat will know the outcome without being told.
    pub(crate) fn hush(&self, seat: usize) {
        let mut state = self.state.lock();
        if let Some(seat @ Seat::Mail(..)) = state.seats[seat].as_mut() {
            *seat = Seat::Idle;
        }
    }

    /// Completes when every caller has gone and nothing wants the result.
    pub(crate) fn abandoned(&self) -> impl Future<Output = ()> + '_ {
        std::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.abandoned {
                return Poll::Ready(());
            }
            state.driver = Some(Driver::Task(cx.waker().clone()));
            Poll::Pending
        })
    }
}

/// A caller's place in a flight, as a future. Dropping it is leaving.
pub(crate) struct Waiting<T: Clone> {
    flights: Arc<Flights<T>>,
    flight: Arc<Flight<T>>,
    seat: Option<usize>,
}

impl<T: Clone> Waiting<T> {
    pub(crate) fn new(flights: Arc<Flights<T>>, flight: Arc<Flight<T>>, seat: usize) -> Self {
        Self { flights, flight, seat: Some(seat) }
    }
}

impl<T: Clone> Waiting<T> {
    /// The outcome, if it is there; else `cx` is told of it, where it is given.
    pub(crate) fn look(&mut self, cx: Option<&mut Context<'_>>) -> Poll<T> {
        let seat = self.seat.expect("polled after it was ready");
        let mut state = self.flight.state.lock();
        let outcome = match state.seats[seat].take() {
            Some(Seat::Answered(outcome)) => outcome,
            _ => match &state.outcome {
                Some(outcome) => outcome.clone(),
                None => {
                    state.seats[seat] = Some(cx.map_or(Seat::Idle, |cx| Seat::Task(cx.waker().clone())));
                    return Poll::Pending;
                }
            },
        };
        state.waiting = state.waiting.saturating_sub(1);
        drop(state);
        self.seat = None;
        Poll::Ready(outcome)
    }
}

impl<T: Clone> Future for Waiting<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.look(Some(cx))
    }
}

impl<T: Clone> Drop for Waiting<T> {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            self.flights.leave(&self.flight, seat);
        }
    }
}
