//! Invalidations from other nodes, the watch over the bus, and repairs.
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
use crate::runtime::{BoxFuture, Runtime};
use crate::watermark::{scope_member, tag_member};
use crate::wire::message::{Body, Item, Message, peek_sender};

/// The pause before a failed subscription or repair is tried again: doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Keys repaired in one step.
const REPAIR_BATCH: usize = 256;

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

    fn apply(self: &Arc<Self>, item: Item) {
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

    /// Sees that somebody works on the repairs.
    pub(crate) fn start_repair(self: &Arc<Self>) {
        if !self.repairs.start_work() {
            return;
        }
        let core = Arc::clone(self);
        // Where no task can run, the next listing tries again.
        if self.spawn_owned(async move { core.repair().await }).is_err() {
            self.repairs.stop_work(|| true);
        }
    }

    async fn repair(self: Arc<Self>) {
        let mut pause = FIRST_RETRY;
        loop {
            let idle = || self.scopes.closed().is_empty() && self.marks.suspended().is_empty();
            if self.repairs.stop_work(idle) {
                return;
            }
            match self.repair_some().await {
                Ok(()) => pause = FIRST_RETRY,
                Err(error) => {
                    tracing::debug!(%error, "a repair failed and is tried again");
                    self.runtime.sleep(jittered(pause, &*self.runtime)).await;
                    pause = (pause * 2).min(LONGEST_RETRY);
                    if self.closed.load(Ordering::Acquire) && pause == LONGEST_RETRY {
                        tracing::error!(
                            keys = self.repairs.len(),
                            "closing with keys that could not be invalidated everywhere"
                        );
                        return;
                    }
                }
            }
        }
    }

    async fn repair_some(self: &Arc<Self>) -> Result<()> {
        for scope in self.scopes.closed() {
            // Numbers listed from here on are of keys that the watermark may not cover.
            let before = self.repairs.next_number();
            self.settle_watermark(scope_member(&scope.name), Item::Scope { scope: (*scope.name).into(), number: None })
                .await?;
            self.repairs.forget_scope(scope.id, before);
            scope.reopen();
        }
        for (member, suspension) in self.marks.suspended() {
            if let Some(item) = member_item(&member) {
                self.settle_watermark(member.clone(), item).await?;
            }
            self.marks.settle(&member, suspension);
        }
        let keys = self.repairs.some(REPAIR_BATCH);
        if keys.is_empty() {
            return Ok(());
        }
        let mut items = Vec::with_capacity(keys.len());
        let mut store_keys = Vec::with_capacity(keys.len());
        for (key, _) in &keys {
            let Some(scope) = self.scopes.by_id(key.scope) else { continue };
            if let Some(shared) = &self.shared {
                store_keys.push(shared.l2.key(&scope.name, &key.text));
            }
            items.push(Item::Key { scope: (*scope.name).into(), key: key.text.clone(), l2_pending: false });
        }
        if let Some(shared) = &self.shared {
            shared.l2.remove(&store_keys).await.inspect_err(|_| self.counters.l2_errors.add_one())?;
        }
        self.announce(items).await?;
        self.repairs.done(&keys);
        self.counters.repairs_done.add(keys.len() as u64);
        Ok(())
    }

    /// Gets a number for a watermark that waits for one, and tells everyone.
    async fn settle_watermark(self: &Arc<Self>, member: String, item: Item) -> Result<()> {
        let number = match &self.shared {
            Some(shared) => shared.l2.invalidate(std::slice::from_ref(&member), self.marks.known()).await?,
            None => self.marks.issue(),
        };
        self.marks.raise([(member.as_str(), number)], 0);
        let number = self.shared.is_some().then_some(number);
        self.announce(vec![match item {
            Item::Scope { scope, .. } => Item::Scope { scope, number },
            Item::Tag { scope, tag, .. } => Item::Tag { scope, tag, number },
            other => other,
        }])
        .await
    }
}

/// The message that stands for a watermark member.
fn member_item(member: &str) -> Option<Item> {
    let (kind, rest) = member.split_once('/')?;
    let unescape = |scope: &str| scope.replace("%2F", "/").replace("%25", "%").into_boxed_str();
    match kind {
        "s" => Some(Item::Scope { scope: unescape(rest), number: None }),
        "t" => {
            rest.split_once('/').map(|(scope, tag)| Item::Tag { scope: unescape(scope), tag: tag.into(), number: None })
        }
        _ => None,
    }
}

fn jittered(pause: Duration, runtime: &dyn Runtime) -> Duration {
    let millis = pause.as_millis() as u64;
    Duration::from_millis(millis / 2 + runtime.random() % (millis / 2 + 1))
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
                self.receive(bus, &bytes);
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
        if let Some(shared) = &self.shared {
            // Also what finds out, on a quiet node, that L2 is back.
            let _ = self.sync(shared).await;
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
