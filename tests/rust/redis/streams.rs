//! The bus on Redis Streams: what is missed in an outage is read afterwards, and what cannot be is a gap.

use std::sync::Arc;

use bytes::Bytes;
use fleetcache::{Bus, Delivery, PartHealth, RedisConfig, RedisStreamsBus, Subscription};
use fleetcache_services::{Fault, Proxy, Redis};
use fleetcache_tests::ms;
use fleetcache_tests::real::{eventually, node, ready};

const STREAM: &str = "fleetcache:!s";

fn bus(port: u16) -> RedisStreamsBus {
    let config = RedisConfig::new(&format!("redis://127.0.0.1:{port}")).unwrap();
    RedisStreamsBus::with_config(config.connect_timeout(ms(300)).response_timeout(ms(300))).unwrap().max_length(1_000)
}

fn message(number: usize) -> Bytes {
    Bytes::from(format!("message {number}"))
}

async fn next(subscription: &mut Box<dyn Subscription>) -> Delivery {
    tokio::select! {
        delivery = subscription.next() => delivery.unwrap(),
        () = fleetcache_tests::real::pause(ms(8_000)) => panic!("nothing is delivered"),
    }
}

/// A subscription through a proxy, and a way to publish beside it.
async fn behind_a_proxy(server: &Redis) -> (Proxy, Box<dyn Subscription>, Arc<dyn Bus>) {
    let proxy = Proxy::start(server.port()).unwrap();
    let direct: Arc<dyn Bus> = Arc::new(bus(server.port()));
    let mut subscription = bus(proxy.port()).subscribe().await.unwrap();
    direct.publish(message(0)).await.unwrap();
    assert_eq!(next(&mut subscription).await, Delivery::Message(message(0)));
    (proxy, subscription, direct)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_interruption_it_goes_on_where_it_stopped() {
    let server = Redis::start().unwrap();
    let (proxy, mut subscription, direct) = behind_a_proxy(&server).await;
    let mut number = 1;
    for fault in [Fault::Reset, Fault::Refuse, Fault::Blackhole, Fault::HalfOpen] {
        proxy.set(fault);
        for _ in 0..300 {
            direct.publish(message(number)).await.unwrap();
            number += 1;
        }
        assert_eq!(next(&mut subscription).await, Delivery::Interrupted, "{fault:?}");
        proxy.set(Fault::None);
        let mut expected = number - 300;
        while expected < number {
            match next(&mut subscription).await {
                Delivery::Interrupted => {}
                delivery => {
                    assert_eq!(delivery, Delivery::Message(message(expected)), "{fault:?}");
                    expected += 1;
                }
            }
        }
    }
}

/// What follows the interruption that a fault made.
async fn after_interruption(subscription: &mut Box<dyn Subscription>) -> Delivery {
    loop {
        match next(subscription).await {
            Delivery::Interrupted => {}
            other => return other,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_trimmed_past_the_reader_is_a_gap() {
    let server = Redis::start().unwrap();
    let (proxy, mut subscription, direct) = behind_a_proxy(&server).await;
    proxy.set(Fault::Refuse);
    assert_eq!(next(&mut subscription).await, Delivery::Interrupted);
    for number in 1..3_000 {
        direct.publish(message(number)).await.unwrap();
    }
    let length: usize = server.command(&["XLEN", STREAM]).unwrap().trim().parse().unwrap();
    assert!(length < 1_200, "{length}: roughly a thousand are kept");
    proxy.set(Fault::None);
    assert_eq!(after_interruption(&mut subscription).await, Delivery::Gap);
    // And then what is left, to the end.
    loop {
        if next(&mut subscription).await == Delivery::Message(message(2_999)) {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_deleted_is_a_gap_and_a_new_one_is_heard() {
    let server = Redis::start().unwrap();
    let (_proxy, mut subscription, direct) = behind_a_proxy(&server).await;
    server.command(&["DEL", STREAM]).unwrap();
    assert_eq!(next(&mut subscription).await, Delivery::Gap, "also without a new message");
    direct.publish(message(1)).await.unwrap();
    assert_eq!(next(&mut subscription).await, Delivery::Message(message(1)));
    // A new one whose ids are behind, as after a failover to a slower clock.
    server.command(&["DEL", STREAM]).unwrap();
    server.command(&["XADD", STREAM, "5-1", "m", "message 2"]).unwrap();
    assert_eq!(next(&mut subscription).await, Delivery::Gap);
    assert_eq!(next(&mut subscription).await, Delivery::Message(message(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarted_is_a_gap() {
    for settings in [&[][..], &["--appendonly", "yes", "--appendfsync", "always"]] {
        let server = Redis::start_with(settings).unwrap();
        let (_proxy, mut subscription, direct) = behind_a_proxy(&server).await;
        server.kill();
        assert_eq!(next(&mut subscription).await, Delivery::Interrupted);
        server.restart().unwrap();
        assert_eq!(after_interruption(&mut subscription).await, Delivery::Gap);
        eventually("it can be published to again", ms(3_000), || async { direct.publish(message(1)).await.is_ok() })
            .await;
        assert_eq!(next(&mut subscription).await, Delivery::Message(message(1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_node_is_left_on_the_server() {
    let server = Redis::start().unwrap();
    let cache = node(&server.url());
    ready(&cache, 0).await;
    cache.set("k", 1).await.unwrap();
    drop(cache);
    let groups = server.command(&["XINFO", "GROUPS", STREAM]).unwrap();
    assert_eq!(groups.trim(), "", "no consumer group");
    let mut keys: Vec<_> = server.command(&["KEYS", "*"]).unwrap().lines().map(str::to_owned).collect();
    keys.sort();
    assert_eq!(keys, ["fleetcache:!b", "fleetcache:!s", "fleetcache:!w", "fleetcache::k"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_and_its_message_are_one_step() {
    let server = Redis::start().unwrap();
    let cache = node(&server.url());
    ready(&cache, 0).await;
    cache.set("k", 1).await.unwrap();
    let calls = |name: &str| -> u64 {
        let stats = server.command(&["INFO", "commandstats"]).unwrap();
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls="))?.split(',').next()?.parse().ok());
        line.unwrap_or(0)
    };
    let before = calls("exec");
    cache.remove("k").await.unwrap();
    assert_eq!(calls("exec"), before + 1);
    // Many at once travel together.
    let keys: Vec<_> = (0..1_000).map(|key| key.to_string()).collect();
    futures_util::future::join_all(keys.iter().map(|key| cache.remove(key))).await;
    assert!(calls("exec") < before + 200, "{} transactions for 1,000 removes", calls("exec") - before);
    assert_eq!(cache.health().bus, PartHealth::Up);
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_of_two_prefixes_do_not_hear_each_other() {
    let server = Redis::start().unwrap();
    let named = |prefix: &str| fleetcache_tests::real::node_with(&server.url(), |builder| builder.prefix(prefix));
    let (one, two) = (named("one"), named("two"));
    ready(&one, 0).await;
    ready(&two, 0).await;
    one.set("k", 1).await.unwrap();
    two.set("k", 2).await.unwrap();
    one.remove("k").await.unwrap();
    assert_eq!(two.get("k").await.unwrap().as_deref(), Some(&2));
    assert_eq!((one.health().peers, two.health().peers), (0, 0));
}
