use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fleetcache::testing::SimRuntime;
use fleetcache::{Error, MemoryStore, Result, Runtime, Store};

use crate::Gate;

/// A call to the store, for choosing which one to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A read of values.
    Get,
    /// A read or change of the watermarks.
    Watermarks,
    /// `delete`.
    Delete,
    /// `compare_and_set` on a value's key, by which everything is written.
    Write,
}

/// One node's way to a memory store, with faults.
pub struct FaultStore {
    inner: MemoryStore,
    faults: StoreFaults,
    runtime: SimRuntime,
}

/// The faults, to be changed while the cache runs.
#[derive(Clone, Default)]
pub struct StoreFaults(Arc<Mutex<Faults>>);

#[derive(Default)]
struct Faults {
    down: bool,
    hanging: bool,
    delay: Duration,
    before: Vec<(Op, Gate)>,
    after: Vec<(Op, Gate)>,
    calls: u64,
}

impl StoreFaults {
    fn with<R>(&self, step: impl FnOnce(&mut Faults) -> R) -> R {
        step(&mut self.0.lock().expect("no panic under this lock"))
    }

    /// Every call fails.
    pub fn down(&self, down: bool) {
        self.with(|faults| faults.down = down);
    }

    /// No call is answered.
    pub fn hang(&self, hanging: bool) {
        self.with(|faults| faults.hanging = hanging);
    }

    /// Every call takes this long.
    pub fn delay(&self, delay: Duration) {
        self.with(|faults| faults.delay = delay);
    }

    /// The next such call stops at the gate before the store carries it out.
    pub fn hold_before(&self, op: Op, gate: &Gate) {
        self.with(|faults| faults.before.push((op, gate.clone())));
    }

    /// The next such call stops at the gate after the store has carried it out.
    pub fn hold_after(&self, op: Op, gate: &Gate) {
        self.with(|faults| faults.after.push((op, gate.clone())));
    }

    /// How many calls were made.
    pub fn calls(&self) -> u64 {
        self.with(|faults| faults.calls)
    }

    fn take(&self, op: Op, after: bool) -> Option<Gate> {
        self.with(|faults| {
            let gates = if after { &mut faults.after } else { &mut faults.before };
            let position = gates.iter().position(|(held, _)| *held == op)?;
            Some(gates.remove(position).1)
        })
    }
}

impl FaultStore {
    /// A way to `inner` without faults at first.
    pub fn new(inner: MemoryStore, runtime: &SimRuntime) -> (Self, StoreFaults) {
        let faults = StoreFaults::default();
        (Self { inner, faults: faults.clone(), runtime: runtime.clone() }, faults)
    }

    async fn call<T>(&self, op: Op, step: impl Future<Output = Result<T>>) -> Result<T> {
        let (down, hanging, delay) = self.faults.with(|faults| {
            faults.calls += 1;
            (faults.down, faults.hanging, faults.delay)
        });
        if hanging {
            std::future::pending::<()>().await;
        }
        if !delay.is_zero() {
            self.runtime.sleep(delay).await;
        }
        if down {
            return Err(Error::unavailable("the test took the store down"));
        }
        if let Some(gate) = self.faults.take(op, false) {
            gate.pass().await;
        }
        let outcome = step.await;
        if let Some(gate) = self.faults.take(op, true) {
            gate.pass().await;
        }
        outcome
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        // Watermarks are asked for all the time: a test that holds a read means a value's.
        if key.ends_with(":!w") {
            return self.call(Op::Watermarks, self.inner.get(key)).await;
        }
        self.call(Op::Get, self.inner.get(key)).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        self.call(Op::Get, self.inner.get_many(keys)).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        self.call(Op::Write, self.inner.set(key, value, ttl)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.call(Op::Delete, self.inner.delete(key)).await
    }

    async fn clear(&self) -> Result<()> {
        self.inner.clear().await
    }

    async fn close(&self) {}

    async fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Option<bool>> {
        let op = if key.ends_with(":!w") { Op::Watermarks } else { Op::Write };
        self.call(op, self.inner.compare_and_set(key, expected, value, ttl)).await
    }

    async fn time(&self) -> Result<Option<u64>> {
        self.inner.time().await
    }
}
