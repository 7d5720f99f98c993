//! For tests: virtual time, a deterministic executor, and the contracts that stores and buses keep.
//!
//! [`SimRuntime`] runs tasks one at a time on the calling thread. Its clock stands still while anything can run and
//! jumps to the next timer when nothing can, so a test waits for hours in no time and never for a thread.

mod contract;
#[doc(hidden)]
pub mod fuzz;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

pub use self::contract::{bus_contract, store_contract};
use crate::error::Result;
use crate::runtime::{BoxFuture, Runtime};
use crate::sync::Mutex;

/// A single-threaded executor on virtual time. Which of several ready tasks runs next is drawn from the seed, so that
/// one seed is one interleaving.
#[derive(Clone)]
pub struct SimRuntime {
    shared: Arc<Shared>,
    /// How far this node's clock is ahead of the runtime's.
    skew_ms: u64,
}

struct Shared {
    state: Mutex<State>,
}

struct State {
    now_ms: u64,
    random: u64,
    next_task: u64,
    tasks: BTreeMap<u64, Option<BoxFuture<'static, ()>>>,
    ready: Vec<u64>,
    timers: BinaryHeap<Reverse<(u64, u64)>>,
    sleepers: BTreeMap<u64, Waker>,
    next_timer: u64,
    shuffle: bool,
}

/// The task number of the future that `block_on` was given.
const MAIN: u64 = 0;

/// Where virtual time begins: far enough from zero that subtracting from it does no harm.
const START_MS: u64 = 1_000_000;

/// The wall clock reads this much more than the monotonic one.
const WALL_OFFSET_MS: u64 = 1_700_000_000_000;

impl SimRuntime {
    /// A runtime that runs ready tasks in the order in which they became ready.
    pub fn new() -> Self {
        Self::with(0, false)
    }

    /// A runtime whose interleavings and random bits are drawn from `seed`.
    pub fn seeded(seed: u64) -> Self {
        Self::with(seed, true)
    }

    fn with(seed: u64, shuffle: bool) -> Self {
        let state = State {
            now_ms: START_MS,
            random: seed ^ 0x9e37_79b9_7f4a_7c15,
            next_task: MAIN + 1,
            tasks: BTreeMap::new(),
            ready: Vec::new(),
            timers: BinaryHeap::new(),
            sleepers: BTreeMap::new(),
            next_timer: 0,
            shuffle,
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state) }), skew_ms: 0 }
    }

    /// The same runtime with clocks that read `ahead` more: another machine's.
    #[must_use]
    pub fn skewed(&self, ahead: Duration) -> Self {
        Self { shared: Arc::clone(&self.shared), skew_ms: ahead.as_millis() as u64 }
    }

    /// Runs `future` and all tasks until it is done.
    ///
    /// # Panics
    ///
    /// When nothing can run, no timer is set and the future is not done: it would never be.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let main = self.waker(MAIN);
        self.shared.state.lock().ready.push(MAIN);
        loop {
            let Some(task) = self.next_ready() else {
                assert!(self.jump(), "nothing can run and no timer is set: the test would hang");
                continue;
            };
            if task == MAIN {
                if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&main)) {
                    return output;
                }
            } else {
                self.run(task);
            }
        }
    }

    /// Lets every task run that can, without moving the clock.
    pub async fn settle(&self) {
        loop {
            let others = {
                let state = self.shared.state.lock();
                state.ready.iter().any(|task| *task != MAIN)
            };
            if !others {
                return;
            }
            self.yield_now().await;
        }
    }

    /// Lets other tasks run once.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Lets `duration` pass, running every task whose time comes on the way.
    pub async fn advance(&self, duration: Duration) {
        self.sleep(duration).await;
        self.settle().await;
    }

    /// A number below `bound`, from the seed.
    pub fn below(&self, bound: u64) -> u64 {
        self.random() % bound.max(1)
    }

    fn waker(&self, task: u64) -> Waker {
        Waker::from(Arc::new(TaskWaker { shared: Arc::clone(&self.shared), task }))
    }

    fn next_ready(&self) -> Option<u64> {
        let mut state = self.shared.state.lock();
        if state.ready.is_empty() {
            return None;
        }
        let index = if state.shuffle { (state.draw() % state.ready.len() as u64) as usize } else { 0 };
        Some(state.ready.remove(index))
    }

    fn run(&self, task: u64) {
        let Some(mut future) = self.shared.state.lock().tasks.get_mut(&task).and_then(Option::take) else { return };
        let waker = self.waker(task);
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            self.shared.state.lock().tasks.remove(&task);
            // Dropped outside the lock: what it holds may wake or spawn.
            drop(future);
        } else if let Some(slot) = self.shared.state.lock().tasks.get_mut(&task) {
            *slot = Some(future);
        }
    }

    /// Moves the clock to the next timer; false where there is none.
    fn jump(&self) -> bool {
        let mut due = Vec::new();
        let mut state = self.shared.state.lock();
        // A timer that nobody waits for any more does not move the clock.
        while state.timers.peek().is_some_and(|Reverse((_, timer))| !state.sleepers.contains_key(timer)) {
            state.timers.pop();
        }
        let Some(Reverse((deadline, _))) = state.timers.peek().copied() else { return false };
        state.now_ms = state.now_ms.max(deadline);
        while let Some(Reverse((at, timer))) = state.timers.peek().copied() {
            if at > state.now_ms {
                break;
            }
            state.timers.pop();
            due.extend(state.sleepers.remove(&timer));
        }
        drop(state);
        due.into_iter().for_each(Waker::wake);
        true
    }

    /// How many tasks have not ended.
    pub fn tasks(&self) -> usize {
        self.shared.state.lock().tasks.len()
    }

    /// Drops every task, as the end of a process does.
    pub fn shut_down(&self) {
        let tasks = std::mem::take(&mut self.shared.state.lock().tasks);
        drop(tasks);
    }
}

impl Default for SimRuntime {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for SimRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimRuntime").field("now_ms", &self.now_ms()).finish_non_exhaustive()
    }
}

impl State {
    /// splitmix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

struct TaskWaker {
    shared: Arc<Shared>,
    task: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut state = self.shared.state.lock();
        let known = self.task == MAIN || state.tasks.contains_key(&self.task);
        if known && !state.ready.contains(&self.task) {
            state.ready.push(self.task);
        }
    }
}

struct Sleep {
    shared: Arc<Shared>,
    deadline: u64,
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        if state.now_ms >= self.deadline {
            return Poll::Ready(());
        }
        let timer = match self.timer {
            Some(timer) => timer,
            None => {
                state.next_timer += 1;
                let timer = state.next_timer;
                state.timers.push(Reverse((self.deadline, timer)));
                self.timer = Some(timer);
                timer
            }
        };
        state.sleepers.insert(timer, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            let mut state = self.shared.state.lock();
            state.sleepers.remove(&timer);
        }
    }
}

impl Runtime for SimRuntime {
    fn now_ms(&self) -> u64 {
        self.shared.state.lock().now_ms + self.skew_ms
    }

    fn wall_ms(&self) -> u64 {
        self.now_ms() + WALL_OFFSET_MS
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let deadline = self.shared.state.lock().now_ms.saturating_add(duration.as_millis().max(1) as u64);
        Box::pin(Sleep { shared: Arc::clone(&self.shared), deadline, timer: None })
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> Result<()> {
        let mut state = self.shared.state.lock();
        let number = state.next_task;
        state.next_task += 1;
        state.tasks.insert(number, Some(task));
        state.ready.push(number);
        Ok(())
    }

    fn random(&self) -> u64 {
        self.shared.state.lock().draw()
    }
}
