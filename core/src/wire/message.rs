//! Messages on the bus.

use super::{Malformed, Reader, VERSION, checked, seal};

/// Who sent a message, and where it stands in what they sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) node: u64,
    pub(crate) incarnation: u64,
    /// The batch's own number; in other messages the number of the last batch.
    pub(crate) sequence: u64,
    /// How often the sender speaks at least.
    pub(crate) heartbeat_ms: u32,
    /// On the sender's clock: means something to the sender alone.
    pub(crate) sent_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) head: Head,
    pub(crate) body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    Hello,
    Heartbeat,
    Goodbye,
    Batch(Vec<Item>),
}

/// One invalidation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Item {
    Key {
        scope: Box<str>,
        key: Box<str>,
        /// The key may not be gone from the shared store yet.
        l2_pending: bool,
    },
    /// Everything in memory; with a scope, of that scope.
    Clear { scope: Option<Box<str>> },
    /// Everything of a scope made before the number; without one, the number is not known yet.
    Scope { scope: Box<str>, number: Option<u64> },
    /// Everything of a tag made before the number.
    Tag { scope: Box<str>, tag: Box<str>, number: Option<u64> },
}

const MAGIC: [u8; 3] = *b"FCM";
const HEAD_LEN: usize = 41;
const CHECKSUM_LEN: usize = 4;
const MAX_ITEMS: usize = 65_536;
const MAX_TEXT: usize = 64 * 1024;

impl Head {
    fn write(&self, kind: u8, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[VERSION, kind]);
        bytes.extend_from_slice(&self.node.to_le_bytes());
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.sequence.to_le_bytes());
        bytes.extend_from_slice(&self.heartbeat_ms.to_le_bytes());
        bytes.extend_from_slice(&self.sent_ms.to_le_bytes());
    }
}

/// The sender of a message that may be of a newer version: this much of the head stays where it is.
pub(crate) fn peek_sender(bytes: &[u8]) -> Option<(u64, u64)> {
    let mut reader = Reader(bytes);
    if reader.array().ok()? != MAGIC {
        return None;
    }
    reader.bytes(2).ok()?;
    Some((reader.u64().ok()?, reader.u64().ok()?))
}

impl Message {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let kind = match &self.body {
            Body::Hello => b'h',
            Body::Heartbeat => b'b',
            Body::Goodbye => b'g',
            Body::Batch(items) => {
                let mut batch = BatchEncoder::new(usize::MAX, self.head);
                items.iter().for_each(|item| {
                    batch.try_push(item);
                });
                return batch.finish();
            }
        };
        let mut bytes = Vec::with_capacity(HEAD_LEN + CHECKSUM_LEN);
        self.head.write(kind, &mut bytes);
        seal(&mut bytes, 0);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        if reader.array()? != MAGIC {
            return Err(Malformed::Foreign);
        }
        let version = reader.u8()?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let mut reader = Reader(checked(bytes)?);
        reader.bytes(MAGIC.len() + 1)?;
        let kind = reader.u8()?;
        let head = Head {
            node: reader.u64()?,
            incarnation: reader.u64()?,
            sequence: reader.u64()?,
            heartbeat_ms: reader.u32()?,
            sent_ms: reader.u64()?,
        };
        let body = match kind {
            b'h' => Body::Hello,
            b'b' => Body::Heartbeat,
            b'g' => Body::Goodbye,
            b'i' => {
                let mut items = Vec::new();
                while !reader.0.is_empty() {
                    if items.len() == MAX_ITEMS {
                        return Err(Malformed::TooLong("number of items"));
                    }
                    items.push(read_item(&mut reader)?);
                }
                Body::Batch(items)
            }
            _ => return Err(Malformed::Unknown("kind of message")),
        };
        if reader.0.is_empty() { Ok(Self { head, body }) } else { Err(Malformed::Length) }
    }
}

fn read_item(reader: &mut Reader<'_>) -> Result<Item, Malformed> {
    let kind = reader.u8()?;
    let mut text = || {
        let length = reader.u32()? as usize;
        if length > MAX_TEXT { Err(Malformed::TooLong("text")) } else { reader.text(length) }
    };
    Ok(match kind {
        1 | 2 => Item::Key { scope: text()?, key: text()?, l2_pending: kind == 2 },
        3 => Item::Clear { scope: None },
        4 => Item::Clear { scope: Some(text()?) },
        5 => Item::Scope { scope: text()?, number: number(reader)? },
        6 => Item::Tag { scope: text()?, tag: text()?, number: number(reader)? },
        _ => return Err(Malformed::Unknown("kind of item")),
    })
}

/// Numbers are issued from 1.
fn number(reader: &mut Reader<'_>) -> Result<Option<u64>, Malformed> {
    reader.u64().map(|number| (number > 0).then_some(number))
}

impl Item {
    pub(crate) fn scope(&self) -> Option<&str> {
        match self {
            Self::Key { scope, .. } | Self::Scope { scope, .. } | Self::Tag { scope, .. } => Some(scope),
            Self::Clear { scope } => scope.as_deref(),
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        let (kind, texts, number): (u8, [Option<&str>; 2], Option<Option<u64>>) = match self {
            Self::Key { scope, key, l2_pending } => (1 + u8::from(*l2_pending), [Some(scope), Some(key)], None),
            Self::Clear { scope: None } => (3, [None, None], None),
            Self::Clear { scope: Some(scope) } => (4, [Some(scope), None], None),
            Self::Scope { scope, number } => (5, [Some(scope), None], Some(*number)),
            Self::Tag { scope, tag, number } => (6, [Some(scope), Some(tag)], Some(*number)),
        };
        bytes.push(kind);
        for text in texts.into_iter().flatten() {
            bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        if let Some(number) = number {
            bytes.extend_from_slice(&number.unwrap_or(0).to_le_bytes());
        }
    }
}

/// Fills one batch up to a carrier's limit.
pub(crate) struct BatchEncoder {
    bytes: Vec<u8>,
    limit: usize,
    items: usize,
}

impl BatchEncoder {
    pub(crate) fn new(limit: usize, head: Head) -> Self {
        let mut bytes = Vec::with_capacity(256);
        head.write(b'i', &mut bytes);
        Self { bytes, limit, items: 0 }
    }

    /// Adds an item, unless the message would become too long.
    pub(crate) fn try_push(&mut self, item: &Item) -> bool {
        let before = self.bytes.len();
        item.write(&mut self.bytes);
        if self.bytes.len().saturating_add(CHECKSUM_LEN) > self.limit || self.items == MAX_ITEMS {
            self.bytes.truncate(before);
            return false;
        }
        self.items += 1;
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items == 0
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        seal(&mut self.bytes, 0);
        self.bytes
    }
}
