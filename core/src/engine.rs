//! What a cache is made of, shared by all its handles, and the rules that the paths through it have in common.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::AbortHandle;

use crate::bus::Bus;
use crate::codec::Codec;
use crate::entry::{Entry, Freshness};
use crate::error::{Error, Result};
use crate::flight::Flights;
use crate::health::{Health, PartHealth};
use crate::key::KeyRef;
use crate::l1::L1;
use crate::l2::L2;
use crate::outbox::Outbox;
use crate::peers::{Peers, Sender};
use crate::pilot::Work;
use crate::recent::Recent;
use crate::repair::Repairs;
use crate::runtime::{BoxFuture, Runtime, SharedRun};
use crate::scopes::{Scope, Scopes};
use crate::stats::{Counters, Stats};
use crate::sync::Mutex;
use crate::watermark::Watermarks;
use crate::wire::message::Body;

/// How a flight ends: a value, nothing (only where nobody loads), or an error. Shared by all who wait.
pub(crate) type Outcome<V> = Result<Option<Entry<V>>>;

pub(crate) struct Core<V> {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) l1: L1<Entry<V>>,
    pub(crate) flights: Arc<Flights<Outcome<V>>>,
    pub(crate) marks: Watermarks,
    pub(crate) scopes: Scopes,
    pub(crate) repairs: Repairs,
    pub(crate) recent: Recent,
    /// The question for the fleet's watermarks that is under way, shared by all who need its answer.
    pub(crate) syncing: SharedRun<Result<()>>,
    pub(crate) shared: Option<SharedTier<V>>,
    pub(crate) bus: Option<BusSide>,
    pub(crate) is_null: Option<fn(&V) -> bool>,
    pub(crate) strict: bool,
    pub(crate) counters: Counters,
    pub(crate) owned: Owned,
    pub(crate) closed: AtomicBool,
    /// Background loops, ended by `close` or by the last handle's drop.
    pub(crate) loops: Mutex<Vec<AbortHandle>>,
}

/// The shared store and how values get into it.
pub(crate) struct SharedTier<V> {
    pub(crate) l2: Arc<L2>,
    pub(crate) codec: Arc<dyn Codec<V>>,
    pub(crate) compress_from: Option<usize>,
}

/// The bus, both ways.
pub(crate) struct BusSide {
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) me: Sender,
    pub(crate) peers: Mutex<Peers>,
    pub(crate) max_silence: u64,
    /// When anything was last heard, own messages included.
    pub(crate) heard_at: AtomicU64,
    pub(crate) subscribed: AtomicBool,
    /// Nothing was heard for `max_silence`: L1 is believed only for that long from reading it.
    pub(crate) silent: AtomicBool,
    /// Milliseconds, `u64::MAX` before the first own message came back.
    pub(crate) lag: AtomicU64,
}

/// Work that goes on without its caller, counted so that `close` can wait for it.
#[derive(Default)]
pub(crate) struct Owned {
    running: AtomicUsize,
    idle: Mutex<Vec<std::task::Waker>>,
}

/// What L1 says about a key.
pub(crate) enum Look<V> {
    /// Answer it.
    Fresh(Entry<V>),
    /// Answer it and see that it is refreshed.
    Refresh(Entry<V>),
    /// Answer it only if the load fails or is slow.
    Fallback(Entry<V>),
    Miss,
}

/// The longest key, in bytes.
pub(crate) const MAX_KEY: usize = 64 * 1024;

impl<V: Send + Sync + 'static> Core<V> {
    /// The hit path: a fresh value in L1, or nothing.
    ///
    /// Costs the engine's lookup (one hash, one copy of the entry), a read of the coarse clock (5 ns), one atomic load
    /// and the striped count (5 ns). Takes no lock of ours and allocates nothing.
    #[inline]
    pub(crate) fn hit(&self, scope: &Scope, key: &str) -> Option<Entry<V>> {
        let entry = self.l1.get(KeyRef { scope: scope.id, text: key })?;
        if entry.checked != self.marks.generation() || entry.freshness(self.runtime.now_ms()) != Freshness::Fresh {
            return None;
        }
        self.counters.l1_hits.add_one();
        Some(entry)
    }

    /// The whole truth about a key in L1: judges watermarks, silence and time.
    pub(crate) fn look(&self, scope: &Scope, key: &str) -> Look<V> {
        let at = KeyRef { scope: scope.id, text: key };
        let Some(mut entry) = self.l1.get(at) else { return Look::Miss };
        if entry.checked != self.marks.generation() {
            match self.recheck(scope, at, &entry) {
                Some(judged) => entry = judged,
                None => return Look::Miss,
            }
        }
        match entry.freshness(self.runtime.now_ms()) {
            Freshness::Fresh => Look::Fresh(entry),
            Freshness::RefreshAhead | Freshness::Stale => Look::Refresh(entry),
            Freshness::Fallback => Look::Fallback(entry),
            Freshness::Expired => Look::Miss,
        }
    }

    /// Something was invalidated since the entry was last judged: judges it again and remembers a good verdict. The
    /// entry as it may be answered, if it may.
    fn recheck(&self, scope: &Scope, at: KeyRef<'_>, entry: &Entry<V>) -> Option<Entry<V>> {
        self.flights.locked(at, || {
            let still = self.l1.get(at).is_some_and(|held| Arc::ptr_eq(&held.value, &entry.value));
            let judged = self.vouched_for(scope, entry);
            match &judged {
                Some(entry) if still => self.l1.insert(at.to_key(), entry.clone()),
                None if still => self.l1.remove(at),
                _ => {}
            }
            judged
        })
    }

    /// The entry with a good verdict for this generation, unless it is dead by a watermark or a clear.
    fn vouched_for(&self, scope: &Scope, entry: &Entry<V>) -> Option<Entry<V>> {
        let checked = self.marks.alive(entry, scope.id, &scope.name)?;
        let entry = Entry { checked, ..entry.clone() };
        // A node that hears nothing answers an entry only for so long from the moment it read or loaded it.
        let silent = self.bus.as_ref().filter(|bus| bus.silent.load(Ordering::Acquire));
        match silent {
            Some(bus) => Some(entry.limited(bus.max_silence)),
            None => Some(entry),
        }
    }

    /// Puts an entry into L1 unless it is dead by a watermark or a clear. Only under the key's lock.
    pub(crate) fn insert(&self, scope: &Scope, key: &str, entry: &Entry<V>) -> bool {
        let Some(entry) = self.vouched_for(scope, entry) else { return false };
        self.l1.insert(KeyRef { scope: scope.id, text: key }.to_key(), entry);
        true
    }

    /// Whether the key must not be read from L2 because an older value may still be there.
    pub(crate) fn closed_to_l2(&self, scope: &Scope, key: &str) -> bool {
        scope.is_closed() || self.repairs.has(KeyRef { scope: scope.id, text: key })
    }

    /// Puts a key on the repair list; where that is full, closes the key's whole scope to L2.
    pub(crate) fn list_for_repair(self: &Arc<Self>, scope: &Scope, key: &str) {
        if self.shared.is_none() && self.bus.is_none() {
            return;
        }
        if self.repairs.add(KeyRef { scope: scope.id, text: key }) {
            self.counters.repairs_listed.add_one();
        } else if scope.close() {
            self.counters.repair_overflows.add_one();
            tracing::error!(
                scope = &*scope.name,
                "the repair list is full: the scope is not read from the shared store until a watermark is in"
            );
        }
        self.start_repair();
    }

    /// Refuses calls that make no sense, and all calls after `close`.
    pub(crate) fn usable(&self, key: &str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed());
        }
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(Error::config(format!("key of {} bytes is not allowed: give 1 to {MAX_KEY} bytes", key.len())));
        }
        Ok(())
    }

    /// Runs `task` to its end whatever becomes of the caller; `close` waits for it.
    pub(crate) fn spawn_owned(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        self.owned.enter();
        let core = Arc::clone(self);
        let leave = OnDrop(Some(move || core.owned.leave()));
        self.runtime.spawn(Box::pin(async move {
            let _leave = leave;
            task.await;
        }))
    }

    /// A flight's work goes to the runtime, where it is not the leading caller's to drive any more. Where no task can
    /// run, its being dropped fails the flight.
    pub(crate) fn send_off(&self, work: Option<Work>) {
        if let Some(work) = work {
            let _ = self.runtime.spawn(work);
        }
    }

    /// Runs `task` as owned work and waits for its result.
    pub(crate) async fn owned<T: Send + 'static>(
        self: &Arc<Self>,
        task: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (done, outcome) = futures_channel::oneshot::channel();
        self.spawn_owned(async move {
            let _ = done.send(task.await);
        })?;
        outcome.await.unwrap_or_else(|_| Err(Error::closed()))
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            entries: self.l1.len(),
            weight: self.l1.weight(),
            loading: self.flights.in_progress() as u64,
            repairs: self.repairs.len() as u64,
            ..self.counters.snapshot()
        }
    }

    pub(crate) fn health(&self) -> Health {
        let l2 = match &self.shared {
            None => PartHealth::Absent,
            Some(shared) if shared.l2.is_down() => PartHealth::Down,
            Some(shared) if shared.l2.is_refusing() => PartHealth::Degraded,
            Some(_) => PartHealth::Up,
        };
        let bus = match &self.bus {
            None => PartHealth::Absent,
            Some(bus) if bus.is_down() => PartHealth::Down,
            Some(_) => PartHealth::Up,
        };
        Health {
            l2,
            bus,
            fenced: self.shared.as_ref().is_none_or(|shared| shared.l2.fenced()),
            peers: self.bus.as_ref().map_or(0, |bus| bus.peers.lock().others(bus.me)),
            repairs: self.repairs.len(),
            closed_scopes: self.scopes.closed().len(),
            bus_lag_ms: self.bus.as_ref().map(|bus| bus.lag.load(Ordering::Relaxed)).filter(|lag| *lag != u64::MAX),
        }
    }

    /// Waits for owned work, says goodbye and lets go of everything.
    pub(crate) async fn close(self: &Arc<Self>) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let drained = crate::runtime::timeout(&*self.runtime, DRAIN, self.owned.drained()).await;
        if drained.is_none() {
            let left = self.repairs.len();
            tracing::warn!(keys_not_repaired = left, "closed with work in progress that did not end within {DRAIN:?}");
        }
        if let Some(bus) = &self.bus {
            let _ = bus.outbox.beat(Body::Goodbye).await;
        }
        self.stop();
        if let Some(bus) = &self.bus {
            bus.bus.close().await;
        }
        if let Some(shared) = &self.shared {
            shared.l2.close().await;
        }
        self.marks.clear();
        self.l1.clear();
        Ok(())
    }

    pub(crate) fn clear_memory(&self) {
        self.marks.clear();
        self.l1.clear();
    }
}

impl<V> Core<V> {
    fn stop(&self) {
        self.loops.lock().drain(..).for_each(|handle| handle.abort());
    }
}

impl<V> Drop for Core<V> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How long `close` waits for owned work.
const DRAIN: Duration = Duration::from_secs(5);

impl BusSide {
    fn is_down(&self) -> bool {
        !self.subscribed.load(Ordering::Acquire) || self.silent.load(Ordering::Acquire) || self.outbox.is_stuck()
    }
}

impl Owned {
    pub(crate) fn enter(&self) {
        self.running.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn leave(&self) {
        // SeqCst here and in `drained`: either the last to leave sees the waker, or who waits sees that it left.
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            let idle = std::mem::take(&mut *self.idle.lock());
            idle.into_iter().for_each(std::task::Waker::wake);
        }
    }

    fn drained(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::poll_fn(|cx| {
            self.idle.lock().push(cx.waker().clone());
            if self.running.load(Ordering::SeqCst) == 0 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        }))
    }
}

/// Runs its function when dropped, also where a task is dropped unfinished.
pub(crate) struct OnDrop<F: FnOnce()>(pub(crate) Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(run) = self.0.take() {
            run();
        }
    }
}

/// What a handle adds to the core: where its keys live and how they are kept.
///
/// One pointer: every flight takes a copy, and two counts that travel between cores cost twice as much.
#[derive(Clone)]
pub(crate) struct Place(Arc<PlaceParts>);

pub(crate) struct PlaceParts {
    pub(crate) scope: Arc<Scope>,
    pub(crate) options: Arc<crate::options::Resolved>,
}

impl std::ops::Deref for Place {
    type Target = PlaceParts;

    fn deref(&self) -> &PlaceParts {
        &self.0
    }
}

impl Place {
    pub(crate) fn new(scope: Arc<Scope>, options: Arc<crate::options::Resolved>) -> Self {
        Self(Arc::new(PlaceParts { scope, options }))
    }

    pub(crate) fn at<'a>(&self, key: &'a str) -> KeyRef<'a> {
        KeyRef { scope: self.scope.id, text: key }
    }
}
