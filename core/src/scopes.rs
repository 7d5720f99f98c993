//! The scopes of a cache: names, their numbers in this process, and whether a scope is closed to the shared store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hashbrown::HashMap;

use crate::error::{Error, Result};
use crate::sync::Mutex;

/// A named part of a cache.
#[derive(Debug)]
pub(crate) struct Scope {
    pub(crate) id: u32,
    pub(crate) name: Arc<str>,
    /// Set when the repair list forgot a key of this scope: nothing is read from L2 until a scope watermark is in.
    closed: AtomicBool,
}

impl Scope {
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn close(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn reopen(&self) {
        self.closed.store(false, Ordering::Release);
    }
}

/// Every scope that was named in this process. They are few and never forgotten.
#[derive(Debug)]
pub(crate) struct Scopes {
    by_name: Mutex<HashMap<Arc<str>, Arc<Scope>, foldhash::fast::FixedState>>,
}

const MAX_NAME: usize = 256;
const MAX_SCOPES: usize = 65_536;

impl Scopes {
    pub(crate) fn new() -> Self {
        Self { by_name: Mutex::default() }
    }

    /// The scope of this name, made on first use.
    pub(crate) fn named(&self, name: &str) -> Result<Arc<Scope>> {
        if name.len() > MAX_NAME {
            return Err(Error::config(format!(
                "scope of {} bytes is not allowed: give at most {MAX_NAME}",
                name.len()
            )));
        }
        let mut by_name = self.by_name.lock();
        if let Some(scope) = by_name.get(name) {
            return Ok(Arc::clone(scope));
        }
        if by_name.len() >= MAX_SCOPES {
            return Err(Error::config(format!("scope {name:?} is one too many: a cache has at most {MAX_SCOPES}")));
        }
        let name: Arc<str> = name.into();
        let scope =
            Arc::new(Scope { id: by_name.len() as u32, name: Arc::clone(&name), closed: AtomicBool::new(false) });
        by_name.insert(name, Arc::clone(&scope));
        Ok(scope)
    }

    /// The scope of this name, if this process ever used it: what it has not used it holds nothing of.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Scope>> {
        self.by_name.lock().get(name).cloned()
    }

    pub(crate) fn by_id(&self, id: u32) -> Option<Arc<Scope>> {
        self.by_name.lock().values().find(|scope| scope.id == id).cloned()
    }

    pub(crate) fn closed(&self) -> Vec<Arc<Scope>> {
        self.by_name.lock().values().filter(|scope| scope.is_closed()).cloned().collect()
    }
}
