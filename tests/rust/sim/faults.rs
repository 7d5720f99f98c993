//! A store and a bus that misbehave as the seed says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fleetcache::testing::SimRuntime;
use fleetcache::{Bus, Delivery, Error, MemoryStore, Result, Runtime, Store, Subscription};

/// How much goes wrong, in percent, and how slow things are, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) store_latency: u64,
    /// The call fails and is not carried out.
    pub(crate) store_error: u64,
    /// The call is carried out, but the answer is lost.
    pub(crate) store_lost_reply: u64,
    /// The call is carried out long after its caller has given up.
    pub(crate) store_late: u64,
    pub(crate) bus_delay: u64,
    pub(crate) bus_drop: u64,
    pub(crate) bus_duplicate: u64,
    pub(crate) publish_error: u64,
}

pub(crate) type SharedFaults = Arc<Mutex<Faults>>;

fn now(faults: &SharedFaults) -> Faults {
    *faults.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone)]
pub(crate) struct SimStore {
    pub(crate) inner: MemoryStore,
    pub(crate) runtime: SimRuntime,
    pub(crate) faults: SharedFaults,
}

impl SimStore {
    async fn call<T: Send + 'static>(&self, step: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let faults = now(&self.faults);
        let runtime = &self.runtime;
        let nap = || Duration::from_millis(runtime.below(faults.store_latency + 1));
        let dice = runtime.below(100);
        if dice < faults.store_error {
            runtime.sleep(nap()).await;
            return Err(Error::unavailable("simulated"));
        }
        if dice < faults.store_error + faults.store_late {
            let delay = Duration::from_millis(runtime.below(3_000));
            let sleeper = runtime.clone();
            runtime.spawn(Box::pin(async move {
                sleeper.sleep(delay).await;
                let _ = step.await;
            }))?;
            std::future::pending::<()>().await;
            unreachable!("pending for ever");
        }
        if faults.store_latency > 0 {
            runtime.sleep(nap()).await;
        }
        let outcome = step.await;
        if faults.store_latency > 0 {
            runtime.sleep(nap()).await;
        }
        if dice >= 100 - faults.store_lost_reply {
            return Err(Error::unavailable("simulated: the answer was lost"));
        }
        outcome
    }
}

#[async_trait]
impl Store for SimStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        self.call(async move { inner.get(&key).await }).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        let (inner, keys) = (self.inner.clone(), keys.to_vec());
        self.call(async move { inner.get_many(&keys).await }).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        self.call(async move { inner.set(&key, value, ttl).await }).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let (inner, key) = (self.inner.clone(), key.to_owned());
        self.call(async move { inner.delete(&key).await }).await
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
        let (inner, key, expected) = (self.inner.clone(), key.to_owned(), expected.map(<[u8]>::to_vec));
        self.call(async move { inner.compare_and_set(&key, expected.as_deref(), value, ttl).await }).await
    }

    async fn time(&self) -> Result<Option<u64>> {
        self.inner.time().await
    }
}

#[derive(Clone)]
pub(crate) struct SimBus {
    pub(crate) runtime: SimRuntime,
    pub(crate) faults: SharedFaults,
    pub(crate) queues: Arc<Mutex<Vec<Arc<Mutex<Queue>>>>>,
}

#[derive(Default)]
pub(crate) struct Queue {
    deliveries: VecDeque<Bytes>,
    waker: Option<Waker>,
}

impl Queue {
    fn push(&mut self, message: Bytes) {
        self.deliveries.push_back(message);
        self.waker.take().into_iter().for_each(Waker::wake);
    }
}

#[async_trait]
impl Bus for SimBus {
    async fn publish(&self, message: Bytes) -> Result<()> {
        let faults = now(&self.faults);
        let runtime = &self.runtime;
        let dice = runtime.below(100);
        if faults.bus_delay > 0 {
            runtime.sleep(Duration::from_millis(runtime.below(faults.bus_delay / 4 + 1))).await;
        }
        // Half of the failed publishes have reached everyone all the same.
        if dice * 2 < faults.publish_error {
            return Err(Error::unavailable("simulated"));
        }
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for queue in queues {
            if runtime.below(100) < faults.bus_drop {
                continue;
            }
            let copies = 1 + u64::from(runtime.below(100) < faults.bus_duplicate);
            for _ in 0..copies {
                let (queue, message, sleeper) = (Arc::clone(&queue), message.clone(), runtime.clone());
                // Each copy takes its own time: so messages overtake each other.
                let delay = Duration::from_millis(runtime.below(faults.bus_delay + 1));
                runtime.spawn(Box::pin(async move {
                    if !delay.is_zero() {
                        sleeper.sleep(delay).await;
                    }
                    queue.lock().unwrap_or_else(PoisonError::into_inner).push(message);
                }))?;
            }
        }
        if dice < faults.publish_error { Err(Error::unavailable("simulated: sent all the same")) } else { Ok(()) }
    }

    async fn subscribe(&self) -> Result<Box<dyn Subscription>> {
        let queue = Arc::new(Mutex::new(Queue::default()));
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&queue));
        Ok(Box::new(SimSubscription(queue)))
    }

    async fn close(&self) {}
}

struct SimSubscription(Arc<Mutex<Queue>>);

#[async_trait]
impl Subscription for SimSubscription {
    async fn next(&mut self) -> Result<Delivery> {
        std::future::poll_fn(|cx| {
            let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(message) = queue.deliveries.pop_front() {
                return Poll::Ready(Ok(Delivery::Message(message)));
            }
            queue.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}
