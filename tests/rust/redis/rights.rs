//! The rights that the documentation names are enough, and what is refused is told apart from what is out of reach.

use fleetcache::{PartHealth, RedisConfig, RedisStore, Store};
use fleetcache_services::Redis;
use fleetcache_tests::real::{eventually, node, node_with, ready};
use fleetcache_tests::{Count, counting, ms};

/// The rights in a backend's documentation.
fn documented(source: &str) -> Vec<String> {
    let block = source.split("ACL SETUSER cache").nth(1).unwrap().split("```").next().unwrap();
    block.split_whitespace().filter(|word| *word != "///").map(str::to_owned).collect()
}

fn with_rights(server: &Redis, rights: &[String]) -> String {
    let mut command = vec!["ACL", "SETUSER", "cache"];
    command.extend(rights.iter().map(String::as_str));
    assert_eq!(server.command(&command).unwrap().trim(), "OK");
    format!("redis://cache:password@127.0.0.1:{}", server.port())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_rights_are_enough() {
    let server = Redis::start().unwrap();
    let mut rights = documented(include_str!("../../../core/src/store/redis.rs"));
    rights.extend(documented(include_str!("../../../core/src/bus/redis_streams.rs")));
    assert!(rights.contains(&"-@all".to_owned()) && rights.contains(&"+xread".to_owned()), "{rights:?}");
    let url = with_rights(&server, &rights);
    let (a, b) = (node(&url), node(&url));
    ready(&a, 1).await;
    ready(&b, 1).await;
    let loads = Count::new();
    assert_eq!(*a.get_with("k", counting(&loads, 1)).await.unwrap(), 1);
    a.set("k", 2).await.unwrap();
    b.get("k").await.unwrap();
    a.remove_many(&["k", "l"]).await.unwrap();
    eventually("b drops it", ms(2_000), || async { b.get("k").await.unwrap().is_none() }).await;
    a.remove_by_tag("t").await.unwrap();
    a.remove_all().await.unwrap();
    b.get_many(&["k", "l"]).await.unwrap();
    let failing = a.get_with("f", fleetcache_tests::failing(&loads)).await;
    assert!(failing.is_err());
    for (name, node) in [("a", &a), ("b", &b)] {
        let stats = node.stats();
        assert_eq!((stats.l2_errors, stats.bus_errors), (0, 0), "{name}: {}", server.command(&["ACL", "LOG"]).unwrap());
        assert!(node.health().is_good(), "{:?}", node.health());
    }
    assert_eq!(server.command(&["ACL", "LOG"]).unwrap().trim(), "", "nothing was denied");
    let mine = server.command(&["--user", "cache", "--pass", "password", "--no-auth-warning", "GET", "other:k"]);
    assert!(mine.unwrap().contains("NOPERM"), "other keys are out of its reach");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_may_not_be_published_to_is_replaced_by_marks_in_the_store() {
    let server = Redis::start().unwrap();
    let mut rights = documented(include_str!("../../../core/src/store/redis.rs"));
    rights.extend(documented(include_str!("../../../core/src/bus/redis_streams.rs")));
    let healthy = with_rights(&server, &rights);
    let b = node(&healthy);
    ready(&b, 0).await;
    // Another user, for whom the stream is out of bounds.
    let barred = healthy.replace("cache:", "barred:");
    let mut command = vec!["ACL", "SETUSER", "barred"];
    rights.retain(|right| right != "+xadd");
    command.extend(rights.iter().map(String::as_str));
    assert_eq!(server.command(&command).unwrap().trim(), "OK");
    let a = node_with(&barred, |builder| builder.strict(true));

    let loads = Count::new();
    for key in ["removed", "set"] {
        assert_eq!(*b.get_with(key, counting(&loads, 1)).await.unwrap(), 1);
        assert_eq!(*a.get_with(key, counting(&loads, 1)).await.unwrap(), 1);
    }
    a.remove("removed").await.expect_err("strict: the message did not leave");
    a.set("set", 2).await.expect_err("strict");
    assert_eq!(a.health().bus, PartHealth::Down);
    // Twice the time between two polls, and the machine's.
    for key in ["removed", "set"] {
        eventually("b hears of it all the same", ms(3_000), || async {
            b.get(key).await.unwrap().as_deref() != Some(&1)
        })
        .await;
    }
    eventually("a has nothing left to repair", ms(3_000), || async { a.stats().repairs == 0 }).await;
    assert_eq!(b.health().bus, PartHealth::Up, "b hears itself");
    assert_eq!(a.health().l2, PartHealth::Up);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_leaves_the_loader_and_the_memory() {
    let server = Redis::start_with(&["--requirepass", "right"]).unwrap();
    let cache = node(&format!("redis://:wrong@127.0.0.1:{}", server.port()));
    let loads = Count::new();
    for _ in 0..20 {
        assert_eq!(*cache.get_with("k", counting(&loads, 1)).await.unwrap(), 1);
    }
    eventually("the parts are known to be down", ms(5_000), || async {
        let _ = cache.get("other").await;
        let health = cache.health();
        health.l2 == PartHealth::Down && health.bus == PartHealth::Down
    })
    .await;
    let store =
        RedisStore::with_config(RedisConfig::new(&format!("redis://:wrong@127.0.0.1:{}", server.port())).unwrap());
    let error = store.unwrap().get("k").await.unwrap_err().to_string();
    assert!(error.contains("WRONGPASS") || error.to_lowercase().contains("auth"), "{error}");
    assert!(!error.contains(":wrong@"), "{error}");
}
