//! The protocol over any [`Store`]: exact where it can compare and set, less without.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hashbrown::HashMap;

use super::cells::{Acquired, Cells, IDENTITY, Lease, Marks, Stored};
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::Store;
use crate::sync::Mutex;
use crate::watermark::{FLOOR, MAX_WATERMARKS};
use crate::wire::cell::{CELL_LEN, Cell, HOLD, Kind, NONE};
use crate::wire::value::decode_value;
use crate::wire::{checked, seal};

/// How often a step starts over because another node was faster. Each time, somebody else has made progress.
const ATTEMPTS: usize = 32;

/// Watermarks do not expire.
const FOREVER: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

pub(crate) struct StoreCells {
    store: Arc<dyn Store>,
    runtime: Arc<dyn Runtime>,
    watermarks: String,
    /// False once the store has said that it cannot compare and set.
    fenced: AtomicBool,
    /// When leases were granted, for a store that cannot fence: an old load does not fill.
    granted: Mutex<HashMap<u64, u64, foldhash::fast::FixedState>>,
}

impl StoreCells {
    pub(crate) fn new(store: Arc<dyn Store>, runtime: Arc<dyn Runtime>, watermarks: String) -> Self {
        Self { store, runtime, watermarks, fenced: AtomicBool::new(true), granted: Mutex::default() }
    }

    async fn now(&self) -> Result<u64> {
        Ok(self.store.time().await?.unwrap_or_else(|| self.runtime.wall_ms()))
    }

    /// Replaces what begins with `expected`; `None`, and nothing done, where the store cannot compare. It is known for
    /// that from then on.
    async fn compare(&self, key: &str, expected: Option<&[u8]>, value: Bytes, ttl: Duration) -> Result<Option<bool>> {
        if !self.fenced() {
            return Ok(None);
        }
        let replaced = self.store.compare_and_set(key, expected, value, ttl).await?;
        if replaced.is_none() && self.fenced.swap(false, Ordering::Relaxed) {
            tracing::warn!("the store cannot compare and set: fills are not fenced (see Health::fenced)");
        }
        Ok(replaced)
    }

    /// The same, but a store that cannot compare overwrites.
    async fn replace(&self, key: &str, expected: Option<&[u8]>, value: Bytes, ttl: Duration) -> Result<bool> {
        if let Some(replaced) = self.compare(key, expected, value.clone(), ttl).await? {
            return Ok(replaced);
        }
        self.store.set(key, value, ttl).await?;
        Ok(true)
    }
}

/// The bytes of `cell` with the lease part of its prefix replaced.
fn relabel(cell: &Cell, bytes: &[u8], token: u64, until: u64) -> Bytes {
    let mut copy = Vec::with_capacity(bytes.len());
    copy.extend_from_slice(&Cell { token, until, ..*cell }.encode());
    copy.extend_from_slice(bytes.get(CELL_LEN..).unwrap_or_default());
    copy.into()
}

fn lease_cell(token: u64, until: u64) -> Bytes {
    Bytes::copy_from_slice(&Cell { kind: Kind::Lease, id: 0, token, until }.encode())
}

/// A value has an id and a lease has none: any other cell is not ours.
fn readable(bytes: &[u8]) -> Option<Cell> {
    Cell::decode(bytes).ok().map(|(cell, _)| cell).filter(|cell| match cell.kind {
        Kind::Value => cell.id != 0,
        Kind::Lease => cell.id == 0,
        Kind::Watermarks => false,
    })
}

/// A number above `known`: the store's time in microseconds, unless numbers are ahead of it.
fn above(known: u64, now: u64) -> u64 {
    now.saturating_mul(1000).max(known.saturating_add(1))
}

/// How much longer the store has to keep the value in `bytes`: to the end of its last window.
fn remaining(bytes: &[u8], now: u64) -> u64 {
    let end = bytes.get(CELL_LEN..).and_then(|blob| decode_value(blob).ok());
    end.map_or(0, |(header, _)| header.stale_until.max(header.error_until).max(header.fresh_until)).saturating_sub(now)
}

#[async_trait]
impl Cells for StoreCells {
    fn fenced(&self) -> bool {
        // Relaxed: a hint that only ever goes from true to false.
        self.fenced.load(Ordering::Relaxed)
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.store.get(key).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>> {
        self.store.get_many(keys).await
    }

    async fn acquire(&self, key: &str, token: u64, lease: u64, seen: u64, over_hold: bool) -> Result<Acquired> {
        for _ in 0..ATTEMPTS {
            let found = self.store.get(key).await?;
            let now = self.now().await?;
            let until = now.saturating_add(lease);
            let cell = found.as_deref().map(|bytes| (bytes, readable(bytes)));
            let (expected, laid, ttl, over) = match &cell {
                None => (None, lease_cell(token, until), lease * 2, 0),
                // Not ours or damaged: of use to nobody, so it gives way.
                Some((bytes, None)) => (Some(*bytes), lease_cell(token, until), lease * 2, 0),
                Some((bytes, Some(cell))) => {
                    if cell.kind == Kind::Value && cell.id != seen {
                        return Ok(Acquired::Hit(Bytes::copy_from_slice(bytes)));
                    }
                    if cell.token == HOLD && cell.lease_runs(now) && !over_hold {
                        return Ok(Acquired::Held(cell.until - now));
                    }
                    if cell.token != NONE && cell.token != HOLD && cell.lease_runs(now) && self.fenced() {
                        return Ok(Acquired::Wait(cell.until - now));
                    }
                    let ttl = remaining(bytes, now).max(lease * 2);
                    let over = if cell.kind == Kind::Value { cell.id } else { 0 };
                    (Some(&bytes[..CELL_LEN]), relabel(cell, bytes, token, until), ttl, over)
                }
            };
            match self.compare(key, expected, laid, Duration::from_millis(ttl)).await? {
                Some(false) => continue,
                Some(true) => {}
                None => {
                    self.granted.lock().insert(token, self.runtime.now_ms().saturating_add(lease));
                }
            }
            return Ok(Acquired::Won(Lease { token, over }));
        }
        Ok(Acquired::Wait(lease.min(10)))
    }

    async fn fill(&self, key: &str, lease: Lease, cell: Bytes, ttl: Duration) -> Result<bool> {
        if !self.fenced() {
            let until = self.granted.lock().remove(&lease.token).unwrap_or(0);
            if self.runtime.now_ms() >= until {
                return Ok(false);
            }
        }
        self.replace(key, Some(&lease.identity()), cell, ttl).await
    }

    async fn renew(&self, key: &str, lease: Lease, millis: u64) -> Result<bool> {
        if !self.fenced() {
            return Ok(true);
        }
        let Some(bytes) = self.store.get(key).await? else { return Ok(false) };
        let Ok((cell, _)) = Cell::decode(&bytes) else { return Ok(false) };
        if cell.token != lease.token {
            return Ok(false);
        }
        let now = self.now().await?;
        let ttl = remaining(&bytes, now).max(millis * 2);
        let renewed = relabel(&cell, &bytes, lease.token, now.saturating_add(millis));
        let renewed = self.compare(key, Some(&lease.identity()), renewed, Duration::from_millis(ttl)).await?;
        Ok(renewed.unwrap_or(true))
    }

    async fn release(&self, key: &str, lease: Lease, hold: u64) -> Result<()> {
        if !self.fenced() {
            self.granted.lock().remove(&lease.token);
            return Ok(());
        }
        let Some(bytes) = self.store.get(key).await? else { return Ok(()) };
        let Ok((cell, _)) = Cell::decode(&bytes) else { return Ok(()) };
        if cell.token != lease.token {
            return Ok(());
        }
        let now = self.now().await?;
        let ttl = remaining(&bytes, now).max(hold).max(1);
        let released = relabel(&cell, &bytes, if hold == 0 { NONE } else { HOLD }, now.saturating_add(hold));
        self.compare(key, Some(&lease.identity()), released, Duration::from_millis(ttl)).await?;
        Ok(())
    }

    /// Two steps: take the key's lease by force, then fill. If either is carried out after the caller has given up, it
    /// destroys but never brings a value back, so no deadline has to be judged by a clock.
    async fn set(&self, key: &str, cell: Bytes, ttl: Duration, _deadline: u64) -> Result<Stored> {
        if !self.fenced() {
            self.store.set(key, cell, ttl).await?;
            return Ok(Stored::Yes);
        }
        for _ in 0..ATTEMPTS {
            let lease = Lease { token: self.runtime.random() | 2, over: 0 };
            let found = self.store.get(key).await?;
            let until = self.now().await?.saturating_add(1_000);
            let expected = found.as_deref().map(|bytes| &bytes[..bytes.len().min(CELL_LEN)]);
            if !self.replace(key, expected, lease_cell(lease.token, until), Duration::from_secs(1)).await? {
                continue;
            }
            let filled = self.replace(key, Some(&lease.identity()), cell, ttl).await?;
            return Ok(if filled { Stored::Yes } else { Stored::Superseded });
        }
        Err(Error::unavailable(format!("{ATTEMPTS} other writers were faster at one key")))
    }

    async fn remove(&self, keys: &[String]) -> Result<()> {
        for key in keys {
            self.store.delete(key).await?;
        }
        Ok(())
    }

    async fn invalidate(&self, members: &[String], known: u64) -> Result<u64> {
        let (number, _) = self
            .change_watermarks(|marks, now| {
                let number = above(known.max(marks.top()), now);
                marks.born(number);
                members.iter().for_each(|member| marks.raise(member, number));
                Some(number)
            })
            .await?;
        Ok(number.unwrap_or(known))
    }

    async fn poll(&self, since: u64, known: u64) -> Result<Marks> {
        let (_, held) = self
            .change_watermarks(|marks, now| {
                let absent = marks.members.is_empty();
                marks.born(above(known, now));
                absent.then_some(0)
            })
            .await?;
        let top = held.top();
        let members = held.members.into_iter().filter(|(_, number)| *number > since).collect();
        Ok(Marks { now: self.now().await?, top, members })
    }

    async fn restore(&self, members: &[(String, u64)]) -> Result<()> {
        let known = members.iter().map(|(_, number)| *number).max().unwrap_or(0);
        self.change_watermarks(|marks, now| {
            marks.born(above(known, now));
            members.iter().for_each(|(member, number)| marks.raise(member, *number));
            Some(0)
        })
        .await?;
        Ok(())
    }

    async fn close(&self) {
        self.store.close().await;
    }
}

/// The watermarks as one value of the store.
pub(crate) struct Held {
    pub(crate) id: u64,
    pub(crate) members: Vec<(String, u64)>,
}

impl Held {
    fn top(&self) -> u64 {
        self.members.iter().map(|(_, number)| *number).max().unwrap_or(0)
    }

    /// Watermarks that were lost or never there: everything older is dead.
    fn born(&mut self, number: u64) {
        if self.members.is_empty() {
            self.raise(FLOOR, number);
        }
    }

    fn raise(&mut self, member: &str, number: u64) {
        match self.members.iter_mut().find(|(known, _)| known == member) {
            Some((_, held)) => *held = (*held).max(number),
            None => self.members.push((member.to_owned(), number)),
        }
        while self.members.len() > MAX_WATERMARKS {
            let lowest = self.members.iter().enumerate().filter(|(_, (member, _))| member != FLOOR);
            let Some(index) = lowest.min_by_key(|(_, (_, number))| *number).map(|(index, _)| index) else { return };
            let (_, number) = self.members.swap_remove(index);
            self.raise(FLOOR, number);
        }
    }

    /// `None` also for more members than are ever written: [`Self::raise`] merges a few, not a flood.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (cell, sealed) = Cell::decode(bytes).ok().filter(|(cell, _)| cell.kind == Kind::Watermarks)?;
        let mut rest = checked(sealed).ok()?;
        let mut members = Vec::new();
        while !rest.is_empty() {
            if members.len() == MAX_WATERMARKS {
                return None;
            }
            let (length, tail) = rest.split_first_chunk::<2>()?;
            let (number, tail) = tail.split_first_chunk::<8>()?;
            let (member, tail) = tail.split_at_checked(u16::from_le_bytes(*length).into())?;
            members.push((std::str::from_utf8(member).ok()?.to_owned(), u64::from_le_bytes(*number)));
            rest = tail;
        }
        Some(Self { id: cell.id, members })
    }

    pub(crate) fn encode(&self, id: u64) -> Bytes {
        let mut bytes = Cell { kind: Kind::Watermarks, id, token: NONE, until: 0 }.encode().to_vec();
        for (member, number) in &self.members {
            bytes.extend_from_slice(&(member.len() as u16).to_le_bytes());
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(member.as_bytes());
        }
        seal(&mut bytes, CELL_LEN);
        bytes.into()
    }
}

impl StoreCells {
    /// One atomic change of the watermarks; `None` from `change` leaves them as they are.
    async fn change_watermarks(
        &self,
        mut change: impl FnMut(&mut Held, u64) -> Option<u64> + Send,
    ) -> Result<(Option<u64>, Held)> {
        for _ in 0..ATTEMPTS {
            let found = self.store.get(&self.watermarks).await?;
            // Damaged watermarks are lost ones: the floor rises.
            let mut held = found.as_deref().and_then(Held::decode).unwrap_or(Held { id: 0, members: Vec::new() });
            let now = self.now().await?;
            let Some(answer) = change(&mut held, now) else { return Ok((None, held)) };
            let expected = found.as_deref().map(|bytes| if held.id == 0 { bytes } else { &bytes[..IDENTITY] });
            let encoded = held.encode(self.runtime.random() | 1);
            if self.replace(&self.watermarks, expected, encoded, FOREVER).await? {
                return Ok((Some(answer), held));
            }
        }
        Err(Error::unavailable(format!("{ATTEMPTS} other writers were faster at the watermarks")))
    }
}
