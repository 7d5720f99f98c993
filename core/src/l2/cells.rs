//! The steps of the coherence protocol on the shared store: cells, leases, watermarks.
//!
//! Bytes enter a cell as a *fill* only by comparison with a random token that the store still holds; everything else
//! only destroys. So a late command of any kind is harmless, and no clocks of nodes are compared.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::bus::StreamAt;
use crate::doubts::Doubt;
use crate::error::Result;
use crate::wire::cell::{CELL_LEN, Cell, Kind};

/// The right to load and fill one key, as the store granted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Random for each attempt, so that no earlier attempt's fill can pass for this one's.
    pub(crate) token: u64,
    /// The id of the stale value the lease was laid over; 0 where there was none.
    pub(crate) over: u64,
}

/// How much of a cell tells it and its lease from others: everything before the lease's end, so a renewal does not matter.
pub(crate) const IDENTITY: usize = CELL_LEN - 8;

impl Lease {
    /// What the cell begins with as long as the lease lies on it.
    pub(crate) fn identity(&self) -> [u8; IDENTITY] {
        let kind = if self.over == 0 { Kind::Lease } else { Kind::Value };
        let cell = Cell { kind, id: self.over, token: self.token, until: 0 }.encode();
        let mut identity = [0; IDENTITY];
        identity.copy_from_slice(&cell[..IDENTITY]);
        identity
    }
}

/// The answer to a request for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Acquired {
    Won(Lease),
    /// Somebody has filled the key: its cell.
    Hit(Bytes),
    /// Another node loads, for at most so many milliseconds more.
    Wait(u64),
    /// A load failed a moment ago; the fleet holds off for so many milliseconds more.
    Held(u64),
}

/// What became of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Yes,
    /// A later operation on the key came in between: the value was replaced or removed.
    Superseded,
    /// It reached the store when its caller had given up, or nearly, and was refused.
    #[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "no other store judges by its clock"))]
    TooLate,
}

/// The fleet's watermarks as the store has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    /// The store's clock, milliseconds since 1970.
    pub(crate) now: u64,
    pub(crate) top: u64,
    pub(crate) members: Vec<(String, u64)>,
}

/// The protocol's steps, each atomic in the store. Keys are complete store keys; durations of leases are milliseconds.
#[async_trait]
pub(crate) trait Cells: Send + Sync {
    /// Whether fills are fenced: without, a stale fill can live for a lease time.
    fn fenced(&self) -> bool;

    async fn get(&self, key: &str) -> Result<Option<Bytes>>;

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>>;

    /// Asks for the lease of a key whose value the caller saw as `seen` (0 for none). `over_hold`: also while the fleet
    /// holds off after a failure.
    async fn acquire(&self, key: &str, token: u64, lease: u64, seen: u64, over_hold: bool) -> Result<Acquired>;

    /// Puts `cell` in place if the key still carries the lease. The lease's time is not asked: a token that is still
    /// there means that nothing happened to the key.
    async fn fill(&self, key: &str, lease: Lease, cell: Bytes, ttl: Duration) -> Result<bool>;

    /// Extends the lease; false where it is lost.
    async fn renew(&self, key: &str, lease: Lease, millis: u64) -> Result<bool>;

    /// Gives the lease back; with `hold`, nobody shall load for so many milliseconds.
    async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()>;

    /// Puts `cell` in place and destroys any lease, unless `deadline` (the store's time) has passed: a set must not
    /// outlive its caller.
    async fn set(&self, key: &str, cell: Bytes, ttl: Duration, deadline: u64) -> Result<Stored>;

    /// Removes the keys, their leases with them.
    async fn remove(&self, keys: &[String]) -> Result<()>;

    /// Issues one number, above `known` and everything issued before, and sets the members to it.
    async fn invalidate(&self, members: &[String], known: u64) -> Result<u64>;

    /// The members above `since`. Where the watermarks are gone, everything older than now is dead.
    async fn poll(&self, since: u64, known: u64) -> Result<Marks>;

    /// Writes back members that the store has lost.
    async fn restore(&self, members: &[(String, u64)]) -> Result<()>;

    /// In how many parts the keys fail apart from each other, and which one a key is in.
    fn parts(&self) -> usize {
        1
    }

    fn part(&self, _key: &str) -> usize {
        0
    }

    /// Whether [`life`](Self::life) ever changes.
    fn may_go_back(&self) -> bool {
        false
    }

    /// The store's life; a new one begins where it may have gone back in time.
    fn life(&self) -> Doubt {
        Doubt::default()
    }

    /// Whether the engine has dealt with everything up to the current life. Until then what reads or fills fails.
    fn is_settled(&self) -> bool {
        true
    }

    fn settle(&self, _life: Doubt) {}

    /// At the beginning of a life: for how long what was written before it may be lost, at most; `None` where that is
    /// not known. Asked before the first [`poll`](Self::poll) of the life, which leaves word for the next.
    async fn lost(&self) -> Result<Option<Duration>> {
        Ok(Some(Duration::ZERO))
    }

    /// Whether the stream is on the same server, so that a removal and its message can be one step.
    fn carries(&self, _stream: &StreamAt) -> bool {
        false
    }

    /// Removes the keys and appends the message, in one atomic step. Only where [`carries`](Self::carries) says so.
    async fn remove_and_append(&self, keys: &[String], _stream: &StreamAt, _message: Bytes) -> Result<()> {
        self.remove(keys).await
    }

    async fn close(&self);
}
