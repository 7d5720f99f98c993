//! What other processes see: keys, cells and values in the shared store, messages on the bus. Version 1.
//!
//! Integers are little-endian. Every length is checked before anything is allocated, and bytes that are not ours are an
//! error, never a value and never a panic. `tests/vectors` holds the format still.
//!
//! | what | bytes |
//! | --- | --- |
//! | store key | `{prefix}:{scope}:{key}`; in prefix and scope `%` and `:` are escaped as `%25` and `%3A`, and so is a leading one of the key; a prefix beyond 128 bytes and a scope beyond 256, escaped, is `%x` and the hexadecimal SHA-256 of itself; beyond 512 bytes in all, the key is `:` and that of itself |
//! | cell | `FC`, version 1, kind (`V` value, `L` lease, `W` watermarks), id u64, lease token u64, lease end u64 (ms); behind kind `V` a value |
//! | value | version 1, flags (1 null, 2 lz4), codec, tag count, created u64, fresh, stale and error end u64 each (ms of the store's clock), stamp u64, tags (u16 length, text), body length u32 before compression, body, CRC-32 of all that |
//! | watermarks | behind kind `W`, for each of at most 10,000 members: text length u16, number u64, text; CRC-32 of all that |
//! | message | `FCM`, version 1, kind (`h` hello, `b` heartbeat, `g` goodbye, `i` batch), node u64, incarnation u64, sequence u64, heartbeat u32 (ms), sent u64 (ms of the sender's clock), items, CRC-32 of all that |
//! | item | tag (1 key, 2 key still in L2, 3 clear all, 4 clear scope, 5 scope, 6 tag), then texts (u32 length, text) and a number u64, 0 for none |

pub(crate) mod cell;
pub(crate) mod key;
pub(crate) mod message;
#[cfg(test)]
mod tests;
pub(crate) mod value;

use std::fmt;

/// The version this crate writes and the only one it reads.
const VERSION: u8 = 1;

/// Why bytes are none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// They do not begin as ours do.
    Foreign,
    /// They are of another version.
    Version(u8),
    /// They end too early, or something is behind their end.
    Length,
    /// Something in them is larger than allowed.
    TooLong(&'static str),
    /// A code that this version does not know.
    Unknown(&'static str),
    /// Text that is not UTF-8.
    Text,
    /// They were damaged.
    Checksum,
    /// The compressed body does not decompress to what it says, or this build has no decompressor.
    Compression,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("not ours"),
            Self::Version(version) => write!(f, "version {version}, which this release does not read"),
            Self::Length => f.write_str("wrong length"),
            Self::TooLong(what) => write!(f, "{what} larger than allowed"),
            Self::Unknown(what) => write!(f, "unknown {what}"),
            Self::Text => f.write_str("text that is not UTF-8"),
            Self::Checksum => f.write_str("damaged (checksum)"),
            Self::Compression => f.write_str("compressed in a way this build cannot undo"),
        }
    }
}

/// Takes fields off the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed::Length)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed::Length)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, length: usize) -> Result<Box<str>, Malformed> {
        std::str::from_utf8(self.bytes(length)?).map(Into::into).map_err(|_| Malformed::Text)
    }
}

/// Splits the CRC-32 off the end and checks it.
pub(crate) fn checked(bytes: &[u8]) -> Result<&[u8], Malformed> {
    let (content, sum) = bytes.split_last_chunk::<4>().ok_or(Malformed::Length)?;
    if crc32fast::hash(content) == u32::from_le_bytes(*sum) { Ok(content) } else { Err(Malformed::Checksum) }
}

/// Puts the CRC-32 of what is behind `from` at the end.
pub(crate) fn seal(bytes: &mut Vec<u8>, from: usize) {
    let sum = crc32fast::hash(&bytes[from..]);
    bytes.extend_from_slice(&sum.to_le_bytes());
}
