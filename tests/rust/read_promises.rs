//! What a read promises (design notes, section 3): one test per promise, by its number.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleetcache::{EntryOptions, ErrorKind, HybridCache, Loaded, PartHealth, Runtime};
use fleetcache_tests::{Broken, Count, Fleet, Gate, alone, counting, failing, held, ms, never, run};
use futures_util::future::{join, join_all, select};

#[test]
fn p1_a_fresh_hit_is_answered_without_a_load() {
    run(async |runtime| {
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
fn p1_a_hit_is_the_same_value_not_a_copy() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let first = cache.get_with("k", counting(&Count::new(), 7)).await.unwrap();
        let second = cache.get("k").await.unwrap().unwrap();
        assert!(std::sync::Arc::ptr_eq(&first, &second));
    });
}

#[test]
fn p2_many_callers_share_one_load() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let (loads, gate) = (Count::new(), Gate::new());
        let calls = (0..1000).map(|_| cache.get_with("k", held(&loads, &gate, 7)));
        let (answers, ()) = join(join_all(calls), async { gate.held().await.release() }).await;
        assert!(answers.iter().all(|answer| **answer.as_ref().unwrap() == 7));
        assert_eq!(loads.get(), 1);
        assert_eq!(cache.stats().joined, 999);
    });
}

#[test]
fn p2_a_leader_who_goes_away_takes_nobody_with_it() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let (loads, gate) = (Count::new(), Gate::new());
        let leader = Box::pin(cache.get_with("k", held(&loads, &gate, 7)));
        let (leader, standing) = match select(leader, Box::pin(gate.held())).await {
            futures_util::future::Either::Right((standing, leader)) => (leader, standing),
            futures_util::future::Either::Left(_) => unreachable!("the load is held"),
        };
        let waiters = join_all((0..99).map(|_| cache.get_with("k", held(&loads, &gate, 8))));
        let (answers, ()) = join(waiters, async {
            runtime.yield_now().await;
            drop(leader);
            standing.release();
        })
        .await;
        assert!(answers.iter().all(|answer| **answer.as_ref().unwrap() == 7));
        assert_eq!(loads.get(), 1);
    });
}

#[test]
fn p2_a_load_is_cancelled_when_every_caller_has_gone() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let (loads, gate, dropped) = (Count::new(), Gate::new(), Count::new());
        let calls: Vec<_> = (0..3)
            .map(|_| {
                let (load, dropped) = (held(&loads, &gate, 7), DropCount(dropped.clone()));
                Box::pin(cache.get_with("k", move || async move {
                    let _dropped = dropped;
                    load().await
                }))
            })
            .collect();
        let all = Box::pin(join_all(calls));
        drop(select(all, Box::pin(gate.held())).await);
        runtime.settle().await;
        assert_eq!(dropped.get(), 3, "the running loader and the two that never ran");
        assert_eq!(cache.stats().loading, 0);
        assert_eq!(*cache.get_with("k", counting(&loads, 9)).await.unwrap(), 9, "the next caller starts anew");
    });
}

struct DropCount(Count);

impl Drop for DropCount {
    fn drop(&mut self) {
        self.0.add();
    }
}

#[test]
fn p2_a_failing_loader_is_called_once_for_all_who_wait_and_those_just_behind() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let calls = Count::new();
        let answers = join_all((0..20).map(|_| cache.get_with("k", failing(&calls)))).await;
        let originals: Vec<_> = answers
            .iter()
            .map(|answer| std::ptr::from_ref(answer.as_ref().unwrap_err().loader_error::<Broken>().unwrap()))
            .collect();
        assert!(originals.iter().all(|original| *original == originals[0]), "the same error object for everyone");
        assert_eq!(calls.get(), 1);
        cache.get_with("k", failing(&calls)).await.unwrap_err();
        assert_eq!(calls.get(), 1, "shared for a short while");
        runtime.advance(ms(200)).await;
        cache.get_with("k", counting(&calls, 1)).await.unwrap();
        assert_eq!(calls.get(), 2, "and then tried again");
    });
}

#[test]
fn p2_a_panicking_loader_fails_its_flight() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        std::panic::set_hook(Box::new(|_| {}));
        let late = cache.get_with("a", || async {
            assert_eq!(1, 2, "on purpose");
            Ok::<_, Broken>(1)
        });
        let late = late.await.unwrap_err();
        let early = cache.get_with("b", || -> std::future::Ready<Result<u64, Broken>> { panic!("at once") });
        let early = early.await.unwrap_err();
        let _ = std::panic::take_hook();
        assert_eq!((late.kind(), early.kind()), (ErrorKind::Loader, ErrorKind::Loader));
        assert!(late.to_string().contains("on purpose"), "{late}");
        assert!(early.to_string().contains("at once"), "{early}");
        assert_eq!(cache.stats().loading, 0);
    });
}

#[test]
fn p2_a_load_whose_task_is_dropped_fails_instead_of_hanging() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        let call = Box::pin(cache.get_with("k", never));
        let (answer, ()) = join(call, async {
            runtime.yield_now().await;
            runtime.yield_now().await;
            runtime.shut_down();
        })
        .await;
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Loader);
    });
}

#[test]
fn p2_a_caller_who_is_not_polled_any_more_takes_nobody_with_it() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &EntryOptions::new()).await;
        fleet.nodes[0].set("k", 7).await.unwrap();
        fleet.nodes[0].remove_local("k");
        fleet.stores[0].delay(ms(5));
        // Each begins to read L2 and is then left alone.
        let mut lookup = Box::pin(fleet.nodes[0].get("k"));
        assert!(futures_util::poll!(&mut lookup).is_pending());
        assert_eq!(fleet.nodes[0].get("k").await.unwrap().as_deref(), Some(&7));

        fleet.nodes[0].remove_local("k");
        let loads = Count::new();
        let mut load = Box::pin(fleet.nodes[0].get_with("k", counting(&loads, 8)));
        assert!(futures_util::poll!(&mut load).is_pending());
        assert_eq!(*fleet.nodes[0].get_with("k", counting(&loads, 9)).await.unwrap(), 7);
        assert_eq!((*load.await.unwrap(), loads.get()), (7, 0));
        assert_eq!(lookup.await.unwrap().as_deref(), Some(&7));
    });
}

#[test]
fn p2_a_caller_who_leaves_while_it_reads_the_store_leaves_nothing_behind() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &EntryOptions::new()).await;
        for _ in 0..3 {
            let mut load = Box::pin(fleet.nodes[0].get_with("k", never));
            assert!(futures_util::poll!(&mut load).is_pending());
            drop(load);
            runtime.advance(ms(10)).await;
            assert_eq!(fleet.nodes[0].stats().loading, 0);
            assert_ne!(fleet.cell("k").await, Some('L'), "no lease is left");
        }
        fleet.nodes[0].close().await.unwrap();
    });
}

#[test]
fn p2_close_waits_for_the_loads_in_progress() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &EntryOptions::new()).await;
        let (gate, node) = (Gate::new(), fleet.nodes[0].clone());
        let load = node.get_with("k", held(&Count::new(), &gate, 7));
        let end = async {
            let loading = gate.held().await;
            let mut close = Box::pin(fleet.nodes[0].close());
            for _ in 0..3 {
                assert!(futures_util::poll!(&mut close).is_pending(), "it waits");
                runtime.settle().await;
            }
            loading.release();
            let before = runtime.now_ms();
            close.await.unwrap();
            assert!(runtime.now_ms() - before < 1_000, "and no longer than it has to");
            assert_eq!(fleet.cell("k").await, Some('V'), "it was filled before the end");
        };
        let (loaded, ()) = join(load, end).await;
        assert_eq!(*loaded.unwrap(), 7);
    });
}

#[test]
fn p3_one_node_of_the_fleet_loads() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 3, &EntryOptions::new()).await;
        let loads = Count::new();
        let calls = fleet.nodes.iter().map(|node| {
            let (loads, runtime) = (loads.clone(), runtime.clone());
            node.get_with("k", move || async move {
                loads.add();
                // Longer than a lease lasts: it is renewed.
                runtime.sleep(ms(9_000)).await;
                Ok::<_, Broken>(7)
            })
        });
        for answer in join_all(calls).await {
            assert_eq!(*answer.unwrap(), 7);
        }
        assert_eq!(loads.get(), 1);
    });
}

#[test]
fn p3_a_lease_whose_holder_died_is_taken_over_when_it_runs_out() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        let mut dying = Box::pin(fleet.nodes[0].get_with("k", never));
        let some_time = Box::pin(runtime.advance(ms(20)));
        futures_util::future::select(&mut dying, some_time).await;
        assert_eq!(fleet.cell("k").await, Some('L'), "node 0 holds the lease");
        fleet.stores[0].hang(true);
        let before = runtime.now_ms();
        assert_eq!(*fleet.nodes[1].get_with("k", counting(&Count::new(), 7)).await.unwrap(), 7);
        let waited = runtime.now_ms() - before;
        assert!((500..=2_700).contains(&waited), "waited {waited} ms for a lease of 2 s");
    });
}

#[test]
fn p3_a_lease_that_seems_to_last_for_ever_is_damaged_and_nobody_waits_for_it() {
    use fleetcache::Store;
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 1, &EntryOptions::new()).await;
        let mut cell = b"FC\x01L".to_vec();
        cell.extend_from_slice(&[0; 8]);
        cell.extend_from_slice(&[7; 8]);
        cell.extend_from_slice(&[0xff; 8]);
        fleet.store.set("fleetcache::k", cell.into(), ms(3_600_000)).await.unwrap();
        let before = runtime.now_ms();
        assert_eq!(*fleet.nodes[0].get_with("k", counting(&Count::new(), 7)).await.unwrap(), 7);
        assert!(runtime.now_ms() - before < 100);
    });
}

#[test]
fn p3_a_failed_load_holds_the_fleet_off_and_a_cancelled_one_does_not() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        let loads = Count::new();
        fleet.nodes[0].get_with("k", failing(&loads)).await.unwrap_err();
        runtime.settle().await;
        assert_eq!(fleet.cell("k").await, Some('L'), "the hold stands where the lease was");
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None, "a hold is a miss for who does not load");
        assert_eq!(
            *fleet.nodes[1].get_with("k", counting(&loads, 7)).await.unwrap(),
            7,
            "who has not seen the error may try once"
        );

        let mut cancelled = Box::pin(fleet.nodes[0].get_with("c", never));
        assert!(futures_util::poll!(&mut cancelled).is_pending());
        runtime.advance(ms(5)).await;
        drop(cancelled);
        runtime.settle().await;
        let before = runtime.now_ms();
        fleet.nodes[1].get_with("c", counting(&loads, 7)).await.unwrap();
        assert!(runtime.now_ms() - before < 20, "the key was free at once");
    });
}

#[test]
fn p3_while_the_fleet_holds_off_a_stale_value_is_answered_without_a_load() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_if_error(ms(60_000));
        let fleet = Fleet::start(&runtime, 2, &options).await;
        let loads = Count::new();
        fleet.nodes[0].get_with("k", counting(&loads, 1)).await.unwrap();
        assert_eq!(*fleet.nodes[1].get_with("k", counting(&loads, 1)).await.unwrap(), 1);
        runtime.advance(ms(150)).await;
        assert_eq!(*fleet.nodes[0].get_with("k", failing(&loads)).await.unwrap(), 1);
        runtime.settle().await;
        assert_eq!(*fleet.nodes[1].get_with("k", failing(&loads)).await.unwrap(), 1);
        assert_eq!(loads.get(), 2, "the other node did not ask the failing loader again");
    });
}

#[test]
fn p3_a_get_without_a_loader_neither_waits_nor_takes_the_lease() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        assert_eq!(fleet.nodes[0].get("k").await.unwrap(), None);
        assert_eq!(fleet.cell("k").await, None, "no lease was laid");
        let mut loading = Box::pin(fleet.nodes[0].get_with("k", never));
        assert!(futures_util::poll!(&mut loading).is_pending());
        runtime.advance(ms(10)).await;
        let before = runtime.now_ms();
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None, "a lease is a miss");
        assert_eq!(fleet.nodes[0].get("k").await.unwrap(), None, "so is a load on the same node");
        assert!(runtime.now_ms() - before < 5);
    });
}

#[test]
fn p4_within_stale_while_revalidate_the_old_value_comes_at_once_and_one_load_refreshes_it() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_while_revalidate(ms(100));
        for fleet_size in [0, 1] {
            let fleet = Fleet::start(&runtime, fleet_size, &options).await;
            let cache = fleet.nodes.first().cloned().unwrap_or_else(|| alone(&runtime, &options));
            let (loads, gate) = (Count::new(), Gate::new());
            cache.get_with("k", counting(&loads, 1)).await.unwrap();
            runtime.advance(ms(120)).await;
            for _ in 0..5 {
                assert_eq!(*cache.get_with("k", held(&loads, &gate, 2)).await.unwrap(), 1);
            }
            gate.held().await.release();
            runtime.advance(ms(5)).await;
            assert_eq!(*cache.get_with("k", counting(&loads, 3)).await.unwrap(), 2);
            assert_eq!(loads.get(), 2);
            runtime.advance(ms(300)).await;
            assert_eq!(
                *cache.get_with("k", counting(&loads, 4)).await.unwrap(),
                4,
                "past both it is loaded while one waits"
            );
        }
    });
}

#[test]
fn p4_within_stale_if_error_the_old_value_stands_in_for_a_failed_load() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_if_error(ms(10_000));
        for fleet_size in [0, 1] {
            let fleet = Fleet::start(&runtime, fleet_size, &options).await;
            let cache = fleet.nodes.first().cloned().unwrap_or_else(|| alone(&runtime, &options));
            let loads = Count::new();
            cache.get_with("k", counting(&loads, 1)).await.unwrap();
            runtime.advance(ms(150)).await;
            for _ in 0..10 {
                assert_eq!(*cache.get_with("k", failing(&loads)).await.unwrap(), 1);
            }
            assert_eq!(loads.get(), 2, "throttled after one failure");
            runtime.advance(ms(2_000)).await;
            assert_eq!(
                *cache.get_with("k", counting(&loads, 2)).await.unwrap(),
                2,
                "tried again after the throttle time"
            );
            runtime.advance(ms(10_200)).await;
            cache.get_with("k", failing(&loads)).await.unwrap_err();
        }
    });
}

#[test]
fn p4_past_soft_timeout_the_old_value_is_answered_and_the_load_goes_on_and_fills() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_if_error(ms(10_000)).soft_timeout(ms(30));
        let cache = alone(&runtime, &options);
        let (loads, gate) = (Count::new(), Gate::new());
        cache.get_with("k", counting(&loads, 1)).await.unwrap();
        runtime.advance(ms(150)).await;
        let before = runtime.now_ms();
        assert_eq!(*cache.get_with("k", held(&loads, &gate, 2)).await.unwrap(), 1);
        assert_eq!(runtime.now_ms() - before, 30);
        assert_eq!(*cache.get_with("k", held(&loads, &gate, 3)).await.unwrap(), 1);
        assert_eq!(runtime.now_ms() - before, 30, "later callers do not wait again");
        gate.held().await.release();
        runtime.settle().await;
        assert_eq!(*cache.get("k").await.unwrap().unwrap(), 2);
        assert_eq!(loads.get(), 2);
    });
}

#[test]
fn p4_past_hard_timeout_the_load_ends() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_if_error(ms(10_000)).hard_timeout(ms(50));
        let cache = alone(&runtime, &options);
        assert_eq!(cache.get_with("k", never).await.unwrap_err().kind(), ErrorKind::Timeout);
        runtime.advance(ms(200)).await;
        cache.get_with("k", counting(&Count::new(), 1)).await.unwrap();
        runtime.advance(ms(150)).await;
        assert_eq!(*cache.get_with("k", never).await.unwrap(), 1, "the old value stands in");
        assert_eq!(cache.stats().loading, 0);
    });
}

#[test]
fn p4_refresh_ahead_refreshes_before_the_value_expires() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(1_000)).refresh_ahead(0.8);
        for fleet_size in [0, 2] {
            let fleet = Fleet::start(&runtime, fleet_size, &options).await;
            let cache = fleet.nodes.first().cloned().unwrap_or_else(|| alone(&runtime, &options));
            let loads = Count::new();
            cache.get_with("k", counting(&loads, 1)).await.unwrap();
            runtime.advance(ms(790)).await;
            assert_eq!(*cache.get_with("k", counting(&loads, 2)).await.unwrap(), 1);
            assert_eq!(loads.get(), 1, "not before its time");
            runtime.advance(ms(20)).await;
            assert_eq!(*cache.get_with("k", counting(&loads, 2)).await.unwrap(), 1);
            runtime.advance(ms(5)).await;
            assert_eq!(*cache.get_with("k", counting(&loads, 3)).await.unwrap(), 2);
            assert_eq!(loads.get(), 2);
        }
    });
}

#[test]
fn p4_background_work_that_fails_is_nobodys_error() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(100)).stale_while_revalidate(ms(5_000));
        let cache = alone(&runtime, &options);
        let loads = Count::new();
        cache.get_with("k", counting(&loads, 1)).await.unwrap();
        runtime.advance(ms(150)).await;
        for _ in 0..5 {
            assert_eq!(*cache.get_with("k", failing(&loads)).await.unwrap(), 1);
            runtime.settle().await;
        }
        assert_eq!(loads.get(), 2, "one refresh failed, and the next waits for the throttle");
        assert_eq!(cache.stats().load_failures, 1);
    });
}

#[test]
fn p5_null_is_a_value_with_its_own_time_to_live() {
    run(async |runtime| {
        let null = |loads: &Count| {
            let loads = loads.clone();
            move || {
                loads.add();
                std::future::ready(Ok::<Option<u64>, Broken>(None))
            }
        };
        for negative_ttl in [None, Some(ms(50))] {
            let mut options = EntryOptions::new().ttl(ms(1_000));
            if let Some(ttl) = negative_ttl {
                options = options.negative_ttl(ttl);
            }
            let store = fleetcache::MemoryStore::on(std::sync::Arc::new(runtime.clone()));
            let build = || {
                HybridCache::<Option<u64>>::builder()
                    .options(&options)
                    .null_when(Option::is_none)
                    .l2(store.clone())
                    .runtime(std::sync::Arc::new(runtime.clone()))
                    .build()
                    .unwrap()
            };
            let (one, two) = (build(), build());
            let loads = Count::new();
            assert_eq!(*one.get_with("k", null(&loads)).await.unwrap(), None);
            let kept = negative_ttl.is_some();
            assert_eq!(one.get("k").await.unwrap().is_some(), kept, "in memory");
            assert_eq!(two.get("k").await.unwrap().is_some(), kept, "and in the store, told from a miss");
            runtime.advance(ms(60)).await;
            assert_eq!(one.get("k").await.unwrap(), None);
            let asked = |_| async { Ok::<_, Broken>(Loaded::value(None).ttl(ms(500))) };
            one.get_with_context("asked", asked).await.unwrap();
            assert_eq!(
                one.get("asked").await.unwrap().as_deref(),
                Some(&None),
                "under ttl where the loader asks for it"
            );
            runtime.advance(ms(600)).await;
        }
    });
}

#[test]
fn p6_a_value_from_the_store_keeps_its_own_deadline() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new().ttl(ms(1_000))).await;
        fleet.nodes[0].get_with("k", counting(&Count::new(), 1)).await.unwrap();
        runtime.advance(ms(900)).await;
        assert_eq!(*fleet.nodes[1].get("k").await.unwrap().unwrap(), 1);
        runtime.advance(ms(110)).await;
        assert_eq!(fleet.nodes[1].get("k").await.unwrap(), None, "not a full ttl anew");
    });
}

#[test]
fn p6_no_nodes_clock_is_trusted() {
    run(async |runtime| {
        let options = EntryOptions::new().ttl(ms(1_000));
        let store = fleetcache::MemoryStore::on(std::sync::Arc::new(runtime.clone()));
        let node = |ahead| {
            HybridCache::<u64>::builder()
                .options(&options)
                .l2(store.clone())
                .runtime(std::sync::Arc::new(runtime.skewed(ms(ahead))))
                .build()
                .unwrap()
        };
        let (one, two) = (node(0), node(3_600_000));
        one.get_with("k", counting(&Count::new(), 1)).await.unwrap();
        assert_eq!(two.get("k").await.unwrap().as_deref(), Some(&1), "an hour ahead, and still a hit");
        two.set("back", 2).await.unwrap();
        assert_eq!(one.get("back").await.unwrap().as_deref(), Some(&2));
        runtime.advance(ms(1_000)).await;
        assert_eq!(one.get("back").await.unwrap(), None, "written by a fast clock, and expired in time");
    });
}

#[test]
fn p7_an_outage_of_the_store_fails_no_read_and_loses_no_value() {
    run(async |runtime| {
        for hanging in [false, true] {
            let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
            let cache = &fleet.nodes[0];
            fleet.stores[0].down(!hanging);
            fleet.stores[0].hang(hanging);
            let loads = Count::new();
            for key in 0..20 {
                let key = format!("k{key}");
                assert_eq!(*cache.get_with(&key, counting(&loads, 1)).await.unwrap(), 1);
                assert_eq!(*cache.get_with(&key, counting(&loads, 2)).await.unwrap(), 1, "kept in memory");
                assert_eq!(cache.get("missing").await.unwrap(), None);
            }
            assert_eq!(loads.get(), 20);
            assert_eq!(cache.health().l2, PartHealth::Down);
            let (before, calls) = (runtime.now_ms(), fleet.stores[0].calls());
            cache.get_with("quick", counting(&loads, 1)).await.unwrap();
            assert_eq!(runtime.now_ms(), before, "the breaker is open: nobody waits for the store");
            assert!(fleet.stores[0].calls() - calls <= 2);

            fleet.stores[0].down(false);
            fleet.stores[0].hang(false);
            runtime.advance(ms(20_000)).await;
            assert!(cache.health().is_good(), "{:?}", cache.health());
            cache.get_with("after", counting(&loads, 5)).await.unwrap();
            assert_eq!(*fleet.nodes[1].get("after").await.unwrap().unwrap(), 5);
        }
    });
}

#[test]
fn p7_bytes_that_are_not_ours_are_a_miss() {
    use fleetcache::Store;
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        fleet.nodes[0].set("good", 7).await.unwrap();
        let good = fleet.raw("good").await.unwrap();
        let mut damaged: Vec<Vec<u8>> = vec![vec![], b"hello".to_vec(), good[..40].to_vec(), vec![0xff; 300]];
        for position in 0..good.len() {
            let mut bytes = good.to_vec();
            bytes[position] ^= 0x10;
            damaged.push(bytes);
        }
        for (number, bytes) in damaged.into_iter().enumerate() {
            let key = format!("d{number}");
            fleet.store.set(&format!("fleetcache::{key}"), bytes.into(), ms(60_000)).await.unwrap();
            let found = fleet.nodes[1].get(&key).await.unwrap();
            // The lease part of the prefix is not under the checksum: a change there leaves the value what it was.
            assert!(found.is_none() || *found.unwrap() == 7, "variant {number}");
            assert_eq!(
                *fleet.nodes[0].get_with(&key, counting(&Count::new(), 9)).await.unwrap() % 2,
                1,
                "variant {number}"
            );
        }
        assert!(fleet.nodes[1].stats().malformed_values > 50);
    });
}
