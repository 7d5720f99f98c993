//! The shared tier: store keys, deadlines, the circuit breaker and the store's clock, around the protocol's steps.

mod breaker;
mod cas;
pub(crate) mod cells;
#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use self::breaker::Breaker;
use self::cas::StoreCells;
use self::cells::{Acquired, Cells, Lease, Marks, Stored};
use crate::error::{Error, Result};
use crate::runtime::{Runtime, timeout};
use crate::store::Store;
use crate::sync::Mutex;
use crate::wire::key::{store_key, system_key};

/// How long a lease lasts without renewal: how long a key waits for a node that died while loading it.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

pub(crate) struct L2 {
    cells: Box<dyn Cells>,
    runtime: Arc<dyn Runtime>,
    prefix: Box<str>,
    call_timeout: Duration,
    breaker: Breaker,
    clock: Mutex<Option<Offset>>,
    /// Whether the watermarks and the store's clock are known well enough to judge what is read. Lost at every gap and
    /// outage; until it is regained, a read asks for them first.
    synced: Synced,
}

/// Counts what made the node's knowledge doubtful, and up to which of these it was renewed.
struct Synced {
    doubts: AtomicU64,
    settled: AtomicU64,
}

/// The store's time less this node's, between two bounds: the store read its clock after we asked and before we heard.
#[derive(Clone, Copy)]
struct Offset {
    low: u64,
    high: u64,
}

impl L2 {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        runtime: Arc<dyn Runtime>,
        prefix: Box<str>,
        call_timeout: Duration,
    ) -> Self {
        let cells = StoreCells::new(store, Arc::clone(&runtime), system_key(&prefix, "w"));
        Self {
            cells: Box::new(cells),
            runtime,
            prefix,
            call_timeout,
            breaker: Breaker::default(),
            clock: Mutex::new(None),
            synced: Synced { doubts: AtomicU64::new(1), settled: AtomicU64::new(0) },
        }
    }

    pub(crate) fn key(&self, scope: &str, key: &str) -> String {
        store_key(&self.prefix, scope, key)
    }

    pub(crate) fn fenced(&self) -> bool {
        self.cells.fenced()
    }

    pub(crate) fn is_down(&self) -> bool {
        self.breaker.is_open()
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.synced.settled.load(Ordering::Acquire) == self.synced.doubts.load(Ordering::Acquire)
    }

    /// What this node knows of the fleet may be out of date from here on.
    pub(crate) fn desync(&self) {
        self.synced.doubts.fetch_add(1, Ordering::AcqRel);
    }

    /// Read before a poll; handed to [`Self::settle`] after its answer is applied.
    pub(crate) fn doubts(&self) -> u64 {
        self.synced.doubts.load(Ordering::Acquire)
    }

    /// A doubt that came up meanwhile stays.
    pub(crate) fn settle(&self, doubts: u64) {
        self.synced.settled.fetch_max(doubts, Ordering::AcqRel);
    }

    /// The store's time, at the latest: judged by it, a value expires a little early rather than late.
    pub(crate) fn now_at_most(&self) -> u64 {
        let now = self.runtime.now_ms();
        self.clock.lock().map_or_else(|| self.runtime.wall_ms(), |offset| now.wrapping_add(offset.high))
    }

    /// The store's time, at the earliest.
    pub(crate) fn now_at_least(&self) -> u64 {
        let now = self.runtime.now_ms();
        self.clock.lock().map_or_else(|| self.runtime.wall_ms(), |offset| now.wrapping_add(offset.low))
    }

    /// Every call to the store goes through here: refused at once while the circuit is open, ended at the deadline.
    async fn call<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        let Some(permit) = self.breaker.admit(self.runtime.now_ms()) else {
            return Err(Error::unavailable(
                "the shared store failed several times in a row; it is not asked for a moment",
            ));
        };
        let outcome = timeout(&*self.runtime, self.call_timeout, step).await;
        let outcome = outcome.unwrap_or_else(|| {
            Err(Error::timeout(format!("the shared store did not answer within {:?}", self.call_timeout)))
        });
        match &outcome {
            Ok(_) => {
                if permit.succeeded() {
                    tracing::info!("the shared store is back");
                    self.desync();
                }
            }
            Err(error) => {
                if permit.failed(&*self.runtime) {
                    tracing::warn!(%error, "the shared store is out of reach: going on without it");
                }
                self.desync();
            }
        }
        outcome
    }

    pub(crate) async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.call(self.cells.get(key)).await
    }

    pub(crate) async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        let found = self.call(self.cells.get_many(keys)).await?;
        if found.len() == keys.len() {
            return Ok(found);
        }
        Err(Error::unavailable(format!("the store answered {} values for {} keys", found.len(), keys.len())))
    }

    pub(crate) async fn acquire(&self, key: &str, seen: u64, over_hold: bool) -> Result<Acquired> {
        // 0 and 1 mean "nobody".
        let token = self.runtime.random() | 2;
        self.call(self.cells.acquire(key, token, LEASE.as_millis() as u64, seen, over_hold)).await
    }

    pub(crate) async fn fill(&self, key: &str, lease: Lease, cell: Bytes, ttl: Duration) -> Result<bool> {
        self.call(self.cells.fill(key, lease, cell, ttl)).await
    }

    pub(crate) async fn renew(&self, key: &str, lease: Lease) -> Result<bool> {
        self.call(self.cells.renew(key, lease, LEASE.as_millis() as u64)).await
    }

    pub(crate) async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()> {
        self.call(self.cells.release(key, lease, hold)).await
    }

    pub(crate) async fn set(&self, key: &str, cell: Bytes, ttl: Duration) -> Result<Stored> {
        let deadline = self.now_at_least().saturating_add(self.call_timeout.as_millis() as u64);
        self.call(self.cells.set(key, cell, ttl, deadline)).await
    }

    pub(crate) async fn remove(&self, keys: &[String]) -> Result<()> {
        self.call(self.cells.remove(keys)).await
    }

    pub(crate) async fn invalidate(&self, members: &[String], known: u64) -> Result<u64> {
        self.call(self.cells.invalidate(members, known)).await
    }

    /// Asks for watermarks above `since` and reads the store's clock on the way.
    pub(crate) async fn poll(&self, since: u64, known: u64) -> Result<Marks> {
        let asked = self.runtime.now_ms();
        let marks = self.call(self.cells.poll(since, known)).await?;
        let heard = self.runtime.now_ms();
        // Our clock may tick coarsely; the widest reading of the two moments is the safe one.
        let offset =
            Offset { low: marks.now.wrapping_sub(heard), high: marks.now.wrapping_sub(asked.saturating_sub(5)) };
        *self.clock.lock() = Some(offset);
        Ok(marks)
    }

    pub(crate) async fn restore(&self, members: &[(String, u64)]) -> Result<()> {
        self.call(self.cells.restore(members)).await
    }

    pub(crate) async fn close(&self) {
        self.cells.close().await;
    }
}
