use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fleetcache::testing::SimRuntime;
use fleetcache::{Bus, Delivery, Error, MemoryBus, Result, Runtime, Subscription};

use crate::Gate;

/// One node's way to a memory bus, with faults.
pub struct FaultBus {
    inner: MemoryBus,
    faults: BusFaults,
    runtime: SimRuntime,
}

/// The faults, to be changed while the cache runs.
#[derive(Clone, Default)]
pub struct BusFaults(Arc<Mutex<Faults>>);

#[derive(Default)]
struct Faults {
    down: bool,
    losing: bool,
    deaf: bool,
    delay: Duration,
    slow: Duration,
    holding: Option<Gate>,
    subscribing: Option<Gate>,
    published: Vec<Bytes>,
    received: Vec<Bytes>,
}

impl BusFaults {
    fn with<R>(&self, step: impl FnOnce(&mut Faults) -> R) -> R {
        step(&mut self.0.lock().expect("no panic under this lock"))
    }

    /// Publishing fails.
    pub fn down(&self, down: bool) {
        self.with(|faults| faults.down = down);
    }

    /// What is published is lost without a word.
    pub fn lose_sent(&self, losing: bool) {
        self.with(|faults| faults.losing = losing);
    }

    /// What others publish does not arrive, without a word.
    pub fn lose_received(&self, deaf: bool) {
        self.with(|faults| faults.deaf = deaf);
    }

    /// What others publish arrives this much later.
    pub fn delay(&self, delay: Duration) {
        self.with(|faults| faults.delay = delay);
    }

    /// Publishing takes this long.
    pub fn slow(&self, slow: Duration) {
        self.with(|faults| faults.slow = slow);
    }

    /// The next delivery stops at the gate.
    pub fn hold(&self, gate: &Gate) {
        self.with(|faults| faults.holding = Some(gate.clone()));
    }

    /// The next subscription stops at the gate.
    pub fn hold_subscribe(&self, gate: &Gate) {
        self.with(|faults| faults.subscribing = Some(gate.clone()));
    }

    /// Everything this node has published.
    pub fn published(&self) -> Vec<Bytes> {
        self.with(|faults| faults.published.clone())
    }

    /// Everything that has reached this node.
    pub fn received(&self) -> Vec<Bytes> {
        self.with(|faults| faults.received.clone())
    }
}

impl FaultBus {
    /// A way to `inner` without faults at first.
    pub fn new(inner: MemoryBus, runtime: &SimRuntime) -> (Self, BusFaults) {
        let faults = BusFaults::default();
        (Self { inner, faults: faults.clone(), runtime: runtime.clone() }, faults)
    }
}

#[async_trait]
impl Bus for FaultBus {
    async fn publish(&self, message: Bytes) -> Result<()> {
        let (down, losing, slow) = self.faults.with(|faults| {
            faults.published.push(message.clone());
            (faults.down, faults.losing, faults.slow)
        });
        if !slow.is_zero() {
            self.runtime.sleep(slow).await;
        }
        if down {
            return Err(Error::unavailable("the test took the bus down"));
        }
        if losing { Ok(()) } else { self.inner.publish(message).await }
    }

    async fn subscribe(&self) -> Result<Box<dyn Subscription>> {
        let gate = self.faults.with(|faults| faults.subscribing.take());
        if let Some(gate) = gate {
            gate.pass().await;
        }
        let inner = self.inner.subscribe().await?;
        Ok(Box::new(FaultSubscription { inner, faults: self.faults.clone(), runtime: self.runtime.clone() }))
    }

    async fn close(&self) {}
}

struct FaultSubscription {
    inner: Box<dyn Subscription>,
    faults: BusFaults,
    runtime: SimRuntime,
}

#[async_trait]
impl Subscription for FaultSubscription {
    async fn next(&mut self) -> Result<Delivery> {
        loop {
            let delivery = self.inner.next().await?;
            let (deaf, delay, gate) = self.faults.with(|faults| (faults.deaf, faults.delay, faults.holding.take()));
            if deaf {
                continue;
            }
            if let Some(gate) = gate {
                gate.pass().await;
            }
            if !delay.is_zero() {
                self.runtime.sleep(delay).await;
            }
            if let Delivery::Message(message) = &delivery {
                self.faults.with(|faults| faults.received.push(message.clone()));
            }
            return Ok(delivery);
        }
    }
}
