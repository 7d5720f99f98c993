//! What a node has to know before it believes L2: the fleet's watermarks, the store's clock, and whether the store is
//! the one it was.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{Core, SharedTier};
use crate::error::Result;
use crate::key::KeyRef;
use crate::recent::REMEMBERED;
use crate::watermark::{FLOOR, member_item};
use crate::wire::message::Item;

impl<V: Send + Sync + 'static> Core<V> {
    /// Makes sure that this node knows enough to judge a value.
    pub(crate) async fn in_sync(self: &Arc<Self>, shared: &SharedTier<V>) -> bool {
        // Twice: an answer that was under way may be older than what made it necessary to ask.
        for _ in 0..2 {
            if shared.l2.is_synced() {
                return true;
            }
            if self.sync().await.is_err() {
                return false;
            }
        }
        shared.l2.is_synced()
    }

    /// Asks L2 for watermarks and the time; gives back to it what it has lost. Who comes while that is under way shares
    /// the answer: after an outage thousands of reads come at once.
    pub(crate) async fn sync(self: &Arc<Self>) -> Result<()> {
        let core = Arc::clone(self);
        let ask = || async move {
            match &core.shared {
                Some(shared) => core.ask_l2(shared).await,
                None => Ok(()),
            }
        };
        self.syncing.join(&*self.runtime, ask).await?
    }

    async fn ask_l2(self: &Arc<Self>, shared: &SharedTier<V>) -> Result<()> {
        // Again where a life begins meanwhile, as the first one does with the connection that asks.
        for _ in 0..3 {
            if !shared.l2.is_settled() {
                self.recover(shared).await?;
            }
        }
        let doubts = shared.l2.doubts();
        let known = self.marks.known();
        let marks = shared.l2.poll(known).await.inspect_err(|_| self.counters.l2_errors.add_one())?;
        if marks.top < known {
            shared.l2.restore(&self.marks.all()).await?;
        }
        let (keys, members): (Vec<_>, Vec<_>) = marks.members.iter().partition(|(member, _)| member.starts_with("k/"));
        for (member, _) in keys {
            // A key whose message the bus could not carry. L2 was rid of it before the mark was made.
            if let Some(item @ Item::Key { .. }) = member_item(member) {
                self.counters.invalidations_received.add_one();
                self.apply(item);
            }
        }
        self.marks.raise(members.iter().map(|(member, number)| (member.as_str(), *number)), marks.top);
        shared.l2.heeded(marks.top);
        shared.l2.settle(doubts);
        Ok(())
    }

    /// The store restarted, or another took over: its last writes may be lost, and what this node removed may be back.
    /// The removals are done again, and until each is, its key is not read from there.
    async fn recover(self: &Arc<Self>, shared: &SharedTier<V>) -> Result<()> {
        let life = shared.l2.life();
        let lost = shared.l2.lost().await.inspect_err(|_| self.counters.l2_errors.add_one())?;
        let (keys, complete) = self.recent.all(self.runtime.now_ms());
        let beyond = lost.is_none_or(|lost| lost > Duration::from_millis(REMEMBERED));
        if beyond || !complete {
            // More may be lost than anyone remembers: everything there is dead. Said before the poll that leaves word of
            // this node's having been here, so that nobody takes that word for an all-clear.
            tracing::warn!(?lost, "the shared store may have lost more than is remembered: nothing in it is used");
            let number = shared.l2.invalidate(&[FLOOR.to_owned()], self.marks.known()).await?;
            self.marks.raise([(FLOOR, number)], 0);
        }
        if !keys.is_empty() {
            tracing::info!(keys = keys.len(), "the shared store may have lost its last writes: removing again");
        }
        for key in keys {
            if let Some(scope) = self.scopes.by_id(key.scope) {
                self.list_for_repair(&scope, &key.text);
            }
        }
        shared.l2.settle_life(life);
        Ok(())
    }

    /// Remembers an invalidation that is about to be sent, where the store may forget it.
    pub(crate) fn note_recent(&self, key: KeyRef<'_>) {
        if self.shared.as_ref().is_some_and(|shared| shared.l2.may_go_back()) {
            self.recent.note(key, self.runtime.now_ms());
        }
    }
}
