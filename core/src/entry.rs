//! A value in L1 and the one judge of its time: fresh, stale or expired.

use std::sync::Arc;

use crate::options::Resolved;

/// What L1 holds for a key. 64 bytes beside the value, without a second allocation: a hit copies it out.
#[derive(Debug)]
pub(crate) struct Entry<V> {
    pub(crate) value: Arc<V>,
    /// When this node began to read or load the value, on its own clock. All deadlines count from here.
    pub(crate) read_at: u64,
    pub(crate) deadlines: Deadlines,
    /// The highest watermark number this node knew when the value's load began.
    pub(crate) stamp: u64,
    /// The generation for which the entry is known to be alive: a hit compares this one number. Until it is in L1, the
    /// generation when its read or load began; what was cleared since is dead.
    pub(crate) checked: u64,
    /// The id of the L2 cell that holds the value, 0 where there is none.
    pub(crate) id: u64,
    pub(crate) tags: Tags,
}

/// In order, each once. One pointer wide: most entries have none.
pub(crate) type Tags = Option<Arc<Vec<Box<str>>>>;

impl<V> Clone for Entry<V> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), tags: self.tags.clone(), ..*self }
    }
}

/// Milliseconds after [`Entry::read_at`]; in 32 bits, so L1 keeps nothing longer than 49 days.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deadlines {
    /// Until here a hit asks nothing else. Before `fresh` where the value is to be refreshed ahead.
    pub(crate) hot: u32,
    pub(crate) fresh: u32,
    /// Answered at once until here, while one flight refreshes it.
    pub(crate) stale: u32,
    /// Answered until here when the loader fails or is slow.
    pub(crate) fallback: u32,
}

/// What may be done with a value now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Answer it.
    Fresh,
    /// Answer it and refresh it in the background, though it is still fresh.
    RefreshAhead,
    /// Answer it and refresh it in the background.
    Stale,
    /// Load; answer this only if the load fails or is slow.
    Fallback,
    /// Of no use.
    Expired,
}

/// For how long after a failed refresh the stale value is answered without asking the loader again. Milliseconds.
pub(crate) const STALE_THROTTLE: u64 = 2_000;

impl<V> Entry<V> {
    pub(crate) fn tags(&self) -> &[Box<str>] {
        self.tags.as_ref().map_or(&[], |tags| tags)
    }

    pub(crate) fn freshness(&self, now: u64) -> Freshness {
        // The clock is monotonic, but another thread may have read it a little later than this one.
        let age = clamp(now.saturating_sub(self.read_at));
        let deadlines = &self.deadlines;
        if age < deadlines.hot {
            Freshness::Fresh
        } else if age < deadlines.fresh {
            Freshness::RefreshAhead
        } else if age < deadlines.stale {
            Freshness::Stale
        } else if age < deadlines.fallback {
            Freshness::Fallback
        } else {
            Freshness::Expired
        }
    }

    /// The same entry, not answered past `age` milliseconds.
    pub(crate) fn limited(&self, age: u64) -> Self {
        let most = |deadline: u32| deadline.min(clamp(age));
        let Deadlines { hot, fresh, stale, fallback } = self.deadlines;
        let deadlines = Deadlines { hot: most(hot), fresh: most(fresh), stale: most(stale), fallback: most(fallback) };
        Self { deadlines, ..self.clone() }
    }

    /// The same entry, answered without a new load until the throttle time has passed; its windows do not move.
    pub(crate) fn throttled(&self, now: u64) -> Self {
        let age = clamp(now.saturating_sub(self.read_at));
        let end = self.deadlines.fallback.max(self.deadlines.stale).max(self.deadlines.fresh);
        let hot = age.saturating_add(STALE_THROTTLE as u32).min(end);
        let deadlines = Deadlines { hot, fresh: self.deadlines.fresh.max(hot), ..self.deadlines };
        Self { deadlines, ..self.clone() }
    }
}

/// When a value that is made now stops being fresh and usable, in milliseconds from now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lifetime {
    pub(crate) fresh: u64,
    pub(crate) stale: u64,
    pub(crate) fallback: u64,
}

impl Lifetime {
    /// For a value whose time to live is `ttl`, with the windows of `options`.
    pub(crate) fn new(ttl: u64, options: &Resolved, random: impl FnOnce() -> u64) -> Self {
        let jitter = if options.jitter == 0 { 0 } else { random() % (options.jitter + 1) };
        let fresh = ttl.saturating_add(jitter);
        Self {
            fresh,
            stale: fresh.saturating_add(options.stale_while_revalidate),
            fallback: fresh.saturating_add(options.stale_if_error),
        }
    }

    /// How long the shared store keeps the value: to the end of its last window.
    pub(crate) fn physical(&self) -> u64 {
        self.stale.max(self.fallback)
    }

    /// L1's deadlines, counted from `elapsed` milliseconds ago.
    pub(crate) fn deadlines(&self, elapsed: u64, options: &Resolved) -> Deadlines {
        let ahead = options.refresh_ahead.map_or(self.fresh, |fraction| part(self.fresh, fraction));
        // Past `l1_ttl` the value may still be a fallback, but it is not answered unasked.
        let held = options.l1_ttl.unwrap_or(u64::MAX);
        let after = |deadline: u64| clamp(deadline.saturating_add(elapsed));
        Deadlines {
            hot: after(ahead.min(held)),
            fresh: after(self.fresh.min(held)),
            stale: after(self.stale.min(held)),
            fallback: after(self.fallback),
        }
    }
}

/// A fraction of a duration.
#[allow(clippy::cast_precision_loss, clippy::cast_sign_loss, reason = "exact to the millisecond for 285,000 years")]
pub(crate) fn part(millis: u64, fraction: f64) -> u64 {
    (millis as f64 * fraction) as u64
}

/// In L1's 32 bits.
pub(crate) fn clamp(millis: u64) -> u32 {
    u32::try_from(millis).unwrap_or(u32::MAX)
}
