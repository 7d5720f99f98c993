//! Invalidations on their way out: gathered while the last batch is under way, numbered, published in order.
//!
//! There is no timer: what comes while a publish is in flight goes together with the next one, so a lone remove leaves
//! at once and a burst travels in few messages. Where bus and store are one server, the removals of the store's keys
//! travel in the same step as the message that tells of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::Shared;
use hashbrown::HashMap;

use crate::bus::{Bus, StreamAt};
use crate::error::{Error, Result};
use crate::l2::L2;
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
    joined: Option<Joined>,
    state: Mutex<State>,
}

/// The store, where its server carries the messages too.
pub(crate) struct Joined {
    pub(crate) l2: Arc<L2>,
    pub(crate) stream: StreamAt,
}

struct State {
    /// What is to be sent; with the store's key where that has to be removed in the same step.
    waiting: HashMap<Item, Option<String>, foldhash::fast::FixedState>,
    /// The run that will carry what waits now; there is one while anything waits.
    next: Option<Run>,
    /// The run that is publishing.
    current: Option<Run>,
    /// The number of the last sealed batch.
    sealed: u64,
    /// A sealed batch that the carrier has not taken. It goes out again as it is, before anything else: a number never
    /// stands for two contents.
    stuck: Option<Sealed>,
}

/// A batch with its number.
#[derive(Clone)]
struct Sealed {
    message: Bytes,
    removals: Arc<Vec<String>>,
}

type Run = Shared<BoxFuture<'static, Result<()>>>;

impl Outbox {
    pub(crate) fn new(
        bus: Arc<dyn Bus>,
        runtime: Arc<dyn Runtime>,
        sender: Sender,
        heartbeat: u64,
        publish_timeout: Duration,
        joined: Option<Joined>,
    ) -> Self {
        let waiting = HashMap::with_hasher(foldhash::fast::FixedState::with_seed(runtime.random()));
        let state = State { waiting, next: None, current: None, sealed: 0, stuck: None };
        Self { bus, runtime, sender, heartbeat, publish_timeout, joined, state: Mutex::new(state) }
    }

    /// Whether items may come with a key of the store to be removed.
    pub(crate) fn is_joined(&self) -> bool {
        self.joined.is_some()
    }

    /// Publishes `items`, together with whatever else waits; returns when the carrier has them. A key of the store that
    /// comes with an item is removed in the same atomic step.
    pub(crate) async fn publish(
        self: &Arc<Self>,
        items: impl IntoIterator<Item = (Item, Option<String>)>,
    ) -> Result<()> {
        let run = {
            let mut state = self.state.lock();
            for (item, removal) in items {
                if state.waiting.len() >= MAX_WAITING {
                    return Err(Error::unavailable(format!("{MAX_WAITING} invalidations wait for the bus already")));
                }
                let waiting = state.waiting.entry(item).or_insert(None);
                *waiting = removal.or(waiting.take());
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
            self.send(&stuck).await?;
            self.state.lock().stuck = None;
        }
        self.send(&Sealed { message: Message { head, body }.encode().into(), removals: Arc::default() }).await
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
                self.send(&stuck).await?;
                self.state.lock().stuck = None;
            }
            while items.peek().is_some() {
                let batch = self.seal(&mut items);
                if let Err(error) = self.send(&batch).await {
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
    fn seal(&self, items: &mut std::iter::Peekable<impl Iterator<Item = (Item, Option<String>)>>) -> Sealed {
        let mut state = self.state.lock();
        let mut batch = BatchEncoder::new(self.bus.message_limit(), self.head(state.sealed + 1));
        let mut removals = Vec::new();
        while let Some((_, removal)) = items.next_if(|(item, _)| batch.try_push(item)) {
            removals.extend(removal);
        }
        if batch.is_empty()
            && let Some((item, removal)) = items.next()
        {
            // A key longer than the carrier's limit: its whole scope goes from every L1 instead.
            let fits = batch.try_push(&Item::Clear { scope: item.scope().map(Into::into) });
            debug_assert!(fits, "a clear fits into the smallest message a bus may have");
            removals.extend(removal);
        }
        state.sealed += 1;
        Sealed { message: batch.finish().into(), removals: Arc::new(removals) }
    }

    async fn send(&self, sealed: &Sealed) -> Result<()> {
        let message = sealed.message.clone();
        let sent = async {
            match &self.joined {
                Some(Joined { l2, stream }) if !sealed.removals.is_empty() => {
                    l2.remove_and_append(&sealed.removals, stream, message).await
                }
                _ => self.bus.publish(message).await,
            }
        };
        timeout(&*self.runtime, self.publish_timeout, sent).await.unwrap_or_else(|| {
            Err(Error::timeout(format!("the bus did not take a message within {:?}", self.publish_timeout)))
        })
    }

    pub(crate) fn is_stuck(&self) -> bool {
        self.state.lock().stuck.is_some()
    }
}
