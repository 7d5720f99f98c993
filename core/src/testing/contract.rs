use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::bus::{Bus, Delivery};
use crate::runtime::{Runtime, timeout};
use crate::store::Store;

const LONG: Duration = Duration::from_secs(60);

/// Checks that `store` keeps what [`Store`] promises. It must be empty; it is empty again afterwards.
///
/// # Panics
///
/// With what was expected and what was found, where a promise is broken.
pub async fn store_contract(store: &dyn Store, runtime: &dyn Runtime) {
    let (a, b) = (Bytes::from_static(b"a\0\xff"), Bytes::from_static(b"another value"));
    assert_eq!(store.get("k").await.expect("get"), None, "a missing key is None");
    store.delete("k").await.expect("deleting a missing key is no error");

    store.set("k", a.clone(), LONG).await.expect("set");
    assert_eq!(store.get("k").await.expect("get"), Some(a.clone()), "what was set is there, byte for byte");
    store.set("k", b.clone(), LONG).await.expect("set");
    assert_eq!(store.get("k").await.expect("get"), Some(b.clone()), "a set replaces");

    let keys = ["missing".to_owned(), "k".to_owned(), "k".to_owned()];
    let found = store.get_many(&keys).await.expect("get_many");
    assert_eq!(found, [None, Some(b.clone()), Some(b.clone())], "get_many answers in the order of its keys");
    assert_eq!(store.get_many(&[]).await.expect("get_many"), [], "no keys, no answers");

    store.delete("k").await.expect("delete");
    assert_eq!(store.get("k").await.expect("get"), None, "a deleted key is gone");

    let key = "ключ: with\0 everything / in {it}";
    store.set(key, Bytes::new(), LONG).await.expect("set");
    assert_eq!(store.get(key).await.expect("get"), Some(Bytes::new()), "any text is a key, and no bytes are a value");

    store.set("short", a.clone(), Duration::from_millis(40)).await.expect("set");
    assert!(store.get("short").await.expect("get").is_some(), "a value lives for its time");
    runtime.sleep(Duration::from_millis(80)).await;
    assert_eq!(store.get("short").await.expect("get"), None, "and no longer");

    compare_and_set_contract(store, &a, &b).await;

    store.clear().await.expect("clear");
    assert_eq!(store.get(key).await.expect("get"), None, "clear removes everything");
}

async fn compare_and_set_contract(store: &dyn Store, a: &Bytes, b: &Bytes) {
    let Some(first) = store.compare_and_set("c", None, a.clone(), LONG).await.expect("compare_and_set") else { return };
    assert!(first, "expecting nothing where nothing is");
    let again = store.compare_and_set("c", None, b.clone(), LONG).await.expect("compare_and_set");
    assert_eq!(again, Some(false), "expecting nothing where something is");
    let wrong = store.compare_and_set("c", Some(b"x"), b.clone(), LONG).await.expect("compare_and_set");
    assert_eq!(wrong, Some(false), "a prefix that is not there");
    assert_eq!(store.get("c").await.expect("get"), Some(a.clone()), "a refused write changes nothing");
    let longer = store.compare_and_set("c", Some(b"a\0\xff and more"), b.clone(), LONG).await.expect("compare_and_set");
    assert_eq!(longer, Some(false), "a prefix longer than the value");
    let right = store.compare_and_set("c", Some(b"a\0"), b.clone(), LONG).await.expect("compare_and_set");
    assert_eq!(right, Some(true), "a prefix that is there");
    assert_eq!(store.get("c").await.expect("get"), Some(b.clone()), "an accepted write is there");
    store.delete("c").await.expect("delete");
    let gone = store.compare_and_set("c", Some(b"a"), b.clone(), LONG).await.expect("compare_and_set");
    assert_eq!(gone, Some(false), "something expected where nothing is");
}

/// Checks that `bus` keeps what [`Bus`] promises.
///
/// # Panics
///
/// With what was expected and what was found, where a promise is broken.
pub async fn bus_contract(bus: Arc<dyn Bus>, runtime: &dyn Runtime) {
    let limit = bus.message_limit();
    assert!(limit >= 1024, "message_limit is {limit}, and has to be 1024 at least");
    let mut one = bus.subscribe().await.expect("subscribe");
    let mut two = bus.subscribe().await.expect("subscribe");
    let messages = [Bytes::from_static(b"\0\xff"), Bytes::from(vec![7; limit]), Bytes::from_static(b"last")];
    for message in &messages {
        bus.publish(message.clone()).await.expect("publish");
    }
    for subscription in [&mut one, &mut two] {
        let mut missing: Vec<_> = messages.iter().collect();
        while !missing.is_empty() {
            let delivery = timeout(runtime, Duration::from_secs(10), subscription.next()).await;
            match delivery.expect("every message is delivered or reported as a gap").expect("next") {
                Delivery::Message(message) => missing.retain(|expected| **expected != message),
                Delivery::Gap => break,
                Delivery::Interrupted => {}
            }
        }
    }
    // A late subscriber gets what comes after it.
    let mut late = bus.subscribe().await.expect("subscribe");
    bus.publish(Bytes::from_static(b"after")).await.expect("publish");
    loop {
        let delivery = timeout(runtime, Duration::from_secs(10), late.next()).await;
        match delivery.expect("what is published after subscribe is delivered").expect("next") {
            Delivery::Message(message) if message == "after" => break,
            Delivery::Message(_) | Delivery::Gap | Delivery::Interrupted => {}
        }
    }
}
