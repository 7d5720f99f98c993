//! What could not be sent is sent again until it has reached everyone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::coherence::{FIRST_RETRY, LONGEST_RETRY};
use crate::engine::Core;
use crate::error::Result;
use crate::key::Key;
use crate::runtime::jittered;
use crate::watermark::{key_member, member_item, scope_member};
use crate::wire::message::Item;

/// Keys repaired in one step.
const BATCH: usize = 256;

impl<V: Send + Sync + 'static> Core<V> {
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
        // Keys that fail apart are repaired apart.
        let mut parts: BTreeMap<usize, Vec<(Key, u64)>> = BTreeMap::new();
        for listed in self.repairs.some(BATCH) {
            parts.entry(self.part(&listed.0)).or_default().push(listed);
        }
        let repairs = parts.into_values().map(|keys| self.repair_keys(keys));
        futures_util::future::join_all(repairs).await.into_iter().collect()
    }

    fn part(&self, key: &Key) -> usize {
        let scope = self.scopes.by_id(key.scope);
        let part = self
            .shared
            .as_ref()
            .zip(scope)
            .map(|(shared, scope)| shared.l2.part(&shared.l2.key(&scope.name, &key.text)));
        part.unwrap_or(0)
    }

    async fn repair_keys(self: &Arc<Self>, keys: Vec<(Key, u64)>) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let mut items = Vec::with_capacity(keys.len());
        let mut store_keys = Vec::with_capacity(keys.len());
        let mut members = Vec::with_capacity(keys.len());
        for (key, _) in &keys {
            let Some(scope) = self.scopes.by_id(key.scope) else { continue };
            if let Some(shared) = &self.shared {
                self.note_recent(key.as_ref());
                store_keys.push(shared.l2.key(&scope.name, &key.text));
                members.push(key_member(&scope.name, &key.text));
            }
            items.push(Item::Key { scope: (*scope.name).into(), key: key.text.clone(), l2_pending: false });
        }
        if let Some(shared) = &self.shared {
            shared.l2.remove(&store_keys).await.inspect_err(|_| self.counters.l2_errors.add_one())?;
        }
        if let Err(error) = self.announce(items).await {
            // The second channel: peers ask L2 for marks regularly, also while the bus is out of reach.
            let Some(shared) = &self.shared else { return Err(error) };
            shared.l2.invalidate(&members, self.marks.known()).await?;
        }
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
