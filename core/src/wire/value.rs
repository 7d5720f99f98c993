//! A value in the shared store, behind its cell's prefix.

use std::borrow::Cow;

use super::cell::{CELL_LEN, Cell};
use super::{Malformed, Reader, VERSION, checked, seal};

/// The longest body, before compression.
pub(crate) const MAX_VALUE_BYTES: usize = 16 * 1024 * 1024;
pub(crate) const MAX_TAGS: usize = 64;
pub(crate) const MAX_TAG_BYTES: usize = 256;

const NULL: u8 = 1;
const LZ4: u8 = 2;

/// What made the body's bytes: 1 MessagePack, 2 JSON, 3 pickle, 128 and above the user's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codec(pub(crate) u8);

/// All times in milliseconds of the store's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ValueHeader {
    pub(crate) codec: Codec,
    pub(crate) null: bool,
    pub(crate) created: u64,
    pub(crate) fresh_until: u64,
    pub(crate) stale_until: u64,
    pub(crate) error_until: u64,
    pub(crate) stamp: u64,
    pub(crate) tags: Vec<Box<str>>,
}

/// The whole cell: prefix, header, body, checksum. The prefix is not under the checksum: a lease changes it in place.
pub(crate) fn encode_value(cell: &Cell, header: &ValueHeader, body: &[u8], compress_from: Option<usize>) -> Vec<u8> {
    let packed = compress_from.filter(|least| body.len() >= *least).and_then(|_| compress(body));
    let stored = packed.as_deref().unwrap_or(body);
    let tags: usize = header.tags.iter().map(|tag| 2 + tag.len()).sum();
    let mut bytes = Vec::with_capacity(CELL_LEN + 4 + 40 + tags + 4 + stored.len() + 4);
    bytes.extend_from_slice(&cell.encode());
    let flags = if header.null { NULL } else { 0 } | if packed.is_some() { LZ4 } else { 0 };
    bytes.extend_from_slice(&[VERSION, flags, header.codec.0, header.tags.len() as u8]);
    for number in [header.created, header.fresh_until, header.stale_until, header.error_until, header.stamp] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for tag in &header.tags {
        bytes.extend_from_slice(&(tag.len() as u16).to_le_bytes());
        bytes.extend_from_slice(tag.as_bytes());
    }
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(stored);
    seal(&mut bytes, CELL_LEN);
    bytes
}

/// Header and body of what is behind a cell's prefix.
pub(crate) fn decode_value(bytes: &[u8]) -> Result<(ValueHeader, Cow<'_, [u8]>), Malformed> {
    match bytes.first() {
        None => return Err(Malformed::Length),
        Some(&VERSION) => {}
        Some(&version) => return Err(Malformed::Version(version)),
    }
    let mut reader = Reader(checked(bytes)?);
    let [_, flags, codec, tag_count] = reader.array()?;
    if flags & !(NULL | LZ4) != 0 {
        return Err(Malformed::Unknown("flag"));
    }
    let [created, fresh_until, stale_until, error_until, stamp] =
        [reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?];
    if usize::from(tag_count) > MAX_TAGS {
        return Err(Malformed::TooLong("number of tags"));
    }
    let mut tags = Vec::with_capacity(usize::from(tag_count));
    for _ in 0..tag_count {
        let length = usize::from(reader.u16()?);
        if length > MAX_TAG_BYTES {
            return Err(Malformed::TooLong("tag"));
        }
        tags.push(reader.text(length)?);
    }
    let length = reader.u32()? as usize;
    if length > MAX_VALUE_BYTES {
        return Err(Malformed::TooLong("body"));
    }
    let body = if flags & LZ4 == 0 {
        if reader.0.len() != length {
            return Err(Malformed::Length);
        }
        Cow::Borrowed(reader.0)
    } else {
        Cow::Owned(decompress(reader.0, length)?)
    };
    let null = flags & NULL != 0;
    Ok((ValueHeader { codec: Codec(codec), null, created, fresh_until, stale_until, error_until, stamp, tags }, body))
}

/// The body compressed, if that makes it smaller.
#[cfg(feature = "lz4")]
fn compress(body: &[u8]) -> Option<Vec<u8>> {
    let packed = lz4_flex::block::compress(body);
    (packed.len() < body.len()).then_some(packed)
}

#[cfg(not(feature = "lz4"))]
fn compress(_: &[u8]) -> Option<Vec<u8>> {
    None
}

#[cfg(feature = "lz4")]
fn decompress(packed: &[u8], length: usize) -> Result<Vec<u8>, Malformed> {
    // lz4 packs at most 255 to 1: a length beyond that lies, and is not allocated.
    if length > packed.len().saturating_mul(255) {
        return Err(Malformed::Compression);
    }
    let body = lz4_flex::block::decompress(packed, length).map_err(|_| Malformed::Compression)?;
    if body.len() == length { Ok(body) } else { Err(Malformed::Compression) }
}

#[cfg(not(feature = "lz4"))]
fn decompress(_: &[u8], _: usize) -> Result<Vec<u8>, Malformed> {
    Err(Malformed::Compression)
}
