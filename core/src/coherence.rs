//! Invalidations from other nodes, and the watch over the bus.
//!
//! A received message only ever removes, so its order does not matter and repeating it does no harm. Whatever may have
//! been missed is a gap: L1 is distrusted at once and watermarks are asked for before L2 is believed again.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable};

use crate::bus::{Bus, Delivery};
use crate::engine::{BusSide, Core};
use crate::error::Result;
use crate::peers::{Numbered, Sender};
use crate::runtime::{BoxFuture, Runtime, jittered};
use crate::watermark::{scope_member, tag_member};
use crate::wire::message::{Body, Item, Message, peek_sender};

/// The pause before a failed subscription or repair is tried again: doubled up to the longest.
pub(crate) const FIRST_RETRY: Duration = Duration::from_millis(100);
pub(crate) const LONGEST_RETRY: Duration = Duration::from_secs(2);

impl<V: Send + Sync + 'static> Core<V> {
    /// Starts what runs as long as the cache: receiving, heartbeats, watermark polls.
    pub(crate) fn start_loops(self: &Arc<Self>) -> Result<()> {
        if let Some(side) = &self.bus {
            self.start_loop(receive(Arc::downgrade(self), Arc::clone(&side.bus), Arc::clone(&self.runtime)))?;
        }
        if self.bus.is_some() || self.shared.is_some() {
            self.start_loop(watch(Arc::downgrade(self), Arc::clone(&self.runtime)))?;
        }
        Ok(())
    }

    fn start_loop(&self, task: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let (handle, registration) = AbortHandle::new_pair();
        let task = Abortable::new(task, registration);
        self.loops.lock().push(handle);
        let task: BoxFuture<'static, ()> = Box::pin(async move {
            let _ = task.await;
        });
        self.runtime.spawn(task)
    }

    /// Messages may have been missed.
    pub(crate) fn gap(&self, why: &str) {
        self.counters.gaps.add_one();
        tracing::info!(why, "a gap in the invalidations: distrusting what is in memory");
        if let Some(shared) = &self.shared {
            shared.l2.desync();
        }
        self.clear_memory();
    }

    pub(crate) fn receive(self: &Arc<Self>, bus: &BusSide, bytes: &[u8]) {
        let now = self.runtime.now_ms();
        bus.heard_at.store(now, Ordering::Release);
        if bus.silent.swap(false, Ordering::AcqRel) {
            tracing::info!("the bus is heard again");
        }
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(why) => {
                self.counters.malformed_messages.add_one();
                tracing::warn!(%why, sender = ?peek_sender(bytes), "a message of the bus cannot be read");
                self.gap("a message that cannot be read");
                return;
            }
        };
        let sender = Sender { node: message.head.node, incarnation: message.head.incarnation };
        let numbered = match &message.body {
            Body::Batch(_) => Numbered::Batch,
            Body::Hello | Body::Heartbeat => Numbered::Last,
            Body::Goodbye => Numbered::Goodbye,
        };
        let heartbeat = u64::from(message.head.heartbeat_ms);
        let missed = bus.peers.lock().heard(sender, numbered, message.head.sequence, heartbeat, now);
        if missed {
            self.gap("a hole in a sender's numbers");
        }
        if sender == bus.me {
            // Applied before it was sent. Coming back, it only shows that the bus works and how fast.
            bus.lag.store(now.saturating_sub(message.head.sent_ms), Ordering::Relaxed);
            return;
        }
        if let Body::Batch(items) = message.body {
            self.counters.invalidations_received.add(items.len() as u64);
            items.into_iter().for_each(|item| self.apply(item));
        }
    }

    pub(crate) fn apply(self: &Arc<Self>, item: Item) {
        match item {
            Item::Key { scope, key, l2_pending } => {
                // A scope that this process never named has nothing in its L1.
                let scope = if l2_pending { self.scopes.named(&scope).ok() } else { self.scopes.find(&scope) };
                let Some(scope) = scope else { return };
                if l2_pending {
                    // The old value may still be in L2, and its sender may die before it is removed: everyone who knows
                    // sees to it. Listed before L1 is dropped, so that nobody reads it from L2 in between.
                    self.list_for_repair(&scope, &key);
                }
                let at = crate::key::KeyRef { scope: scope.id, text: &key };
                self.flights.invalidate(at, None, |_| self.l1.remove(at));
            }
            Item::Clear { scope: None } => self.clear_local(None),
            Item::Clear { scope: Some(scope) } => {
                if let Some(scope) = self.scopes.find(&scope) {
                    self.clear_local(Some(scope.id));
                }
            }
            Item::Scope { scope, number } => self.apply_watermark(scope_member(&scope), number),
            Item::Tag { scope, tag, number } => self.apply_watermark(tag_member(&scope, &tag), number),
        }
    }

    fn apply_watermark(self: &Arc<Self>, member: String, number: Option<u64>) {
        match number {
            Some(number) => self.marks.raise([(member.as_str(), number)], 0),
            None if self.shared.is_some() => self.suspend(member),
            None => self.marks.raise([(member.as_str(), self.marks.issue())], 0),
        }
    }
}

/// Receives for as long as the cache lives. Holds it only while a message is applied.
async fn receive<V: Send + Sync + 'static>(core: Weak<Core<V>>, bus: Arc<dyn Bus>, runtime: Arc<dyn Runtime>) {
    let mut pause = FIRST_RETRY;
    loop {
        match bus.subscribe().await {
            Ok(mut subscription) => {
                pause = FIRST_RETRY;
                let Some(alive) = core.upgrade() else { return };
                // Whatever was read before the subscription stood may have been invalidated unheard.
                alive.gap("a new subscription");
                alive.set_subscribed(true);
                drop(alive);
                loop {
                    let delivery = subscription.next().await;
                    let Some(alive) = core.upgrade() else { return };
                    if !alive.delivered(delivery) {
                        break;
                    }
                }
            }
            Err(error) => {
                let Some(alive) = core.upgrade() else { return };
                alive.counters.bus_errors.add_one();
                tracing::warn!(%error, "cannot subscribe to the bus; trying again");
            }
        }
        runtime.sleep(jittered(pause, &*runtime)).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}

impl<V: Send + Sync + 'static> Core<V> {
    fn set_subscribed(&self, subscribed: bool) {
        if let Some(bus) = &self.bus {
            bus.subscribed.store(subscribed, Ordering::Release);
        }
    }

    /// Takes a delivery; false where the subscription has ended.
    fn delivered(self: &Arc<Self>, delivery: Result<Delivery>) -> bool {
        let Some(bus) = &self.bus else { return false };
        match delivery {
            Ok(Delivery::Message(bytes)) => {
                if !bus.subscribed.load(Ordering::Acquire) {
                    self.set_subscribed(true);
                }
                self.receive(bus, &bytes);
                true
            }
            Ok(Delivery::Interrupted) => {
                self.counters.bus_errors.add_one();
                self.set_subscribed(false);
                true
            }
            Ok(Delivery::Gap) => {
                self.gap("the bus reported one");
                true
            }
            Err(error) => {
                self.counters.bus_errors.add_one();
                tracing::warn!(%error, "the subscription to the bus ended; subscribing again");
                self.set_subscribed(false);
                self.gap("the subscription ended");
                false
            }
        }
    }

    /// One round of the watch: heartbeat, silence, lost senders, watermarks.
    async fn watch_once(self: &Arc<Self>, hello: bool) {
        if let Some(bus) = &self.bus {
            let now = self.runtime.now_ms();
            let unheard = now.saturating_sub(bus.heard_at.load(Ordering::Acquire));
            if unheard >= bus.max_silence && !bus.silent.swap(true, Ordering::AcqRel) {
                tracing::warn!(
                    unheard,
                    "nothing is heard from the bus: what is in memory is believed only for a while"
                );
                self.marks.recheck();
            }
            if bus.peers.lock().lost(now) {
                self.gap("a sender fell silent without goodbye");
            }
            let body = if hello { Body::Hello } else { Body::Heartbeat };
            if bus.outbox.beat(body).await.is_err() {
                self.counters.bus_errors.add_one();
            }
        }
        if self.shared.is_some() {
            // Also what finds out, on a quiet node, that L2 is back, and what tells of a peer that cannot reach the bus.
            let _ = self.sync().await;
        }
    }
}

async fn watch<V: Send + Sync + 'static>(core: Weak<Core<V>>, runtime: Arc<dyn Runtime>) {
    let mut hello = true;
    loop {
        let pause = {
            let Some(alive) = core.upgrade() else { return };
            alive.watch_once(hello).await;
            alive.heartbeat()
        };
        hello = false;
        runtime.sleep(pause).await;
    }
}

impl<V> Core<V> {
    /// A third of the silence that is tolerated.
    fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.bus.as_ref().map_or(3_000, |bus| bus.max_silence / 3).max(1))
    }
}
