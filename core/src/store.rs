//! The shared tier as the engine sees it: a store of bytes.
//!
//! Implement [`Store`] to put the cache on a server of your own: five methods, and a sixth that earns it every promise.
//! [`store_contract`](crate::testing::store_contract) (feature `testing`) checks an implementation.

mod memory;
#[cfg(feature = "redis")]
mod redis;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::memory::MemoryStore;
#[cfg(feature = "redis")]
pub use self::redis::RedisStore;
use crate::error::Result;
use crate::l2::cells::Cells;
use crate::runtime::Runtime;

/// A shared store of bytes by key.
///
/// Every method may be called by many tasks at once and must be safe to cancel. A failure is an error of kind
/// [`Unavailable`](crate::ErrorKind::Unavailable) or [`Timeout`](crate::ErrorKind::Timeout); the engine brings its own
/// deadline and circuit breaker. Reads must see writes that were acknowledged before they began, so they go to the
/// primary.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The bytes under `key`, unless their time has passed.
    async fn get(&self, key: &str) -> Result<Option<Bytes>>;

    /// The bytes under each of `keys`, in their order.
    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            found.push(self.get(key).await?);
        }
        Ok(found)
    }

    /// Puts `value` under `key` for `ttl`, whatever was there.
    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()>;

    /// Removes `key`; a missing one is no error.
    async fn delete(&self, key: &str) -> Result<()>;

    /// Removes everything.
    async fn clear(&self) -> Result<()>;

    /// Lets go of connections; calls may fail from here on.
    async fn close(&self);

    /// In one atomic step: if what is under `key` begins with `expected` (or, for `None`, nothing is there), puts
    /// `value` in its place for `ttl` and says true; else changes nothing and says false.
    ///
    /// A store without it keeps the default, which says `None`: the engine then promises less, and
    /// [`Health::fenced`](crate::Health::fenced) says so.
    async fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Option<bool>> {
        let _ = (key, expected, value, ttl);
        Ok(None)
    }

    /// The store's own clock in milliseconds since 1970, if it has one. Deadlines in shared values are in its time.
    async fn time(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// The protocol's own steps, where the store has better than `compare_and_set` for them. For the crate's stores.
    #[doc(hidden)]
    fn native(&self, _prefix: &str, _runtime: &Arc<dyn Runtime>) -> Option<NativeStore> {
        None
    }
}

/// What [`Store::native`] answers.
#[doc(hidden)]
#[allow(missing_debug_implementations, reason = "nothing to see")]
pub struct NativeStore(pub(crate) Box<dyn Cells>);
