//! What this node invalidated lately: done again where the store may have gone back in time.

use std::collections::VecDeque;

use crate::key::{Key, KeyRef};
use crate::sync::Mutex;

/// For how long an invalidation is remembered, in milliseconds: how much of its last writes a store may lose when it
/// restarts or fails over, without everything in it being given up.
pub(crate) const REMEMBERED: u64 = 60_000;
/// How many are remembered.
const MOST: usize = 10_000;

#[derive(Default)]
pub(crate) struct Recent(Mutex<State>);

#[derive(Default)]
struct State {
    keys: VecDeque<(u64, Key)>,
    /// When the last one was forgotten before its time, because there were too many.
    forgot_at: Option<u64>,
}

impl Recent {
    /// Called before the invalidation is sent.
    pub(crate) fn note(&self, key: KeyRef<'_>, now: u64) {
        let mut state = self.0.lock();
        while state.keys.front().is_some_and(|(at, _)| now.saturating_sub(*at) > REMEMBERED) {
            state.keys.pop_front();
        }
        if state.keys.len() >= MOST
            && let Some((at, _)) = state.keys.pop_front()
        {
            state.forgot_at = Some(at);
        }
        state.keys.push_back((now, key.to_key()));
    }

    /// The keys, and whether that is all there were.
    pub(crate) fn all(&self, now: u64) -> (Vec<Key>, bool) {
        let state = self.0.lock();
        let complete = state.forgot_at.is_none_or(|at| now.saturating_sub(at) > REMEMBERED);
        let lately = state.keys.iter().filter(|(at, _)| now.saturating_sub(*at) <= REMEMBERED);
        (lately.map(|(_, key)| key.clone()).collect(), complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_old_is_forgotten_and_what_is_too_much_is_told() {
        let recent = Recent::default();
        let key = |text| KeyRef { scope: 0, text };
        recent.note(key("old"), 0);
        recent.note(key("new"), REMEMBERED);
        assert_eq!(recent.all(REMEMBERED).0.len(), 2);
        assert_eq!(recent.all(REMEMBERED + 1), (vec![key("new").to_key()], true));
        (0..MOST).for_each(|_| recent.note(key("many"), REMEMBERED + 1));
        assert!(!recent.all(REMEMBERED + 2).1, "one was forgotten before its time");
        assert!(recent.all(3 * REMEMBERED).1, "but that is long ago");
    }
}
