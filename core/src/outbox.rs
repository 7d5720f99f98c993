//! Invalidations on their way out: gathered while the last batch is under way, numbered, published in order.
//!
//! There is no timer: what comes while a publish is in flight goes together with the next one, so a lone remove leaves
//! at once and a burst travels in few messages.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::Shared;
use hashbrown::HashSet;

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::peers::Sender;
use crate::runtime::{BoxFuture, Runtime, timeout};
use crate::sync::Mutex;
use crate::wire::message::{BatchEncoder, Body, Head, Item, Message};

/// Items that may wait for the carrier; what comes beyond is refused and goes to the repair list.
const MAX_WAITING: usize = 100_000;

pub(crate) struct Outbox {
    bus: Arc<dyn Bus>,
    runtime: Arc<dyn Runtime>,
    sender: Sender,
    heartbeat: u64,
    publish_timeout: Duration,
    state: Mutex<State>,
}

struct State {
    waiting: HashSet<Item, foldhash::fast::FixedState>,
    /// The run that will carry what waits now; there is one while anything waits.
    next: Option<Run>,
    /// The run that is publishing.
    current: Option<Run>,
    /// The number of the last sealed batch.
    sealed: u64,
    /// A sealed batch that the carrier has not taken. It goes out again as it is, before anything else: a number never
    /// stands for two contents.
    stuck: Option<Bytes>,
}

type Run = Shared<BoxFuture<'static, Result<()>>>;

impl Outbox {
    pub(crate) fn new(
        bus: Arc<dyn Bus>,
        runtime: Arc<dyn Runtime>,
        sender: Sender,
        heartbeat: u64,
        publish_timeout: Duration,
    ) -> Self {
        let waiting = HashSet::with_hasher(foldhash::fast::FixedState::with_seed(runtime.random()));
        let state = State { waiting, next: None, current: None, sealed: 0, stuck: None };
        Self { bus, runtime, sender, heartbeat, publish_timeout, state: Mutex::new(state) }
    }

    /// Publishes `items`, together with whatever else waits; returns when the carrier has them.
    pub(crate) async fn publish(self: &Arc<Self>, items: impl IntoIterator<Item = Item>) -> Result<()> {
        let run = {
            let mut state = self.state.lock();
            for item in items {
                if state.waiting.len() >= MAX_WAITING {
                    return Err(Error::unavailable(format!("{MAX_WAITING} invalidations wait for the bus already")));
                }
                state.waiting.insert(item);
            }
            self.next_run(&mut state)
        };
        run.await
    }

    /// Says that this node lives and which number was its last.
    pub(crate) async fn beat(self: &Arc<Self>, body: Body) -> Result<()> {
        let run = {
            let state = self.state.lock();
            state.next.clone().or_else(|| state.current.clone())
        };
        // Behind whatever is under way: a heartbeat that overtakes a batch would look like a gap.
        if let Some(run) = run {
            run.await?;
        }
        let (stuck, head) = {
            let state = self.state.lock();
            (state.stuck.clone(), self.head(state.sealed))
        };
        if let Some(stuck) = stuck {
            self.send(stuck).await?;
            self.state.lock().stuck = None;
        }
        self.send(Message { head, body }.encode().into()).await
    }

    fn head(&self, sequence: u64) -> Head {
        Head {
            node: self.sender.node,
            incarnation: self.sender.incarnation,
            sequence,
            heartbeat_ms: u32::try_from(self.heartbeat).unwrap_or(u32::MAX),
            sent_ms: self.runtime.now_ms(),
        }
    }

    /// The run that carries what waits now, behind the current one.
    fn next_run(self: &Arc<Self>, state: &mut State) -> Run {
        if let Some(run) = &state.next {
            return run.clone();
        }
        let previous = state.current.clone();
        let outbox = Arc::clone(self);
        let run: BoxFuture<'static, Result<()>> = Box::pin(async move {
            if let Some(previous) = previous {
                let _ = previous.await;
            }
            outbox.flush().await
        });
        let run = run.shared();
        state.next = Some(run.clone());
        run
    }

    /// Publishes everything that waits. One flush runs at a time: each run awaits the one before.
    async fn flush(&self) -> Result<()> {
        let mut items = {
            let mut state = self.state.lock();
            state.current = state.next.take();
            std::mem::take(&mut state.waiting).into_iter().peekable()
        };
        let outcome = async {
            let stuck = self.state.lock().stuck.clone();
            if let Some(stuck) = stuck {
                self.send(stuck).await?;
                self.state.lock().stuck = None;
            }
            while items.peek().is_some() {
                let batch = self.seal(&mut items);
                if let Err(error) = self.send(batch.clone()).await {
                    self.state.lock().stuck = Some(batch);
                    return Err(error);
                }
            }
            Ok(())
        }
        .await;
        self.state.lock().current = None;
        outcome
    }

    /// The next batch, as long as the carrier takes, under a new number.
    fn seal(&self, items: &mut std::iter::Peekable<impl Iterator<Item = Item>>) -> Bytes {
        let mut state = self.state.lock();
        let mut batch = BatchEncoder::new(self.bus.message_limit(), self.head(state.sealed + 1));
        while let Some(item) = items.next_if(|item| batch.try_push(item)) {
            drop(item);
        }
        if batch.is_empty()
            && let Some(item) = items.next()
        {
            // A key longer than the carrier's limit: its whole scope goes from every L1 instead.
            let fits = batch.try_push(&Item::Clear { scope: item.scope().map(Into::into) });
            debug_assert!(fits, "a clear fits into the smallest message a bus may have");
        }
        state.sealed += 1;
        batch.finish().into()
    }

    async fn send(&self, message: Bytes) -> Result<()> {
        timeout(&*self.runtime, self.publish_timeout, self.bus.publish(message)).await.unwrap_or_else(|| {
            Err(Error::timeout(format!("the bus did not take a message within {:?}", self.publish_timeout)))
        })
    }

    pub(crate) fn is_stuck(&self) -> bool {
        self.state.lock().stuck.is_some()
    }
}
