//! Nanoseconds per operation.

use std::convert::Infallible;
use std::future::Future;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleetcache::{EngineKind, HybridCache};
use foldhash::quality::RandomState;

use crate::work::{key, table, time, zipf};

const KEYS: usize = 10_000;
const HITS: usize = 400_000;
const ROUNDS: usize = 11;

type Bare = quick_cache::sync::Cache<Box<str>, (Arc<u64>, u64), quick_cache::UnitWeighter, RandomState>;

fn bare_quick(capacity: usize) -> Bare {
    Bare::with(capacity, capacity as u64, quick_cache::UnitWeighter, RandomState::default(), Default::default())
}

fn bare_moka(capacity: u64) -> moka::sync::Cache<Box<str>, (Arc<u64>, u64), RandomState> {
    moka::sync::Cache::builder().max_capacity(capacity).build_with_hasher(RandomState::default())
}

fn coarse() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
}

fn ours(engine: EngineKind, capacity: u64) -> HybridCache<u64> {
    let builder = HybridCache::builder().ttl(Duration::from_secs(3600)).capacity(capacity).engine(engine);
    builder.build().expect("a sound cache")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
}

/// A loop of hits through an async call, driven without a reactor's turns in between.
fn drive<F: Future>(future: F) -> F::Output {
    futures_util::FutureExt::now_or_never(future).expect("a hit is answered at once")
}

async fn never() -> Result<u64, Infallible> {
    unreachable!("every key is there")
}

fn hit_ours(cache: &HybridCache<u64>, keys: &[String], order: &[u32]) {
    for index in order {
        black_box(drive(cache.get_with(&keys[*index as usize], never)).expect("a hit"));
    }
}

fn amalgam(keys: &[String]) -> amalgam::Cache<Arc<u64>> {
    let cache: amalgam::Cache<Arc<u64>> = amalgam::Cache::new();
    runtime().block_on(async {
        for key in keys {
            cache.set(key.as_str(), Arc::new(1)).await.expect("set");
        }
    });
    cache
}

fn hit_amalgam(cache: &amalgam::Cache<Arc<u64>>, keys: &[String], order: &[u32]) {
    for index in order {
        let factory =
            amalgam::source::factory(
                |context| async move { Ok::<_, amalgam::FactoryError>(context.value(Arc::new(2))) },
            );
        let call = cache.get_or_set(keys[*index as usize].as_str(), factory);
        black_box(drive(call.into_future()).expect("a hit"));
    }
}

pub fn hit() {
    let keys: Vec<_> = (0..KEYS).map(key).collect();
    let order = zipf(KEYS, 0.99, HITS, 1);
    let (quick, moka) = (bare_quick(KEYS * 2), bare_moka(KEYS as u64 * 2));
    let deadline = coarse() + 3_600_000;
    let (ours_quick, ours_moka) =
        (ours(EngineKind::QuickCache, KEYS as u64 * 2), ours(EngineKind::Moka, KEYS as u64 * 2));
    let foyer: foyer_memory::Cache<String, Arc<u64>> = foyer_memory::CacheBuilder::new(KEYS * 2).build();
    let runtime = runtime();
    for key in &keys {
        quick.insert(key.as_str().into(), (Arc::new(1), deadline));
        moka.insert(key.as_str().into(), (Arc::new(1), deadline));
        foyer.insert(key.clone(), Arc::new(1));
        runtime.block_on(ours_quick.set(key, 1)).expect("set");
        runtime.block_on(ours_moka.set(key, 1)).expect("set");
    }
    let amalgam = amalgam(&keys);
    let start = Instant::now();
    let each = |work: &dyn Fn(&str)| time(HITS, || order.iter().for_each(|index| work(&keys[*index as usize])));
    table(
        "A hit, 10,000 keys by Zipf 0.99",
        "ns",
        ROUNDS,
        vec![
            (
                "quick_cache 0.7.0 get, deadline by `Instant::now`",
                Box::new(|| {
                    each(&|key| {
                        let (value, deadline) = quick.get(key).expect("there");
                        assert!((start.elapsed().as_millis() as u64) < deadline);
                        black_box(value);
                    })
                }),
            ),
            (
                "quick_cache 0.7.0 get, deadline by the coarse clock",
                Box::new(|| {
                    each(&|key| {
                        let (value, deadline) = quick.get(key).expect("there");
                        assert!(coarse() < deadline);
                        black_box(value);
                    })
                }),
            ),
            ("fleetcache `get_with`", Box::new(|| time(HITS, || hit_ours(&ours_quick, &keys, &order)))),
            (
                "fleetcache `get`",
                Box::new(|| {
                    each(&|key| {
                        black_box(drive(ours_quick.get(key)).expect("a hit"));
                    })
                }),
            ),
            (
                "fleetcache host `peek`",
                Box::new(|| {
                    each(&|key| {
                        black_box(ours_quick.peek(key));
                    })
                }),
            ),
            ("fleetcache `get_with` on moka", Box::new(|| time(HITS, || hit_ours(&ours_moka, &keys, &order)))),
            (
                "moka 0.12.16 sync get, deadline by the coarse clock",
                Box::new(|| {
                    each(&|key| {
                        let (value, deadline) = moka.get(key).expect("there");
                        assert!(coarse() < deadline);
                        black_box(value);
                    })
                }),
            ),
            (
                "foyer-memory 0.22.6 get",
                Box::new(|| {
                    each(&|key| {
                        black_box(foyer.get(key).expect("there"));
                    })
                }),
            ),
            ("amalgam-cache 0.4.2 `get_or_set`", Box::new(|| time(HITS, || hit_amalgam(&amalgam, &keys, &order)))),
        ],
    );
}

/// Nanoseconds per hit, all threads' hits together. Each thread has its own order.
fn on_threads(threads: usize, work: &(dyn Fn(usize) + Sync)) -> f64 {
    // Long enough for the scheduler to give each thread a core of its own.
    const PASSES: usize = 8;
    time(HITS * threads * PASSES, || {
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || (0..PASSES).for_each(|_| work(thread)));
            }
        });
    })
}

pub fn threads() {
    let keys: Vec<_> = (0..KEYS).map(key).collect();
    let orders = [zipf(KEYS, 0.99, HITS, 1), zipf(KEYS, 0.99, HITS, 1).into_iter().rev().collect()];
    let (quick, ours_quick, ours_moka) =
        (bare_quick(KEYS * 2), ours(EngineKind::QuickCache, KEYS as u64 * 2), ours(EngineKind::Moka, KEYS as u64 * 2));
    let runtime = runtime();
    for key in &keys {
        quick.insert(key.as_str().into(), (Arc::new(1), u64::MAX));
        runtime.block_on(ours_quick.set(key, 1)).expect("set");
        runtime.block_on(ours_moka.set(key, 1)).expect("set");
    }
    let amalgam = amalgam(&keys);
    let bare = |thread: usize| {
        orders[thread].iter().for_each(|index| drop(black_box(quick.get(keys[*index as usize].as_str()))))
    };
    let alone = |thread: usize| {
        let mut chance = crate::work::Chance(thread as u64);
        (0..HITS * 10).for_each(|_| drop(black_box(chance.next())));
    };
    let cases: [(&str, &(dyn Fn(usize) + Sync)); 5] = [
        ("nothing shared (what the machine gives)", &alone),
        ("quick_cache 0.7.0 get", &bare),
        ("fleetcache `get_with`", &|thread| hit_ours(&ours_quick, &keys, &orders[thread])),
        ("fleetcache `get_with` on moka", &|thread| hit_ours(&ours_moka, &keys, &orders[thread])),
        ("amalgam-cache 0.4.2 `get_or_set`", &|thread| hit_amalgam(&amalgam, &keys, &orders[thread])),
    ];
    for (name, work) in cases {
        table(
            &format!("Threads: {name} (a ratio of 0.5 is twice the hits)"),
            "ns per hit",
            ROUNDS,
            vec![
                ("1 thread", Box::new(move || on_threads(1, work))),
                ("2 threads", Box::new(move || on_threads(2, work))),
            ],
        );
    }
}

pub fn insert() {
    const CAPACITY: usize = 10_000;
    const COUNT: usize = 200_000;
    let keys: Vec<_> = (0..CAPACITY * 10).map(key).collect();
    let order = zipf(keys.len(), 0.6, COUNT, 2);
    let (quick, moka) = (bare_quick(CAPACITY), bare_moka(CAPACITY as u64));
    let (ours_quick, ours_moka) =
        (ours(EngineKind::QuickCache, CAPACITY as u64), ours(EngineKind::Moka, CAPACITY as u64));
    let foyer: foyer_memory::Cache<String, Arc<u64>> = foyer_memory::CacheBuilder::new(CAPACITY).build();
    let each = |work: &dyn Fn(&str)| time(COUNT, || order.iter().for_each(|index| work(&keys[*index as usize])));
    table(
        "A get, and a set on a miss; ten times more keys than capacity",
        "ns",
        ROUNDS,
        vec![
            (
                "quick_cache 0.7.0",
                Box::new(|| {
                    each(&|key| {
                        if quick.get(key).is_none() {
                            quick.insert(key.into(), (Arc::new(1), u64::MAX));
                        }
                    })
                }),
            ),
            (
                "fleetcache",
                Box::new(|| {
                    each(&|key| {
                        if ours_quick.peek(key).is_none() {
                            drive(ours_quick.set(key, 1)).expect("set");
                        }
                    })
                }),
            ),
            (
                "fleetcache on moka",
                Box::new(|| {
                    each(&|key| {
                        if ours_moka.peek(key).is_none() {
                            drive(ours_moka.set(key, 1)).expect("set");
                        }
                    })
                }),
            ),
            (
                "moka 0.12.16 sync",
                Box::new(|| {
                    each(&|key| {
                        if moka.get(key).is_none() {
                            moka.insert(key.into(), (Arc::new(1), u64::MAX));
                        }
                    })
                }),
            ),
            (
                "foyer-memory 0.22.6",
                Box::new(|| {
                    each(&|key| {
                        if foyer.get(key).is_none() {
                            foyer.insert(key.to_owned(), Arc::new(1));
                        }
                    })
                }),
            ),
        ],
    );
}

pub fn stampede() {
    const CALLERS: usize = 10_000;
    const LOAD: Duration = Duration::from_millis(50);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().expect("a runtime");
    let cache = runtime.block_on(async { ours(EngineKind::QuickCache, 1_000) });
    let moka: moka::future::Cache<String, u64> = moka::future::Cache::new(1_000);
    let gather = |spawn: &dyn Fn() -> tokio::task::JoinHandle<()>| {
        let start = Instant::now();
        let calls: Vec<_> = (0..CALLERS).map(|_| spawn()).collect();
        runtime.block_on(async {
            for call in calls {
                call.await.expect("a caller");
            }
        });
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut round = 0;
    table(
        "10,000 callers of one missing key, loaded in 50 ms",
        "ms",
        7,
        vec![
            (
                "a timer of 50 ms awaited by 10,000 tasks",
                Box::new(|| gather(&|| runtime.spawn(async { tokio::time::sleep(LOAD).await }))),
            ),
            (
                "fleetcache `get_with`",
                Box::new(|| {
                    let before = cache.stats().loads;
                    runtime.block_on(cache.remove("k")).expect("remove");
                    let took = gather(&|| {
                        let cache = cache.clone();
                        runtime.spawn(async move {
                            let load = || async {
                                tokio::time::sleep(LOAD).await;
                                Ok::<_, Infallible>(1)
                            };
                            cache.get_with("k", load).await.expect("loaded");
                        })
                    });
                    assert_eq!(cache.stats().loads, before + 1, "one load");
                    took
                }),
            ),
            (
                "moka 0.12.16 future `get_with`",
                Box::new(|| {
                    round += 1;
                    let key = format!("k{round}");
                    gather(&|| {
                        let (moka, key) = (moka.clone(), key.clone());
                        runtime.spawn(async move {
                            moka.get_with(key, async {
                                tokio::time::sleep(LOAD).await;
                                1
                            })
                            .await;
                        })
                    })
                }),
            ),
        ],
    );
}
