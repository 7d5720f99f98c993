//! What holds for every key, cell, value and message, and for bytes that are none of ours; and the golden vectors,
//! which hold version 1 still for every language.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell as Slot;
use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

use super::cell::{CELL_LEN, Cell, HOLD, Kind, NONE};
use super::key::{store_key, system_key};
use super::message::{BatchEncoder, Body, Head, Item, Message, peek_sender};
use super::value::{Codec, MAX_VALUE_BYTES, ValueHeader, decode_value, encode_value};
use super::{Malformed, seal};

const CELL: Cell = Cell { kind: Kind::Value, id: 0x0102_0304_0506_0708, token: NONE, until: 0 };
const HEAD: Head = Head {
    node: 0x0102_0304_0506_0708,
    incarnation: 0x1112_1314_1516_1718,
    sequence: 57,
    heartbeat_ms: 3_000,
    sent_ms: 1_790_000_000_123,
};

fn header() -> ValueHeader {
    ValueHeader {
        codec: Codec(1),
        null: false,
        created: 1_790_000_000_000,
        fresh_until: 1_790_000_060_000,
        stale_until: 1_790_000_120_000,
        error_until: 1_790_000_600_000,
        stamp: 1_790_000_000_000_123,
        tags: Vec::new(),
    }
}

fn sealed(content: &[u8]) -> Vec<u8> {
    let mut bytes = content.to_vec();
    seal(&mut bytes, 0);
    bytes
}

/// A value's blob up to its tags, with a tag count, and then `tail`.
fn blob(flags: u8, tags: u8, tail: &[u8]) -> Vec<u8> {
    sealed(&[&[1, flags, 1, tags][..], &[0; 40], tail].concat())
}

fn batch(items: &[u8]) -> Vec<u8> {
    sealed(&[b"FCM\x01i", &[0; 36][..], items].concat())
}

// Strategies.

fn name() -> impl Strategy<Value = Box<str>> {
    prop_oneof![6 => "[%:!ax235é]{0,12}", 1 => "[a%:]{100,300}", 1 => "\\PC{0,700}"].prop_map(String::into_boxed_str)
}

fn tag() -> impl Strategy<Value = Box<str>> {
    prop_oneof!["[ab]{0,2}", "\\PC{0,60}", "a{200,256}"].prop_map(String::into_boxed_str)
}

fn cell() -> impl Strategy<Value = Cell> {
    let kind = prop_oneof![Just(Kind::Value), Just(Kind::Lease), Just(Kind::Watermarks)];
    (kind, any::<[u64; 3]>()).prop_map(|(kind, [id, token, until])| Cell { kind, id, token, until })
}

fn value() -> impl Strategy<Value = (ValueHeader, Vec<u8>)> {
    let body = prop_oneof![
        vec(any::<u8>(), 0..2_000),
        vec(0..2_u8, 0..5_000),
        (any::<u8>(), 0..70_000_usize).prop_map(|(byte, times)| vec![byte; times]),
    ];
    (any::<(u8, bool, [u64; 5])>(), vec(tag(), 0..=64), body).prop_map(|((codec, null, times), tags, body)| {
        let [created, fresh_until, stale_until, error_until, stamp] = times;
        (ValueHeader { codec: Codec(codec), null, created, fresh_until, stale_until, error_until, stamp, tags }, body)
    })
}

fn head() -> impl Strategy<Value = Head> {
    any::<([u64; 4], u32)>().prop_map(|([node, incarnation, sequence, sent_ms], heartbeat_ms)| Head {
        node,
        incarnation,
        sequence,
        heartbeat_ms,
        sent_ms,
    })
}

fn item() -> impl Strategy<Value = Item> {
    let number = || option::of(1..=u64::MAX);
    prop_oneof![
        (tag(), name(), any::<bool>()).prop_map(|(scope, key, l2_pending)| Item::Key { scope, key, l2_pending }),
        option::of(tag()).prop_map(|scope| Item::Clear { scope }),
        (tag(), number()).prop_map(|(scope, number)| Item::Scope { scope, number }),
        (tag(), tag(), number()).prop_map(|(scope, tag, number)| Item::Tag { scope, tag, number }),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let body = prop_oneof![
        Just(Body::Hello),
        Just(Body::Heartbeat),
        Just(Body::Goodbye),
        vec(item(), 0..20).prop_map(Body::Batch),
    ];
    (head(), body).prop_map(|(head, body)| Message { head, body })
}

// Keys.

/// The inverse of [`store_key`] up to what was hashed: each text as it was, or as `#` and its hash.
fn parse(key: &str) -> Option<[String; 3]> {
    let unescape = |text: &str| text.replace("%3A", ":").replace("%25", "%");
    let name = |text: &str| text.strip_prefix("%x").map_or_else(|| unescape(text), |hash| format!("#{hash}"));
    let (prefix, rest) = key.split_once(':')?;
    let (scope, key) = rest.split_once(':')?;
    let key = match (key.strip_prefix(':'), key.split_at_checked(3)) {
        (Some(hash), _) => format!("#{hash}"),
        (None, Some((first @ ("%25" | "%3A"), rest))) => unescape(first) + rest,
        _ => key.to_owned(),
    };
    Some([name(prefix), name(scope), key])
}

proptest! {
    #[test]
    fn a_store_key_is_bounded_and_tells_what_it_is_of(prefix in name(), scope in name(), key in name()) {
        let store_key = store_key(&prefix, &scope, &key);
        prop_assert!(store_key.len() <= 512);
        for (parsed, text) in parse(&store_key).unwrap().iter().zip([prefix, scope, key]) {
            let hashed = parsed.strip_prefix('#').is_some_and(|hash| hash == hex(&Sha256::digest(&*text)));
            prop_assert!(hashed || **parsed == *text, "{parsed} is not of {text}");
        }
    }

    #[test]
    fn a_system_key_has_one_colon_where_a_store_key_has_two(prefix in name(), scope in name(), key in name()) {
        prop_assert_eq!(system_key(&prefix, &key).matches(':').count(), 1);
        prop_assert!(store_key(&prefix, &scope, &key).matches(':').count() >= 2);
    }
}

#[test]
fn short_awkward_names_make_different_keys() {
    let alphabet = ["%", ":", "!", "2", "x"];
    let mut names: Vec<_> = alphabet.iter().flat_map(|a| alphabet.map(|b| format!("{a}{b}"))).collect();
    names.extend(alphabet.map(str::to_owned));
    names.push(String::new());
    let mut keys = HashSet::new();
    for prefix in &names {
        for second in &names {
            assert!(keys.insert(system_key(prefix, second)));
            for third in &names {
                assert!(keys.insert(store_key(prefix, second, third)), "{prefix:?} {second:?} {third:?}");
            }
        }
    }
}

#[test]
fn no_written_name_passes_for_a_hashed_one() {
    let long = "n".repeat(600);
    let of_key = store_key("app", "s", &long);
    let tail = of_key.strip_prefix("app:s:").unwrap();
    assert_eq!(tail.len(), 65);
    assert_ne!(store_key("app", "s", tail), of_key);
    assert_ne!(store_key("app", "s:", &tail[1..]), of_key);

    let of_scope = store_key("app", &long, "k");
    let scope = of_scope.strip_prefix("app:").unwrap().strip_suffix(":k").unwrap();
    assert_eq!(scope.len(), 66);
    assert_ne!(store_key("app", scope, "k"), of_scope);
}

#[test]
fn the_largest_names_a_cache_takes_are_written_and_escapes_do_not_break_the_bound() {
    let (prefix, scope) = ("p".repeat(128), "s".repeat(256));
    assert_eq!(store_key(&prefix, &scope, "k"), format!("{prefix}:{scope}:k"));
    let escapes = store_key(&":".repeat(128), &"%".repeat(256), &":".repeat(65_536));
    assert_eq!(escapes.len(), 66 + 1 + 66 + 1 + 65);
    assert_eq!(store_key("p", "s", &"k".repeat(508)).len(), 512);
    assert_eq!(store_key("p", "s", &":".repeat(508)).len(), 69, "the escape would make it longer than 512");
}

// Round trips.

proptest! {
    #[test]
    fn a_cell_comes_back(cell in cell(), behind in vec(any::<u8>(), 0..40)) {
        let bytes = [&cell.encode()[..], &behind].concat();
        prop_assert_eq!(Cell::decode(&bytes), Ok((cell, &behind[..])));
        for length in 0..CELL_LEN {
            prop_assert_eq!(Cell::decode(&bytes[..length]), Err(Malformed::Length));
        }
    }

    #[test]
    fn a_value_comes_back(cell in cell(), (header, body) in value(), compress_from in option::of(0..5_000_usize)) {
        let bytes = encode_value(&cell, &header, &body, compress_from);
        let (read, blob) = Cell::decode(&bytes).unwrap();
        prop_assert_eq!(read, cell);
        prop_assert_eq!(decode_value(blob), Ok((header, body.into())));
    }

    #[test]
    fn a_message_comes_back(message in message()) {
        let bytes = message.encode();
        prop_assert_eq!(peek_sender(&bytes), Some((message.head.node, message.head.incarnation)));
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    #[test]
    fn a_batch_keeps_its_limit_and_what_did_not_fit_goes_into_the_next(
        head in head(), items in vec(item(), 0..40), limit in 1_024..4_000_usize,
    ) {
        let mut waiting = items.iter().peekable();
        let mut carried = Vec::new();
        while waiting.peek().is_some() {
            let mut batch = BatchEncoder::new(limit, head);
            while waiting.next_if(|item| batch.try_push(item)).is_some() {}
            let oversized = batch.is_empty().then(|| waiting.next()).flatten();
            let bytes = batch.finish();
            prop_assert!(bytes.len() <= limit);
            let Ok(Message { head: read, body: Body::Batch(items) }) = Message::decode(&bytes) else { panic!() };
            prop_assert_eq!(read, head);
            if let Some(item) = oversized {
                prop_assert!(BatchEncoder::new(usize::MAX, head).try_push(item));
                carried.push(item.clone());
            }
            carried.extend(items);
        }
        prop_assert_eq!(carried, items);
    }
}

#[test]
fn a_batch_ends_at_the_most_items_a_message_may_have() {
    let mut batch = BatchEncoder::new(usize::MAX, HEAD);
    let taken = std::iter::repeat_with(|| batch.try_push(&Item::Clear { scope: None })).take_while(|taken| *taken);
    assert_eq!(taken.count(), 65_536);
    assert!(Message::decode(&batch.finish()).is_ok());
}

#[test]
fn a_body_is_compressed_only_where_that_helps() {
    let length = |body: &[u8], from| encode_value(&CELL, &header(), body, from).len();
    let zeros = [0; 4_096];
    let noise: Vec<u8> = (0..128_u32).flat_map(|n| Sha256::digest(n.to_le_bytes())).collect();
    assert_eq!(length(&zeros, Some(4_096)) < 200, cfg!(feature = "lz4"));
    assert_eq!(length(&zeros, Some(4_097)), length(&zeros, None));
    assert_eq!(length(&noise, Some(0)), length(&noise, None));
    let largest = vec![7; MAX_VALUE_BYTES];
    let bytes = encode_value(&CELL, &header(), &largest, Some(0));
    assert_eq!(decode_value(&bytes[CELL_LEN..]).unwrap().1, largest);
}

#[test]
fn of_a_message_of_another_version_the_sender_is_still_told() {
    let mut newer = Message { head: HEAD, body: Body::Hello }.encode();
    newer[3] = 2;
    newer.truncate(21);
    assert_eq!(Message::decode(&newer), Err(Malformed::Version(2)));
    assert_eq!(peek_sender(&newer), Some((HEAD.node, HEAD.incarnation)));
    assert_eq!(peek_sender(&newer[..20]), None);
    assert_eq!(peek_sender(&CELL.encode()), None);
}

// Damage.

fn every_cut_and_flip(bytes: &[u8], is_refused: impl Fn(&[u8]) -> bool) {
    for length in 0..bytes.len() {
        assert!(is_refused(&bytes[..length]), "cut to {length}");
    }
    let mut flipped = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(is_refused(&flipped), "bit {bit}");
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn every_cut_and_every_flipped_bit_is_seen((mut header, mut body) in value(), mut message in message()) {
        header.tags.truncate(3);
        body.truncate(200);
        for compress_from in [None, Some(0)] {
            let bytes = encode_value(&CELL, &header, &body, compress_from);
            every_cut_and_flip(&bytes[CELL_LEN..], |bytes| decode_value(bytes).is_err());
        }
        if let Body::Batch(items) = &mut message.body {
            items.truncate(3);
        }
        every_cut_and_flip(&message.encode(), |bytes| Message::decode(bytes).is_err());
    }
}

/// `bytes` with some replaced and some cut, under a checksum that hides it.
fn tampered(bytes: &[u8], edits: &[(Index, u8)], cut: Index) -> Vec<u8> {
    let mut content = bytes[..bytes.len() - 4].to_vec();
    for (at, byte) in edits {
        let at = at.index(content.len());
        content[at] = *byte;
    }
    content.truncate(content.len() - cut.index(content.len()) / 2);
    sealed(&content)
}

proptest! {
    #[test]
    fn other_bytes_are_refused(bytes in vec(any::<u8>(), 0..300)) {
        let _ = (Cell::decode(&bytes), peek_sender(&bytes));
        prop_assert!(decode_value(&bytes).is_err());
        prop_assert!(Message::decode(&bytes).is_err());
        let _ = decode_value(&sealed(&[&[1], &bytes[..]].concat()));
        let _ = Message::decode(&sealed(&[b"FCM\x01i", &bytes[..]].concat()));
        let _ = Message::decode(&batch(&bytes));
    }

    #[test]
    fn what_passes_the_checksum_is_still_checked(
        (header, body) in value(), message in message(), edits in vec(any::<(Index, u8)>(), 1..4), cut in any::<Index>(),
    ) {
        let bytes = encode_value(&CELL, &header, &body, Some(0));
        if let Ok((_, body)) = decode_value(&tampered(&bytes[CELL_LEN..], &edits, cut)) {
            prop_assert!(body.len() <= MAX_VALUE_BYTES);
        }
        if let Ok(read) = Message::decode(&tampered(&message.encode(), &edits, cut)) {
            prop_assert_eq!(Message::decode(&read.encode()), Ok(read));
        }
    }
}

/// Notes the largest allocation of each thread.
struct Noting;

thread_local! {
    static LARGEST: Slot<usize> = const { Slot::new(0) };
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

#[allow(unsafe_code, reason = "an allocator cannot be written without")]
// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[test]
fn lengths_that_lie_are_refused_before_anything_is_allocated_for_them() {
    let (most, sixteen_mib) = (u32::MAX.to_le_bytes(), (16_u32 << 20).to_le_bytes());
    let values = [
        (blob(0, 0, &most), Malformed::TooLong("body")),
        (blob(0, 0, &sixteen_mib), Malformed::Length),
        (blob(0, 255, &[0; 600]), Malformed::TooLong("number of tags")),
        (blob(0, 64, &[0; 4]), Malformed::Length),
        (blob(0, 1, &[0xff, 0xff, b't']), Malformed::TooLong("tag")),
        (blob(2, 0, &most), Malformed::TooLong("body")),
        (blob(2, 0, &[&sixteen_mib[..], &[0x1f, 0, 1, 0, 255]].concat()), Malformed::Compression),
        (blob(2, 0, &[0, 0, 0, 0]), Malformed::Compression),
    ];
    let messages = [
        (batch(&[&[1][..], &most].concat()), Malformed::TooLong("text")),
        (batch(&[1, 0, 0, 1, 0]), Malformed::Length),
        (batch(&[4, 1, 0, 1, 0]), Malformed::TooLong("text")),
        (batch(&vec![3; 65_537]), Malformed::TooLong("number of items")),
    ];
    LARGEST.set(0);
    for (bytes, error) in &values {
        assert_eq!(decode_value(bytes), Err(*error));
    }
    for (bytes, error) in &messages[..3] {
        assert_eq!(Message::decode(bytes), Err(*error));
    }
    assert!(LARGEST.get() < 4_096, "{} bytes at once", LARGEST.get());
    let (items, error) = &messages[3];
    assert_eq!(Message::decode(items), Err(*error));
    assert!(LARGEST.get() <= 65_536 * size_of::<Item>(), "{} bytes at once", LARGEST.get());
}

// Golden vectors. Bytes are hexadecimal, 64-bit numbers decimal strings.

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(name).with_extension("json")
}

/// Hands every vector of a file to `valid` or, with the error it names, to `malformed`.
fn check(name: &str, valid: impl Fn(&Json, &[u8]), malformed: impl Fn(&[u8]) -> Malformed) {
    let vectors: Json = serde_json::from_slice(&fs::read(path(name)).unwrap()).unwrap();
    for vector in vectors["valid"].as_array().unwrap() {
        valid(vector, &unhex(text(&vector["hex"])));
    }
    for vector in vectors["malformed"].as_array().unwrap() {
        let error = malformed(&unhex(text(&vector["hex"])));
        assert_eq!(error_name(error), text(&vector["error"]), "{}", vector["name"]);
    }
}

fn text(json: &Json) -> &str {
    json.as_str().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

fn unhex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn error_name(error: Malformed) -> String {
    format!("{error:?}").split('(').next().unwrap().to_owned()
}

fn cell_to_json(cell: &Cell) -> Json {
    let numbers = [cell.id, cell.token, cell.until].map(|number| number.to_string());
    json!({"kind": format!("{:?}", cell.kind), "id": numbers[0], "token": numbers[1], "until": numbers[2]})
}

fn value_to_json(header: &ValueHeader, body: &[u8]) -> Json {
    json!({
        "codec": header.codec.0,
        "null": header.null,
        "created": header.created.to_string(),
        "fresh_until": header.fresh_until.to_string(),
        "stale_until": header.stale_until.to_string(),
        "error_until": header.error_until.to_string(),
        "stamp": header.stamp.to_string(),
        "tags": header.tags,
        "body": hex(body),
    })
}

fn item_to_json(item: &Item) -> Json {
    let number = |number: &Option<u64>| number.map(|number| number.to_string());
    match item {
        Item::Key { scope, key, l2_pending } => json!({"scope": scope, "key": key, "l2_pending": l2_pending}),
        Item::Clear { scope } => json!({"clear": scope}),
        Item::Scope { scope, number: n } => json!({"scope": scope, "number": number(n)}),
        Item::Tag { scope, tag, number: n } => json!({"scope": scope, "tag": tag, "number": number(n)}),
    }
}

fn message_to_json(message: &Message) -> Json {
    let head = &message.head;
    json!({
        "node": head.node.to_string(),
        "incarnation": head.incarnation.to_string(),
        "sequence": head.sequence.to_string(),
        "heartbeat_ms": head.heartbeat_ms,
        "sent_ms": head.sent_ms.to_string(),
        "body": match &message.body {
            Body::Hello => json!("hello"),
            Body::Heartbeat => json!("heartbeat"),
            Body::Goodbye => json!("goodbye"),
            Body::Batch(items) => items.iter().map(item_to_json).collect(),
        },
    })
}

#[test]
fn keys_are_as_the_vectors_say() {
    let vectors: Json = serde_json::from_slice(&fs::read(path("keys")).unwrap()).unwrap();
    for vector in vectors["store"].as_array().unwrap() {
        let [prefix, scope, key] = ["prefix", "scope", "key"].map(|name| text(&vector[name]));
        assert_eq!(store_key(prefix, scope, key), vector["is"], "{prefix:?} {scope:?} {key:?}");
    }
    for vector in vectors["system"].as_array().unwrap() {
        assert_eq!(system_key(text(&vector["prefix"]), text(&vector["name"])), vector["is"]);
    }
}

#[test]
fn cells_are_as_the_vectors_say() {
    let valid = |vector: &Json, bytes: &[u8]| {
        let (cell, _) = Cell::decode(bytes).unwrap();
        assert_eq!(cell_to_json(&cell), vector["cell"], "{}", vector["name"]);
        assert_eq!(cell.encode(), bytes, "{}", vector["name"]);
    };
    check("cells", valid, |bytes| Cell::decode(bytes).unwrap_err());
}

#[test]
fn values_are_as_the_vectors_say() {
    let valid = |vector: &Json, bytes: &[u8]| {
        let (cell, blob) = Cell::decode(bytes).unwrap();
        assert_eq!(cell_to_json(&cell), vector["cell"], "{}", vector["name"]);
        if vector["lz4"] == true && cfg!(not(feature = "lz4")) {
            assert_eq!(decode_value(blob), Err(Malformed::Compression));
            return;
        }
        let (header, body) = decode_value(blob).unwrap();
        assert_eq!(value_to_json(&header, &body), vector["value"], "{}", vector["name"]);
        // Another release of the compressor may choose other bytes.
        if vector["lz4"] == false {
            assert_eq!(encode_value(&cell, &header, &body, None), bytes, "{}", vector["name"]);
        }
    };
    check("values", valid, |bytes| decode_value(&bytes[CELL_LEN..]).unwrap_err());
}

#[test]
fn messages_are_as_the_vectors_say() {
    let valid = |vector: &Json, bytes: &[u8]| {
        let message = Message::decode(bytes).unwrap();
        assert_eq!(message_to_json(&message), vector["message"], "{}", vector["name"]);
        assert_eq!(message.encode(), bytes, "{}", vector["name"]);
    };
    check("messages", valid, |bytes| Message::decode(bytes).unwrap_err());
}

#[test]
#[ignore = "writes tests/vectors, to add some: a line of it that changes breaks the format"]
fn write_vectors() {
    for (name, vectors) in [
        ("keys", key_vectors()),
        ("cells", cell_vectors()),
        ("values", value_vectors()),
        ("messages", message_vectors()),
    ] {
        fs::write(path(name), format!("{vectors:#}\n")).unwrap();
    }
}

fn key_vectors() -> Json {
    let repeat = |text: &str, times| text.repeat(times);
    let store = [
        ("app", "users", "42".to_owned()),
        ("app", "", "42".to_owned()),
        ("a:b", "c%d", "e:f%g".to_owned()),
        ("a", "b:c", "d".to_owned()),
        ("a", "b", "c:d".to_owned()),
        ("app", "s", ":leading".to_owned()),
        ("app", "s", "%leading".to_owned()),
        ("app", "s", "%3Aleading".to_owned()),
        ("app", "!w", "x".to_owned()),
        ("app", "", "!w".to_owned()),
        ("app", "größe", "日本 語\0\n".to_owned()),
        ("app", "longest!", repeat("k", 499)),
        ("app", "longest!", repeat("k", 500)),
        ("app", "longest", repeat(":", 500)),
        ("app", "s", repeat("é", 300)),
        ("app", &repeat("s", 256), "k".to_owned()),
        ("app", &repeat("s", 255), repeat("k", 300)),
        ("app", &repeat(":", 85), "k".to_owned()),
        ("app", &repeat(":", 86), "k".to_owned()),
        (&repeat("p", 128), "s", "k".to_owned()),
        (&repeat("%", 128), &repeat("%", 256), repeat("%", 512)),
    ]
    .map(|(prefix, scope, key)| {
        let is = store_key(prefix, scope, &key);
        json!({"prefix": prefix, "scope": scope, "key": key, "is": is})
    });
    let system = [("app", "w"), ("a:b", "w"), (&repeat(":", 43), "w")]
        .map(|(prefix, name)| json!({"prefix": prefix, "name": name, "is": system_key(prefix, name)}));
    json!({"store": store, "system": system})
}

fn cell_vectors() -> Json {
    let lease = Cell { kind: Kind::Lease, id: 0, token: 0x1112_1314_1516_1718, until: 1_790_000_000_123 };
    let valid = [
        ("value", CELL),
        ("lease", lease),
        ("stale value under a lease", Cell { kind: Kind::Value, id: CELL.id, ..lease }),
        ("hold", Cell { token: HOLD, ..lease }),
        ("watermarks", Cell { kind: Kind::Watermarks, ..CELL }),
        ("extremes", Cell { kind: Kind::Value, id: u64::MAX, token: u64::MAX, until: u64::MAX }),
    ]
    .map(|(name, cell)| json!({"name": name, "cell": cell_to_json(&cell), "hex": hex(&cell.encode())}));
    let malformed = [
        ("empty", Vec::new()),
        ("cut", lease.encode()[..27].to_vec()),
        ("a foreign text", b"{\"user\": 42, \"name\": \"Ada Lovelace\"}".to_vec()),
        ("a message", Message { head: HEAD, body: Body::Hello }.encode()),
        ("version 0", with(&lease.encode(), 2, 0)),
        ("version 2", with(&lease.encode(), 2, 2)),
        ("kind v", with(&lease.encode(), 3, b'v')),
    ]
    .map(|(name, bytes)| malformed(name, &bytes, Cell::decode(&bytes).unwrap_err()));
    json!({"valid": valid, "malformed": malformed})
}

fn with(bytes: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = byte;
    bytes
}

fn malformed(name: &str, bytes: &[u8], error: Malformed) -> Json {
    json!({"name": name, "hex": hex(bytes), "error": error_name(error)})
}

fn value_vectors() -> Json {
    let plain = header();
    let tagged = ValueHeader { tags: vec!["user:42".into(), "größe".into()], ..plain.clone() };
    let null = ValueHeader { null: true, codec: Codec(2), ..plain.clone() };
    let extreme = ValueHeader {
        codec: Codec(255),
        null: true,
        created: u64::MAX,
        fresh_until: 0,
        stale_until: u64::MAX,
        error_until: 0,
        stamp: u64::MAX,
        tags: vec!["t".repeat(256).into(); 2],
    };
    let ada = &b"\x82\xa2id\x2a\xa4name\xa3Ada"[..];
    let leased = Cell { token: 99, until: 1_790_000_130_000, ..CELL };
    let valid = [
        ("plain", CELL, &plain, ada, None),
        ("under a lease", leased, &plain, ada, None),
        ("empty body", CELL, &plain, b"", None),
        ("tags", CELL, &tagged, ada, None),
        ("null", CELL, &null, b"null", None),
        ("extremes", CELL, &extreme, b"\xff", None),
        ("lz4", CELL, &plain, &[7; 1_500], Some(1_024)),
        ("lz4 and tags", CELL, &tagged, &[0; 1_500], Some(1_024)),
    ]
    .map(|(name, cell, header, body, from)| {
        let bytes = encode_value(&cell, header, body, from);
        let (cell, value) = (cell_to_json(&cell), value_to_json(header, body));
        json!({"name": name, "cell": cell, "value": value, "lz4": from.is_some(), "hex": hex(&bytes)})
    });

    let whole = &encode_value(&CELL, &tagged, ada, None)[CELL_LEN..];
    let edited = |at, byte| sealed(&with(&whole[..whole.len() - 4], at, byte));
    let malformed = [
        ("empty", Vec::new()),
        ("version only", vec![1]),
        ("version 2", edited(0, 2)),
        ("version 2 of another shape", vec![2, 0]),
        ("a changed byte", with(whole, 60, 0)),
        ("a cut checksum", whole[..whole.len() - 1].to_vec()),
        ("an unknown flag", edited(1, 4)),
        ("lz4 that is none", edited(1, 2)),
        ("lz4 that would be 16 MiB", blob(2, 0, &[0, 0, 0, 1, 0x1f, 0, 1, 0, 255])),
        ("an end in the deadlines", sealed(&whole[..30])),
        ("an end in a tag", sealed(&whole[..50])),
        ("a body above 16 MiB", blob(0, 0, &[1, 0, 0, 1, 0])),
        ("a body longer than the bytes", blob(0, 0, &[5, 0, 0, 0, 1, 2, 3, 4])),
        ("a body shorter than the bytes", blob(0, 0, &[3, 0, 0, 0, 1, 2, 3, 4])),
        ("65 tags", blob(0, 65, &[0; 134])),
        ("a tag of 257 bytes", blob(0, 1, &[&[1, 1][..], &[b't'; 257], &[0; 4]].concat())),
        ("a tag longer than the bytes", blob(0, 1, &[9, 0, b't'])),
        ("a tag that is not UTF-8", blob(0, 1, &[1, 0, 0xff, 0, 0, 0, 0])),
    ]
    .map(|(name, blob)| malformed(name, &[&CELL.encode()[..], &blob].concat(), decode_value(&blob).unwrap_err()));
    json!({"valid": valid, "malformed": malformed})
}

fn message_vectors() -> Json {
    let edge = Head { node: u64::MAX, incarnation: 0, sequence: u64::MAX, heartbeat_ms: u32::MAX, sent_ms: 0 };
    let key = |scope: &str, key: &str, l2_pending| Item::Key { scope: scope.into(), key: key.into(), l2_pending };
    let number = Some(1_790_000_000_000_123);
    let one_of_each = vec![
        key("users", "42", false),
        key("users", "43", true),
        Item::Clear { scope: None },
        Item::Clear { scope: Some("orders".into()) },
        Item::Scope { scope: "orders".into(), number },
        Item::Scope { scope: "".into(), number: None },
        Item::Tag { scope: "users".into(), tag: "größe".into(), number },
        Item::Tag { scope: "users".into(), tag: "".into(), number: None },
        key("", "日本", false),
    ];
    let valid = [
        ("hello", HEAD, Body::Hello),
        ("heartbeat", HEAD, Body::Heartbeat),
        ("goodbye", HEAD, Body::Goodbye),
        ("extremes", edge, Body::Heartbeat),
        ("empty batch", HEAD, Body::Batch(Vec::new())),
        ("one key", HEAD, Body::Batch(vec![key("users", "42", false)])),
        ("one key of 300 bytes", HEAD, Body::Batch(vec![key("users", &"k".repeat(300), false)])),
        ("one of each", HEAD, Body::Batch(one_of_each)),
    ]
    .map(|(name, head, body)| {
        let message = Message { head, body };
        json!({"name": name, "message": message_to_json(&message), "hex": hex(&message.encode())})
    });

    let hello = Message { head: HEAD, body: Body::Hello }.encode();
    let content = &hello[..hello.len() - 4];
    let malformed = [
        ("empty", Vec::new()),
        ("a foreign text", b"invalidate:users:42:and-some-more".to_vec()),
        ("a cell", CELL.encode().to_vec()),
        ("version 2", sealed(&with(content, 3, 2))),
        ("version 2 of another shape", [b"FCM\x02?", &content[5..21], b"later"].concat()),
        ("an unknown kind", sealed(&with(content, 4, b'?'))),
        ("a changed bit", with(&hello, 21, hello[21] ^ 1)),
        ("a short head", sealed(&content[..40])),
        ("a hello with a tail", sealed(&[content, &[0]].concat())),
        ("an unknown item", batch(&[7])),
        ("an item without its text", batch(&[4])),
        ("a text longer than the bytes", batch(&[4, 9, 0, 0, 0, b's'])),
        ("a text of 65,537 bytes", batch(&[4, 1, 0, 1, 0])),
        ("a text that is not UTF-8", batch(&[4, 1, 0, 0, 0, 0xff])),
        ("half a number", batch(&[5, 0, 0, 0, 0, 1, 2, 3, 4])),
    ]
    .map(|(name, bytes)| malformed(name, &bytes, Message::decode(&bytes).unwrap_err()));
    json!({"valid": valid, "malformed": malformed})
}
