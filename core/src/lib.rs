//! One hybrid cache for a whole fleet of services: hot values in this process (L1), shared ones in a store (L2), a bus
//! that tells every node when one changes, and one load for each missing value.
//!
//! Start at [`HybridCache`]. In reading order:
//!
//! - `cache`: the handle and its calls; `builder` puts the parts together; `options`, `loader` and `codec` are what
//!   callers say about values
//! - `read`: the way of a `get`, through `l1`, `flight` (who flies for a key, and who waits), `fly` (find in `l2` or take
//!   the lease, load, fill) and `landing` (what is answered and kept)
//! - `write`: the way of a `set` or `remove`, through L2, L1 and the bus
//! - `coherence`: the way of an invalidation from the bus to L1; `peers` finds gaps, `outbox` sends, `repair` remembers
//!   what could not be sent and `repairing` sends it, `watermark` kills whole tags and scopes, `syncing` learns what a
//!   node has to know before it believes L2, `recent` what is to be removed again when a server went back in time
//! - `store` and `bus`: the traits behind which servers stand, and the servers; `redis`: connections to Redis; `wire`:
//!   what is stored and sent, byte by byte
//! - `host`: the seam on which the Python and Node packages stand
//! - `runtime`: time, tasks and chance
//!
//! What the cache promises, and how it keeps it under races and outages, is told in the project's design notes.

#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(test, deny(unsafe_code))]

pub mod host;
#[cfg(feature = "testing")]
pub mod testing;

mod builder;
mod bus;
mod cache;
mod codec;
mod coherence;
mod doubts;
mod engine;
mod entry;
mod error;
mod flight;
mod fly;
mod health;
mod key;
mod l1;
mod l2;
mod landing;
mod loader;
mod options;
mod outbox;
mod peers;
mod pilot;
mod read;
mod recent;
#[cfg(feature = "redis")]
mod redis;
mod repair;
mod repairing;
mod runtime;
mod scopes;
mod stats;
mod store;
mod sync;
mod syncing;
mod values;
mod watermark;
mod wire;
mod write;

pub use crate::builder::Builder;
#[cfg(feature = "redis")]
pub use crate::bus::RedisStreamsBus;
pub use crate::bus::{Bus, Delivery, MemoryBus, Subscription};
pub use crate::cache::HybridCache;
pub use crate::codec::Codec;
#[cfg(feature = "msgpack")]
pub use crate::codec::MessagePack;
pub use crate::error::{Error, ErrorKind, Result};
pub use crate::health::{Health, PartHealth};
pub use crate::l1::EngineKind;
pub use crate::loader::{LoadContext, Loaded};
pub use crate::options::{ENTRY_OPTION_NAMES, EntryOptions};
#[cfg(feature = "redis")]
pub use crate::redis::RedisConfig;
pub use crate::runtime::{BoxFuture, Runtime, SystemRuntime};
pub use crate::stats::Stats;
#[cfg(feature = "redis")]
pub use crate::store::RedisStore;
pub use crate::store::{MemoryStore, Store};

/// The README's examples are tests.
#[cfg(all(doctest, feature = "msgpack", feature = "redis"))]
#[doc = include_str!("../../README.md")]
struct Readme;
