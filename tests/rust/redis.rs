//! The cache on real Redis servers: standalone, cluster, Sentinel, TLS.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "redis/bytes.rs"]
mod bytes;
#[path = "redis/fleet.rs"]
mod fleet;
#[path = "redis/late.rs"]
mod late;
#[path = "redis/lives.rs"]
mod lives;
#[path = "redis/rights.rs"]
mod rights;
#[path = "redis/servers.rs"]
mod servers;
#[path = "redis/streams.rs"]
mod streams;
