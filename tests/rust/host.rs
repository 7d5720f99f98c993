//! The seam for bindings, proven by a small fake host: a single-threaded event loop with callers of its own, which
//! leads, joins, cancels and fails flights without any async runtime.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fleetcache::host::{Begin, Event, Lead, Mailbox, Seat};
use fleetcache::testing::SimRuntime;
use fleetcache::{BoxFuture, EntryOptions, Error, ErrorKind, HybridCache, Loaded, Result, Runtime};
use fleetcache_tests::{Broken, Fleet, ms};

struct CountingAllocator;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[allow(unsafe_code, reason = "an allocator cannot be written without")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// A runtime that runs nothing: whoever asks it for a task or a timer has touched the async world.
struct NoRuntime;

impl Runtime for NoRuntime {
    fn now_ms(&self) -> u64 {
        1_000_000
    }

    fn wall_ms(&self) -> u64 {
        1_000_000
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        panic!("a timer was asked for")
    }

    fn spawn(&self, _: BoxFuture<'static, ()>) -> Result<()> {
        panic!("a task was asked for")
    }

    fn random(&self) -> u64 {
        4
    }
}

fn without_runtime() -> HybridCache<u64> {
    HybridCache::builder().runtime(Arc::new(NoRuntime)).build().unwrap()
}

type Answer = Result<Option<u64>>;

/// The host: callers with tickets, loaders that end when the test says so.
struct Host {
    cache: HybridCache<u64>,
    mailbox: Arc<Mailbox<u64>>,
    wakes: Arc<AtomicU64>,
    tickets: Cell<u64>,
    seats: RefCell<HashMap<u64, Seat<u64>>>,
    leads: RefCell<HashMap<u64, Lead<u64>>>,
    answers: RefCell<HashMap<u64, Answer>>,
    cancelled: RefCell<Vec<u64>>,
}

impl Host {
    fn new(cache: HybridCache<u64>) -> Rc<Self> {
        let wakes = Arc::new(AtomicU64::new(0));
        let mailbox = Mailbox::new({
            let wakes = Arc::clone(&wakes);
            move || {
                wakes.fetch_add(1, Ordering::SeqCst);
            }
        });
        Rc::new(Self {
            cache,
            mailbox,
            wakes,
            tickets: Cell::new(0),
            seats: RefCell::default(),
            leads: RefCell::default(),
            answers: RefCell::default(),
            cancelled: RefCell::default(),
        })
    }

    /// A caller asks. Its ticket; the loader, if the caller leads, waits for `load`.
    fn get(&self, key: &str) -> u64 {
        let ticket = self.tickets.get() + 1;
        self.tickets.set(ticket);
        match self.cache.begin(key, &self.mailbox, ticket) {
            Begin::Hit(value) => self.answer(ticket, Ok(Some(*value))),
            Begin::Refresh(value, lead) => {
                self.answer(ticket, Ok(Some(*value)));
                self.leads.borrow_mut().insert(ticket, lead);
            }
            Begin::Lead(lead, seat) => {
                self.leads.borrow_mut().insert(ticket, lead);
                self.seats.borrow_mut().insert(ticket, seat);
            }
            Begin::Wait(seat) => {
                self.seats.borrow_mut().insert(ticket, seat);
            }
            Begin::Missing => self.answer(ticket, Ok(None)),
            Begin::Failed(error) => self.answer(ticket, Err(error)),
        }
        ticket
    }

    fn answer(&self, ticket: u64, answer: Answer) {
        assert!(self.answers.borrow_mut().insert(ticket, answer).is_none(), "ticket {ticket} was answered twice");
    }

    /// The loader that this ticket started ends.
    fn load(&self, ticket: u64, outcome: Result<Loaded<u64>>) {
        let lead = self.leads.borrow_mut().remove(&ticket).expect("this ticket leads");
        if let Some(answer) = lead.complete(outcome)
            && self.seats.borrow_mut().remove(&ticket).is_some()
        {
            self.answer(ticket, answer.map(|value| Some(*value)));
        }
    }

    /// One turn of the event loop: takes what has come.
    fn turn(&self) {
        for event in self.mailbox.drain() {
            match event {
                Event::Done { ticket, outcome } => {
                    self.seats.borrow_mut().remove(&ticket);
                    self.answer(ticket, outcome.map(|value| value.map(|value| *value)));
                }
                Event::Load { ticket, lead } => {
                    self.leads.borrow_mut().insert(ticket, lead);
                }
                Event::Cancel { ticket } => self.cancelled.borrow_mut().push(ticket),
            }
        }
    }

    fn go_away(&self, ticket: u64) -> bool {
        self.seats.borrow_mut().remove(&ticket).expect("this caller waits").leave()
    }

    fn answered(&self, ticket: u64) -> Option<u64> {
        self.answers.borrow().get(&ticket).and_then(|answer| answer.as_ref().ok().copied().flatten())
    }

    fn error(&self, ticket: u64) -> Option<Error> {
        self.answers.borrow().get(&ticket).and_then(|answer| answer.as_ref().err().cloned())
    }
}

#[test]
fn a_hit_is_synchronous_and_allocates_nothing() {
    let cache = without_runtime();
    let host = Host::new(cache.clone());
    let lead = host.get("k");
    host.load(lead, Ok(7.into()));
    assert_eq!(cache.peek("k").as_deref(), Some(&7));
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..1000 {
        assert!(cache.peek("k").is_some());
        assert!(cache.peek("missing").is_none());
    }
    assert_eq!(ALLOCATIONS.with(Cell::get), before);
}

#[test]
fn a_rust_hit_allocates_nothing_either() {
    let cache = without_runtime();
    futures_util::FutureExt::now_or_never(cache.set("k", 7)).unwrap().unwrap();
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..1000 {
        let hit = futures_util::FutureExt::now_or_never(cache.get_with("k", || std::future::ready(Ok::<_, Broken>(8))));
        assert_eq!(*hit.unwrap().unwrap(), 7);
    }
    assert_eq!(ALLOCATIONS.with(Cell::get), before);
}

#[test]
fn a_miss_without_a_store_touches_no_runtime_and_joiners_are_told_in_one_batch() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    let joiners: Vec<_> = (0..1000).map(|_| host.get("k")).collect();
    assert_eq!(host.leads.borrow().len(), 1);
    host.load(leader, Ok(7.into()));
    assert_eq!(host.answered(leader), Some(7), "the leader knows at once");
    assert_eq!(host.wakes.load(Ordering::SeqCst), 1, "one wake-up for a thousand waiters");
    host.turn();
    assert!(joiners.iter().all(|ticket| host.answered(*ticket) == Some(7)));
    let later = host.get("k");
    assert_eq!(host.answered(later), Some(7));
    assert_eq!(host.cache.stats().loads, 1);
    assert_eq!(host.cache.stats().loading, 0);
}

#[test]
fn two_event_loops_share_a_flight() {
    let cache = without_runtime();
    let (one, two) = (Host::new(cache.clone()), Host::new(cache));
    let leader = one.get("k");
    let joiner = two.get("k");
    one.load(leader, Ok(7.into()));
    two.turn();
    assert_eq!(two.answered(joiner), Some(7));
    assert_eq!(one.wakes.load(Ordering::SeqCst), 0, "nobody on this loop has anything to hear");
}

#[test]
fn a_leader_who_goes_away_leaves_the_load_to_those_who_wait() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    let joiner = host.get("k");
    assert!(!host.go_away(leader), "the load is still wanted");
    host.load(leader, Ok(7.into()));
    host.turn();
    assert_eq!(host.answered(joiner), Some(7));
    assert!(host.cancelled.borrow().is_empty());
}

#[test]
fn the_last_to_go_away_cancels_the_load_and_the_next_caller_starts_anew() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    let joiner = host.get("k");
    assert!(!host.go_away(leader));
    assert!(host.go_away(joiner), "the last");
    host.turn();
    assert_eq!(*host.cancelled.borrow(), [leader]);
    let next = host.get("k");
    assert!(host.leads.borrow().contains_key(&next));
    host.load(leader, Ok(1.into()));
    assert!(host.cache.peek("k").is_none(), "what the cancelled load gives is not kept");
    host.load(next, Ok(2.into()));
    assert_eq!(host.answered(next), Some(2));
    assert_eq!(host.cache.stats().loading, 0);
}

#[test]
fn a_failure_reaches_everyone_as_it_was_and_those_just_behind() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    let joiner = host.get("k");
    host.load(leader, Err(Error::loader(Broken("down"))));
    host.turn();
    let later = host.get("k");
    for ticket in [leader, joiner, later] {
        assert_eq!(host.error(ticket).unwrap().loader_error::<Broken>(), Some(&Broken("down")));
    }
    assert!(host.leads.borrow().is_empty(), "nobody was asked to load again");
}

#[test]
fn a_dropped_lead_fails_its_flight() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    let joiner = host.get("k");
    host.leads.borrow_mut().remove(&leader);
    host.turn();
    assert_eq!(host.error(joiner).unwrap().kind(), ErrorKind::Loader);
    assert_eq!(host.cache.stats().loading, 0);
}

#[test]
fn an_invalidation_during_a_hosts_load_keeps_the_value_out() {
    let host = Host::new(without_runtime());
    let leader = host.get("k");
    host.cache.remove_local("k");
    let later = host.get("k");
    assert!(host.leads.borrow().contains_key(&later), "a later caller does not join");
    host.load(leader, Ok(1.into()));
    assert_eq!(host.answered(leader), Some(1));
    assert!(host.cache.peek("k").is_none());
    host.load(later, Ok(2.into()));
    assert_eq!(host.cache.peek("k").as_deref(), Some(&2));
}

#[test]
fn a_stale_value_comes_with_the_lead_of_its_refresh() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let options = EntryOptions::new().ttl(ms(100)).stale_while_revalidate(ms(1_000));
        let host = Host::new(fleetcache_tests::alone(&runtime, &options));
        let first = host.get("k");
        host.load(first, Ok(1.into()));
        runtime.advance(ms(150)).await;
        let stale = host.get("k");
        let second = host.get("k");
        assert_eq!((host.answered(stale), host.answered(second)), (Some(1), Some(1)));
        assert_eq!(host.leads.borrow().len(), 1, "one refresh");
        assert_eq!(host.leads.borrow()[&stale].context().stale().map(|value| **value), Some(1));
        host.load(stale, Ok(2.into()));
        let fresh = host.get("k");
        assert_eq!(host.answered(fresh), Some(2));
    });
}

#[test]
fn with_a_store_the_engine_asks_the_host_to_load_when_it_has_the_lease() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        let host = Host::new(fleet.nodes[0].clone());
        let (leader, joiner) = (host.get("k"), host.get("k"));
        runtime.advance(ms(5)).await;
        host.turn();
        assert_eq!(fleet.cell("k").await, Some('L'));
        host.load(leader, Ok(7.into()));
        runtime.advance(ms(5)).await;
        host.turn();
        assert_eq!((host.answered(leader), host.answered(joiner)), (Some(7), Some(7)));
        assert_eq!(fleet.nodes[1].get("k").await.unwrap().as_deref(), Some(&7));

        let gone = host.get("gone");
        runtime.advance(ms(5)).await;
        host.turn();
        assert!(host.go_away(gone));
        runtime.advance(ms(5)).await;
        host.turn();
        assert_eq!(*host.cancelled.borrow(), [gone]);
        let other = Host::new(fleet.nodes[1].clone());
        let next = other.get("gone");
        runtime.advance(ms(5)).await;
        other.turn();
        assert!(other.leads.borrow().contains_key(&next), "the key is free for the next at once");
    });
}

#[test]
fn a_hosts_load_meets_the_hard_timeout() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let host = Host::new(fleetcache_tests::alone(&runtime, &EntryOptions::new().hard_timeout(ms(50))));
        let leader = host.get("k");
        runtime.advance(ms(60)).await;
        host.turn();
        assert_eq!(host.error(leader).unwrap().kind(), ErrorKind::Timeout);
        assert_eq!(*host.cancelled.borrow(), [leader], "and the host is told to stop its loader");
    });
}

#[test]
fn a_get_without_a_loader_finds_what_is_there() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        fleet.nodes[1].set("k", 7).await.unwrap();
        let host = Host::new(fleet.nodes[0].clone());
        for (key, expected) in [("k", Some(7)), ("missing", None)] {
            let Begin::Wait(seat) = host.cache.begin_get(key, &host.mailbox, 1) else { panic!("the store is asked") };
            host.seats.borrow_mut().insert(1, seat);
            runtime.advance(ms(5)).await;
            host.turn();
            assert_eq!(host.answers.borrow_mut().remove(&1).unwrap().unwrap(), expected);
        }
        assert!(matches!(host.cache.begin_get("k", &host.mailbox, 2), Begin::Hit(_)));
        assert!(matches!(without_runtime().begin_get("k", &host.mailbox, 3), Begin::Missing));
    });
}
