//! Commands that reach the server when their caller has given up, and answers that come back wrong.

use fleetcache_services::{Fault, Proxy, Redis};
use fleetcache_tests::real::{eventually, node, pause, ready};
use fleetcache_tests::{Count, counting, ms};
use futures_util::StreamExt;

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_outlives_its_caller_is_refused() {
    let server = Redis::start().unwrap();
    let proxy = Proxy::start(server.port()).unwrap();
    let a = node(&format!("redis://127.0.0.1:{}", proxy.port()));
    let b = node(&server.url());
    ready(&a, 1).await;
    ready(&b, 1).await;
    // The server tells of each change to the key.
    server.command(&["CONFIG", "SET", "notify-keyspace-events", "KA"]).unwrap();
    let mut changes = redis::Client::open(server.url()).unwrap().get_async_pubsub().await.unwrap();
    changes.subscribe("__keyspace@0__:fleetcache::k").await.unwrap();

    proxy.set(Fault::Blackhole);
    a.set("k", 1).await.unwrap();
    assert_eq!(a.get("k").await.unwrap().as_deref(), Some(&1), "its own node has it");
    b.set("k", 2).await.unwrap();

    // What was on its way arrives now: the set, too late, and then the repair, which only removes.
    proxy.set(Fault::None);
    eventually("repaired", ms(5_000), || async { a.health().repairs == 0 }).await;
    // In either order: the repair has a connection of its own. So some time for what is still on its way.
    let (mut happened, mut messages) = (Vec::new(), changes.on_message());
    while let Some(change) = tokio::select! {
        change = messages.next() => change,
        () = pause(ms(600)) => None,
    } {
        happened.push(change.get_payload::<String>().unwrap());
    }
    assert!(happened.contains(&"del".to_owned()), "{happened:?}");
    assert_eq!(happened.iter().filter(|change| *change == "set").count(), 1, "b's alone: {happened:?}");
    for node in [&a, &b] {
        assert!(node.get("k").await.unwrap().is_none_or(|found| *found == 2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_began_before_a_remove_elsewhere_never_fills() {
    let server = Redis::start().unwrap();
    let (a, b) = (node(&server.url()), node(&server.url()));
    ready(&a, 1).await;
    ready(&b, 1).await;
    for round in 0..20 {
        let key = format!("k{round}");
        let remover = b.clone();
        let removed = key.clone();
        let old = a.get_with(&key, move || async move {
            // The source is read, and then it changes.
            remover.remove(&removed).await.unwrap();
            Ok::<_, std::convert::Infallible>(1)
        });
        assert_eq!(*old.await.unwrap(), 1, "who waited gets what was loaded");
        let loads = Count::new();
        for node in [&a, &b] {
            assert_eq!(*node.get_with(&key, counting(&loads, 2)).await.unwrap(), 2, "and nobody after");
        }
        assert_eq!(loads.get(), 1);
    }
    assert_eq!(a.stats().fills_refused, 20);
}
