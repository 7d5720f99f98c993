use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};
use std::task::{Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Bus, Delivery, Subscription};
use crate::error::Result;
use crate::sync::Mutex;

/// A bus in this process's memory, between several caches in one process. Clones share it. A subscriber that falls
/// behind by more than 4096 messages gets a gap instead of them.
#[derive(Clone, Default)]
pub struct MemoryBus {
    subscribers: Arc<Mutex<Vec<Weak<Mutex<Queue>>>>>,
}

#[derive(Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    waker: Option<Waker>,
}

const QUEUE_LIMIT: usize = 4096;

impl MemoryBus {
    /// A bus without subscribers.
    pub fn new() -> Self {
        Self::default()
    }
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBus").field("subscribers", &self.subscribers.lock().len()).finish()
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn publish(&self, message: Bytes) -> Result<()> {
        let mut wakers = Vec::new();
        self.subscribers.lock().retain(|subscriber| {
            let Some(queue) = subscriber.upgrade() else { return false };
            let mut queue = queue.lock();
            if queue.deliveries.len() >= QUEUE_LIMIT {
                queue.deliveries.clear();
                queue.deliveries.push_back(Delivery::Gap);
            }
            queue.deliveries.push_back(Delivery::Message(message.clone()));
            wakers.extend(queue.waker.take());
            true
        });
        wakers.into_iter().for_each(Waker::wake);
        Ok(())
    }

    async fn subscribe(&self) -> Result<Box<dyn Subscription>> {
        let queue = Arc::new(Mutex::new(Queue::default()));
        self.subscribers.lock().push(Arc::downgrade(&queue));
        Ok(Box::new(MemorySubscription { queue }))
    }

    async fn close(&self) {}
}

struct MemorySubscription {
    queue: Arc<Mutex<Queue>>,
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Result<Delivery> {
        std::future::poll_fn(|cx| {
            let mut queue = self.queue.lock();
            match queue.deliveries.pop_front() {
                Some(delivery) => Poll::Ready(Ok(delivery)),
                None => {
                    queue.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
