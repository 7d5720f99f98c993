//! What both engines have to keep.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Capacity, EngineKind, L1, Weigher};
use crate::key::KeyRef;

const ENGINES: &[EngineKind] = &[
    EngineKind::QuickCache,
    #[cfg(feature = "moka")]
    EngineKind::Moka,
];

fn each<T: Clone + Send + Sync + 'static>(capacity: Capacity, weigher: Option<&Weigher<T>>, test: impl Fn(&L1<T>)) {
    for engine in ENGINES {
        test(&L1::new(*engine, capacity, weigher.cloned(), 7));
    }
}

fn at(text: &str) -> KeyRef<'_> {
    KeyRef { scope: 0, text }
}

#[test]
fn changes_are_visible_at_once_and_scopes_do_not_meet() {
    each(Capacity::Entries(100), None, |l1| {
        let other = KeyRef { scope: 1, text: "k" };
        l1.insert(at("k").to_key(), 1);
        assert_eq!((l1.get(at("k")), l1.get(other)), (Some(1), None));
        l1.insert(other.to_key(), 2);
        l1.insert(at("k").to_key(), 3);
        assert_eq!((l1.get(at("k")), l1.get(other)), (Some(3), Some(2)));
        l1.remove(at("k"));
        assert_eq!((l1.get(at("k")), l1.get(other)), (None, Some(2)));
        l1.clear();
        assert_eq!(l1.get(other), None);
    });
}

#[test]
fn capacity_bounds_what_is_held_and_what_leaves_is_dropped() {
    for capacity in [1, 2, 10, 100, 5_000] {
        each(Capacity::Entries(capacity), None, |l1| {
            let token = Arc::new(());
            for key in 0..capacity * 10 {
                l1.insert(at(&key.to_string()).to_key(), Arc::clone(&token));
            }
            l1.settle();
            // Each shard rounds its part up.
            assert!(l1.len() <= capacity + capacity / 64, "{} entries for a capacity of {capacity}", l1.len());
            assert!(l1.len() >= capacity / 2, "{} entries of {capacity}", l1.len());
            // moka frees what it has evicted at a time of its own.
            if let L1::Quick(_) = l1 {
                assert_eq!(Arc::strong_count(&token) as u64, l1.len() + 1);
                l1.clear();
                assert_eq!(Arc::strong_count(&token), 1);
            }
        });
    }
}

#[test]
fn bytes_bound_what_is_held() {
    let weigh: Weigher<u64> = Arc::new(|_, weight| *weight);
    each(Capacity::Bytes(10_000), Some(&weigh), |l1| {
        for key in 0..1_000_u64 {
            l1.insert(at(&key.to_string()).to_key(), key % 100);
        }
        l1.settle();
        assert!(l1.weight() <= 10_000 && l1.weight() > 2_000, "{} bytes", l1.weight());
        l1.insert(at("huge").to_key(), 20_000);
        l1.settle();
        assert_eq!(l1.get(at("huge")), None, "larger than everything there may be");
        assert!(l1.weight() <= 10_000);
    });
}

#[test]
fn a_removed_entry_never_comes_back() {
    each(Capacity::Entries(100), None, |l1| {
        let removed = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 1..=50_000 {
                    l1.insert(at("k").to_key(), version);
                    l1.remove(at("k"));
                    removed.store(version, Ordering::SeqCst);
                }
            });
            scope.spawn(|| {
                while removed.load(Ordering::SeqCst) < 50_000 {
                    let gone = removed.load(Ordering::SeqCst);
                    let found = l1.get(at("k"));
                    assert!(found.is_none_or(|version| version > gone), "{found:?} was removed before {gone}");
                }
            });
        });
    });
}
