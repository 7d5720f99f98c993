//! The protocol's steps, one by one, on a store in memory and in virtual time.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::cas::{Held, StoreCells};
use super::cells::{Acquired, Cells, Lease, Stored};
use crate::error::Result;
use crate::runtime::Runtime;
use crate::store::{MemoryStore, Store};
use crate::sync::Mutex;
use crate::testing::SimRuntime;
use crate::watermark::{FLOOR, MAX_WATERMARKS};
use crate::wire::cell::{CELL_LEN, Cell, HOLD, Kind, NONE};
use crate::wire::value::{Codec, ValueHeader, decode_value, encode_value};

const K: &str = "k";
const W: &str = "w";
const LEASE: u64 = 2_000;
const LONG: Duration = Duration::from_secs(60);

struct World<S = MemoryStore> {
    runtime: SimRuntime,
    memory: MemoryStore,
    store: Arc<S>,
    cells: StoreCells,
}

fn within<S: Store>(wrap: impl FnOnce(MemoryStore) -> S, test: impl AsyncFnOnce(World<S>)) {
    let runtime = SimRuntime::new();
    let memory = MemoryStore::on(Arc::new(runtime.clone()));
    let store = Arc::new(wrap(memory.clone()));
    let cells = StoreCells::new(Arc::clone(&store) as Arc<dyn Store>, Arc::new(runtime.clone()), W.into());
    runtime.clone().block_on(test(World { runtime, memory, store, cells }));
}

fn in_memory(test: impl AsyncFnOnce(World)) {
    within(|memory| memory, test);
}

impl<S> World<S> {
    /// A value that its body and id tell from others, fresh and then stale for as long.
    fn value(&self, id: u64) -> Bytes {
        let now = self.runtime.wall_ms();
        let long = LONG.as_millis() as u64;
        let header = ValueHeader {
            codec: Codec(1),
            null: false,
            created: now,
            fresh_until: now + long,
            stale_until: now + 2 * long,
            error_until: 0,
            stamp: 0,
            tags: Vec::new(),
        };
        encode_value(&Cell { kind: Kind::Value, id, token: NONE, until: 0 }, &header, &id.to_le_bytes(), None).into()
    }

    async fn put(&self, id: u64) {
        self.memory.set(K, self.value(id), LONG * 2).await.unwrap();
    }

    /// The id of the value that is there and whole.
    async fn found(&self) -> Option<u64> {
        let bytes = self.memory.get(K).await.unwrap()?;
        let (cell, blob) = Cell::decode(&bytes).unwrap();
        if cell.kind != Kind::Value {
            return None;
        }
        assert_eq!(*decode_value(blob).unwrap().1, cell.id.to_le_bytes());
        Some(cell.id)
    }

    async fn token(&self) -> u64 {
        Cell::decode(&self.memory.get(K).await.unwrap().unwrap()).unwrap().0.token
    }

    async fn acquire(&self, token: u64, seen: u64) -> Acquired {
        self.cells.acquire(K, token, LEASE, seen, false).await.unwrap()
    }

    async fn won(&self, token: u64, seen: u64) -> Lease {
        match self.acquire(token, seen).await {
            Acquired::Won(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    async fn fill(&self, lease: Lease, id: u64) -> bool {
        self.cells.fill(K, lease, self.value(id), LONG).await.unwrap()
    }

    async fn set(&self, id: u64) -> Stored {
        self.cells.set(K, self.value(id), LONG, u64::MAX).await.unwrap()
    }

    async fn remove(&self) {
        self.cells.remove(&[K.to_owned()]).await.unwrap();
    }

    async fn pass(&self, millis: u64) {
        self.runtime.sleep(Duration::from_millis(millis)).await;
    }

    async fn invalidate(&self, member: &str, known: u64) -> u64 {
        self.cells.invalidate(&[member.to_owned()], known).await.unwrap()
    }

    /// All watermarks, in order.
    async fn marks(&self) -> Vec<(String, u64)> {
        let mut members = self.cells.poll(0, 0).await.unwrap().members;
        members.sort();
        members
    }
}

#[test]
fn an_absent_key_is_leased_to_one_and_the_next_after_the_lease_time() {
    in_memory(async |world| {
        assert_eq!(world.won(10, 0).await, Lease { token: 10, over: 0 });
        assert_eq!(world.acquire(20, 0).await, Acquired::Wait(LEASE));
        world.pass(LEASE - 1).await;
        assert_eq!(world.acquire(20, 0).await, Acquired::Wait(1));
        world.pass(1).await;
        assert_eq!(world.won(20, 0).await, Lease { token: 20, over: 0 });
    });
}

#[test]
fn a_value_the_caller_has_not_seen_is_a_hit_and_one_it_has_seen_is_leased_over_and_stays_readable() {
    in_memory(async |world| {
        world.put(7).await;
        assert_eq!(world.acquire(10, 0).await, Acquired::Hit(world.memory.get(K).await.unwrap().unwrap()));
        assert_eq!(world.won(10, 7).await, Lease { token: 10, over: 7 });
        assert_eq!(world.found().await, Some(7));
        assert_eq!(world.acquire(20, 7).await, Acquired::Wait(LEASE));
        assert!(matches!(world.acquire(20, 0).await, Acquired::Hit(_)));
        world.pass(LEASE * 4).await;
        assert_eq!(world.found().await, Some(7), "the lease does not shorten its life");
    });
}

#[test]
fn a_hold_keeps_the_fleet_off_but_for_those_who_ask_over_it() {
    in_memory(async |world| {
        let lease = world.won(10, 0).await;
        world.cells.release(K, lease, 200).await.unwrap();
        assert_eq!(world.token().await, HOLD);
        assert_eq!(world.acquire(20, 0).await, Acquired::Held(200));
        let over = world.cells.acquire(K, 20, LEASE, 0, true).await.unwrap();
        assert_eq!(over, Acquired::Won(Lease { token: 20, over: 0 }));

        world.cells.release(K, Lease { token: 20, over: 0 }, 200).await.unwrap();
        world.pass(200).await;
        world.won(30, 0).await;
    });
}

#[test]
fn bytes_that_are_not_ours_give_way_to_a_lease_that_can_be_filled() {
    in_memory(async |world| {
        let value = world.value(7);
        let cell = |kind, id| Bytes::copy_from_slice(&Cell { kind, id, token: 99, until: u64::MAX }.encode());
        for (number, foreign) in (1..).zip([
            Bytes::new(),
            Bytes::from_static(b"F"),
            Bytes::from_static(b"{\"user\": 42, \"name\": \"Ada Lovelace\"}"),
            value.slice(..CELL_LEN - 1),
            Bytes::from([b"FC\x02", &value[3..]].concat()),
            cell(Kind::Value, 0),
            cell(Kind::Lease, 7),
            cell(Kind::Watermarks, 7),
        ]) {
            world.memory.set(K, foreign.clone(), LONG).await.unwrap();
            let lease = world.won(number * 10, 0).await;
            assert!(world.fill(lease, number).await, "{foreign:?}");
            assert_eq!(world.found().await, Some(number));
        }
    });
}

#[test]
fn only_the_token_that_is_still_there_fills_and_only_once() {
    in_memory(async |world| {
        let lease = world.won(10, 0).await;
        assert!(!world.fill(Lease { token: 20, over: 0 }, 1).await, "another token");
        assert!(!world.fill(Lease { token: 10, over: 7 }, 1).await, "of another value");
        assert!(world.fill(lease, 1).await);
        assert_eq!((world.found().await, world.token().await), (Some(1), NONE));
        assert!(!world.fill(lease, 2).await, "repeated");
        assert_eq!(world.found().await, Some(1));
    });
}

#[test]
fn a_lease_whose_time_is_over_still_fills_where_nobody_took_it() {
    in_memory(async |world| {
        for stale in [None, Some(7)] {
            world.remove().await;
            if let Some(id) = stale {
                world.put(id).await;
            }
            let lease = world.won(10, stale.unwrap_or(0)).await;
            world.pass(LEASE + LEASE / 2).await;
            assert!(world.fill(lease, 1).await);

            let lost = world.won(20, 1).await;
            world.pass(LEASE).await;
            let taken = world.won(30, 1).await;
            assert!(!world.fill(lost, 2).await);
            assert!(world.fill(taken, 3).await);
        }
    });
}

#[test]
fn remove_and_set_destroy_a_lease_over_nothing_or_over_a_stale_value() {
    in_memory(async |world| {
        for seen in [0, 7] {
            for set in [false, true] {
                world.remove().await;
                if seen != 0 {
                    world.put(seen).await;
                }
                let lease = world.won(10, seen).await;
                if set {
                    assert_eq!(world.set(8).await, Stored::Yes);
                } else {
                    world.remove().await;
                }
                assert!(!world.cells.renew(K, lease, LEASE).await.unwrap());
                assert!(!world.fill(lease, 9).await);
                world.cells.release(K, lease, 200).await.unwrap();
                assert_eq!(world.found().await, set.then_some(8));
                assert!(set || world.memory.get(K).await.unwrap().is_none(), "not even a hold is left");
            }
        }
    });
}

#[test]
fn a_fill_is_refused_though_the_key_looks_again_as_when_it_was_leased() {
    in_memory(async |world| {
        let early = world.won(10, 0).await;
        world.remove().await;
        let late = world.won(20, 0).await;
        assert!(!world.fill(early, 1).await, "leased again, over nothing as before");
        assert!(world.fill(late, 2).await);

        let early = world.won(30, 2).await;
        world.remove().await;
        world.put(2).await;
        assert!(!world.fill(early, 3).await, "the same value is there again, without the lease");
        assert_eq!(world.found().await, Some(2));
    });
}

#[test]
fn a_renewed_lease_lasts_longer_and_a_lost_one_is_told() {
    in_memory(async |world| {
        for seen in [0, 7] {
            world.remove().await;
            if seen != 0 {
                world.put(seen).await;
            }
            let lease = world.won(10, seen).await;
            for _ in 0..5 {
                world.pass(LEASE - 1).await;
                assert!(world.cells.renew(K, lease, LEASE).await.unwrap());
                assert_eq!(world.acquire(20, seen).await, Acquired::Wait(LEASE));
            }
            assert_eq!(world.found().await.unwrap_or(0), seen);
            world.pass(LEASE).await;
            let taken = world.won(20, seen).await;
            assert!(!world.cells.renew(K, lease, LEASE).await.unwrap(), "taken by another");
            assert!(world.fill(taken, 8).await);
            assert!(!world.cells.renew(K, taken, LEASE).await.unwrap(), "filled");
        }
    });
}

#[test]
fn a_released_key_is_free_at_once_and_a_stale_value_under_the_lease_stays() {
    in_memory(async |world| {
        let lease = world.won(10, 0).await;
        world.cells.release(K, lease, 0).await.unwrap();
        let lease = world.won(20, 0).await;
        world.cells.release(K, lease, 0).await.unwrap();
        world.pass(1).await;
        assert_eq!(world.memory.get(K).await.unwrap(), None, "nothing is left behind");

        world.put(7).await;
        for (token, hold) in [(30, 200), (40, 0)] {
            let lease = world.won(token, 7).await;
            world.cells.release(K, lease, hold).await.unwrap();
            assert_eq!(world.found().await, Some(7));
            assert!(!world.fill(lease, 8).await);
            let expected = if hold > 0 { Acquired::Held(hold) } else { Acquired::Won(Lease { token: 50, over: 7 }) };
            assert_eq!(world.acquire(50, 7).await, expected);
            world.pass(LEASE).await;
        }
        assert_eq!(world.found().await, Some(7));
    });
}

#[test]
fn a_lease_of_another_is_not_released() {
    in_memory(async |world| {
        let lost = world.won(10, 0).await;
        world.remove().await;
        let lease = world.won(20, 0).await;
        world.cells.release(K, lost, 200).await.unwrap();
        assert!(world.fill(lease, 1).await);
    });
}

/// Right before the comparison whose turn it is, another node removes the key or puts other bytes under it.
struct Meddling {
    memory: MemoryStore,
    turn: Mutex<Option<(u64, Option<Bytes>)>>,
}

impl Meddling {
    fn new(memory: MemoryStore) -> Self {
        Self { memory, turn: Mutex::new(None) }
    }

    /// Before the comparison after the next `skipped`.
    fn at(&self, skipped: u64, bytes: Option<Bytes>) {
        *self.turn.lock() = Some((skipped, bytes));
    }

    async fn meddle(&self, key: &str, ttl: Duration) -> Result<()> {
        let bytes = {
            let mut turn = self.turn.lock();
            match turn.take() {
                None => return Ok(()),
                Some((0, bytes)) => bytes,
                Some((skipped, bytes)) => {
                    *turn = Some((skipped - 1, bytes));
                    return Ok(());
                }
            }
        };
        match bytes {
            Some(bytes) => self.memory.set(key, bytes, ttl).await,
            None => self.memory.delete(key).await,
        }
    }
}

#[async_trait]
impl Store for Meddling {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.memory.get(key).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        self.memory.set(key, value, ttl).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.memory.delete(key).await
    }

    async fn clear(&self) -> Result<()> {
        self.memory.clear().await
    }

    async fn close(&self) {}

    async fn compare_and_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        value: Bytes,
        ttl: Duration,
    ) -> Result<Option<bool>> {
        self.meddle(key, ttl).await?;
        self.memory.compare_and_set(key, expected, value, ttl).await
    }

    async fn time(&self) -> Result<Option<u64>> {
        self.memory.time().await
    }
}

#[test]
fn the_second_step_of_a_set_that_comes_after_a_remove_brings_nothing_back() {
    within(Meddling::new, async |world| {
        world.put(7).await;
        world.store.at(1, None);
        assert_eq!(world.set(8).await, Stored::Superseded);
        assert_eq!(world.memory.get(K).await.unwrap(), None);
    });
}

#[test]
fn a_remove_before_the_first_step_of_a_set_does_not_keep_it_from_its_end() {
    within(Meddling::new, async |world| {
        world.put(7).await;
        world.store.at(0, None);
        assert_eq!(world.set(8).await, Stored::Yes);
        assert_eq!(world.found().await, Some(8));
    });
}

#[test]
fn no_step_brings_back_a_value_that_is_removed_while_it_is_worked_on() {
    within(Meddling::new, async |world| {
        world.put(7).await;
        world.store.at(0, None);
        assert_eq!(world.won(10, 7).await, Lease { token: 10, over: 0 }, "the second attempt finds nothing");
        assert_eq!(world.found().await, None);

        for hold in [None, Some(0), Some(200)] {
            world.put(7).await;
            let lease = world.won(20, 7).await;
            world.store.at(0, None);
            match hold {
                None => assert!(!world.cells.renew(K, lease, LEASE).await.unwrap()),
                Some(hold) => world.cells.release(K, lease, hold).await.unwrap(),
            }
            assert_eq!(world.memory.get(K).await.unwrap(), None);
        }
    });
}

#[test]
fn no_step_but_a_set_replaces_a_value_that_another_node_puts_there_meanwhile() {
    within(Meddling::new, async |world| {
        let newer = world.value(8);
        for seen in [0, 7] {
            for hold in [None, Some(0), Some(200)] {
                world.remove().await;
                if seen != 0 {
                    world.put(seen).await;
                }
                let lease = world.won(10, seen).await;
                world.store.at(0, Some(newer.clone()));
                match hold {
                    None => assert!(!world.cells.renew(K, lease, LEASE).await.unwrap()),
                    Some(hold) => world.cells.release(K, lease, hold).await.unwrap(),
                }
                assert_eq!(world.memory.get(K).await.unwrap(), Some(newer.clone()));
            }
            world.put(7).await;
            world.store.at(0, Some(newer.clone()));
            assert_eq!(world.acquire(20, 7).await, Acquired::Hit(newer.clone()));
        }
        world.store.at(1, Some(newer.clone()));
        assert_eq!(world.set(9).await, Stored::Superseded);
        assert_eq!(world.found().await, Some(8));
        world.store.at(0, Some(newer));
        assert_eq!(world.set(9).await, Stored::Yes);
        assert_eq!(world.found().await, Some(9));
    });
}

#[test]
fn numbers_strictly_grow_whatever_is_known_and_whatever_was_lost() {
    in_memory(async |world| {
        let mut last = world.runtime.wall_ms() * 1_000 - 1;
        for round in 0..100 {
            let number = world.invalidate("a", 0).await;
            assert!(number > last);
            last = if round % 10 == 0 { number + 1_000_000 } else { number };
            let number = world.invalidate("b", last).await;
            assert!(number > last);
            last = number;
            if round % 7 == 0 {
                world.memory.clear().await.unwrap();
                last = world.invalidate("c", last).await;
            }
        }
        assert_eq!(world.invalidate("a", u64::MAX).await, u64::MAX, "no number is beyond it, and none wraps around");
    });
}

#[test]
fn one_invalidation_gives_all_its_members_one_number_and_a_poll_tells_those_above_what_was_asked_for() {
    in_memory(async |world| {
        let first = world.cells.invalidate(&["a".into(), "b".into()], 0).await.unwrap();
        let second = world.invalidate("b", 0).await;
        assert_eq!(world.marks().await, [(FLOOR.to_owned(), first), ("a".to_owned(), first), ("b".to_owned(), second)]);
        let marks = world.cells.poll(first, 0).await.unwrap();
        assert_eq!((marks.top, marks.members), (second, vec![("b".to_owned(), second)]));
        assert_eq!(marks.now, world.runtime.wall_ms());
    });
}

#[test]
fn watermarks_that_are_absent_or_damaged_raise_the_floor_above_everything_before() {
    in_memory(async |world| {
        world.invalidate("a", 0).await;
        let whole = world.memory.get(W).await.unwrap().unwrap();
        let mut foreign = vec![
            None,
            Some(Bytes::from_static(b"junk")),
            Some(world.value(7)),
            Some([&whole[..], b"\0"].concat().into()),
            Some(Held { id: 7, members: vec![(String::new(), u64::MAX); MAX_WATERMARKS + 1] }.encode(7)),
        ];
        foreign.extend((0..whole.len()).map(|length| Some(whole.slice(..length))));
        foreign.extend((CELL_LEN * 8..whole.len() * 8).map(|bit| {
            let mut flipped = whole.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            Some(flipped.into())
        }));
        for found in foreign {
            world.pass(1).await;
            let known = world.runtime.wall_ms() * 1_000 + 5;
            for by_poll in [true, false] {
                world.memory.delete(W).await.unwrap();
                if let Some(bytes) = &found {
                    world.memory.set(W, bytes.clone(), LONG).await.unwrap();
                }
                if by_poll {
                    world.cells.poll(0, known).await.unwrap();
                } else {
                    world.invalidate("b", known).await;
                }
                let marks = world.marks().await;
                assert!(marks[0].0 == FLOOR && marks[0].1 > known, "{found:?} became {marks:?}");
            }
        }
    });
}

#[test]
fn the_lowest_of_too_many_watermarks_go_into_the_floor() {
    in_memory(async |world| {
        let members = |kind: &str, count| (0..count).map(|n| format!("{kind}{n}")).collect::<Vec<_>>();
        let born = world.invalidate("first", 0).await;
        world.pass(1).await;
        let old = world.cells.invalidate(&members("old", MAX_WATERMARKS - 2), 0).await.unwrap();
        assert_eq!(world.marks().await[0], (FLOOR.to_owned(), born));
        world.pass(1).await;
        let new = world.cells.invalidate(&members("new", 50), 0).await.unwrap();

        let marks = world.marks().await;
        assert_eq!(marks.len(), MAX_WATERMARKS);
        assert_eq!(marks[0], (FLOOR.to_owned(), old));
        assert_eq!(marks.iter().filter(|(member, number)| member.starts_with("new") && *number == new).count(), 50);
        assert!(marks.iter().all(|(member, _)| member != "first"));
    });
}

#[test]
fn restoring_only_ever_raises() {
    in_memory(async |world| {
        let number = world.invalidate("a", 0).await;
        let restored = [("a".to_owned(), number - 1), ("b".to_owned(), number + 5), (FLOOR.to_owned(), 0)];
        world.cells.restore(&restored).await.unwrap();
        let expected = [(FLOOR.to_owned(), number), ("a".to_owned(), number), ("b".to_owned(), number + 5)];
        assert_eq!(world.marks().await, expected);

        world.memory.delete(W).await.unwrap();
        world.cells.restore(&restored).await.unwrap();
        let marks = world.marks().await;
        assert!(marks[0].0 == FLOOR && marks[0].1 > number + 5, "what others knew is dead too: {marks:?}");
        assert_eq!(marks[1..], restored[..2]);
    });
}

/// Cannot compare.
struct Plain(MemoryStore);

#[async_trait]
impl Store for Plain {
    async fn get(&self, key: &str) -> Result<Option<Bytes>> {
        self.0.get(key).await
    }

    async fn set(&self, key: &str, value: Bytes, ttl: Duration) -> Result<()> {
        self.0.set(key, value, ttl).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.0.delete(key).await
    }

    async fn clear(&self) -> Result<()> {
        self.0.clear().await
    }

    async fn close(&self) {}
}

#[test]
fn a_store_that_cannot_compare_is_found_out_without_a_trace_and_filled_from_the_first_load_on() {
    within(Plain, async |world| {
        assert!(world.cells.fenced());
        let lease = world.won(10, 0).await;
        assert!(!world.cells.fenced());
        assert_eq!(world.memory.get(K).await.unwrap(), None);
        assert!(world.fill(lease, 1).await);
        assert!(!world.fill(lease, 2).await, "repeated");
        assert_eq!(world.found().await, Some(1));
    });
}

#[test]
fn where_nothing_is_fenced_a_load_that_is_older_than_its_lease_never_fills() {
    within(Plain, async |world| {
        let lease = world.won(10, 0).await;
        world.pass(LEASE).await;
        assert!(world.cells.renew(K, lease, LEASE).await.unwrap(), "a load is not ended for it");
        assert!(!world.fill(lease, 1).await);
        assert_eq!(world.memory.get(K).await.unwrap(), None);

        let lease = world.won(20, 0).await;
        world.pass(LEASE - 1).await;
        assert!(world.fill(lease, 2).await);
    });
}

#[test]
fn where_nothing_is_fenced_a_lease_that_was_given_back_never_fills_and_nobody_waits() {
    within(Plain, async |world| {
        world.put(7).await;
        let before = world.memory.get(K).await.unwrap();
        let (lease, other) = (world.won(10, 7).await, world.won(20, 7).await);
        world.cells.release(K, lease, 200).await.unwrap();
        assert!(!world.fill(lease, 1).await);
        assert_eq!(world.memory.get(K).await.unwrap(), before);
        assert!(world.fill(other, 2).await);
    });
}

#[test]
fn where_nothing_is_fenced_sets_removes_and_watermarks_work_from_the_first_on() {
    within(Plain, async |world| {
        assert_eq!(world.set(1).await, Stored::Yes);
        assert!(!world.cells.fenced());
        assert_eq!(world.found().await, Some(1));
        assert_eq!(world.set(2).await, Stored::Yes);
        assert_eq!(world.found().await, Some(2));
        world.remove().await;
        assert_eq!(world.found().await, None);
    });
    within(Plain, async |world| {
        let first = world.invalidate("a", 0).await;
        let second = world.invalidate("a", 0).await;
        assert!(second > first);
        assert_eq!(world.marks().await, [(FLOOR.to_owned(), first), ("a".to_owned(), second)]);
    });
}
