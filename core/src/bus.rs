//! What carries invalidations between nodes: bytes to every subscriber, and word of every break in delivery.
//!
//! Implement [`Bus`] to use a broker of your own; [`bus_contract`](crate::testing::bus_contract) (feature `testing`)
//! checks an implementation.

mod memory;
#[cfg(feature = "redis")]
mod redis_streams;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::memory::MemoryBus;
#[cfg(feature = "redis")]
pub use self::redis_streams::RedisStreamsBus;
use crate::error::Result;
use crate::runtime::Runtime;

/// A carrier of messages to every subscriber, the sender's own included.
///
/// It may lose, repeat and reorder messages; what it knows of a loss it must report as [`Delivery::Gap`]. The engine
/// numbers its messages and finds the rest.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Sends one message; returns when the carrier has it.
    async fn publish(&self, message: Bytes) -> Result<()>;

    /// Begins to receive: every message published after this returns is delivered or reported as a gap.
    async fn subscribe(&self) -> Result<Box<dyn Subscription>>;

    /// The longest message the carrier takes, in bytes; at least 1024.
    fn message_limit(&self) -> usize {
        256 * 1024
    }

    /// Told once, before anything else: the prefix of the cache. Nodes of one prefix hear each other; a carrier that
    /// keeps others apart uses it as the name of its channel.
    fn open(&self, prefix: &str, runtime: &Arc<dyn Runtime>) {
        let _ = (prefix, runtime);
    }

    /// Lets go of connections; calls may fail from here on.
    async fn close(&self);

    /// The stream that carries the messages, for a store on the same server. For the crate's buses.
    #[doc(hidden)]
    fn stream(&self) -> Option<StreamAt> {
        None
    }
}

/// What [`Bus::stream`] answers.
#[doc(hidden)]
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "no other bus has one"))]
pub struct StreamAt {
    pub(crate) server: String,
    pub(crate) key: String,
    pub(crate) length: usize,
}

/// One subscriber's stream of deliveries.
#[async_trait]
pub trait Subscription: Send {
    /// The next delivery. Safe to cancel: a delivery is never lost by dropping the future. An error ends the
    /// subscription; the engine subscribes again and takes that for a gap.
    async fn next(&mut self) -> Result<Delivery>;
}

/// What a subscription yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// A message, as it was published.
    Message(Bytes),
    /// Messages may have been lost before this point.
    Gap,
    /// The carrier is out of reach. What comes next goes on where it stopped, or is a gap.
    Interrupted,
}
