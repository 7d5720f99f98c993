//! What can be set for an entry. A call's options win over its scope's, and those over the cache's.

use std::time::Duration;

use crate::error::{Error, Result};

/// How values are kept: given to the builder for a whole cache, to a scope, or to single calls through
/// [`HybridCache::with_options`](crate::HybridCache::with_options). What is not set is inherited.
///
/// ```
/// # use std::time::Duration;
/// # use fleetcache::EntryOptions;
/// let options = EntryOptions::new().ttl(Duration::from_secs(300)).stale_if_error(Duration::from_secs(3600));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EntryOptions {
    ttl: Option<Duration>,
    jitter: Option<Duration>,
    stale_while_revalidate: Option<Duration>,
    stale_if_error: Option<Duration>,
    refresh_ahead: Option<f64>,
    soft_timeout: Option<Duration>,
    hard_timeout: Option<Duration>,
    l1_ttl: Option<Duration>,
    negative_ttl: Option<Duration>,
}

/// Every option name of [`EntryOptions`] in the spelling that all languages share.
pub const ENTRY_OPTION_NAMES: [&str; 9] = [
    "ttl",
    "jitter",
    "stale_while_revalidate",
    "stale_if_error",
    "refresh_ahead",
    "soft_timeout",
    "hard_timeout",
    "l1_ttl",
    "negative_ttl",
];

/// The longest duration an option takes: 100 years.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

impl EntryOptions {
    /// Inherits everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long a value is fresh. Default: 60 s.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Up to this much is added to each `ttl` at random, so that values made together do not expire together.
    /// Default: 0.
    #[must_use]
    pub fn jitter(mut self, jitter: Duration) -> Self {
        self.jitter = Some(jitter);
        self
    }

    /// For this long past `ttl` the old value is answered at once while one load refreshes it. Default: 0.
    #[must_use]
    pub fn stale_while_revalidate(mut self, window: Duration) -> Self {
        self.stale_while_revalidate = Some(window);
        self
    }

    /// For this long past `ttl` the old value is answered when the loader fails or is too slow. Default: 0.
    #[must_use]
    pub fn stale_if_error(mut self, window: Duration) -> Self {
        self.stale_if_error = Some(window);
        self
    }

    /// The fraction of `ttl` after which a hit refreshes the value in the background; between 0 and 1, both excluded.
    /// Default: never.
    #[must_use]
    pub fn refresh_ahead(mut self, fraction: f64) -> Self {
        self.refresh_ahead = Some(fraction);
        self
    }

    /// Past this, a load goes on in the background while its callers get the stale value, if there is one.
    /// Default: none.
    #[must_use]
    pub fn soft_timeout(mut self, limit: Duration) -> Self {
        self.soft_timeout = Some(limit);
        self
    }

    /// Past this, a load is ended: its callers get the stale value or a timeout. Default: none.
    #[must_use]
    pub fn hard_timeout(mut self, limit: Duration) -> Self {
        self.hard_timeout = Some(limit);
        self
    }

    /// How long this node keeps a value before it asks the shared store again. Default: as long as it may be used.
    #[must_use]
    pub fn l1_ttl(mut self, ttl: Duration) -> Self {
        self.l1_ttl = Some(ttl);
        self
    }

    /// How long a loaded null is kept (see [`Builder::null_when`](crate::Builder::null_when)). Default: not at all.
    #[must_use]
    pub fn negative_ttl(mut self, ttl: Duration) -> Self {
        self.negative_ttl = Some(ttl);
        self
    }

    /// These options, and `below` where they say nothing.
    pub(crate) fn over(&self, below: &Self) -> Self {
        Self {
            ttl: self.ttl.or(below.ttl),
            jitter: self.jitter.or(below.jitter),
            stale_while_revalidate: self.stale_while_revalidate.or(below.stale_while_revalidate),
            stale_if_error: self.stale_if_error.or(below.stale_if_error),
            refresh_ahead: self.refresh_ahead.or(below.refresh_ahead),
            soft_timeout: self.soft_timeout.or(below.soft_timeout),
            hard_timeout: self.hard_timeout.or(below.hard_timeout),
            l1_ttl: self.l1_ttl.or(below.l1_ttl),
            negative_ttl: self.negative_ttl.or(below.negative_ttl),
        }
    }

    /// Refuses what makes no sense, by name and value, and fills in the defaults.
    pub(crate) fn resolve(&self) -> Result<Resolved> {
        for (name, value) in [
            ("ttl", self.ttl),
            ("soft_timeout", self.soft_timeout),
            ("hard_timeout", self.hard_timeout),
            ("l1_ttl", self.l1_ttl),
            ("negative_ttl", self.negative_ttl),
        ] {
            if value.is_some_and(|value| value < Duration::from_millis(1)) {
                return Err(refused(name, value.unwrap_or_default(), "at least 1 ms"));
            }
        }
        for (name, value) in [
            ("ttl", self.ttl),
            ("jitter", self.jitter),
            ("stale_while_revalidate", self.stale_while_revalidate),
            ("stale_if_error", self.stale_if_error),
            ("soft_timeout", self.soft_timeout),
            ("hard_timeout", self.hard_timeout),
            ("l1_ttl", self.l1_ttl),
            ("negative_ttl", self.negative_ttl),
        ] {
            if value.is_some_and(|value| value > LONGEST) {
                return Err(refused(name, value.unwrap_or_default(), "at most 100 years"));
            }
        }
        if let Some(fraction) = self.refresh_ahead
            && !(fraction > 0.0 && fraction < 1.0)
        {
            return Err(refused("refresh_ahead", fraction, "a fraction of ttl between 0 and 1, both excluded"));
        }
        if let (Some(soft), Some(hard)) = (self.soft_timeout, self.hard_timeout)
            && soft > hard
        {
            return Err(refused("soft_timeout", soft, &format!("at most hard_timeout, {hard:?}")));
        }
        let millis = |duration: Option<Duration>| duration.map(|duration| duration.as_millis() as u64);
        Ok(Resolved {
            ttl: millis(self.ttl).unwrap_or(60_000),
            jitter: millis(self.jitter).unwrap_or(0),
            stale_while_revalidate: millis(self.stale_while_revalidate).unwrap_or(0),
            stale_if_error: millis(self.stale_if_error).unwrap_or(0),
            refresh_ahead: self.refresh_ahead,
            soft_timeout: self.soft_timeout,
            hard_timeout: self.hard_timeout,
            l1_ttl: millis(self.l1_ttl),
            negative_ttl: millis(self.negative_ttl),
        })
    }
}

fn refused(name: &str, value: impl std::fmt::Debug, allowed: &str) -> Error {
    Error::config(format!("{name} = {value:?} is not allowed: give {allowed}"))
}

/// Options with every question answered. Milliseconds, except where a timer takes a `Duration`.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) ttl: u64,
    pub(crate) jitter: u64,
    pub(crate) stale_while_revalidate: u64,
    pub(crate) stale_if_error: u64,
    pub(crate) refresh_ahead: Option<f64>,
    pub(crate) soft_timeout: Option<Duration>,
    pub(crate) hard_timeout: Option<Duration>,
    pub(crate) l1_ttl: Option<u64>,
    pub(crate) negative_ttl: Option<u64>,
}
