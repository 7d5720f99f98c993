//! Who drives a flight's work: the caller who leads it, as long as it is alone with it.
//!
//! A task of its own costs two wake-ups, a third of what a read of the shared store costs otherwise. But a caller may
//! stop being polled, or go away, and must take nobody with it: so the work goes to the runtime as soon as somebody else
//! waits for it, its loader runs, or its leader leaves.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::sync::Mutex;

pub(crate) type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

#[derive(Default)]
pub(crate) struct Pilot(Mutex<State>);

/// Invariant: work is in one place, here, in its leader's hands while that polls it, or with the runtime; and it comes
/// back here only while nobody has asked for it to go to the runtime.
#[derive(Default)]
enum State {
    /// No work yet.
    #[default]
    Boarding,
    /// None yet, and somebody else waits for it.
    Wanted,
    /// The leader's next poll drives it. The waker is the leader's: it is told when it has to wait like the others.
    Here(Work, Option<Waker>),
    /// The leader is polling it; `wanted` if it is to go to the runtime then.
    Driven { wanted: bool },
    /// Done, or with the runtime.
    Gone,
}

/// What a poll of the leader's left.
pub(crate) enum Drive {
    /// The work goes on, and wakes the leader.
    Here,
    /// The leader waits like the others.
    Gone,
    /// The same, and this has to go to the runtime.
    HandOver(Work),
}

impl Pilot {
    /// The leader takes the work on. It gets it back where it has to go to the runtime at once.
    pub(crate) fn take_on(&self, work: Work) -> Option<Work> {
        let mut state = self.0.lock();
        if matches!(*state, State::Boarding) {
            *state = State::Here(work, None);
            return None;
        }
        *state = State::Gone;
        Some(work)
    }

    /// The leader's poll.
    pub(crate) fn drive(&self, cx: &mut Context<'_>) -> Drive {
        let mut work = {
            let mut state = self.0.lock();
            match std::mem::replace(&mut *state, State::Driven { wanted: false }) {
                State::Here(work, _) => work,
                other => {
                    *state = other;
                    return Drive::Gone;
                }
            }
        };
        let poll = work.as_mut().poll(cx);
        let mut state = self.0.lock();
        let wanted = matches!(*state, State::Driven { wanted: true });
        match poll {
            Poll::Pending if !wanted => {
                *state = State::Here(work, Some(cx.waker().clone()));
                Drive::Here
            }
            Poll::Pending => {
                *state = State::Gone;
                Drive::HandOver(work)
            }
            Poll::Ready(()) => {
                *state = State::Gone;
                Drive::Gone
            }
        }
    }

    /// Somebody else waits for the work, it begins to load, or its leader leaves: it goes to the runtime, now if it is
    /// here, or as soon as the leader's poll returns.
    pub(crate) fn hand_over(&self) -> Option<Work> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Gone) {
            State::Here(work, leader) => {
                drop(state);
                leader.into_iter().for_each(Waker::wake);
                Some(work)
            }
            State::Boarding | State::Wanted => {
                *state = State::Wanted;
                None
            }
            State::Driven { .. } => {
                *state = State::Driven { wanted: true };
                None
            }
            State::Gone => None,
        }
    }
}
