//! The write path: own flights marked dead, L2, L1, bus. In this order a reader never brings an old value back.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{Core, Place, SharedTier};
use crate::entry::{Entry, Lifetime};
use crate::error::{Error, Result};
use crate::flight::{Boarded, Filled, Hear, Purpose};
use crate::l2::cells::Stored;
use crate::values::checked_tags;
use crate::watermark::{scope_member, tag_member};
use crate::wire::message::Item;

impl<V: Send + Sync + 'static> Core<V> {
    pub(crate) async fn set(
        self: &Arc<Self>,
        place: Place,
        key: Box<str>,
        value: V,
        tags: Vec<Box<str>>,
    ) -> Result<()> {
        self.usable(&key)?;
        let tags = if tags.is_empty() { None } else { Some(checked_tags(tags)?) };
        if let Some(shared) = &self.shared {
            // Before the stamp is taken: one from before this node knew of the fleet's watermarks would be below them.
            // Where L2 is out of reach, the set itself finds out.
            self.in_sync(shared).await;
        }
        let lifetime = Lifetime::new(place.options.ttl, &place.options, || self.runtime.random());
        let mut entry = Entry {
            value: Arc::new(value),
            read_at: self.runtime.now_ms(),
            deadlines: lifetime.deadlines(0, &place.options),
            stamp: self.marks.known(),
            checked: self.marks.generation(),
            id: 0,
            tags,
        };
        if self.shared.is_none() && self.bus.is_none() {
            self.flights.invalidate(place.at(&key), None, |_| self.insert(&place.scope, &key, &entry));
            return Ok(());
        }
        let cell = match &self.shared {
            None => None,
            Some(shared) => {
                let Some(cell) = self.encode(shared, &mut entry, &lifetime)? else {
                    let most = crate::wire::value::MAX_VALUE_BYTES;
                    return Err(Error::config(format!(
                        "value of key {key:?} is not allowed: give at most {most} encoded bytes"
                    )));
                };
                Some(cell)
            }
        };
        let core = Arc::clone(self);
        let physical = Duration::from_millis(lifetime.physical());
        self.owned(async move { core.set_shared(place, key, entry, cell, physical).await }).await
    }

    async fn set_shared(
        self: Arc<Self>,
        place: Place,
        key: Box<str>,
        entry: Entry<V>,
        cell: Option<bytes::Bytes>,
        physical: Duration,
    ) -> Result<()> {
        // Registered before anything is sent: an invalidation that comes meanwhile keeps the value out of L1.
        let Boarded::Lead(flight, _) = self.board(&place, &key, Purpose::Set, Hear::Future) else {
            return Err(Error::closed());
        };
        self.flights.invalidate(place.at(&key), Some(&flight), |_| self.l1.remove(place.at(&key)));
        let mut failed = None;
        let mut superseded = false;
        if let (Some(shared), Some(cell)) = (&self.shared, cell) {
            let store_key = shared.l2.key(&place.scope.name, &key);
            self.note_recent(place.at(&key));
            match self.set_in_l2(shared, &store_key, cell, physical).await {
                Ok(Stored::Yes) => {}
                Ok(Stored::Superseded) => superseded = true,
                Ok(Stored::TooLate) => failed = Some(Error::timeout("the shared store took the value too late")),
                Err(error) => failed = Some(error),
            }
        }
        // Listed before L1 takes the value: L1 may hold what L2 has not accepted only while the key is listed.
        let pending = failed.is_some();
        if pending {
            self.list_for_repair(&place.scope, &key);
        }
        self.flights.finish(&flight, Ok(None), None, |alive| {
            if alive && !superseded {
                self.insert(&place.scope, &key, &entry);
            } else {
                self.l1.remove(place.at(&key));
            }
            // In either case whoever read L2 before this moment may have read the old value.
            Filled::Written
        });
        let item = Item::Key { scope: (*place.scope.name).into(), key: key.clone(), l2_pending: pending };
        if let Err(error) = self.announce(vec![item]).await {
            self.list_for_repair(&place.scope, &key);
            failed.get_or_insert(error);
        }
        self.verdict(failed)
    }

    /// Only once what this node knows is up to date: the set is given the store's time to be refused after.
    async fn set_in_l2(
        self: &Arc<Self>,
        shared: &SharedTier<V>,
        key: &str,
        cell: bytes::Bytes,
        physical: Duration,
    ) -> Result<Stored> {
        if !self.in_sync(shared).await {
            return Err(Error::unavailable("the shared store cannot be asked for its time"));
        }
        shared.l2.set(key, cell, physical).await.inspect_err(|_| self.counters.l2_errors.add_one())
    }

    pub(crate) async fn remove(self: &Arc<Self>, place: Place, keys: Vec<Box<str>>) -> Result<()> {
        for key in &keys {
            self.usable(key)?;
        }
        if self.shared.is_none() && self.bus.is_none() {
            keys.iter().for_each(|key| self.drop_local(&place, key));
            return Ok(());
        }
        let core = Arc::clone(self);
        self.owned(async move { core.remove_shared(place, keys).await }).await
    }

    async fn remove_shared(self: Arc<Self>, place: Place, keys: Vec<Box<str>>) -> Result<()> {
        for key in &keys {
            self.drop_local(&place, key);
            self.note_recent(place.at(key));
        }
        let failed = match (&self.shared, &self.bus) {
            (Some(shared), Some(bus)) if bus.outbox.is_joined() => self.remove_in_one_step(shared, &place, &keys).await,
            _ => self.remove_then_announce(&place, &keys).await,
        };
        // Again: a reader that came between the first step and L2's delete may have copied the old value into L1, or be
        // about to.
        keys.iter().for_each(|key| self.drop_local(&place, key));
        self.verdict(failed)
    }

    /// Where the store's server carries the messages too.
    async fn remove_in_one_step(
        self: &Arc<Self>,
        shared: &SharedTier<V>,
        place: &Place,
        keys: &[Box<str>],
    ) -> Option<Error> {
        let item = |key: &str| Item::Key { scope: (*place.scope.name).into(), key: key.into(), l2_pending: false };
        let removals = keys.iter().map(|key| (item(key), Some(shared.l2.key(&place.scope.name, key))));
        let failed = self.send(removals.collect()).await.err();
        if failed.is_some() {
            // Neither is sure to have happened. The repair does both, the removal first.
            keys.iter().for_each(|key| self.list_for_repair(&place.scope, key));
        }
        failed
    }

    async fn remove_then_announce(self: &Arc<Self>, place: &Place, keys: &[Box<str>]) -> Option<Error> {
        let mut failed = None;
        if let Some(shared) = &self.shared {
            let store_keys: Vec<_> = keys.iter().map(|key| shared.l2.key(&place.scope.name, key)).collect();
            if let Err(error) = shared.l2.remove(&store_keys).await {
                self.counters.l2_errors.add_one();
                keys.iter().for_each(|key| self.list_for_repair(&place.scope, key));
                failed = Some(error);
            }
        }
        let pending = failed.is_some();
        let items = keys.iter().map(|key| Item::Key {
            scope: (*place.scope.name).into(),
            key: key.clone(),
            l2_pending: pending,
        });
        if let Err(error) = self.announce(items.collect()).await {
            keys.iter().for_each(|key| self.list_for_repair(&place.scope, key));
            failed.get_or_insert(error);
        }
        failed
    }

    /// Marks the key's flights dead and drops its L1 entry, in one step.
    pub(crate) fn drop_local(&self, place: &Place, key: &str) {
        self.flights.invalidate(place.at(key), None, |_| self.l1.remove(place.at(key)));
    }

    /// Empties L1 here and on peers; L2 stays.
    pub(crate) async fn clear(self: &Arc<Self>, scope: Option<&Place>) -> Result<()> {
        self.usable("any")?;
        self.clear_local(scope.map(|place| place.scope.id));
        if self.bus.is_none() {
            return Ok(());
        }
        let core = Arc::clone(self);
        let item = Item::Clear { scope: scope.map(|place| (*place.scope.name).into()) };
        self.owned(async move {
            let failed = core.announce(vec![item]).await.err();
            core.verdict(failed)
        })
        .await
    }

    pub(crate) fn clear_local(&self, scope: Option<u32>) {
        match scope {
            // The scope's entries are dead at once and leave L1 as they are met or evicted.
            Some(scope) => self.marks.clear_scope(scope),
            None => self.clear_memory(),
        }
    }

    /// Kills everything of a scope (`tag` is `None`) or tag that was made before now, in O(1).
    pub(crate) async fn invalidate(self: &Arc<Self>, place: Place, tag: Option<Box<str>>) -> Result<()> {
        self.usable("any")?;
        if let Some(tag) = &tag {
            checked_tags(vec![tag.clone()])?;
        }
        let core = Arc::clone(self);
        if self.shared.is_none() && self.bus.is_none() {
            return core.invalidate_shared(&place, tag).await;
        }
        self.owned(async move { core.invalidate_shared(&place, tag).await }).await
    }

    async fn invalidate_shared(self: Arc<Self>, place: &Place, tag: Option<Box<str>>) -> Result<()> {
        let scope = &place.scope.name;
        let member = tag.as_deref().map_or_else(|| scope_member(scope), |tag| tag_member(scope, tag));
        let mut failed = None;
        let number = match &self.shared {
            None => {
                self.marks.raise([(member.as_str(), self.marks.issue())], 0);
                None
            }
            Some(shared) => match shared.l2.invalidate(std::slice::from_ref(&member), self.marks.known()).await {
                Ok(number) => {
                    self.marks.raise([(member.as_str(), number)], 0);
                    Some(number)
                }
                Err(error) => {
                    self.counters.l2_errors.add_one();
                    self.suspend(member);
                    failed = Some(error);
                    None
                }
            },
        };
        let scope: Box<str> = (**scope).into();
        let item = match tag {
            Some(tag) => Item::Tag { scope, tag, number },
            None => Item::Scope { scope, number },
        };
        if let Err(error) = self.announce(vec![item]).await {
            // Not lost: peers ask L2 for watermarks regularly, and the repair publishes what waits for a number.
            failed.get_or_insert(error);
        }
        self.verdict(failed)
    }

    /// A watermark that waits for its number: nothing of it is read from L2 until then.
    pub(crate) fn suspend(self: &Arc<Self>, member: String) {
        self.marks.suspend(member, self.runtime.now_ms());
        self.start_repair();
    }

    /// Publishes what happened, if there is a bus.
    pub(crate) async fn announce(&self, items: Vec<Item>) -> Result<()> {
        self.send(items.into_iter().map(|item| (item, None)).collect()).await
    }

    /// The same, with the store's key where it has to be removed in the same step.
    async fn send(&self, items: Vec<(Item, Option<String>)>) -> Result<()> {
        let Some(bus) = &self.bus else { return Ok(()) };
        let count = items.len() as u64;
        bus.outbox.publish(items).await.inspect_err(|_| self.counters.bus_errors.add_one())?;
        self.counters.invalidations_sent.add(count);
        Ok(())
    }

    /// What did not reach everyone is repaired; the caller hears of it only if the cache is strict.
    fn verdict(&self, failed: Option<Error>) -> Result<()> {
        match failed {
            Some(error) if self.strict => Err(error),
            Some(error) => {
                tracing::debug!(%error, "an invalidation did not reach everyone yet");
                Ok(())
            }
            None => Ok(()),
        }
    }
}
