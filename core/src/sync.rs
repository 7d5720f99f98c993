//! The lock the engine uses, named once so that a model checker's can take its place in tests.

use std::sync::{Mutex as StdMutex, MutexGuard, PoisonError};

/// A mutex without poisoning: no code under one of the engine's locks leaves half a change behind a panic.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(StdMutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(StdMutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
