use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

/// A place where a task stops until the test lets it go on, and where the test waits until it has come.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    arrived: usize,
    passes: usize,
    open: bool,
    wakers: Vec<Waker>,
}

/// Proof that somebody stands at the gate.
#[derive(Debug)]
pub struct Held(Gate);

impl Gate {
    /// A shut gate.
    pub fn new() -> Self {
        Self::default()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock().expect("no panic under this lock");
        change(&mut state);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    async fn until(&self, mut ready: impl FnMut(&mut State) -> bool) {
        std::future::poll_fn(|cx| {
            let mut state = self.0.lock().expect("no panic under this lock");
            if ready(&mut state) {
                return Poll::Ready(());
            }
            state.wakers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Stops here until the test lets it pass.
    pub async fn pass(&self) {
        self.change(|state| state.arrived += 1);
        self.until(|state| {
            if state.open {
                return true;
            }
            let passes = state.passes > 0;
            state.passes -= usize::from(passes);
            passes
        })
        .await;
    }

    /// Waits until somebody has come to the gate who was not reported before.
    pub async fn held(&self) -> Held {
        self.until(|state| {
            let somebody = state.arrived > 0;
            state.arrived -= usize::from(somebody);
            somebody
        })
        .await;
        Held(self.clone())
    }

    /// Lets everybody pass from now on.
    pub fn open(&self) {
        self.change(|state| state.open = true);
    }
}

impl Held {
    /// Lets one pass.
    pub fn release(self) {
        self.0.change(|state| state.passes += 1);
    }
}
