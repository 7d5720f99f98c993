//! The shared tier: store keys, deadlines, the circuit breaker and the store's clock, around the protocol's steps.

mod breaker;
pub(crate) mod cas;
pub(crate) mod cells;
#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use self::breaker::Breaker;
use self::cas::StoreCells;
use self::cells::{Acquired, Cells, Lease, Marks, Stored};
use crate::bus::StreamAt;
use crate::doubts::{Doubt, Doubts};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Runtime, timeout};
use crate::store::{NativeStore, Store};
use crate::sync::Mutex;
use crate::wire::key::{store_key, system_key};

/// How long a lease lasts without renewal: how long a key waits for a node that died while loading it.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

/// How late this node's clock may be. Milliseconds.
const COARSE: u64 = 5;

pub(crate) struct L2 {
    cells: Box<dyn Cells>,
    runtime: Arc<dyn Runtime>,
    prefix: Box<str>,
    call_timeout: Duration,
    /// One for each part of the keys that fails apart from the others.
    breakers: Box<[Breaker]>,
    /// The part that the watermarks are in.
    watermarks_part: usize,
    /// The store answers but refuses what would change it.
    refusing: AtomicBool,
    /// The highest number that a poll has told of: the next asks for what is above.
    polled: AtomicU64,
    clock: Clock,
    /// Whether the watermarks and the store's clock are known well enough to judge what is read. Raised at every gap and
    /// outage; until they are settled, a read asks first.
    doubts: Doubts,
}

/// The store's time less this node's, between two bounds: the store read its clock after we asked and before we heard.
#[derive(Clone, Copy)]
struct Offset {
    low: u64,
    high: u64,
    /// When it was learned.
    at: u64,
}

/// The offset, changed by a poll and read by every call.
#[derive(Default)]
struct Clock {
    offset: Mutex<Option<Offset>>,
    known: AtomicBool,
    low: AtomicU64,
    high: AtomicU64,
}

impl Clock {
    /// One of the bounds, if they are known. Each is right by itself, so no lock is needed to read one.
    fn read(&self, bound: &AtomicU64) -> Option<u64> {
        self.known.load(Ordering::Acquire).then(|| bound.load(Ordering::Relaxed))
    }

    fn set(&self, change: impl FnOnce(Option<Offset>) -> Option<Offset>) {
        let mut offset = self.offset.lock();
        *offset = change(*offset);
        if let Some(offset) = *offset {
            self.low.store(offset.low, Ordering::Relaxed);
            self.high.store(offset.high, Ordering::Relaxed);
        }
        self.known.store(offset.is_some(), Ordering::Release);
    }
}

impl Offset {
    /// What is known with another reading: what both allow, the older one widened by what clocks drift apart. Where they
    /// contradict each other, a clock was set, and the newer one is right.
    fn sharpened(older: Option<Self>, newer: Self) -> Self {
        let Some(older) = older else { return newer };
        // A thousandth, ten times what an oscillator strays.
        let drift = newer.at.saturating_sub(older.at) / 1_000 + 1;
        let (low, high) = (older.low.wrapping_sub(drift), older.high.wrapping_add(drift));
        // Differences of two clocks, which may be on either side of zero.
        let less = |a: u64, b: u64| a.wrapping_sub(b).cast_signed() < 0;
        let both = Self {
            low: if less(newer.low, low) { low } else { newer.low },
            high: if less(high, newer.high) { high } else { newer.high },
            at: newer.at,
        };
        if less(both.high, both.low) { newer } else { both }
    }
}

impl L2 {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        runtime: Arc<dyn Runtime>,
        prefix: Box<str>,
        call_timeout: Duration,
    ) -> Self {
        let watermarks = system_key(&prefix, "w");
        let cells = match store.native(&prefix, &runtime) {
            Some(NativeStore(cells)) => cells,
            None => Box::new(StoreCells::new(store, Arc::clone(&runtime), watermarks.clone())),
        };
        Self {
            breakers: (0..cells.parts()).map(|_| Breaker::default()).collect(),
            watermarks_part: cells.part(&watermarks),
            refusing: AtomicBool::new(false),
            polled: AtomicU64::new(0),
            cells,
            runtime,
            prefix,
            call_timeout,
            clock: Clock::default(),
            doubts: Doubts::default(),
        }
    }

    pub(crate) fn key(&self, scope: &str, key: &str) -> String {
        store_key(&self.prefix, scope, key)
    }

    pub(crate) fn fenced(&self) -> bool {
        self.cells.fenced()
    }

    pub(crate) fn is_down(&self) -> bool {
        self.breakers.iter().any(Breaker::is_open)
    }

    pub(crate) fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::Relaxed)
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.cells.is_settled() && self.doubts.is_settled()
    }

    /// What this node knows of the fleet may be out of date from here on.
    pub(crate) fn desync(&self) {
        self.doubts.raise();
    }

    /// Read before a poll; handed to [`Self::settle`] after its answer is applied.
    pub(crate) fn doubts(&self) -> Doubt {
        self.doubts.now()
    }

    pub(crate) fn settle(&self, doubts: Doubt) {
        self.doubts.settle(doubts);
    }

    /// The store's time, at the latest: judged by it, a value expires a little early rather than late.
    pub(crate) fn now_at_most(&self) -> u64 {
        let now = self.runtime.now_ms();
        self.clock.read(&self.clock.high).map_or_else(|| self.runtime.wall_ms(), |high| now.wrapping_add(high))
    }

    /// The store's time, at the earliest.
    pub(crate) fn now_at_least(&self) -> u64 {
        let now = self.runtime.now_ms();
        self.clock.read(&self.clock.low).map_or_else(|| self.runtime.wall_ms(), |low| now.wrapping_add(low))
    }

    /// Every call to the store goes through here: refused at once while the circuit is open, ended at the deadline.
    async fn call<T>(&self, part: usize, step: impl Future<Output = Result<T>>) -> Result<T> {
        let Some(permit) = self.breakers[part].admit(self.runtime.now_ms()) else {
            return Err(Error::unavailable(
                "the shared store failed several times in a row; it is not asked for a moment",
            ));
        };
        let outcome = timeout(&*self.runtime, self.call_timeout, step).await;
        let outcome = outcome.unwrap_or_else(|| {
            Err(Error::timeout(format!("the shared store did not answer within {:?}", self.call_timeout)))
        });
        match &outcome {
            Err(error) if error.kind() != ErrorKind::Refused => {
                if permit.failed(&*self.runtime) {
                    tracing::warn!(%error, "the shared store is out of reach: going on without it");
                }
                self.desync();
            }
            // A store that refuses is there.
            _ => {
                if permit.succeeded() {
                    tracing::info!("the shared store is back");
                    self.desync();
                }
            }
        }
        outcome
    }

    /// A step that changes something, which a store that is full or read-only refuses.
    async fn change<T>(&self, key: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = self.call(self.cells.part(key), step).await;
        let refused = outcome.as_ref().err().filter(|error| error.kind() == ErrorKind::Refused);
        if (refused.is_some() || outcome.is_ok())
            && self.refusing.swap(refused.is_some(), Ordering::Relaxed) != refused.is_some()
        {
            match refused {
                Some(error) => tracing::warn!(%error, "the shared store refuses changes: going on without them"),
                None => tracing::info!("the shared store takes changes again"),
            }
        }
        outcome
    }

    pub(crate) async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.call(self.cells.part(key), self.cells.get(key)).await
    }

    pub(crate) async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        let part = keys.first().map_or(0, |key| self.cells.part(key));
        let found = self.call(part, self.cells.get_many(keys)).await?;
        if found.len() == keys.len() {
            return Ok(found);
        }
        Err(Error::unavailable(format!("the store answered {} values for {} keys", found.len(), keys.len())))
    }

    pub(crate) async fn acquire(&self, key: &str, seen: u64, over_hold: bool) -> Result<Acquired> {
        // 0 and 1 mean "nobody".
        let token = self.runtime.random() | 2;
        self.change(key, self.cells.acquire(key, token, LEASE.as_millis() as u64, seen, over_hold)).await
    }

    pub(crate) async fn fill(&self, key: &str, lease: Lease, cell: Bytes, ttl: Duration) -> Result<bool> {
        self.change(key, self.cells.fill(key, lease, cell, ttl)).await
    }

    pub(crate) async fn renew(&self, key: &str, lease: Lease) -> Result<bool> {
        self.change(key, self.cells.renew(key, lease, LEASE.as_millis() as u64)).await
    }

    pub(crate) async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()> {
        self.change(key, self.cells.release(key, lease, hold)).await
    }

    pub(crate) async fn set(&self, key: &str, cell: Bytes, ttl: Duration) -> Result<Stored> {
        // Our clock may tick late: a set must not outlive its caller by that.
        let patience = (self.call_timeout.as_millis() as u64).saturating_sub(COARSE);
        let deadline = self.now_at_least().saturating_add(patience);
        self.change(key, self.cells.set(key, cell, ttl, deadline)).await
    }

    /// Removes keys, those of each part together; the last failure, if there was one.
    pub(crate) async fn remove(&self, keys: &[String]) -> Result<()> {
        if self.breakers.len() == 1 {
            return self.call(0, self.cells.remove(keys)).await;
        }
        let mut parts: Vec<Vec<String>> = vec![Vec::new(); self.breakers.len()];
        keys.iter().for_each(|key| parts[self.cells.part(key)].push(key.clone()));
        let parts = parts.iter().enumerate().filter(|(_, keys)| !keys.is_empty());
        let removals = parts.map(|(part, keys)| self.call(part, self.cells.remove(keys)));
        futures_util::future::join_all(removals).await.into_iter().collect()
    }

    /// The part a key is in: keys of one part fail together.
    pub(crate) fn part(&self, key: &str) -> usize {
        self.cells.part(key)
    }

    pub(crate) fn carries(&self, stream: &StreamAt) -> bool {
        self.cells.carries(stream)
    }

    /// Removes keys and appends the message that says so, in one step.
    pub(crate) async fn remove_and_append(&self, keys: &[String], stream: &StreamAt, message: Bytes) -> Result<()> {
        self.call(0, self.cells.remove_and_append(keys, stream, message)).await
    }

    pub(crate) async fn invalidate(&self, members: &[String], known: u64) -> Result<u64> {
        self.call(self.watermarks_part, self.cells.invalidate(members, known)).await
    }

    pub(crate) fn life(&self) -> Doubt {
        self.cells.life()
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.cells.is_settled()
    }

    /// Whether the store may go back in time at all, as far as is known.
    pub(crate) fn may_go_back(&self) -> bool {
        self.cells.may_go_back()
    }

    /// The next poll asks for everything.
    pub(crate) fn settle_life(&self, life: Doubt) {
        // Another server has another clock.
        self.clock.set(|_| None);
        self.polled.store(0, Ordering::Release);
        self.cells.settle(life);
    }

    pub(crate) async fn lost(&self) -> Result<Option<Duration>> {
        self.call(self.watermarks_part, self.cells.lost()).await
    }

    /// Asks for the watermarks that no poll has told of yet, and reads the store's clock on the way.
    pub(crate) async fn poll(&self, known: u64) -> Result<Marks> {
        let asked = self.runtime.now_ms();
        let since = self.polled.load(Ordering::Acquire);
        let marks = self.call(self.watermarks_part, self.cells.poll(since, known)).await?;
        let heard = self.runtime.now_ms();
        // Our clock may tick coarsely; the widest reading of the two moments is the safe one.
        let (low, high) = (marks.now.wrapping_sub(heard), marks.now.wrapping_sub(asked.saturating_sub(COARSE)));
        self.clock.set(|older| Some(Offset::sharpened(older, Offset { low, high, at: heard })));
        Ok(marks)
    }

    /// What a poll told of is applied.
    pub(crate) fn heeded(&self, top: u64) {
        self.polled.store(top, Ordering::Release);
    }

    pub(crate) async fn restore(&self, members: &[(String, u64)]) -> Result<()> {
        self.call(self.watermarks_part, self.cells.restore(members)).await
    }

    pub(crate) async fn close(&self) {
        self.cells.close().await;
    }
}

#[cfg(test)]
mod offset_tests {
    use super::Offset;

    #[test]
    fn a_slow_answer_does_not_blur_what_a_quick_one_told() {
        let quick = Offset { low: 1_000, high: 1_002, at: 0 };
        let slow = Offset { low: 900, high: 1_200, at: 10_000 };
        let both = Offset::sharpened(Some(quick), slow);
        assert_eq!((both.low, both.high), (989, 1_013), "widened by the drift of ten seconds");
        let set = Offset { low: 5_000, high: 5_002, at: 10_000 };
        let both = Offset::sharpened(Some(quick), set);
        assert_eq!((both.low, both.high), (5_000, 5_002), "the clock was set");
        let behind = Offset { low: 2_u64.wrapping_neg(), high: 3, at: 10 };
        let both = Offset::sharpened(Some(Offset { low: 10_u64.wrapping_neg(), high: 1, at: 0 }), behind);
        assert_eq!((both.low, both.high), (2_u64.wrapping_neg(), 2), "on both sides of zero");
    }
}
