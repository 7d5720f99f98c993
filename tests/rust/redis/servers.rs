//! Every kind of server keeps the contracts and carries a fleet.

use std::sync::Arc;
use std::time::Duration;

use fleetcache::testing::{bus_contract, store_contract};
use fleetcache::{ErrorKind, HybridCache, PartHealth, RedisConfig, RedisStore, RedisStreamsBus};
use fleetcache_services::{Certificates, Redis, RedisCluster, RedisSentinel};
use fleetcache_tests::real::{eventually, node, ready, runtime};
use fleetcache_tests::{Count, counting, ms};

async fn keeps_the_contracts(config: RedisConfig) {
    let runtime = runtime();
    store_contract(&RedisStore::with_config(config.clone()).unwrap(), &*runtime).await;
    bus_contract(Arc::new(RedisStreamsBus::with_config(config).unwrap()), &*runtime).await;
}

async fn carries_a_fleet(a: HybridCache<u64>, b: HybridCache<u64>) {
    ready(&a, 1).await;
    ready(&b, 1).await;
    let loads = Count::new();
    assert_eq!(*a.get_with("k", counting(&loads, 1)).await.unwrap(), 1);
    assert_eq!(*b.get_with("k", counting(&loads, 2)).await.unwrap(), 1, "found in the shared store");
    assert_eq!(loads.get(), 1);

    a.remove("k").await.unwrap();
    eventually("b drops what a removed", ms(2_000), || async { b.get("k").await.unwrap().is_none() }).await;
    a.set("k", 3).await.unwrap();
    eventually("b reads what a set", ms(2_000), || async { b.get("k").await.unwrap().as_deref() == Some(&3) }).await;

    let (users_a, users_b) = (a.scope("users").unwrap(), b.scope("users").unwrap());
    for id in 0..50 {
        users_a.set_with_tags(&format!("user:{id}"), id, ["team:7"]).await.unwrap();
    }
    let keys: Vec<_> = (0..50).map(|id| format!("user:{id}")).collect();
    let found = users_b.get_many(&keys).await.unwrap();
    assert!(found.iter().zip(0..).all(|(found, id)| found.as_deref() == Some(&id)), "{found:?}");
    users_a.remove_by_tag("team:7").await.unwrap();
    assert!(users_a.get("user:1").await.unwrap().is_none());
    eventually("b honours the tag", ms(2_000), || async { users_b.get("user:1").await.unwrap().is_none() }).await;
    assert_eq!(a.health().l2, PartHealth::Up);
    a.close().await.unwrap();
    b.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server() {
    let server = Redis::start().unwrap();
    keeps_the_contracts(RedisConfig::new(&server.url()).unwrap()).await;
    carries_a_fleet(node(&server.url()), node(&server.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster() {
    let cluster = RedisCluster::start(0).unwrap();
    keeps_the_contracts(RedisConfig::new(&cluster.url()).unwrap()).await;
    carries_a_fleet(node(&cluster.url()), node(&cluster.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_known_to_sentinels() {
    let fleet = RedisSentinel::start().unwrap();
    keeps_the_contracts(RedisConfig::new(&fleet.url()).unwrap()).await;
    carries_a_fleet(node(&fleet.url()), node(&fleet.url())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_authority_and_a_client_certificate_of_ones_own() {
    let certificates = Certificates::make().unwrap();
    let server = Redis::start_with_tls(&certificates).unwrap();
    let url = format!("rediss://127.0.0.1:{}", server.tls_port().unwrap());
    let pem = |name: &str| certificates.pem(name).unwrap();
    let trusting = RedisConfig::new(&url).unwrap().ca_certificate(pem("ca.pem"));
    let known = trusting.clone().client_certificate(pem("client.pem"), pem("client.key"));
    keeps_the_contracts(known.clone()).await;
    let tls_node = || {
        let builder = HybridCache::builder().ttl(Duration::from_secs(300));
        let store = RedisStore::with_config(known.clone()).unwrap();
        builder.l2(store).bus(RedisStreamsBus::with_config(known.clone()).unwrap()).build().unwrap()
    };
    carries_a_fleet(tls_node(), tls_node()).await;

    for refused in [trusting, RedisConfig::new(&url).unwrap()] {
        let cache: HybridCache<u64> =
            HybridCache::builder().l2(RedisStore::with_config(refused).unwrap()).build().unwrap();
        let loads = Count::new();
        assert_eq!(*cache.get_with("k", counting(&loads, 1)).await.unwrap(), 1, "reads go on without L2");
        assert_eq!(cache.stats().l2_hits, 0);
        assert!(cache.stats().l2_errors > 0, "no certificate, or an authority nobody knows");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_user_and_password_of_the_url_are_used() {
    let server = Redis::start().unwrap();
    server.command(&["ACL", "SETUSER", "ann", "on", ">p@ss:word", "~*", "&*", "+@all"]).unwrap();
    server.command(&["ACL", "SETUSER", "default", "off"]).unwrap();
    let url = format!("redis://ann:p%40ss%3Aword@127.0.0.1:{}/5", server.port());
    let cache = node(&url);
    ready(&cache, 0).await;
    cache.set("k", 1).await.unwrap();
    let there = fleetcache_services::redis_cli(
        server.port(),
        &["--no-auth-warning", "--user", "ann", "--pass", "p@ss:word", "-n", "5", "EXISTS", "fleetcache::k"],
    );
    assert_eq!(there.unwrap().trim(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_uses_one_connection_for_values_and_one_each_to_publish_and_to_read() {
    let server = Redis::start().unwrap();
    let cache = node(&server.url());
    ready(&cache, 0).await;
    for key in 0..200_u64 {
        cache.set(&key.to_string(), key).await.unwrap();
    }
    let connections = || {
        let list = server.command(&["CLIENT", "LIST"]).unwrap();
        list.lines().filter(|line| !line.trim().is_empty() && !line.contains("cmd=client")).count()
    };
    // The question's own connection shows its command.
    assert_eq!(connections(), 3, "{}", server.command(&["CLIENT", "LIST"]).unwrap());
    cache.close().await.unwrap();
    eventually("closed with the cache", ms(2_000), || async { connections() == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_are_one_round_trip_to_each_server() {
    let cluster = RedisCluster::start(0).unwrap();
    let (writer, reader) = (node(&cluster.url()), node(&cluster.url()));
    ready(&reader, 1).await;
    let keys: Vec<_> = (0..300).map(|key| key.to_string()).collect();
    for key in &keys {
        writer.set(key, 1).await.unwrap();
    }
    let reads = || -> Vec<u64> {
        let reads =
            |info: &str| info.lines().find_map(|line| line.strip_prefix("total_reads_processed:")?.trim().parse().ok());
        cluster.nodes().iter().map(|node| reads(&node.command(&["INFO", "stats"]).unwrap()).unwrap()).collect()
    };
    let before = reads();
    let found = reader.get_many(&keys).await.unwrap();
    assert!(found.iter().all(Option::is_some));
    for (before, after) in before.iter().zip(reads()) {
        // Beside it: the question itself, heartbeats, polls, the cluster's own gossip.
        assert!(after - before < 40, "{} reads for 100 keys", after - before);
    }
}

#[test]
fn a_bad_url_is_refused_at_once() {
    for url in ["redis://", "http://x", "redis://a,b", "redis+sentinel://a"] {
        for error in [RedisStore::new(url).unwrap_err(), RedisStreamsBus::new(url).unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_call_of_a_new_node_counts() {
    let server = Redis::start().unwrap();
    for key in ["on an empty server", "on one in use"] {
        let first = node(&server.url());
        first.set(key, 1).await.unwrap();
        first.remove_local(key);
        assert_eq!(first.get(key).await.unwrap().as_deref(), Some(&1), "{key}");
        let loads = Count::new();
        assert_eq!(*node(&server.url()).get_with(key, counting(&loads, 2)).await.unwrap(), 1, "{key}");
    }
}
