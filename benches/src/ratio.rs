//! The share of hits on traces, beside LRU and the optimum.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use fleetcache::{EngineKind, HybridCache};

use crate::work::{key, zipf};

const KEYS: usize = 100_000;
const LENGTH: usize = 1_000_000;

fn share(trace: &[u32], mut hit: impl FnMut(u32) -> bool) -> f64 {
    trace.iter().filter(|key| hit(**key)).count() as f64 / trace.len() as f64
}

fn ours(trace: &[u32], capacity: usize, engine: EngineKind) -> f64 {
    let cache: HybridCache<u64> =
        HybridCache::builder().capacity(capacity as u64).engine(engine).build().expect("a sound cache");
    share(trace, |number| {
        let key = key(number as usize);
        let hit = cache.peek(&key).is_some();
        if !hit {
            futures_util::FutureExt::now_or_never(cache.set(&key, 1)).expect("at once").expect("set");
        }
        hit
    })
}

fn foyer(trace: &[u32], capacity: usize) -> f64 {
    let cache: foyer_memory::Cache<u32, Arc<u64>> = foyer_memory::CacheBuilder::new(capacity).build();
    share(trace, |number| {
        let hit = cache.get(&number).is_some();
        if !hit {
            cache.insert(number, Arc::new(1));
        }
        hit
    })
}

/// Keeps the `capacity` keys with the highest rank; a rank is given at each use.
fn ranked(trace: &[u32], capacity: usize, rank: impl Fn(usize) -> u64) -> f64 {
    let (mut ranks, mut order) = (HashMap::new(), BTreeSet::new());
    let mut position = 0;
    share(trace, |key| {
        let now = rank(position);
        position += 1;
        let before = ranks.insert(key, now);
        if let Some(before) = before {
            order.remove(&(before, key));
        }
        order.insert((now, key));
        if order.len() > capacity
            && let Some((_, lowest)) = order.pop_first()
        {
            ranks.remove(&lowest);
        }
        before.is_some()
    })
}

/// Where each position's key is used next: the optimum drops what is used last.
fn next_uses(trace: &[u32]) -> Vec<u64> {
    let mut next = HashMap::new();
    let mut uses = vec![0; trace.len()];
    for (position, key) in trace.iter().enumerate().rev() {
        uses[position] = next.insert(*key, position as u64).unwrap_or(u64::MAX);
    }
    uses
}

pub fn table() {
    let zipfian = zipf(KEYS, 0.9, LENGTH, 3);
    let mut scans = Vec::with_capacity(LENGTH);
    for (chunk, part) in zipfian.chunks(75_000).enumerate() {
        scans.extend_from_slice(part);
        // Keys that are used once and never again.
        scans.extend((0..20_000).map(|key| (KEYS + chunk * 20_000 + key) as u32));
    }
    println!(
        "\n### Share of hits\n\n| trace | capacity | fleetcache | fleetcache on moka | foyer-memory 0.22.6 | LRU | optimum |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for capacity in [KEYS / 100, KEYS / 10] {
        let cycle: Vec<u32> = (0..LENGTH).map(|step| (step % (capacity * 3 / 2)) as u32).collect();
        for (name, trace) in
            [("Zipf 0.9", &zipfian), ("Zipf 0.9 with scans", &scans), ("loop over 1.5 x capacity", &cycle)]
        {
            let next = next_uses(trace);
            println!(
                "| {name} | {capacity} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} |",
                ours(trace, capacity, EngineKind::QuickCache),
                ours(trace, capacity, EngineKind::Moka),
                foyer(trace, capacity),
                ranked(trace, capacity, |position| position as u64),
                ranked(trace, capacity, |position| u64::MAX - next[position]),
            );
        }
    }
}
