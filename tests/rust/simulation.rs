//! The real engine under a simulated fleet: several nodes on virtual time, a store with latency and errors, a bus that
//! delays, reorders, duplicates and drops; one seed is one history. What reads return is checked after every step.
//!
//! `FLEETCACHE_SIM_OPS` says how many operations (10^6 by default), `FLEETCACHE_SIM_SEED` replays one seed and prints
//! its history.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "sim/faults.rs"]
mod faults;
#[path = "sim/model.rs"]
mod model;
#[path = "sim/world.rs"]
mod world;

use world::{Plan, run};

const OPERATIONS_PER_SEED: u64 = 250;

fn from_env(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} = {value:?} is not allowed: give a number")))
}

#[test]
fn the_promises_hold_in_every_history() {
    if let Some(seed) = from_env("FLEETCACHE_SIM_SEED") {
        let plan = Plan::new(seed, OPERATIONS_PER_SEED);
        let (violation, trace, _) = run(&plan);
        println!("{plan:#?}\n{}", trace.join("\n"));
        assert_eq!(violation, None);
        return;
    }
    let operations = from_env("FLEETCACHE_SIM_OPS").unwrap_or(1_000_000);
    let seeds = operations.div_ceil(OPERATIONS_PER_SEED);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64).min(seeds);
    // Panics inside a history are reported with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    let workers: Vec<_> = (0..threads)
        .map(|worker| {
            std::thread::spawn(move || {
                let mut checked = 0;
                for seed in (worker..seeds).step_by(threads as usize) {
                    let (violation, trace, reads) = run(&Plan::new(seed, OPERATIONS_PER_SEED));
                    checked += reads;
                    if let Some(violation) = violation {
                        return Err((seed, violation, trace));
                    }
                }
                Ok(checked)
            })
        })
        .collect();
    let outcomes: Vec<_> =
        workers.into_iter().map(|worker| worker.join().expect("a worker reports its panics")).collect();
    let _ = std::panic::take_hook();
    let mut checked = 0;
    for outcome in outcomes {
        match outcome {
            Ok(reads) => checked += reads,
            Err((seed, violation, trace)) => {
                let tail = trace.len().saturating_sub(60);
                panic!("{}\n{violation}\nreplay with FLEETCACHE_SIM_SEED={seed}", trace[tail..].join("\n"));
            }
        }
    }
    println!("{operations} operations in {seeds} histories, {checked} reads checked");
    assert!(checked > operations / 4, "the histories read too little to show anything: {checked}");
}

#[test]
fn a_seed_replays_identically() {
    for seed in 0..20 {
        let plan = Plan::new(seed, OPERATIONS_PER_SEED);
        assert_eq!(run(&plan).1, run(&plan).1, "seed {seed}");
    }
}
