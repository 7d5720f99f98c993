//! The handle: every public call, each a few lines over the paths in `read` and `write`.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use crate::builder::Builder;
use crate::engine::{Core, Place};
use crate::error::Result;
use crate::health::Health;
use crate::loader::{LoadContext, Loaded, loader};
use crate::options::EntryOptions;
use crate::stats::Stats;

/// One cache of a fleet: values in this process's memory, in a shared store, and coherent with every other node.
///
/// A handle is cheap to clone, and all clones are the same cache. A handle may also stand for a [scope](Self::scope) or
/// carry [options](Self::with_options) for the calls made through it.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use fleetcache::HybridCache;
/// # async fn db_user(id: u32) -> Result<String, std::io::Error> { Ok(format!("user {id}")) }
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let cache: HybridCache<String> = HybridCache::builder().ttl(Duration::from_secs(60)).build()?;
/// let user = cache.get_with("user:1", || db_user(1)).await?;
/// assert_eq!(*user, "user 1");
/// cache.remove("user:1").await?;
/// # Ok::<_, fleetcache::Error>(()) }).unwrap();
/// ```
pub struct HybridCache<V> {
    pub(crate) core: Arc<Core<V>>,
    pub(crate) place: Place,
    options: EntryOptions,
}

impl<V> Clone for HybridCache<V> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), place: self.place.clone(), options: self.options.clone() }
    }
}

impl<V> fmt::Debug for HybridCache<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HybridCache")
            .field("scope", &self.place.scope.name)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<V: Send + Sync + 'static> HybridCache<V> {
    /// Starts to build a cache.
    pub fn builder() -> Builder<V> {
        Builder::new()
    }

    pub(crate) fn from_parts(core: Arc<Core<V>>, place: Place, options: EntryOptions) -> Self {
        Self { core, place, options }
    }

    /// The value under `key`, loaded by `load` if it is nowhere to be found.
    ///
    /// However many callers ask at once, one load runs, here and in the fleet. It belongs to all of them: it goes on
    /// while any caller waits, and its error reaches each (see [`ErrorKind::Loader`](crate::ErrorKind::Loader)), as
    /// does, for a moment, whoever comes next.
    pub async fn get_with<F, Fut, E>(&self, key: &str, load: F) -> Result<Arc<V>>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<V, E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + 'static,
    {
        if let Some(entry) = self.core.hit(&self.place.scope, key) {
            return Ok(entry.value);
        }
        // Boxed, so that a hit does not carry the load's state machine on its stack.
        Box::pin(self.core.load(&self.place, key, loader(|_| load()))).await
    }

    /// The same with a loader that is told what it fills, and may say how its value is kept (see [`Loaded`]).
    pub async fn get_with_context<F, Fut, E>(&self, key: &str, load: F) -> Result<Arc<V>>
    where
        F: FnOnce(LoadContext<V>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Loaded<V>, E>> + Send + 'static,
        E: Into<Box<dyn StdError + Send + Sync>> + 'static,
    {
        if let Some(entry) = self.core.hit(&self.place.scope, key) {
            return Ok(entry.value);
        }
        Box::pin(self.core.load(&self.place, key, loader(load))).await
    }

    /// The value under `key` in memory or in the shared store, if it is there. Never waits for a load, its own fleet's
    /// included.
    pub async fn get(&self, key: &str) -> Result<Option<Arc<V>>> {
        if let Some(entry) = self.core.hit(&self.place.scope, key) {
            return Ok(Some(entry.value));
        }
        Box::pin(self.core.find(&self.place, key)).await
    }

    /// The values under `keys`, in their order; those not in memory are asked from the shared store in one call.
    pub async fn get_many<K: AsRef<str>>(&self, keys: &[K]) -> Result<Vec<Option<Arc<V>>>> {
        let keys = keys.iter().map(|key| key.as_ref().into()).collect();
        Arc::clone(&self.core).find_many(self.place.clone(), keys).await
    }

    /// Puts `value` under `key`, here and in the shared store; other nodes drop theirs.
    ///
    /// After a change of the database prefer [`remove`](Self::remove): a set is unconditional, so of two at once the
    /// one that reaches the store last wins, whichever value is newer.
    pub async fn set(&self, key: &str, value: V) -> Result<()> {
        self.core.set(self.place.clone(), key.into(), value, Vec::new()).await
    }

    /// The same, marked with `tags` for [`remove_by_tag`](Self::remove_by_tag).
    pub async fn set_with_tags<T: Into<Box<str>>>(
        &self,
        key: &str,
        value: V,
        tags: impl IntoIterator<Item = T>,
    ) -> Result<()> {
        let tags = tags.into_iter().map(Into::into).collect();
        self.core.set(self.place.clone(), key.into(), value, tags).await
    }

    /// Removes `key` here, from the shared store and from every other node.
    ///
    /// When this returns, no later `get` on this node sees the old value; nor does one on another node once it has the
    /// message. What cannot be reached now is repaired in the background. A load that is in progress anywhere answers
    /// those who wait for it and is not kept. Once begun, a remove runs to its end also if its future is dropped.
    pub async fn remove(&self, key: &str) -> Result<()> {
        self.core.remove(self.place.clone(), vec![key.into()]).await
    }

    /// Removes many keys at the price of one.
    pub async fn remove_many<K: AsRef<str>>(&self, keys: &[K]) -> Result<()> {
        let keys = keys.iter().map(|key| key.as_ref().into()).collect();
        self.core.remove(self.place.clone(), keys).await
    }

    /// Removes everything of this scope that was set or loaded with `tag` before now, anywhere, in one step.
    pub async fn remove_by_tag(&self, tag: &str) -> Result<()> {
        self.core.invalidate(self.place.clone(), Some(tag.into())).await
    }

    /// Removes everything of this scope that was made before now, anywhere, in one step.
    pub async fn remove_all(&self) -> Result<()> {
        self.core.invalidate(self.place.clone(), None).await
    }

    /// Empties the memory of every node; the shared store keeps its values. On a scope's handle, of that scope alone.
    pub async fn clear(&self) -> Result<()> {
        let scope = (!self.place.scope.name.is_empty()).then_some(&self.place);
        self.core.clear(scope).await
    }

    /// Drops `key` from this node's memory alone.
    pub fn remove_local(&self, key: &str) {
        self.core.drop_local(&self.place, key);
    }

    /// Empties this node's memory alone. On a scope's handle, of that scope alone.
    pub fn clear_memory(&self) {
        self.core.clear_local((!self.place.scope.name.is_empty()).then_some(self.place.scope.id));
    }

    /// A part of the cache whose keys never meet those of another part. A scope of a scope has the joined name, `a/b`.
    pub fn scope(&self, name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(crate::Error::config("scope \"\" is not allowed: give a name"));
        }
        let outer = &self.place.scope.name;
        let scope = match &**outer {
            "" => self.core.scopes.named(name)?,
            outer => self.core.scopes.named(&format!("{outer}/{name}"))?,
        };
        Ok(Self {
            core: Arc::clone(&self.core),
            place: Place::new(scope, Arc::clone(&self.place.options)),
            options: self.options.clone(),
        })
    }

    /// A handle whose calls use `options` where they are set: a scope's defaults, or a single call's wishes.
    pub fn with_options(&self, options: &EntryOptions) -> Result<Self> {
        let options = options.over(&self.options);
        let resolved = Arc::new(options.resolve()?);
        Ok(Self { core: Arc::clone(&self.core), place: Place::new(Arc::clone(&self.place.scope), resolved), options })
    }

    /// What the cache has done so far.
    pub fn stats(&self) -> Stats {
        self.core.stats()
    }

    /// How its parts are doing.
    pub fn health(&self) -> Health {
        self.core.health()
    }

    /// Waits for the work that is in progress (5 s at most), says goodbye to the fleet and lets go of all connections.
    /// Later calls fail with [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    pub async fn close(&self) -> Result<()> {
        self.core.close().await
    }
}
