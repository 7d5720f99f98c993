//! What is under one key of the shared store: a value, a lease, or both.

use super::{Malformed, Reader, VERSION};

/// The length of the prefix that every cell begins with.
pub(crate) const CELL_LEN: usize = 28;

/// The token where nobody holds the lease.
pub(crate) const NONE: u64 = 0;
/// The token that stands for "nobody shall load yet".
pub(crate) const HOLD: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Value,
    Lease,
    Watermarks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) kind: Kind,
    /// Random for each value; kept while a lease lies over it.
    pub(crate) id: u64,
    /// Random for each attempt to load, [`NONE`] or [`HOLD`].
    pub(crate) token: u64,
    /// When the lease ends, in milliseconds of the store's clock.
    pub(crate) until: u64,
}

/// No lease and no hold lasts longer, in milliseconds: an end further ahead is damaged, and nobody waits for it.
const LONGEST_LEASE: u64 = 60_000;

impl Cell {
    /// Whether the lease, or the hold, has not run out.
    pub(crate) fn lease_runs(&self, now: u64) -> bool {
        self.until > now && self.until - now <= LONGEST_LEASE
    }

    pub(crate) fn encode(&self) -> [u8; CELL_LEN] {
        let kind = match self.kind {
            Kind::Value => b'V',
            Kind::Lease => b'L',
            Kind::Watermarks => b'W',
        };
        let mut bytes = [0; CELL_LEN];
        bytes[..4].copy_from_slice(&[b'F', b'C', VERSION, kind]);
        bytes[4..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.token.to_le_bytes());
        bytes[20..].copy_from_slice(&self.until.to_le_bytes());
        bytes
    }

    /// The cell, and what is behind its prefix.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut reader = Reader(bytes);
        if reader.array()? != *b"FC" {
            return Err(Malformed::Foreign);
        }
        let version = reader.u8()?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let kind = match reader.u8()? {
            b'V' => Kind::Value,
            b'L' => Kind::Lease,
            b'W' => Kind::Watermarks,
            _ => return Err(Malformed::Unknown("kind of cell")),
        };
        let cell = Self { kind, id: reader.u64()?, token: reader.u64()?, until: reader.u64()? };
        Ok((cell, reader.0))
    }
}
