//! What a node must not rely on until it has asked again: counted, so that an answer settles only the doubts from before
//! the question.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Doubts {
    raised: AtomicU64,
    settled: AtomicU64,
}

/// All doubts up to a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Doubt(u64);

impl Default for Doubts {
    /// Nothing is known at first.
    fn default() -> Self {
        Self { raised: AtomicU64::new(1), settled: AtomicU64::new(0) }
    }
}

impl Doubts {
    pub(crate) fn raise(&self) {
        self.raised.fetch_add(1, Ordering::AcqRel);
    }

    /// Read before the question whose answer is to settle it.
    pub(crate) fn now(&self) -> Doubt {
        Doubt(self.raised.load(Ordering::Acquire))
    }

    /// A doubt that came up since stays.
    pub(crate) fn settle(&self, doubt: Doubt) {
        self.settled.fetch_max(doubt.0, Ordering::AcqRel);
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire) == self.raised.load(Ordering::Acquire)
    }
}
