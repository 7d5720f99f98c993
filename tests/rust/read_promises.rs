//! What a read promises (design notes, section 3), one test per promise and race.

use fleetcache::testing::SimRuntime;
use fleetcache::{EntryOptions, Runtime};
use fleetcache_tests::{Broken, Count, Fleet, Gate, alone, counting, ms};
use futures_util::future::join_all;

#[test]
fn p1_a_fresh_hit_is_answered_without_a_load() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let cache = alone(&runtime, &EntryOptions::new().ttl(ms(1000)));
        let loads = Count::new();
        for _ in 0..3 {
            assert_eq!(*cache.get_with("k", counting(&loads, 7)).await.unwrap(), 7);
        }
        assert_eq!(loads.get(), 1);
        assert_eq!(cache.stats().l1_hits, 2);
        runtime.advance(ms(1000)).await;
        assert_eq!(*cache.get_with("k", counting(&loads, 8)).await.unwrap(), 8, "past ttl it is loaded anew");
    });
}

#[test]
fn p2_many_callers_share_one_load() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let cache = alone(&runtime, &EntryOptions::new());
        let (loads, gate) = (Count::new(), Gate::new());
        let calls = (0..1000).map(|_| {
            let (cache, loads, gate) = (cache.clone(), loads.clone(), gate.clone());
            async move {
                cache
                    .get_with("k", move || async move {
                        loads.add();
                        gate.pass().await;
                        Ok::<_, Broken>(7)
                    })
                    .await
            }
        });
        let (answers, ()) = futures_util::future::join(join_all(calls), async { gate.held().await.release() }).await;
        assert!(answers.iter().all(|answer| **answer.as_ref().unwrap() == 7));
        assert_eq!(loads.get(), 1);
        assert_eq!(cache.stats().joined, 999);
    });
}

#[test]
fn p3_one_node_of_the_fleet_loads() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let fleet = Fleet::start(&runtime, 3, &EntryOptions::new()).await;
        let loads = Count::new();
        let calls = fleet.nodes.iter().map(|node| {
            let (loads, runtime) = (loads.clone(), runtime.clone());
            node.get_with("k", move || async move {
                loads.add();
                runtime.sleep(ms(50)).await;
                Ok::<_, Broken>(7)
            })
        });
        for answer in join_all(calls).await {
            assert_eq!(*answer.unwrap(), 7);
        }
        assert_eq!(loads.get(), 1);
        fleet.nodes[0].remove("k").await.unwrap();
        runtime.settle().await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
    });
}
