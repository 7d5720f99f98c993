//! What an invalidation promises (design notes, section 4): one test per promise and race, by its number.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleetcache::{EntryOptions, ErrorKind, Loaded, PartHealth};
use fleetcache_tests::{Count, Fleet, Gate, Op, alone, counting, held, ms, never, run};
use futures_util::future::{join, join_all};

fn options() -> EntryOptions {
    EntryOptions::new().ttl(ms(60_000))
}

/// What the test does while a load is held.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    Remove,
    RemoveMany,
    Set,
    Clear,
    RemoveAll,
    RemoveByTag,
    RemoveLocal,
    ClearMemory,
}

use Meanwhile::{Clear, ClearMemory, Remove, RemoveAll, RemoveByTag, RemoveLocal, RemoveMany, Set};

async fn invalidate(cache: &fleetcache::HybridCache<u64>, how: Meanwhile) {
    match how {
        Remove => cache.remove("k").await.unwrap(),
        RemoveMany => cache.remove_many(&["other", "k"]).await.unwrap(),
        Set => cache.set("k", 5).await.unwrap(),
        Clear => cache.clear().await.unwrap(),
        RemoveAll => cache.remove_all().await.unwrap(),
        RemoveByTag => cache.remove_by_tag("t").await.unwrap(),
        RemoveLocal => cache.remove_local("k"),
        ClearMemory => cache.clear_memory(),
    }
}

#[test]
fn p1_a_load_that_began_before_an_invalidation_of_its_own_node_is_not_kept() {
    run(async |runtime| {
        for how in [Remove, RemoveMany, Set, Clear, RemoveAll, RemoveByTag, RemoveLocal, ClearMemory] {
            for size in [0, 1] {
                let fleet = Fleet::start(&runtime, size, &options()).await;
                let cache = fleet.nodes.first().cloned().unwrap_or_else(|| alone(&runtime, &options()));
                let (loads, gate) = (Count::new(), Gate::new());
                let tagged = held(&loads, &gate, 1);
                let load = cache.get_with_context("k", move |_| async move {
                    tagged().await.map(|v| Loaded::value(v).tags(["t"]))
                });
                let (answer, ()) = join(load, async {
                    let standing = gate.held().await;
                    invalidate(&cache, how).await;
                    // With a store, what does not touch the key there leaves its lease to the old load; and whether a tag
                    // killed the load is known when it ends.
                    let own = matches!(how, Clear | RemoveLocal | ClearMemory) && size == 0;
                    if own || matches!(how, Remove | RemoveMany | Set) {
                        let later = cache.get_with("k", counting(&loads, 2)).await.unwrap();
                        let newer = if matches!(how, Set) { 5 } else { 2 };
                        assert_eq!(*later, newer, "{how:?}: a later caller does not join the old load");
                    }
                    standing.release();
                })
                .await;
                assert!([1, 2, 5].contains(&*answer.unwrap()), "{how:?}: who waited is answered");
                let kept = cache.get("k").await.unwrap();
                let local = matches!(how, Clear | RemoveLocal | ClearMemory) && size == 1;
                assert!(local || kept.as_deref() != Some(&1), "{how:?}: the old value is not kept");
            }
        }
    });
}

#[test]
fn p1_what_was_loading_when_memory_was_cleared_is_not_kept() {
    run(async |runtime| {
        let cache = alone(&runtime, &options());
        for handle in [cache.clone(), cache.scope("s").unwrap()] {
            let (loads, gate) = (Count::new(), Gate::new());
            let (answer, ()) = join(handle.get_with("k", held(&loads, &gate, 1)), async {
                let standing = gate.held().await;
                handle.clear_memory();
                standing.release();
            })
            .await;
            assert_eq!(*answer.unwrap(), 1);
            assert!(handle.peek("k").is_none());
        }
    });
}

#[test]
fn p1_a_load_that_began_before_another_nodes_invalidation_gets_into_neither_tier() {
    run(async |runtime| {
        for how in [Remove, RemoveMany, Set, RemoveAll, RemoveByTag] {
            let fleet = Fleet::start(&runtime, 2, &options()).await;
            let (loads, gate) = (Count::new(), Gate::new());
            let tagged = held(&loads, &gate, 1);
            let load = fleet.nodes[0]
                .get_with_context("k", move |_| async move { tagged().await.map(|v| Loaded::value(v).tags(["t"])) });
            let (answer, ()) = join(load, async {
                let standing = gate.held().await;
                invalidate(&fleet.nodes[1], how).await;
                standing.release();
            })
            .await;
            assert!([1, 5].contains(&*answer.unwrap()), "{how:?}");
            runtime.advance(ms(10)).await;
            for node in &fleet.nodes {
                assert_ne!(node.get("k").await.unwrap().as_deref(), Some(&1), "{how:?}");
            }
        }
    });
}

#[test]
fn p1_a_refresh_is_fenced_like_a_cold_load() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_while_revalidate(ms(60_000));
        let fleet = Fleet::start(&runtime, 2, &options).await;
        let (loads, gate) = (Count::new(), Gate::new());
        fleet.nodes[0].get_with("k", counting(&loads, 1)).await.unwrap();
        runtime.advance(ms(150)).await;
        assert_eq!(
            *fleet.nodes[0].get_with("k", held(&loads, &gate, 1)).await.unwrap(),
            1,
            "stale, and refreshed behind"
        );
        let standing = gate.held().await;
        assert_eq!(fleet.cell("k").await, Some('V'), "the lease lies over the stale value");
        assert_eq!(*fleet.nodes[1].get("k").await.unwrap().unwrap(), 1, "which others still read");
        fleet.nodes[1].remove("k").await.unwrap();
        standing.release();
        runtime.advance(ms(10)).await;
        for node in &fleet.nodes {
            assert_eq!(node.get("k").await.unwrap(), None);
        }
    });
}

#[test]
fn p1_a_read_of_the_store_that_began_before_a_remove_does_not_fill_memory() {
    run(async |runtime| {
        for (remover, with_loader) in [(0, false), (1, false), (0, true), (1, true)] {
            let fleet = Fleet::start(&runtime, 2, &options()).await;
            fleet.nodes[1].set("k", 1).await.unwrap();
            runtime.advance(ms(5)).await;
            let gate = Gate::new();
            fleet.stores[0].hold_after(Op::Get, &gate);
            let read = async {
                if with_loader {
                    Some(fleet.nodes[0].get_with("k", counting(&Count::new(), 2)).await.unwrap())
                } else {
                    fleet.nodes[0].get("k").await.unwrap()
                }
            };
            let (answer, ()) = join(read, async {
                let standing = gate.held().await;
                fleet.nodes[remover].remove("k").await.unwrap();
                runtime.settle().await;
                standing.release();
            })
            .await;
            assert_eq!(answer.as_deref(), Some(&1), "who waited is answered");
            assert_eq!(fleet.nodes[0].get("k").await.unwrap(), None, "and the value is not kept");
        }
    });
}

#[test]
fn p1_a_set_that_was_overtaken_by_another_nodes_does_not_stay_in_memory() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        let gate = Gate::new();
        // Carried out; the answer is under way.
        fleet.stores[0].hold_after(Op::Write, &gate);
        let (first, ()) = join(fleet.nodes[0].set("k", 1), async {
            let standing = gate.held().await;
            fleet.nodes[1].set("k", 2).await.unwrap();
            runtime.settle().await;
            standing.release();
        })
        .await;
        first.unwrap();
        runtime.advance(ms(10)).await;
        let seen = join_all(fleet.nodes.iter().map(|node| node.get("k"))).await;
        let seen: Vec<_> = seen.into_iter().map(|value| value.unwrap().map(|value| *value)).collect();
        assert_eq!(seen[0], seen[1], "both nodes agree");
        assert_eq!(seen[0], Some(2));
    });
}

#[test]
fn p1_a_dead_load_does_not_make_the_fleet_wait_for_its_lease() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.buses[0].delay(ms(50));
        let (loads, gate) = (Count::new(), Gate::new());
        fleet.nodes[1].remove("k").await.unwrap();
        // Node 0 leases and loads before it has the message of the earlier remove.
        let load = fleet.nodes[0].get_with("k", held(&loads, &gate, 1));
        let (answer, ()) = join(load, async {
            let standing = gate.held().await;
            runtime.advance(ms(100)).await;
            standing.release();
        })
        .await;
        assert_eq!(*answer.unwrap(), 1);
        assert_eq!(*fleet.nodes[1].get("k").await.unwrap().unwrap(), 1, "its fill was valid and is in the store");
    });
}

#[test]
fn p2_a_reader_between_the_steps_of_a_remove_leaves_nothing_behind() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &options()).await;
        let cache = &fleet.nodes[0];
        cache.set("k", 1).await.unwrap();
        let (before, after) = (Gate::new(), Gate::new());
        fleet.stores[0].hold_before(Op::Delete, &before);
        fleet.stores[0].hold_after(Op::Delete, &after);
        let (removed, ()) = join(cache.remove("k"), async {
            let standing = before.held().await;
            // Memory is empty, the store is not: the reader copies the old value back.
            assert_eq!(cache.get("k").await.unwrap().as_deref(), Some(&1));
            standing.release();
            after.held().await.release();
        })
        .await;
        removed.unwrap();
        assert_eq!(cache.get("k").await.unwrap(), None);
    });
}

#[test]
fn p2_a_message_is_sent_when_the_store_has_let_go() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(5)).await;
        let sent = fleet.buses[0].published().len();
        let gate = Gate::new();
        fleet.stores[0].hold_before(Op::Delete, &gate);
        let (removed, ()) = join(fleet.nodes[0].remove("k"), async {
            let standing = gate.held().await;
            runtime.settle().await;
            assert_eq!(fleet.buses[0].published().len(), sent, "nothing is published before the delete");
            standing.release();
        })
        .await;
        removed.unwrap();
        assert_eq!(fleet.buses[0].published().len(), sent + 1, "and the call returns after the publish");
    });
}

#[test]
fn p2_a_remove_runs_to_its_end_when_its_caller_goes_away() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(5)).await;
        assert!(fleet.nodes[1].get("k").await.unwrap().is_some());
        let mut call = Box::pin(fleet.nodes[0].remove("k"));
        assert!(futures_util::poll!(&mut call).is_pending());
        drop(call);
        runtime.advance(ms(5)).await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
    });
}

#[test]
fn p3_a_node_reads_its_own_writes_and_others_when_they_have_the_message() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 3, &options()).await;
        for version in 0..20 {
            let writer = (version % 3) as usize;
            fleet.nodes[writer].set("k", version).await.unwrap();
            assert_eq!(fleet.nodes[writer].get("k").await.unwrap().as_deref(), Some(&version));
            runtime.settle().await;
            for node in &fleet.nodes {
                assert_eq!(node.get("k").await.unwrap().as_deref(), Some(&version));
            }
            fleet.nodes[(writer + 1) % 3].remove("k").await.unwrap();
            runtime.settle().await;
            for node in &fleet.nodes {
                assert_eq!(node.get("k").await.unwrap(), None);
            }
        }
    });
}

#[test]
fn p3_keys_of_two_scopes_never_meet() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        let (one, two) = (fleet.nodes[0].scope("a").unwrap(), fleet.nodes[0].scope("a/b").unwrap());
        one.set("k", 1).await.unwrap();
        two.set("k", 2).await.unwrap();
        fleet.nodes[0].set("k", 3).await.unwrap();
        assert_eq!(fleet.nodes[1].scope("a").unwrap().get("k").await.unwrap().as_deref(), Some(&1));
        assert_eq!(fleet.nodes[1].scope("a").unwrap().scope("b").unwrap().get("k").await.unwrap().as_deref(), Some(&2));
        one.remove_all().await.unwrap();
        runtime.settle().await;
        assert_eq!(fleet.nodes[1].scope("a").unwrap().get("k").await.unwrap(), None);
        assert_eq!(fleet.nodes[1].scope("a/b").unwrap().get("k").await.unwrap().as_deref(), Some(&2));
        two.clear().await.unwrap();
        assert_eq!(fleet.nodes[1].get("k").await.unwrap().as_deref(), Some(&3));
    });
}

#[test]
fn p4_an_outage_of_the_store_brings_no_older_value_back() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &options()).await;
        let cache = &fleet.nodes[0];
        cache.get_with("k", counting(&Count::new(), 1)).await.unwrap();
        cache.remove_local("k");
        fleet.stores[0].down(true);
        assert_eq!(
            *cache.get_with("k", counting(&Count::new(), 2)).await.unwrap(),
            2,
            "loaded anew while the store is out"
        );
        fleet.stores[0].down(false);
        cache.remove_local("k");
        assert_eq!(*cache.get_with("k", counting(&Count::new(), 3)).await.unwrap(), 3, "the store's 1 is not read");
        runtime.advance(ms(20_000)).await;
        cache.remove_local("k");
        let found = cache.get("k").await.unwrap();
        assert!(found.is_none() || *found.unwrap() == 3, "the repair has removed it");
        assert!(cache.health().is_good());
    });
}

#[test]
fn p5_a_lost_message_is_noticed_within_a_heartbeat() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(10)).await;
        assert!(fleet.nodes[1].get("k").await.unwrap().is_some());
        fleet.buses[1].lose_received(true);
        fleet.nodes[0].remove("k").await.unwrap();
        runtime.settle().await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap().as_deref(), Some(&1), "it has not heard");
        fleet.buses[1].lose_received(false);
        let gaps = fleet.nodes[1].stats().gaps;
        runtime.advance(ms(3_400)).await;
        assert_eq!(fleet.nodes[1].stats().gaps, gaps + 1);
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
    });
}

#[test]
fn p5_the_lost_tail_of_a_sender_that_died_is_a_gap() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(10)).await;
        assert!(fleet.nodes[1].get("k").await.unwrap().is_some());
        fleet.buses[0].lose_sent(true);
        fleet.nodes[0].remove("k").await.unwrap();
        // From here on node 0 is not heard any more.
        let gaps = fleet.nodes[1].stats().gaps;
        runtime.advance(ms(14_000)).await;
        assert_eq!(fleet.nodes[1].stats().gaps, gaps + 1, "one gap, and then it is forgotten");
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
    });
}

#[test]
fn p5_a_goodbye_is_no_gap_and_neither_is_a_newcomer() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(10)).await;
        let gaps = fleet.nodes[1].stats().gaps;
        fleet.nodes[0].close().await.unwrap();
        runtime.advance(ms(30_000)).await;
        assert_eq!(fleet.nodes[1].stats().gaps, gaps);
        assert_eq!(fleet.nodes[0].get("k").await.unwrap_err().kind(), ErrorKind::Closed);
    });
}

#[test]
fn p5_the_first_sight_of_a_sender_in_the_middle_is_a_gap() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        // As if node 1 had come when node 0 had been sending for a while.
        fleet.buses[1].lose_received(true);
        runtime.advance(ms(11_000)).await;
        for key in ["a", "b"] {
            fleet.nodes[0].set(key, 1).await.unwrap();
        }
        runtime.settle().await;
        fleet.buses[1].lose_received(false);
        let gaps = fleet.nodes[1].stats().gaps;
        runtime.advance(ms(3_400)).await;
        assert!(fleet.nodes[1].stats().gaps > gaps);
    });
}

#[test]
fn p5_what_was_read_before_the_subscription_stood_is_distrusted() {
    run(async |runtime| {
        let gate = Gate::new();
        let fleet = Fleet::start(&runtime, 1, &options()).await;
        let (late, faults) = fleetcache_tests::FaultBus::new(fleet.bus.clone(), &runtime);
        faults.hold_subscribe(&gate);
        let node = fleetcache::HybridCache::<u64>::builder()
            .l2(fleet.store.clone())
            .bus(late)
            .runtime(std::sync::Arc::new(runtime.clone()))
            .build()
            .unwrap();
        fleet.nodes[0].set("k", 1).await.unwrap();
        assert_eq!(node.get("k").await.unwrap().as_deref(), Some(&1));
        let standing = gate.held().await;
        fleet.nodes[0].remove("k").await.unwrap();
        assert_eq!(node.health().bus, PartHealth::Down);
        standing.release();
        runtime.settle().await;
        assert_eq!(node.get("k").await.unwrap(), None);
    });
}

#[test]
fn p5_bytes_that_are_no_message_are_a_gap_and_nothing_else() {
    use fleetcache::Bus;
    run(async |runtime| {
        let bus = fleetcache::MemoryBus::new();
        let cache = fleetcache::HybridCache::<u64>::builder()
            .bus(bus.clone())
            .runtime(std::sync::Arc::new(runtime.clone()))
            .build()
            .unwrap();
        runtime.advance(ms(5)).await;
        cache.set("k", 1).await.unwrap();
        bus.publish(bytes::Bytes::from_static(b"FCM\x63 from the future")).await.unwrap();
        runtime.settle().await;
        assert_eq!(cache.stats().malformed_messages, 1);
        assert_eq!(cache.get("k").await.unwrap(), None, "distrusted");
        cache.set("k", 2).await.unwrap();
        assert_eq!(cache.get("k").await.unwrap().as_deref(), Some(&2), "and it goes on");
    });
}

#[test]
fn p6_a_node_that_hears_nothing_believes_its_memory_only_for_a_while() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[1].get_with("k", counting(&Count::new(), 1)).await.unwrap();
        fleet.buses[1].lose_received(true);
        runtime.advance(ms(500)).await;
        fleet.nodes[0].remove("k").await.unwrap();
        runtime.advance(ms(14_000)).await;
        assert_eq!(fleet.nodes[1].health().bus, PartHealth::Down);
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
        let loads = Count::new();
        for _ in 0..10 {
            fleet.nodes[1].get_with("k", counting(&loads, 2)).await.unwrap();
            runtime.advance(ms(10)).await;
        }
        assert_eq!(loads.get(), 1, "what it reads now it believes for as long again");
    });
}

#[test]
fn p7_a_remove_that_could_not_reach_the_store_is_repaired_and_nobody_reads_the_old_value() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(5)).await;
        fleet.stores[0].down(true);
        // Node 1 reaches the store; its own repair is held so that the old value stays there.
        let gate = Gate::new();
        fleet.stores[1].hold_before(Op::Delete, &gate);
        fleet.nodes[0].remove("k").await.unwrap();
        let standing = gate.held().await;
        assert_eq!(fleet.cell("k").await, Some('V'), "the store still has it");
        for node in &fleet.nodes {
            assert_eq!(node.get("k").await.unwrap(), None, "and nobody reads it");
            assert!(!node.health().is_good());
        }
        standing.release();
        runtime.settle().await;
        assert_eq!(
            fleet.cell("k").await,
            None,
            "a peer that has the message repairs it, though its sender may be dead"
        );
        fleet.stores[0].down(false);
        runtime.advance(ms(20_000)).await;
        assert!(fleet.nodes.iter().all(|node| node.health().is_good()));
        assert!(fleet.nodes[0].stats().repairs_done >= 1);
    });
}

#[test]
fn p7_a_message_that_could_not_be_sent_is_sent_later() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.advance(ms(5)).await;
        assert!(fleet.nodes[1].get("k").await.unwrap().is_some());
        fleet.buses[0].down(true);
        fleet.nodes[0].remove("k").await.unwrap();
        assert_eq!(fleet.nodes[0].health().bus, PartHealth::Down);
        fleet.buses[0].down(false);
        runtime.advance(ms(6_000)).await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
        assert!(fleet.nodes[0].health().is_good(), "{:?}", fleet.nodes[0].health());
    });
}

#[test]
fn p7_a_repair_is_a_remove_never_a_late_set() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.stores[0].down(true);
        fleet.nodes[0].set("k", 1).await.unwrap();
        fleet.nodes[1].set("k", 2).await.unwrap();
        fleet.stores[0].down(false);
        runtime.advance(ms(20_000)).await;
        for node in &fleet.nodes {
            assert_ne!(node.get("k").await.unwrap().as_deref(), Some(&1));
        }
    });
}

#[test]
fn p7_a_key_that_is_listed_again_during_its_repair_stays_listed() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &options()).await;
        let gate = Gate::new();
        fleet.stores[0].down(true);
        fleet.nodes[0].remove("k").await.unwrap();
        fleet.stores[0].down(false);
        fleet.stores[0].hold_after(Op::Delete, &gate);
        let standing = gate.held().await;
        fleet.stores[0].down(true);
        fleet.nodes[0].remove("k").await.unwrap();
        standing.release();
        runtime.settle().await;
        assert_eq!(fleet.nodes[0].health().repairs, 1, "the second remove has not reached the store");
        fleet.stores[0].down(false);
        runtime.advance(ms(20_000)).await;
        assert!(fleet.nodes[0].health().is_good());
    });
}

#[test]
fn p7_strict_raises_and_repairs() {
    run(async |runtime| {
        let fleet = Fleet::start_with(&runtime, 2, &options(), |builder| builder.strict(true)).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        fleet.stores[0].down(true);
        assert_eq!(fleet.nodes[0].remove("k").await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(fleet.nodes[0].set("s", 1).await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(fleet.nodes[0].remove_by_tag("t").await.unwrap_err().kind(), ErrorKind::Unavailable);
        fleet.stores[0].down(false);
        runtime.advance(ms(20_000)).await;
        assert_eq!(fleet.cell("k").await, None);
        assert!(fleet.nodes[0].health().is_good());
    });
}

#[test]
fn p7_an_overflowing_repair_list_closes_the_scope_until_a_watermark_is_in() {
    let runtime = fleetcache::testing::SimRuntime::new();
    runtime.block_on(async {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        let one = fleet.nodes[0].scope("s").unwrap();
        let keys: Vec<_> = (0..10_001).map(|key| format!("k{key}")).collect();
        for key in &keys {
            one.set(key, 1).await.unwrap();
        }
        fleet.stores[0].down(true);
        fleet.buses[0].down(true);
        for key in &keys {
            one.remove(key).await.unwrap();
        }
        assert_eq!(fleet.nodes[0].health().closed_scopes, 1);
        assert_eq!(fleet.nodes[0].stats().repair_overflows, 1);
        fleet.stores[0].down(false);
        assert_eq!(
            one.get(&keys[10_000]).await.unwrap(),
            None,
            "the key that was forgotten is not read from the store"
        );
        fleet.buses[0].down(false);
        runtime.advance(ms(30_000)).await;
        assert!(fleet.nodes[0].health().is_good(), "{:?}", fleet.nodes[0].health());
        for node in &fleet.nodes {
            for key in [&keys[0], &keys[10_000]] {
                assert_eq!(node.scope("s").unwrap().get(key).await.unwrap(), None);
            }
        }
    });
    runtime.shut_down();
}

#[test]
fn p8_a_burst_travels_in_few_messages() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.buses[0].slow(ms(10));
        let sent = fleet.buses[0].published().len();
        join_all((0..1_000).map(|key| {
            let cache = &fleet.nodes[0];
            async move { cache.remove(&format!("k{key}")).await.unwrap() }
        }))
        .await;
        let messages = fleet.buses[0].published().len() - sent;
        assert!(messages <= 10, "{messages} messages for 1,000 removes");
        runtime.advance(ms(20)).await;
        assert_eq!(fleet.nodes[1].stats().invalidations_received, 1_000);
    });
}

#[test]
fn p9_own_messages_drop_nothing_and_measure_the_bus() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &options()).await;
        fleet.buses[0].delay(ms(40));
        let cache = &fleet.nodes[0];
        cache.set("k", 1).await.unwrap();
        runtime.advance(ms(100)).await;
        assert!(cache.peek("k").is_some(), "the echo of a set does not drop the value just set");
        assert_eq!(cache.stats().invalidations_received, 0);
        assert!(cache.health().bus_lag_ms.is_some_and(|lag| (40..100).contains(&lag)), "{:?}", cache.health());
    });
}

#[test]
fn p9_two_caches_in_one_process_are_two_nodes() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.settle().await;
        assert!(fleet.nodes[1].get("k").await.unwrap().is_some());
        fleet.nodes[0].remove("k").await.unwrap();
        runtime.settle().await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None);
        runtime.advance(ms(4_000)).await;
        assert_eq!(fleet.nodes[0].health().peers, 1, "each hears the other");
    });
}

#[test]
fn clear_empties_every_memory_and_leaves_the_store() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set("k", 1).await.unwrap();
        runtime.settle().await;
        fleet.nodes[1].get("k").await.unwrap();
        fleet.nodes[0].clear().await.unwrap();
        runtime.settle().await;
        for node in &fleet.nodes {
            assert!(node.peek("k").is_none());
            assert_eq!(node.stats().entries, 0);
        }
        assert_eq!(fleet.nodes[1].get("k").await.unwrap().as_deref(), Some(&1));
    });
}

#[test]
fn a_tag_kills_what_was_made_before_it_also_on_a_node_that_was_away() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set_with_tags("a", 1, ["t", "u"]).await.unwrap();
        fleet.nodes[0].set_with_tags("b", 2, ["u"]).await.unwrap();
        runtime.settle().await;
        for key in ["a", "b"] {
            assert!(fleet.nodes[1].get(key).await.unwrap().is_some());
        }
        fleet.buses[1].lose_received(true);
        fleet.nodes[0].remove_by_tag("t").await.unwrap();
        assert_eq!(fleet.nodes[0].get("a").await.unwrap(), None, "at once on the node that did it");
        assert_eq!(fleet.nodes[0].get("b").await.unwrap().as_deref(), Some(&2));
        // Node 1 hears nothing of it, but asks for watermarks regularly.
        runtime.advance(ms(3_400)).await;
        assert_eq!(fleet.nodes[1].get("a").await.unwrap(), None);
        assert_eq!(fleet.nodes[1].get("b").await.unwrap().as_deref(), Some(&2));
        fleet.nodes[0].set_with_tags("a", 3, ["t"]).await.unwrap();
        assert_eq!(fleet.nodes[1].get("a").await.unwrap().as_deref(), Some(&3), "what is made after it lives");
    });
}

#[test]
fn a_caller_who_comes_after_a_tag_was_removed_does_not_get_a_load_from_before() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        let (loads, gate) = (Count::new(), Gate::new());
        let tagged = held(&loads, &gate, 1);
        let load = fleet.nodes[0]
            .get_with_context("k", move |_| async move { tagged().await.map(|v| Loaded::value(v).tags(["t"])) });
        let (early, late) = join(load, async {
            let standing = gate.held().await;
            fleet.nodes[0].remove_by_tag("t").await.unwrap();
            let late = fleet.nodes[0].get_with("k", counting(&loads, 2));
            let (late, ()) = join(late, async {
                runtime.advance(ms(5)).await;
                standing.release();
            })
            .await;
            late
        })
        .await;
        assert_eq!((*early.unwrap(), *late.unwrap()), (1, 2));
    });
}

#[test]
fn a_tag_removed_while_the_store_is_out_is_dead_at_once_and_for_everyone_later() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set_with_tags("k", 1, ["t"]).await.unwrap();
        runtime.advance(ms(5)).await;
        fleet.nodes[1].get("k").await.unwrap();
        fleet.stores.iter().for_each(|store| store.down(true));
        fleet.nodes[0].remove_by_tag("t").await.unwrap();
        runtime.settle().await;
        for node in &fleet.nodes {
            assert_eq!(node.get("k").await.unwrap(), None);
        }
        fleet.stores.iter().for_each(|store| store.down(false));
        runtime.advance(ms(20_000)).await;
        for node in &fleet.nodes {
            assert_eq!(node.get("k").await.unwrap(), None, "the store's copy is dead by its number");
            assert!(node.health().is_good());
        }
    });
}

#[test]
fn a_lost_set_of_watermarks_kills_everything_older() {
    use fleetcache::Store;
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.nodes[0].set_with_tags("k", 1, ["t"]).await.unwrap();
        fleet.nodes[0].remove_by_tag("t").await.unwrap();
        fleet.store.delete("fleetcache:!w").await.unwrap();
        // A node that starts cold and knows nothing.
        let fresh = fleetcache::HybridCache::<u64>::builder()
            .l2(fleet.store.clone())
            .runtime(std::sync::Arc::new(runtime.clone()))
            .build()
            .unwrap();
        assert_eq!(fresh.get("k").await.unwrap(), None);
    });
}

#[test]
fn work_in_progress_is_drained_by_close() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &options()).await;
        fleet.stores[0].delay(ms(30));
        let cache = fleet.nodes[0].clone();
        let mut remove = Box::pin(cache.remove("k"));
        assert!(futures_util::poll!(&mut remove).is_pending());
        drop(remove);
        fleet.nodes[0].close().await.unwrap();
        runtime.settle().await;
        assert_eq!(fleet.nodes[1].stats().invalidations_received, 1);
        assert_eq!(cache.get_with("x", never).await.unwrap_err().kind(), ErrorKind::Closed);
    });
}
