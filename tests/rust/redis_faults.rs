//! Two nodes under load while their Redis fails in every way there is.
//!
//! During each fault no read fails, none takes longer than the timeouts allow, and `health()` tells. After each, within
//! the stated bound, every key is what the database says on both nodes, nothing is left to repair, and when the nodes
//! are closed no connection is left.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "redis_faults/load.rs"]
mod load;

use std::time::Duration;

use fleetcache::PartHealth;
use fleetcache_services::{Fault, Proxy, Redis, RedisCluster, RedisSentinel};
use fleetcache_tests::ms;
use fleetcache_tests::real::{SILENCE, eventually, pause};

use self::load::Load;

/// How long a fault lasts.
const FAULT: Duration = ms(2_000);

async fn proxied(fault: Fault, down: bool) {
    let server = Redis::start().unwrap();
    let (one, two) = (Proxy::start(server.port()).unwrap(), Proxy::start(server.port()).unwrap());
    let url = |proxy: &Proxy| format!("redis://127.0.0.1:{}", proxy.port());
    let load = Load::start(&[url(&one), url(&two)]).await;
    // First one node alone, then both.
    for proxies in [vec![&one], vec![&one, &two]] {
        proxies.iter().for_each(|proxy| proxy.set(fault));
        if down {
            load.node_is(0, PartHealth::Down).await;
        }
        pause(FAULT).await;
        proxies.iter().for_each(|proxy| proxy.set(Fault::None));
        load.heals(&format!("{fault:?} of {} nodes", proxies.len())).await;
    }
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delay() {
    proxied(Fault::Delay(ms(30)), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blackhole() {
    proxied(Fault::Blackhole, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open() {
    proxied(Fault::HalfOpen, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reset() {
    proxied(Fault::Reset, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refuse() {
    proxied(Fault::Refuse, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut() {
    proxied(Fault::CutAfter(2_000), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_restarted_without_its_data() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    server.kill();
    load.node_is(0, PartHealth::Down).await;
    load.node_is(1, PartHealth::Down).await;
    pause(FAULT).await;
    server.restart().unwrap();
    load.heals("a restart without data").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_from_an_old_snapshot() {
    let server = Redis::start_with(&["--dbfilename", "old.rdb"]).unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    pause(ms(300)).await;
    assert_eq!(server.command(&["SAVE"]).unwrap().trim(), "OK");
    pause(FAULT).await;
    server.kill();
    pause(ms(300)).await;
    server.restart().unwrap();
    let keys: u64 = server.command(&["DBSIZE"]).unwrap().trim().parse().unwrap();
    assert!(keys > 10, "the old values are back: {keys}");
    load.heals("a restart from an old snapshot").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_for_three_times_the_silence() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    server.pause();
    load.node_is(0, PartHealth::Down).await;
    pause(3 * SILENCE).await;
    server.resume();
    load.heals("a pause").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    for _ in 0..3 {
        server.command(&["FLUSHALL"]).unwrap();
        pause(ms(200)).await;
    }
    load.heals("FLUSHALL").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    server.command(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]).unwrap();
    server.command(&["CONFIG", "SET", "maxmemory", "1"]).unwrap();
    eventually("the nodes know that it refuses", ms(3_000), || async {
        load.health(0).l2 == PartHealth::Degraded && load.health(0).bus == PartHealth::Down
    })
    .await;
    pause(FAULT).await;
    server.command(&["CONFIG", "SET", "maxmemory", "0"]).unwrap();
    load.heals("no memory").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn turned_into_a_replica() {
    let (server, other) = (Redis::start().unwrap(), Redis::start().unwrap());
    let load = Load::start(&[server.url(), server.url()]).await;
    server.command(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]).unwrap();
    load.node_is(0, PartHealth::Down).await;
    pause(FAULT).await;
    server.command(&["REPLICAOF", "NO", "ONE"]).unwrap();
    load.heals("READONLY").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_is_changed() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    server.command(&["ACL", "SETUSER", "admin", "on", ">a", "~*", "&*", "+@all"]).unwrap();
    server.command(&["CONFIG", "SET", "requirepass", "changed"]).unwrap();
    let admin = |command: &[&str]| {
        let login = ["--user", "admin", "--pass", "a", "--no-auth-warning"];
        server.command(&[&login, command].concat()).unwrap()
    };
    admin(&["CLIENT", "KILL", "TYPE", "normal"]);
    load.node_is(0, PartHealth::Down).await;
    pause(FAULT).await;
    admin(&["CONFIG", "SET", "requirepass", ""]);
    load.heals("a wrong password").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_is_forbidden() {
    let server = Redis::start().unwrap();
    let load = Load::start(&[server.url(), server.url()]).await;
    server.command(&["ACL", "SETUSER", "default", "-xadd"]).unwrap();
    eventually("the bus is down", ms(5_000), || async { load.health(0).bus == PartHealth::Down }).await;
    pause(FAULT).await;
    // Without the bus: by marks in the store.
    load.settles("while publishing is forbidden").await;
    load.resume();
    pause(ms(300)).await;
    server.command(&["ACL", "SETUSER", "default", "+xadd"]).unwrap();
    load.heals("publishing was forbidden").await;
    load.end(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_failover() {
    let fleet = RedisSentinel::start().unwrap();
    let load = Load::start(&[fleet.url(), fleet.url()]).await;
    fleet.primary().kill();
    load.node_is(0, PartHealth::Down).await;
    eventually("the replica is promoted", Duration::from_secs(20), || async {
        fleet.replica().command(&["ROLE"]).is_ok_and(|role| role.starts_with("master"))
    })
    .await;
    load.heals("a Sentinel failover").await;
    load.end(fleet.replica()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_primary_is_lost_and_replaced() {
    let cluster = RedisCluster::start(1).unwrap();
    let load = Load::start(&[cluster.url(), cluster.url()]).await;
    // The one that holds the watermarks hurts most.
    let lost = cluster.holder("fleetcache:!w").unwrap();
    lost.kill();
    load.node_is(0, PartHealth::Down).await;
    eventually("a replica takes over", Duration::from_secs(20), || async {
        cluster.holder("fleetcache:!w").is_ok_and(|holder| holder.port() != lost.port())
    })
    .await;
    load.heals("a primary was lost").await;
    // And back, as a replica that is promoted by hand.
    lost.restart().unwrap();
    eventually("it follows", Duration::from_secs(20), || async {
        lost.command(&["INFO", "replication"]).is_ok_and(|info| info.contains("master_link_status:up"))
    })
    .await;
    eventually("it is the primary again", Duration::from_secs(20), || async {
        let _ = lost.command(&["CLUSTER", "FAILOVER"]).unwrap();
        pause(ms(500)).await;
        cluster.holder("fleetcache:!w").is_ok_and(|holder| holder.port() == lost.port())
    })
    .await;
    load.heals("a failover by hand").await;
    load.end(lost).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_of_a_cluster_move() {
    let cluster = RedisCluster::start(0).unwrap();
    let load = Load::start(&[cluster.url(), cluster.url()]).await;
    let [from, to, _] = cluster.nodes() else { panic!("three nodes") };
    let id = |node: &Redis| node.command(&["CLUSTER", "MYID"]).unwrap().trim().to_owned();
    let port = from.port().to_string();
    let moved = std::process::Command::new("redis-cli")
        .args([
            "--cluster",
            "reshard",
            &format!("127.0.0.1:{port}"),
            "--cluster-from",
            &id(from),
            "--cluster-to",
            &id(to),
        ])
        .args(["--cluster-slots", "3000", "--cluster-yes"])
        .output();
    let moved = tokio::task::spawn_blocking(move || moved.unwrap()).await.unwrap();
    assert!(moved.status.success(), "{}", String::from_utf8_lossy(&moved.stdout));
    load.heals("slots moved").await;
    load.end(to).await;
}
