//! What holds for any bytes that a server hands over. `make fuzz` looks for bytes for which it does not.
//!
//! There is one way to write each thing down, so what decodes encodes to the very bytes it came from. From that it
//! follows that it decodes to the same thing again, and that nothing in it is larger than what was received. Only a
//! compressed body is, and it may come out compressed otherwise.

use std::borrow::Cow;

use crate::l2::cas::Held;
use crate::watermark::MAX_WATERMARKS;
use crate::wire::cell::{CELL_LEN, Cell, Kind, NONE};
use crate::wire::message::{Message, peek_sender};
use crate::wire::seal;
use crate::wire::value::{MAX_TAG_BYTES, MAX_TAGS, MAX_VALUE_BYTES, decode_value, encode_value};

/// A cell of the shared store: its prefix, whatever is behind it.
pub fn cell(bytes: &[u8]) {
    let Ok((cell, behind)) = Cell::decode(bytes) else { return };
    assert!([&cell.encode()[..], behind].concat() == bytes, "encodes otherwise: {cell:?}");
}

/// A value, behind its cell's prefix.
pub fn value(bytes: &[u8]) {
    also_resealed(bytes, 0, |bytes| {
        let Ok((header, body)) = decode_value(bytes) else { return };
        assert!(header.tags.len() <= MAX_TAGS, "{} tags", header.tags.len());
        assert!(header.tags.iter().all(|tag| tag.len() <= MAX_TAG_BYTES), "a long tag: {header:?}");
        assert!(body.len() <= MAX_VALUE_BYTES, "a body of {}", body.len());
        let cell = Cell { kind: Kind::Value, id: 1, token: NONE, until: 0 };
        let plain = encode_value(&cell, &header, &body, None);
        if let Cow::Borrowed(_) = body {
            assert!(plain[CELL_LEN..] == *bytes, "encodes otherwise: {header:?}");
        }
        let packed = encode_value(&cell, &header, &body, Some(0));
        for again in [plain, packed] {
            let again = decode_value(&again[CELL_LEN..]);
            assert!(again.is_ok_and(|again| again == (header.clone(), body.clone())), "decodes otherwise: {header:?}");
        }
    });
}

/// A message on the bus.
pub fn message(bytes: &[u8]) {
    also_resealed(bytes, 0, |bytes| {
        let sender = peek_sender(bytes);
        let Ok(message) = Message::decode(bytes) else { return };
        assert_eq!(sender, Some((message.head.node, message.head.incarnation)));
        assert!(message.encode() == bytes, "encodes otherwise: {message:?}");
    });
}

/// The cell that holds the fleet's watermarks.
pub fn watermarks(bytes: &[u8]) {
    also_resealed(bytes, CELL_LEN, |bytes| {
        let Some(held) = Held::decode(bytes) else { return };
        assert!(held.members.len() <= MAX_WATERMARKS, "{} members", held.members.len());
        // The prefix's lease means nothing here and is not kept.
        assert!(held.encode(held.id)[CELL_LEN..] == bytes[CELL_LEN..], "encodes otherwise: {:?}", held.members);
    });
}

/// Checks `bytes` as they are and, since nobody guesses a checksum, with the one of what is behind `from` put right.
fn also_resealed(bytes: &[u8], from: usize, check: impl Fn(&[u8])) {
    check(bytes);
    let mut bytes = bytes.to_vec();
    bytes.truncate(bytes.len().saturating_sub(4));
    if bytes.len() >= from {
        seal(&mut bytes, from);
        check(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn what_holds_for_any_bytes_holds_for_the_corpus() {
        replay("cell", super::cell);
        replay("value", super::value);
        replay("message", super::message);
        replay("watermarks", super::watermarks);
    }

    fn replay(target: &str, check: fn(&[u8])) {
        let inputs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
        let inputs: Vec<_> = fs::read_dir(inputs).unwrap().map(|input| input.unwrap().path()).collect();
        assert!(!inputs.is_empty(), "{target} has no inputs");
        for input in inputs {
            println!("{}", input.display());
            check(&fs::read(input).unwrap());
        }
    }
}
