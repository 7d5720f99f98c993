//! Bytes per entry at a million entries, each cache in a process of its own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fleetcache::{EngineKind, HybridCache};

use crate::work::key;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ENTRIES: usize = 1_000_000;
const CASES: [&str; 5] =
    ["quick_cache 0.7.0", "fleetcache", "moka 0.12.16 sync", "fleetcache on moka", "foyer-memory 0.22.6"];

fn value() -> String {
    "v".repeat(100)
}

/// Fills one cache and prints what it holds.
pub fn measure(case: &str) {
    let before = HELD.load(Ordering::Relaxed);
    let deadline = 0_u64;
    let keep: Box<dyn std::any::Any> = match case {
        "quick_cache 0.7.0" => {
            let cache = quick_cache::sync::Cache::<Box<str>, (Arc<String>, u64)>::new(ENTRIES * 11 / 10);
            (0..ENTRIES).for_each(|number| cache.insert(key(number).into(), (Arc::new(value()), deadline)));
            assert!(cache.len() > ENTRIES * 99 / 100);
            Box::new(cache)
        }
        "moka 0.12.16 sync" => {
            let cache = moka::sync::Cache::<Box<str>, (Arc<String>, u64)>::new(ENTRIES as u64 * 11 / 10);
            (0..ENTRIES).for_each(|number| cache.insert(key(number).into(), (Arc::new(value()), deadline)));
            cache.run_pending_tasks();
            Box::new(cache)
        }
        "foyer-memory 0.22.6" => {
            let cache: foyer_memory::Cache<Box<str>, Arc<String>> =
                foyer_memory::CacheBuilder::new(ENTRIES * 11 / 10).build();
            (0..ENTRIES).for_each(|number| drop(cache.insert(key(number).into(), Arc::new(value()))));
            Box::new(cache)
        }
        ours => {
            let engine = if ours == "fleetcache" { EngineKind::QuickCache } else { EngineKind::Moka };
            let cache: HybridCache<String> = HybridCache::builder()
                .capacity(ENTRIES as u64 * 11 / 10)
                .engine(engine)
                .build()
                .expect("a sound cache");
            for number in 0..ENTRIES {
                futures_util::FutureExt::now_or_never(cache.set(&key(number), value())).expect("at once").expect("set");
            }
            Box::new(cache)
        }
    };
    println!("{}", (HELD.load(Ordering::Relaxed) - before) as f64 / ENTRIES as f64);
    drop(keep);
}

pub fn table() {
    println!("\n### Bytes per entry at a million entries (20-byte keys, 100-byte strings, both included)\n");
    println!("| case | bytes | against quick_cache | against moka |\n| --- | --- | --- | --- |");
    let program = std::env::current_exe().expect("this program");
    let sizes = CASES.map(|case| {
        let output = std::process::Command::new(&program).arg(format!("bytes-of:{case}")).output().expect("a child");
        String::from_utf8_lossy(&output.stdout).trim().parse::<f64>().expect("a number")
    });
    for (case, size) in CASES.iter().zip(sizes) {
        println!("| {case} | {size:.0} | {:.2} | {:.2} |", size / sizes[0], size / sizes[2]);
    }
}
