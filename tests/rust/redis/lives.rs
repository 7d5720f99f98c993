//! Servers that go back in time: a restart from an old snapshot brings removed values back.

use std::convert::Infallible;

use fleetcache::HybridCache;
use fleetcache_services::Redis;
use fleetcache_tests::ms;
use fleetcache_tests::real::{eventually, node, ready};

fn restart(server: &Redis) {
    server.kill();
    server.restart().unwrap();
    let there = server.command(&["EXISTS", "fleetcache::k"]).unwrap();
    assert_eq!(there.trim(), "1", "the removed value is back");
}

/// Waits until the node has the shared store again, without touching the key in question: a read that fails would list
/// it for repair by itself.
async fn has_the_store_again(node: &HybridCache<u64>) {
    let probes = node.scope("probes").unwrap();
    eventually("the shared store is reached again", ms(8_000), || async {
        probes.set("probe", 1).await.unwrap();
        probes.remove_local("probe");
        probes.get("probe").await.unwrap().is_some()
    })
    .await;
}

async fn load(node: &HybridCache<u64>) -> u64 {
    *node.get_with("k", || async { Ok::<_, Infallible>(2) }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_removed_a_value_does_not_read_it_again_and_removes_it_again() {
    for set in [false, true] {
        let server = Redis::start_with(&["--dbfilename", "old.rdb"]).unwrap();
        let (a, b) = (node(&server.url()), node(&server.url()));
        ready(&a, 1).await;
        ready(&b, 1).await;
        a.set("k", 1).await.unwrap();
        assert_eq!(server.command(&["SAVE"]).unwrap().trim(), "OK");
        if set {
            a.set("k", 2).await.unwrap();
        } else {
            a.remove("k").await.unwrap();
        }
        restart(&server);
        a.remove_local("k");
        b.remove_local("k");
        has_the_store_again(&a).await;
        // Not one old answer from who changed it, however early it asks.
        assert_eq!(load(&a).await, 2);
        eventually("b hears of it", ms(3_000), || async { load(&b).await == 2 }).await;
        assert_eq!(load(&a).await, 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_anyone_remembers_is_not_used_at_all() {
    for (lost, used) in [(10_000, true), (120_000, false)] {
        let server = Redis::start_with(&["--dbfilename", "old.rdb"]).unwrap();
        let early = node(&server.url());
        ready(&early, 0).await;
        early.set("k", 1).await.unwrap();
        early.close().await.unwrap();
        // As if the fleet had been alive for so long after what is in the snapshot.
        let beat = server.command(&["GET", "fleetcache:!b"]).unwrap();
        let (at, life) = beat.trim().split_once(' ').unwrap();
        let at = at.parse::<u64>().unwrap() - lost;
        server.command(&["SET", "fleetcache:!b", &format!("{at} {life}")]).unwrap();
        assert_eq!(server.command(&["SAVE"]).unwrap().trim(), "OK");

        let same = node(&server.url());
        assert_eq!(same.get("k").await.unwrap().as_deref(), Some(&1), "the same life: nothing was lost");
        same.close().await.unwrap();
        restart(&server);
        let late = node(&server.url());
        assert_eq!(late.get("k").await.unwrap().is_some(), used, "{lost} ms");
        ready(&late, 0).await;
        late.set("k", 3).await.unwrap();
        late.remove_local("k");
        assert_eq!(late.get("k").await.unwrap().as_deref(), Some(&3), "what is new is used");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_that_were_invalidated_before_a_restart_stay_dead() {
    let server = Redis::start_with(&["--dbfilename", "old.rdb"]).unwrap();
    let (a, b) = (node(&server.url()), node(&server.url()));
    ready(&a, 1).await;
    ready(&b, 1).await;
    // By a node that is gone before the restart: its own would remove the key again.
    let setter = node(&server.url());
    setter.set_with_tags("k", 1, ["t"]).await.unwrap();
    setter.close().await.unwrap();
    assert_eq!(a.get("k").await.unwrap().as_deref(), Some(&1));
    assert_eq!(server.command(&["SAVE"]).unwrap().trim(), "OK");
    a.remove_by_tag("t").await.unwrap();
    restart(&server);
    has_the_store_again(&a).await;
    // Also for a node that was not there: those who were have written their watermarks back.
    let late = node(&server.url());
    for node in [&a, &b, &late] {
        node.clear_memory();
        assert_eq!(node.get("k").await.unwrap(), None);
    }
}
