//! What a loader is told and what it may answer.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::runtime::{BoxFuture, CatchPanic, panic_message};

/// What a loader is asked to fill.
#[derive(Debug)]
pub struct LoadContext<V> {
    pub(crate) scope: Arc<str>,
    pub(crate) key: Box<str>,
    pub(crate) stale: Option<Arc<V>>,
}

impl<V> LoadContext<V> {
    /// The key to load.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The name of the scope the key is in; empty for the cache itself.
    pub fn scope(&self) -> &str {
        &self.scope
    }

    /// The value that was kept until now, if it is still at hand and nothing invalidated it. A loader that finds it
    /// unchanged answers [`Loaded::not_modified`].
    pub fn stale(&self) -> Option<&Arc<V>> {
        self.stale.as_ref()
    }
}

/// A loader's answer.
#[derive(Debug)]
pub struct Loaded<V> {
    pub(crate) value: Option<V>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) tags: Vec<Box<str>>,
    pub(crate) cache: bool,
}

impl<V> Loaded<V> {
    /// A value, kept as the options say.
    pub fn value(value: V) -> Self {
        Self { value: Some(value), ttl: None, tags: Vec::new(), cache: true }
    }

    /// The stale value of the context is still right and is fresh again. An error where there was none.
    pub fn not_modified() -> Self {
        Self { value: None, ttl: None, tags: Vec::new(), cache: true }
    }

    /// Keeps this value for `ttl` instead of what the options say; a null too.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Marks the value with `tags`, so that [`remove_by_tag`](crate::HybridCache::remove_by_tag) finds it. At most 64
    /// of at most 256 bytes.
    #[must_use]
    pub fn tags<T: Into<Box<str>>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Answers those who wait and keeps nothing.
    #[must_use]
    pub fn do_not_cache(mut self) -> Self {
        self.cache = false;
        self
    }
}

impl<V> From<V> for Loaded<V> {
    fn from(value: V) -> Self {
        Self::value(value)
    }
}

/// A load that can be started once.
pub(crate) type Loader<V> = Box<dyn FnOnce(LoadContext<V>) -> BoxFuture<'static, Result<Loaded<V>>> + Send>;

/// A caller's function as a [`Loader`]: a panic, also before the first await, becomes an error.
pub(crate) fn loader<V, F, Fut, L, E>(load: F) -> Loader<V>
where
    V: Send + Sync + 'static,
    F: FnOnce(LoadContext<V>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<L, E>> + Send + 'static,
    L: Into<Loaded<V>> + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    Box::new(move |context| {
        Box::pin(async move {
            let started = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| load(context)));
            let future = started.map_err(|panic| panicked(&panic_message(&*panic)))?;
            let outcome = CatchPanic(Box::pin(future)).await.map_err(|message| panicked(&message))?;
            outcome.map(Into::into).map_err(Error::loader)
        })
    })
}

fn panicked(message: &str) -> Error {
    Error::loader(format!("it panicked: {message}"))
}
