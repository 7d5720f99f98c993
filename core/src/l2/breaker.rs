//! A circuit breaker: after failures in a row, calls fail at once until a probe succeeds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::runtime::{Runtime, jittered};
use crate::sync::Mutex;

/// Failures in a row that open the circuit.
const THRESHOLD: u32 = 3;
/// How long the circuit stays open at first; doubled by each failed probe. Milliseconds.
const FIRST_WAIT: u64 = 100;
const LONGEST_WAIT: u64 = 2_000;

#[derive(Default)]
pub(crate) struct Breaker {
    /// Whether there are failures at all: nearly always not, and then no call takes the lock.
    failing: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failures: u32,
    open_until: u64,
    wait: u64,
    probing: bool,
}

/// Leave for one call. Dropped without a verdict (the caller was cancelled), it changes nothing.
pub(crate) struct Permit<'a> {
    breaker: &'a Breaker,
    probe: bool,
}

impl Breaker {
    /// Leave to call, unless the circuit is open. While it is half open, one call at a time probes.
    pub(crate) fn admit(&self, now: u64) -> Option<Permit<'_>> {
        // Relaxed: a call that does not see a failure of this moment is one that began before it.
        if !self.failing.load(Ordering::Relaxed) {
            return Some(Permit { breaker: self, probe: false });
        }
        let mut state = self.state.lock();
        let open = state.failures >= THRESHOLD;
        if open && (state.probing || now < state.open_until) {
            return None;
        }
        state.probing = open;
        Some(Permit { breaker: self, probe: open })
    }

    pub(crate) fn is_open(&self) -> bool {
        self.failing.load(Ordering::Relaxed) && self.state.lock().failures >= THRESHOLD
    }
}

impl Permit<'_> {
    /// The call succeeded. Says whether that closed the circuit.
    pub(crate) fn succeeded(self) -> bool {
        if !self.breaker.failing.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.breaker.state.lock();
        let was_open = state.failures >= THRESHOLD;
        (state.failures, state.wait) = (0, 0);
        self.breaker.failing.store(false, Ordering::Relaxed);
        was_open
    }

    /// The call failed. Says whether that opened the circuit.
    pub(crate) fn failed(self, runtime: &dyn Runtime) -> bool {
        let mut state = self.breaker.state.lock();
        let was_open = state.failures >= THRESHOLD;
        state.failures = state.failures.saturating_add(1);
        self.breaker.failing.store(true, Ordering::Relaxed);
        if state.failures < THRESHOLD || (was_open && !self.probe) {
            return false;
        }
        state.wait = (state.wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
        let wait = jittered(Duration::from_millis(state.wait), runtime);
        state.open_until = runtime.now_ms().saturating_add(wait.as_millis() as u64);
        !was_open
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.probe {
            self.breaker.state.lock().probing = false;
        }
    }
}
