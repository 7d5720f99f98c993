//! Time, tasks and chance: the only place that asks the process for them, so that tests and simulations can own all three.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::Shared;

use crate::error::{Error, Result};
use crate::sync::Mutex;

/// An owned future, as object-safe traits pass it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the engine asks of the process it runs in.
///
/// [`SystemRuntime`] serves production. Implement it to run the engine on virtual time.
pub trait Runtime: Send + Sync + 'static {
    /// Milliseconds since a fixed moment; never goes back. May be coarse (up to 5 ms late): it is read on every hit.
    fn now_ms(&self) -> u64;

    /// Milliseconds since 1970. Judges deadlines in a store that has no clock of its own, and nothing else.
    fn wall_ms(&self) -> u64;

    /// Completes once `duration` has passed.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Runs `task` to its end. [`ErrorKind::Config`](crate::ErrorKind::Config) where nothing can run it.
    fn spawn(&self, task: BoxFuture<'static, ()>) -> Result<()>;

    /// 64 random bits that no other process draws: node ids and lease tokens are made of them.
    fn random(&self) -> u64;
}

/// Waits for `future` at most `limit`.
pub(crate) async fn timeout<T>(runtime: &dyn Runtime, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    match first(future, runtime.sleep(limit)).await {
        Either::Left(value) => Some(value),
        Either::Right(()) => None,
    }
}

/// Half to all of a pause, at random, so that the nodes of a fleet do not try again together.
pub(crate) fn jittered(pause: Duration, runtime: &dyn Runtime) -> Duration {
    let millis = pause.as_millis() as u64;
    Duration::from_millis(millis / 2 + runtime.random() % (millis / 2 + 1))
}

pub(crate) enum Either<A, B> {
    Left(A),
    Right(B),
}

/// The first of two futures to finish; the left one where both have. The other is dropped.
pub(crate) async fn first<A, B>(left: impl Future<Output = A>, right: impl Future<Output = B>) -> Either<A, B> {
    let (mut left, mut right) = (pin!(left), pin!(right));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(value) = left.as_mut().poll(cx) {
            return Poll::Ready(Either::Left(value));
        }
        right.as_mut().poll(cx).map(Either::Right)
    })
    .await
}

/// Work that many ask for and that runs once: who comes while it runs shares its outcome. It runs as a task of its own, so
/// that a caller who gives up does not end it for the others.
pub(crate) struct SharedRun<T>(Arc<Mutex<Option<Running<T>>>>);

type Running<T> = Shared<BoxFuture<'static, Result<T>>>;

impl<T> Default for SharedRun<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone + Send + Sync + 'static> SharedRun<T> {
    /// The outcome of the run under way, or of `work`. An error where no task can run.
    pub(crate) async fn join<F: Future<Output = T> + Send + 'static>(
        &self,
        runtime: &dyn Runtime,
        work: impl FnOnce() -> F,
    ) -> Result<T> {
        let running = {
            let mut running = self.0.lock();
            // One that was dropped with its runtime is there still, and has ended.
            match running.clone().filter(|running| running.peek().is_none()) {
                Some(running) => running,
                None => {
                    let (done, outcome) = futures_channel::oneshot::channel();
                    let (work, slot) = (work(), Arc::clone(&self.0));
                    runtime.spawn(Box::pin(async move {
                        let outcome = work.await;
                        // Who comes from here on asks anew, and nothing keeps what came out.
                        *slot.lock() = None;
                        let _ = done.send(outcome);
                    }))?;
                    let outcome: BoxFuture<'static, _> =
                        Box::pin(async move { outcome.await.map_err(|_| Error::closed()) });
                    running.insert(outcome.shared()).clone()
                }
            }
        };
        running.await
    }
}

/// Turns a panic of `future` into the panic's message.
pub(crate) struct CatchPanic<F>(pub(crate) Pin<Box<F>>);

impl<F: Future> Future for CatchPanic<F> {
    type Output = Result<F::Output, String>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let poll = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.0.as_mut().poll(cx)));
        match poll {
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Ok(Poll::Pending) => Poll::Pending,
            Err(panic) => Poll::Ready(Err(panic_message(&*panic))),
        }
    }
}

pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// The process's own clock and random source, and a tokio runtime.
///
/// A memory-only cache asks for tasks only when it loads, so it can be built before a runtime runs.
#[derive(Clone, Debug, Default)]
pub struct SystemRuntime {
    handle: Option<tokio::runtime::Handle>,
}

impl SystemRuntime {
    /// Tasks run on the tokio runtime that is current when the cache is built, or else when it first loads.
    pub fn current() -> Self {
        Self { handle: tokio::runtime::Handle::try_current().ok() }
    }

    /// Tasks run on `handle`.
    pub fn on(handle: tokio::runtime::Handle) -> Self {
        Self { handle: Some(handle) }
    }
}

#[allow(clippy::disallowed_methods, reason = "this is the one place")]
impl Runtime for SystemRuntime {
    #[cfg(target_os = "linux")]
    fn now_ms(&self) -> u64 {
        // The coarse clock costs about 5 ns where `Instant::now` costs 24; it ticks every 1 to 4 ms.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
        now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
    }

    #[cfg(not(target_os = "linux"))]
    fn now_ms(&self) -> u64 {
        use std::sync::LazyLock;
        use std::time::Instant;
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed().as_millis() as u64
    }

    fn wall_ms(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.unwrap_or_default().as_millis() as u64
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        match &self.handle {
            Some(handle) => {
                let _inside = handle.enter();
                Box::pin(tokio::time::sleep(duration))
            }
            None => Box::pin(tokio::time::sleep(duration)),
        }
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) -> Result<()> {
        if let Some(handle) = &self.handle {
            handle.spawn(task);
            return Ok(());
        }
        let handle = tokio::runtime::Handle::try_current().map_err(|_| {
            Error::config(
                "no tokio runtime: call this inside one, or give the builder `.runtime(SystemRuntime::on(handle))`",
            )
        })?;
        handle.spawn(task);
        Ok(())
    }

    fn random(&self) -> u64 {
        // From the operating system each time: a generator's state would be shared by both sides of a fork.
        getrandom::u64().expect("the operating system has a random source")
    }
}
