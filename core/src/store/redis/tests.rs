//! The scripts do what the protocol's steps over a plain store do, on a real server.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use fleetcache_services::Redis;

use super::RedisStore;
use crate::l2::cas::StoreCells;
use crate::l2::cells::{Acquired, Cells, IDENTITY, Lease, Stored};
use crate::runtime::{Runtime, SystemRuntime};
use crate::store::{MemoryStore, NativeStore, Store};
use crate::watermark::{FLOOR, MAX_WATERMARKS};
use crate::wire::cell::{CELL_LEN, Cell, HOLD, Kind, NONE};
use crate::wire::value::{Codec, ValueHeader, encode_value};

const K: &str = "fleetcache::k";
/// Long beside a test, and the longest that is believed.
const LEASE: u64 = 50_000;
const LONG: Duration = Duration::from_secs(600);

fn native(server: &Redis) -> (RedisStore, Box<dyn Cells>) {
    let store = RedisStore::new(&server.url()).unwrap();
    let runtime: Arc<dyn Runtime> = Arc::new(SystemRuntime::current());
    let NativeStore(cells) = store.native("fleetcache", &runtime).unwrap();
    (store, cells)
}

/// Deals with the life that began with the first connection.
async fn settle(cells: &dyn Cells) {
    cells.lost().await.unwrap();
    cells.settle(cells.life());
}

fn value(id: u64) -> Bytes {
    // The same bytes for the same id, whenever they are asked for.
    static UNTIL: LazyLock<u64> = LazyLock::new(|| SystemRuntime::default().wall_ms() + LONG.as_millis() as u64);
    let until = *UNTIL;
    let header = ValueHeader {
        codec: Codec(1),
        null: false,
        created: 0,
        fresh_until: until,
        stale_until: until,
        error_until: until,
        stamp: 0,
        tags: Vec::new(),
    };
    encode_value(&Cell { kind: Kind::Value, id, token: NONE, until: 0 }, &header, &id.to_le_bytes(), None).into()
}

/// One step, and its answer without times.
async fn step(cells: &dyn Cells, store: &dyn Store, what: u64, number: u64) -> String {
    // Few of each, so that they meet.
    let (token, id) = (2 + number % 3, number / 3 % 3);
    let lease = Lease { token, over: id };
    match what {
        0..=2 => match cells.acquire(K, token, LEASE, id, number.is_multiple_of(2)).await.unwrap() {
            Acquired::Wait(left) if left > LEASE / 2 => "wait".into(),
            Acquired::Held(left) if left > 10_000 => "held".into(),
            Acquired::Hit(cell) => format!("hit {:?} of {}", &cell[..cell.len().min(IDENTITY)], cell.len()),
            other => format!("{other:?}"),
        },
        3 => format!("{}", cells.fill(K, lease, value(id + 1), LONG).await.unwrap()),
        4 => format!("{}", cells.renew(K, lease, LEASE).await.unwrap()),
        5 => format!("{:?}", cells.release(K, lease, number % 2 * 20_000).await.unwrap()),
        6 => format!("{:?}", cells.set(K, value(id + 1), LONG, u64::MAX).await.unwrap()),
        7 => format!("{:?}", cells.remove(&[K.to_owned()]).await.unwrap()),
        _ => {
            let cell = |kind, id| Bytes::copy_from_slice(&Cell { kind, id, token: 99, until: u64::MAX }.encode());
            let bytes = match number % 6 {
                0 => Bytes::from_static(b"F"),
                1 => Bytes::from_static(b"a foreign value that is longer than a cell"),
                2 => value(1).slice(..CELL_LEN - 1),
                3 => cell(Kind::Value, 0),
                4 => cell(Kind::Lease, 7),
                _ => cell(Kind::Value, id + 1),
            };
            format!("{:?}", store.set(K, bytes, LONG).await.unwrap())
        }
    }
}

/// What is there, without the lease's end.
async fn there(store: &dyn Store) -> Option<Vec<u8>> {
    let mut bytes = store.get(K).await.unwrap()?.to_vec();
    if let Ok((cell, _)) = Cell::decode(&bytes) {
        // A plain store cannot remove by comparison: it keeps nobody's lease for a moment.
        if cell.kind == Kind::Lease && cell.token == NONE {
            return None;
        }
        bytes[CELL_LEN - 8..CELL_LEN].fill(u8::from(cell.token >= HOLD && cell.until > 0));
    }
    Some(bytes)
}

#[tokio::test]
async fn the_scripts_do_what_the_steps_over_a_plain_store_do() {
    let server = Redis::start().unwrap();
    let (store, cells) = native(&server);
    settle(&*cells).await;
    let memory = MemoryStore::new();
    let reference =
        StoreCells::new(Arc::new(memory.clone()), Arc::new(SystemRuntime::default()), "fleetcache:!w".into());
    let mut random = 7_u64;
    for round in 0..300 {
        let mut history = Vec::new();
        for _ in 0..25 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (what, number) = ((random >> 33) % 9, random >> 40);
            let (ours, expected) =
                (step(&*cells, &store, what, number).await, step(&reference, &memory, what, number).await);
            history.push((what, number, expected.clone()));
            // A token that is asked for twice is laid again by the script: a repeated request of one holder.
            let repeated = ours.starts_with("Won") && expected == "wait";
            assert!(ours == expected || repeated, "round {round}: {ours} instead of {expected}: {history:?}");
            if repeated {
                break;
            }
            assert_eq!(there(&store).await, there(&memory).await, "round {round}: {history:?}");
        }
        store.delete(K).await.unwrap();
        memory.delete(K).await.unwrap();
    }
}

#[tokio::test]
async fn a_set_that_comes_too_late_is_refused_and_a_lease_keeps_the_value_alive() {
    let server = Redis::start().unwrap();
    let (store, cells) = native(&server);
    settle(&*cells).await;
    let now = store.time().await.unwrap().unwrap();
    assert_eq!(cells.set(K, value(1), LONG, now - 1).await.unwrap(), Stored::TooLate);
    assert_eq!(store.get(K).await.unwrap(), None);
    assert_eq!(cells.set(K, value(1), Duration::from_millis(400), now + 1000).await.unwrap(), Stored::Yes);

    // Stale soon, but leased for two seconds: the fill must find its lease.
    let Acquired::Won(lease) = cells.acquire(K, 10, 2_000, 1, false).await.unwrap() else { panic!("not won") };
    let left: u64 = server.command(&["PTTL", K]).unwrap().trim().parse().unwrap();
    assert!(left > 3_000, "{left}");
    assert!(cells.fill(K, lease, value(2), LONG).await.unwrap());
    let left: u64 = server.command(&["PTTL", K]).unwrap().trim().parse().unwrap();
    assert!(left > 500_000, "{left}");
}

#[tokio::test]
async fn a_key_of_another_type_is_a_damaged_value_and_gives_way() {
    let server = Redis::start().unwrap();
    let (_, cells) = native(&server);
    settle(&*cells).await;
    server.command(&["RPUSH", K, "a"]).unwrap();
    assert!(Cell::decode(&cells.get(K).await.unwrap().unwrap()).is_err());
    assert_eq!(cells.get_many(&[K.to_owned()]).await.unwrap(), [None]);
    assert!(!cells.fill(K, Lease { token: 10, over: 0 }, value(1), LONG).await.unwrap());
    assert!(!cells.renew(K, Lease { token: 10, over: 0 }, LEASE).await.unwrap());
    cells.release(K, Lease { token: 10, over: 0 }, 0).await.unwrap();
    let won = cells.acquire(K, 10, LEASE, 0, false).await.unwrap();
    assert_eq!(won, Acquired::Won(Lease { token: 10, over: 0 }));
    assert!(cells.fill(K, Lease { token: 10, over: 0 }, value(1), LONG).await.unwrap());

    server.command(&["SET", "fleetcache:!w", "not a set"]).unwrap();
    let marks = cells.poll(0, 5).await.unwrap();
    assert_eq!(marks.members, [(FLOOR.to_owned(), marks.top)]);
    server.command(&["SET", "fleetcache:!w", "not a set"]).unwrap();
    assert!(cells.invalidate(&["s/a".to_owned()], marks.top).await.unwrap() > marks.top);
}

#[tokio::test]
async fn watermark_numbers_only_grow_and_what_is_lost_or_too_much_raises_the_floor() {
    let server = Redis::start().unwrap();
    let (store, cells) = native(&server);
    settle(&*cells).await;
    let first = cells.poll(0, 0).await.unwrap();
    assert!(first.now.abs_diff(store.time().await.unwrap().unwrap()) < 1_000);
    assert_eq!(first.members, [(FLOOR.to_owned(), first.top)], "never there: everything older is dead");

    let one = cells.invalidate(&["s/a".to_owned(), "t/a/x".to_owned()], 0).await.unwrap();
    assert!(one > first.top);
    let two = cells.invalidate(&["s/b".to_owned()], one + 1_000_000).await.unwrap();
    assert_eq!(two, one + 1_000_001, "above what the caller knows, also where the clock is behind");
    let three = cells.invalidate(&["s/c".to_owned()], 0).await.unwrap();
    assert_eq!(three, two + 1, "above every one before");
    let marks = cells.poll(one, 0).await.unwrap();
    assert_eq!(marks.members, [("s/b".to_owned(), two), ("s/c".to_owned(), three)]);
    assert_eq!(marks.top, three);

    cells.restore(&[("s/b".to_owned(), 5), ("s/d".to_owned(), two)]).await.unwrap();
    let marks = cells.poll(one, 0).await.unwrap();
    assert!(marks.members.contains(&("s/b".to_owned(), two)), "a restore never lowers");
    assert!(marks.members.contains(&("s/d".to_owned(), two)));

    let many: Vec<_> = (0..MAX_WATERMARKS).map(|tag| format!("t/many/{tag}")).collect();
    let last =
        cells.invalidate(&many[..5_000], 0).await.unwrap().max(cells.invalidate(&many[5_000..], 0).await.unwrap());
    let marks = cells.poll(0, 0).await.unwrap();
    assert_eq!((marks.members.len(), marks.top), (MAX_WATERMARKS, last));
    let floor = marks.members.iter().find(|(member, _)| member == FLOOR).unwrap().1;
    assert!(floor >= three, "the lowest went into the floor");

    server.command(&["FLUSHALL"]).unwrap();
    let marks = cells.poll(last, last).await.unwrap();
    assert_eq!(marks.members, [(FLOOR.to_owned(), marks.top)]);
    assert!(marks.top > last, "lost: everything older is dead");
}

#[tokio::test]
async fn a_restart_begins_a_life_in_which_nothing_is_read_before_it_is_settled() {
    let server = Redis::start_with(&["--appendonly", "yes", "--appendfsync", "always"]).unwrap();
    let (_, cells) = native(&server);
    assert!(cells.get(K).await.is_err(), "not before the first life is settled");
    assert_eq!(cells.lost().await.unwrap(), Some(Duration::ZERO), "there is nothing yet");
    settle(&*cells).await;
    cells.poll(0, 0).await.unwrap();
    server.command(&["DEL", "fleetcache:!b"]).unwrap();
    assert_eq!(cells.lost().await.unwrap(), None, "nobody left word");
    cells.poll(0, 0).await.unwrap();
    let kept = value(1);
    cells.set(K, kept.clone(), LONG, u64::MAX).await.unwrap();
    assert_eq!(cells.lost().await.unwrap(), Some(Duration::ZERO), "the same life");

    server.kill();
    server.restart().unwrap();
    let _ = cells.get(K).await;
    assert!(cells.get(K).await.is_err());
    assert!(!cells.is_settled());
    cells.remove(&["fleetcache::other".to_owned()]).await.expect("a removal is harmless in any life");
    let lost = cells.lost().await.unwrap().expect("the life before left word");
    assert!(lost < Duration::from_secs(10), "{lost:?}");
    settle(&*cells).await;
    assert_eq!(cells.get(K).await.unwrap(), Some(kept));
}
