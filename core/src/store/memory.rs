use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hashbrown::HashMap;

use super::Store;
use crate::error::Result;
use crate::runtime::{Runtime, SystemRuntime};
use crate::sync::Mutex;

/// A store in this process's memory: the shared tier of several caches in one process, and of tests. Clones share what
/// they hold. It holds every entry until its time has passed.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    runtime: Arc<dyn Runtime>,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    values: HashMap<String, (Bytes, u64), foldhash::fast::FixedState>,
    by_expiry: BTreeSet<(u64, String)>,
}

impl MemoryStore {
    /// An empty store on the system's clock.
    pub fn new() -> Self {
        Self::on(Arc::new(SystemRuntime::default()))
    }

    /// An empty store on `runtime`'s clock.
    pub fn on(runtime: Arc<dyn Runtime>) -> Self {
        Self { shared: Arc::new(Shared { runtime, held: Mutex::default() }) }
    }

    fn with<R>(&self, step: impl FnOnce(&mut Held, u64) -> R) -> R {
        let now = self.shared.runtime.wall_ms();
        let mut held = self.shared.held.lock();
        held.expire(now);
        step(&mut held, now)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("entries", &self.shared.held.lock().values.len()).finish()
    }
}

impl Held {
    fn expire(&mut self, now: u64) {
        while let Some((expiry, key)) = self.by_expiry.pop_first() {
            if expiry > now {
                self.by_expiry.insert((expiry, key));
                return;
            }
            self.values.remove(&key);
        }
    }

    fn put(&mut self, key: &str, value: Bytes, expiry: u64) {
        if let Some((_, old)) = self.values.insert(key.to_owned(), (value, expiry)) {
            self.by_expiry.remove(&(old, key.to_owned()));
        }
        self.by_expiry.insert((expiry, key.to_owned()));
    }

    fn take(&mut self, key: &str) {
        if let Some((key, (_, expiry))) = self.values.remove_entry(key) {
            self.by_expiry.remove(&(expiry, key));
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        Ok(self.with(|held, _| held.values.get(key).map(|(value, _)| value.clone())))
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        self.with(|held, now| held.put(key, value, now.saturating_add(ttl.as_millis() as u64)));
        Ok(())
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.with(|held, _| held.take(key));
        Ok(())
    }

    async fn clear(&self) -> Result<()> {
        self.with(|held, _| *held = Held::default());
        Ok(())
    }

    async fn close(&self) {}

    async fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Option<bool>> {
        Ok(Some(self.with(|held, now| {
            let found = held.values.get(key).map(|(value, _)| value);
            let matches = match (found, expected) {
                (None, None) => true,
                (Some(found), Some(expected)) => found.starts_with(expected),
                _ => false,
            };
            if matches {
                held.put(key, value, now.saturating_add(ttl.as_millis() as u64));
            }
            matches
        })))
    }

    async fn time(&self) -> Result<Option<u64>> {
        Ok(Some(self.shared.runtime.wall_ms()))
    }
}
