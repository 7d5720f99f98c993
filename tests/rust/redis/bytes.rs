//! What others do to the bytes in Redis: never a panic, never a wrong value.

use fleetcache_services::Redis;
use fleetcache_tests::real::{eventually, node_with, ready};
use fleetcache_tests::{Count, counting, ms};
use redis::AsyncCommands;

#[tokio::test(flavor = "multi_thread")]
async fn values_damaged_at_random_are_misses() {
    let server = Redis::start().unwrap();
    let a = node_with(&server.url(), |builder| builder.compression(true));
    ready(&a, 0).await;
    let mut raw = redis::Client::open(server.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut random = 11_u64;
    let mut draw = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap() % below
    };
    let loads = Count::new();
    let mut misses = 0;
    for round in 0..400_u64 {
        let key = (round % 8).to_string();
        let cell_key = format!("fleetcache::{key}");
        a.set(&key, round).await.unwrap();
        let mut bytes: Vec<u8> = raw.get(&cell_key).await.unwrap();
        let position = draw(bytes.len());
        match draw(4) {
            0 => bytes[position] ^= 1 << draw(8),
            1 => bytes.truncate(position),
            2 => bytes.insert(position, 0xA5),
            _ => bytes[position..].reverse(),
        }
        let _: () = raw.set(&cell_key, &bytes).await.unwrap();
        a.remove_local(&key);
        let found = a.get(&key).await.unwrap();
        // A change in the cell's prefix may leave the value as it was.
        assert!(found.as_deref().is_none_or(|found| *found == round), "{found:?} instead of {round}");
        misses += u64::from(found.is_none());
        let loaded = *a.get_with(&key, counting(&loads, 1_000_000 + round)).await.unwrap();
        assert!(loaded == round || loaded == 1_000_000 + round, "{loaded}");
        // A lease that a damaged prefix seems to hold would keep the key for its time.
        if draw(4) == 0 {
            let _: () = raw.del(&cell_key).await.unwrap();
        }
    }
    assert!(misses > 100, "{misses}");
    assert!(a.stats().malformed_values > 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_entries_in_the_stream_are_gaps_and_what_comes_after_them_is_heard() {
    let server = Redis::start().unwrap();
    let (a, b) = (node_with(&server.url(), |builder| builder), node_with(&server.url(), |builder| builder));
    ready(&a, 1).await;
    ready(&b, 1).await;
    a.set("k", 1).await.unwrap();
    eventually("b reads it", ms(2_000), || async { b.get("k").await.unwrap().is_some() }).await;
    let before = b.stats();
    for entry in [["m", "nonsense"], ["m", "FCM\u{1}i"], ["other", "field"]] {
        server.command(&[&["XADD", "fleetcache:!s", "*"], &entry[..]].concat()).unwrap();
    }
    eventually("b distrusts its memory", ms(2_000), || async { b.stats().gaps >= before.gaps + 3 }).await;
    assert_eq!(b.stats().malformed_messages, before.malformed_messages + 2);
    assert_eq!(b.get("k").await.unwrap().as_deref(), Some(&1), "from the shared store");
    a.remove("k").await.unwrap();
    eventually("b hears what comes after", ms(2_000), || async { b.get("k").await.unwrap().is_none() }).await;
}
