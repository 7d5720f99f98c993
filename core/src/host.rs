//! The seam that bindings stand on: hits without a future, and loads that a host runs on its own event loop.
//!
//! A host has a [`Mailbox`] per event loop. It asks with a ticket of its choosing; what cannot be answered at once comes
//! back through the mailbox, which wakes the loop once for a whole batch. A load is a [`Lead`]: the host runs its own
//! loader and completes it. Without a shared store and timeouts nothing here touches an async runtime: the host gets
//! its lead on the spot, and completing it tells all who joined.
//!
//! Rules a host keeps: it drops a [`Seat`] when its caller goes away; it stops a loader when its lead is cancelled (or
//! lets it run on in vain); it may complete a lead from any thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_channel::oneshot;

use crate::cache::HybridCache;
use crate::engine::{Core, Look, OnDrop, Outcome};
use crate::error::{Error, Result};
use crate::flight::{Abandon, Boarded, Deliver, Flight, Flights, Hear, Purpose};
use crate::fly::{Begun, Plan};
use crate::loader::{LoadContext, Loaded, Loader};
use crate::sync::Mutex;

/// Where answers for one event loop wait to be taken.
pub struct Mailbox<V> {
    events: Mutex<Vec<Event<V>>>,
    /// A wake-up is under way. Invariant: cleared before the events are taken, so that an event that comes after the
    /// taking wakes again.
    armed: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// Something for the host to do.
#[derive(Debug)]
pub enum Event<V> {
    /// The answer for a ticket: a value, or `None` where nobody loads.
    Done {
        /// The caller's ticket.
        ticket: u64,
        /// What its caller gets.
        outcome: Result<Option<Arc<V>>>,
    },
    /// A load to be run, started by the caller with this ticket. That caller may have had its answer already.
    Load {
        /// The caller's ticket.
        ticket: u64,
        /// The load.
        lead: Lead<V>,
    },
    /// The load that was started by this ticket is not wanted any more.
    Cancel {
        /// The caller's ticket.
        ticket: u64,
    },
}

/// The answer to a host's call.
#[derive(Debug)]
pub enum Begin<V> {
    /// The value.
    Hit(Arc<V>),
    /// The value, which is stale: the host should also run the load, in the background.
    Refresh(Arc<V>, Lead<V>),
    /// The caller is the first: the host runs the load. The seat is the caller's; the lead's completion is its answer.
    Lead(Lead<V>, Seat<V>),
    /// The answer will come through the mailbox.
    Wait(Seat<V>),
    /// Nothing is there, and nobody loads.
    Missing,
    /// The call failed.
    Failed(Error),
}

/// A caller's interest in a flight. Dropping it is the caller's going away.
pub struct Seat<V> {
    flights: Arc<Flights<Outcome<V>>>,
    flight: Arc<Flight<Outcome<V>>>,
    number: Option<usize>,
}

/// A load that the host runs. Dropping it fails the load.
pub struct Lead<V> {
    context: LoadContext<V>,
    reply: Option<Reply<V>>,
}

enum Reply<V> {
    /// The flight is the host's own from here to landing.
    Direct(Box<Plan<V>>, Begun),
    /// The engine waits for the answer.
    Engine(oneshot::Sender<Result<Loaded<V>>>),
}

impl<V: Send + Sync + 'static> Mailbox<V> {
    /// A mailbox that calls `wake`, from any thread, when its first event has come; again after [`drain`](Self::drain).
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { events: Mutex::default(), armed: AtomicBool::new(false), wake: Box::new(wake) })
    }

    /// Takes everything that has come.
    pub fn drain(&self) -> Vec<Event<V>> {
        self.armed.store(false, Ordering::SeqCst);
        std::mem::take(&mut *self.events.lock())
    }

    fn push(&self, event: Event<V>) {
        self.events.lock().push(event);
        if !self.armed.swap(true, Ordering::SeqCst) {
            (self.wake)();
        }
    }
}

impl<V: Send + Sync + 'static> Deliver<Outcome<V>> for Mailbox<V> {
    fn deliver(&self, ticket: u64, outcome: Outcome<V>) {
        self.push(Event::Done { ticket, outcome: outcome.map(|entry| entry.map(|entry| entry.value)) });
    }
}

impl<V: Send + Sync + 'static> HybridCache<V> {
    /// A fresh value in this process's memory. Synchronous; takes no lock that I/O could hold, and allocates nothing.
    #[inline]
    pub fn peek(&self, key: &str) -> Option<Arc<V>> {
        self.core.hit(&self.place.scope, key).map(|entry| entry.value)
    }

    /// [`get_with`](Self::get_with) for a host: what follows from the answer is the host's to do.
    pub fn begin(&self, key: &str, mailbox: &Arc<Mailbox<V>>, ticket: u64) -> Begin<V> {
        let core = &self.core;
        if let Err(error) = core.usable(key) {
            return Begin::Failed(error);
        }
        let fallback = match core.look(&self.place.scope, key) {
            Look::Fresh(entry) => {
                core.counters.l1_hits.add_one();
                return Begin::Hit(entry.value);
            }
            Look::Refresh(entry) => {
                core.counters.stale_served.add_one();
                let Some(flight) = core.board_refresh(&self.place, key) else { return Begin::Hit(entry.value) };
                let plan = Plan::refreshing(core, flight, &self.place, key, &entry);
                return match self.lead(plan, mailbox, ticket) {
                    Some(lead) => Begin::Refresh(entry.value, lead),
                    None => Begin::Hit(entry.value),
                };
            }
            Look::Fallback(entry) => Some(entry),
            Look::Miss => None,
        };
        let hear = Hear::Mail(Arc::clone(mailbox) as Arc<dyn Deliver<Outcome<V>>>, ticket);
        match core.board(&self.place, key, Purpose::Load, hear) {
            Boarded::Failed(outcome) => {
                core.counters.joined.add_one();
                match (outcome, fallback) {
                    (_, Some(entry)) | (Ok(Some(entry)), None) => Begin::Hit(entry.value),
                    (Ok(None), None) => Begin::Missing,
                    (Err(error), None) => Begin::Failed(error),
                }
            }
            Boarded::Joined(flight, seat) => {
                core.counters.joined.add_one();
                let seat = Seat { flights: Arc::clone(&core.flights), flight: Arc::clone(&flight), number: Some(seat) };
                match fallback.filter(|_| flight.is_late()) {
                    Some(entry) => Begin::Hit(entry.value),
                    None => Begin::Wait(seat),
                }
            }
            Boarded::Lead(flight, seat) => {
                core.counters.misses.add_one();
                let plan = Plan::new(core, Arc::clone(&flight), &self.place, key, fallback);
                let seat = Seat { flights: Arc::clone(&core.flights), flight, number: Some(seat) };
                match self.lead(plan, mailbox, ticket) {
                    Some(lead) => {
                        // Nobody else can end the flight before the host has its lead.
                        seat.number.iter().for_each(|index| seat.flight.hush(*index));
                        Begin::Lead(lead, seat)
                    }
                    None => Begin::Wait(seat),
                }
            }
        }
    }

    /// [`get`](Self::get) for a host.
    pub fn begin_get(&self, key: &str, mailbox: &Arc<Mailbox<V>>, ticket: u64) -> Begin<V> {
        if let Some(value) = self.peek(key) {
            return Begin::Hit(value);
        }
        let core = Arc::clone(&self.core);
        if core.shared.is_none() {
            if let Err(error) = core.usable(key) {
                return Begin::Failed(error);
            }
            return match core.look(&self.place.scope, key) {
                Look::Fresh(entry) | Look::Refresh(entry) => Begin::Hit(entry.value),
                Look::Fallback(_) | Look::Miss => {
                    core.counters.misses.add_one();
                    Begin::Missing
                }
            };
        }
        core.begin_find(&self.place, key, Arc::clone(mailbox) as Arc<dyn Deliver<Outcome<V>>>, ticket)
    }

    /// The flight's lead, where the host can run it to its end alone; else the engine flies and asks for the load
    /// through the mailbox.
    fn lead(&self, plan: Plan<V>, mailbox: &Arc<Mailbox<V>>, ticket: u64) -> Option<Lead<V>> {
        let options = &self.place.options;
        if self.core.shared.is_none() && options.soft_timeout.is_none() && options.hard_timeout.is_none() {
            plan.flight.on_abandoned(Arc::clone(mailbox) as Arc<dyn Abandon>, ticket);
            let begun = plan.begin_load();
            let context = plan.context();
            return Some(Lead { context, reply: Some(Reply::Direct(Box::new(plan), begun)) });
        }
        plan.take_off(host_loader(Arc::clone(mailbox), ticket));
        None
    }
}

impl<V: Send + Sync + 'static> Core<V> {
    fn begin_find(
        self: &Arc<Self>,
        place: &crate::engine::Place,
        key: &str,
        mailbox: Arc<dyn Deliver<Outcome<V>>>,
        ticket: u64,
    ) -> Begin<V> {
        if let Err(error) = self.usable(key) {
            return Begin::Failed(error);
        }
        if let Look::Fresh(entry) | Look::Refresh(entry) = self.look(&place.scope, key) {
            return Begin::Hit(entry.value);
        }
        match self.board(place, key, Purpose::Lookup, Hear::Mail(mailbox, ticket)) {
            Boarded::Lead(flight, seat) => {
                let seat = Seat { flights: Arc::clone(&self.flights), flight: Arc::clone(&flight), number: Some(seat) };
                Plan::new(self, flight, place, key, None).look_up();
                Begin::Wait(seat)
            }
            Boarded::Joined(flight, seat) => {
                Begin::Wait(Seat { flights: Arc::clone(&self.flights), flight, number: Some(seat) })
            }
            Boarded::Failed(_) => Begin::Missing,
        }
    }
}

impl<V: Send + Sync + 'static> Abandon for Mailbox<V> {
    fn abandon(&self, ticket: u64) {
        self.push(Event::Cancel { ticket });
    }
}

/// A loader that hands its work to the host and waits for the answer.
fn host_loader<V: Send + Sync + 'static>(mailbox: Arc<Mailbox<V>>, ticket: u64) -> Loader<V> {
    Box::new(move |context| {
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            mailbox.push(Event::Load { ticket, lead: Lead { context, reply: Some(Reply::Engine(reply)) } });
            let mut cancelled = OnDrop(Some(|| mailbox.push(Event::Cancel { ticket })));
            let loaded = answer.await.unwrap_or_else(|_| Err(dropped()));
            cancelled.0 = None;
            loaded
        })
    })
}

fn dropped() -> Error {
    Error::loader("it was dropped before it finished")
}

impl<V: Send + Sync + 'static> Seat<V> {
    /// The caller goes away. True where it was the last, so that its load is not wanted any more.
    pub fn leave(mut self) -> bool {
        self.number.take().is_some_and(|seat| self.flights.leave(&self.flight, seat))
    }
}

impl<V> Drop for Seat<V> {
    fn drop(&mut self) {
        if let Some(seat) = self.number.take() {
            self.flights.leave(&self.flight, seat);
        }
    }
}

impl<V: Send + Sync + 'static> Lead<V> {
    /// What is to be loaded.
    pub fn context(&self) -> &LoadContext<V> {
        &self.context
    }

    /// Ends the load with what the host's loader gave. All who wait are told; the answer for the leading caller is
    /// returned where it is known already, and else comes through the mailbox.
    pub fn complete(mut self, outcome: Result<Loaded<V>>) -> Option<Result<Arc<V>>> {
        match self.reply.take() {
            Some(Reply::Direct(plan, begun)) => {
                let outcome = plan.land_alone(outcome, &begun);
                Some(outcome.and_then(|entry| entry.map(|entry| entry.value).ok_or_else(dropped)))
            }
            Some(Reply::Engine(reply)) => {
                let _ = reply.send(outcome);
                None
            }
            None => None,
        }
    }
}

impl<V> Drop for Lead<V> {
    fn drop(&mut self) {
        if let Some(Reply::Direct(plan, _)) = self.reply.take() {
            plan.core.flights.retire(&plan.flight, Err(dropped()));
        }
    }
}

impl<V> fmt::Debug for Mailbox<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<V> fmt::Debug for Seat<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("number", &self.number).finish_non_exhaustive()
    }
}

impl<V> fmt::Debug for Lead<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lead").field("key", &self.context.key).finish_non_exhaustive()
    }
}
