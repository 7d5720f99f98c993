//! What both engines have to keep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::{Capacity, EngineKind, L1, Weigher};
use crate::key::KeyRef;

macro_rules! suite {
    ($($test:ident,)*) => {
        mod quick_cache {
            $(#[test] fn $test() { super::$test(super::EngineKind::QuickCache); })*
        }
        #[cfg(feature = "moka")]
        mod moka {
            $(#[test] fn $test() { super::$test(super::EngineKind::Moka); })*
        }
    };
}

suite! {
    changes_are_visible_at_once,
    scopes_do_not_meet,
    entries_are_bounded,
    bytes_are_bounded,
    weightless_entries_are_bounded_too,
    one_entry_at_a_time,
    what_leaves_is_dropped,
    what_is_too_large_is_not_kept_and_wipes_nothing,
    an_entry_is_weighed_once,
    a_panic_of_the_weigher_breaks_nothing,
    a_value_may_use_the_cache_while_it_is_dropped,
    what_was_removed_never_comes_back,
    what_was_cleared_never_comes_back,
}

fn at(text: &str) -> KeyRef<'_> {
    KeyRef { scope: 0, text }
}

fn entries<T: Clone + Send + Sync + 'static>(kind: EngineKind, capacity: u64) -> L1<T> {
    L1::new(kind, Capacity::Entries(capacity), None, 7)
}

fn bytes<T: Clone + Send + Sync + 'static>(
    kind: EngineKind,
    capacity: u64,
    weigh: impl Fn(&T) -> u64 + Send + Sync + 'static,
) -> L1<T> {
    let weigher: Weigher<T> = Arc::new(move |_, entry| weigh(entry));
    L1::new(kind, Capacity::Bytes(capacity), Some(weigher), 7)
}

fn fill<T: Clone + Send + Sync + 'static>(l1: &L1<T>, count: u64, entry: impl Fn(u64) -> T) {
    for number in 0..count {
        l1.insert(at(&number.to_string()).to_key(), entry(number));
    }
    l1.settle();
}

/// moka drops a value when no thread can be reading it any more, which the other tests' threads delay.
fn holds_soon<T: Clone + Send + Sync + 'static>(l1: &L1<T>, done: impl Fn() -> bool) -> bool {
    (0..100_000).any(|_| {
        l1.settle();
        std::thread::yield_now();
        done()
    })
}

fn changes_are_visible_at_once(kind: EngineKind) {
    let l1 = entries(kind, 100);
    assert_eq!(l1.get(at("k")), None);
    for round in 0..1_000 {
        l1.insert(at("k").to_key(), round);
        assert_eq!(l1.get(at("k")), Some(round));
        l1.insert(at("k").to_key(), -round);
        assert_eq!(l1.get(at("k")), Some(-round));
        if round % 2 == 0 {
            l1.remove(at("k"));
        } else {
            l1.clear();
        }
        assert_eq!(l1.get(at("k")), None);
    }
    l1.settle();
    assert_eq!((l1.len(), l1.weight()), (0, 0));
}

fn scopes_do_not_meet(kind: EngineKind) {
    let l1 = entries(kind, 100);
    let other = KeyRef { scope: 1, text: "k" };
    l1.insert(at("k").to_key(), 1);
    assert_eq!((l1.get(at("k")), l1.get(other)), (Some(1), None));
    l1.insert(other.to_key(), 2);
    assert_eq!((l1.get(at("k")), l1.get(other)), (Some(1), Some(2)));
    l1.remove(at("k"));
    assert_eq!((l1.get(at("k")), l1.get(other)), (None, Some(2)));
}

fn entries_are_bounded(kind: EngineKind) {
    for capacity in [0, 1, 2, 33, 100, 129, 1_000, 9_001] {
        let l1 = entries(kind, capacity);
        fill(&l1, capacity * 10 + 10, |_| ());
        let len = l1.len();
        assert!(len <= capacity && len >= capacity * 9 / 10, "{len} entries for a capacity of {capacity}");
        assert_eq!(l1.weight(), len);
    }
}

fn bytes_are_bounded(kind: EngineKind) {
    for capacity in [1_000, 100_000, 100 << 20] {
        let l1 = bytes(kind, capacity, |weight| *weight);
        let largest = capacity / 100;
        fill(&l1, 2_000, |number| number * 7_919 % largest);
        let weight = l1.weight();
        assert!(weight <= capacity && weight >= capacity * 8 / 10, "{weight} bytes for a capacity of {capacity}");
    }
}

fn weightless_entries_are_bounded_too(kind: EngineKind) {
    let l1 = bytes(kind, 100, |()| 0);
    fill(&l1, 1_000, |_| ());
    assert!(l1.len() <= 100, "{} entries", l1.len());
}

fn one_entry_at_a_time(kind: EngineKind) {
    let l1 = entries(kind, 1);
    for number in 0..100 {
        let key = number.to_string();
        l1.insert(at(&key).to_key(), number);
        assert_eq!(l1.get(at(&key)), Some(number));
    }
    l1.settle();
    assert_eq!((0..100).filter(|number| l1.get(at(&number.to_string())).is_some()).count(), 1);
}

fn what_leaves_is_dropped(kind: EngineKind) {
    let l1 = entries(kind, 1_000);
    let token = Arc::new(());
    fill(&l1, 10_000, |_| Arc::clone(&token));
    assert!(holds_soon(&l1, || Arc::strong_count(&token) as u64 == l1.len() + 1), "evicted");

    l1.clear();
    assert!(holds_soon(&l1, || Arc::strong_count(&token) == 1), "cleared");

    let tokens = [(); 3].map(Arc::new);
    l1.insert(at("removed").to_key(), Arc::clone(&tokens[0]));
    l1.insert(at("replaced").to_key(), Arc::clone(&tokens[1]));
    l1.insert(at("replaced").to_key(), Arc::clone(&tokens[2]));
    l1.remove(at("removed"));
    assert!(holds_soon(&l1, || tokens.each_ref().map(Arc::strong_count) == [1, 1, 2]), "removed and replaced");

    drop(l1);
    assert_eq!(Arc::strong_count(&tokens[2]), 1);
}

fn what_is_too_large_is_not_kept_and_wipes_nothing(kind: EngineKind) {
    let l1 = bytes(kind, 1_000, |weight| *weight);
    fill(&l1, 50, |_| 10);
    for (key, weight) in [("new", 1_001), ("7", 1_001), ("8", u64::MAX)] {
        l1.insert(at(key).to_key(), weight);
        assert_eq!(l1.get(at(key)), None, "neither the new entry nor the one before");
    }
    l1.settle();
    assert_eq!((l1.len(), l1.weight()), (48, 480));
}

fn an_entry_is_weighed_once(kind: EngineKind) {
    let calls = Arc::new(AtomicU64::new(0));
    let l1 = bytes(kind, 1_000, {
        let calls = Arc::clone(&calls);
        move |()| calls.fetch_add(1, Ordering::Relaxed) % 100
    });
    fill(&l1, 500, |_| ());
    fill(&l1, 500, |_| ());
    assert!(l1.weight() <= 1_000);
    assert_eq!(calls.load(Ordering::Relaxed), 1_000);
    l1.clear();
    l1.settle();
    assert_eq!((l1.len(), l1.weight()), (0, 0));
}

fn a_panic_of_the_weigher_breaks_nothing(kind: EngineKind) {
    let l1 = bytes(kind, 1_000, |weight| if *weight == 0 { panic!("weigher") } else { *weight });
    l1.insert(at("k").to_key(), 1);
    catch_unwind(AssertUnwindSafe(|| l1.insert(at("k").to_key(), 0))).unwrap_err();
    assert_eq!(l1.get(at("k")), Some(1));
    l1.insert(at("k").to_key(), 2);
    assert_eq!(l1.get(at("k")), Some(2));
}

struct Reentrant(Weak<L1<Arc<Reentrant>>>);

impl Drop for Reentrant {
    fn drop(&mut self) {
        if let Some(l1) = self.0.upgrade() {
            for number in 0..100_u32 {
                l1.remove(at(&number.to_string()));
            }
        }
    }
}

fn a_value_may_use_the_cache_while_it_is_dropped(kind: EngineKind) {
    let l1 = Arc::new(entries(kind, 10));
    let value = || Arc::new(Reentrant(Arc::downgrade(&l1)));
    fill(&l1, 100, |_| value());
    fill(&l1, 100, |_| value());
    l1.clear();

    let heavy = Arc::new(AtomicU64::new(1));
    let l1 = Arc::new(bytes(kind, 100, {
        let heavy = Arc::clone(&heavy);
        move |_| heavy.load(Ordering::Relaxed)
    }));
    let value = || Arc::new(Reentrant(Arc::downgrade(&l1)));
    fill(&l1, 100, |_| value());
    heavy.store(90, Ordering::Relaxed);
    l1.insert(at("drives out many at once").to_key(), value());
    l1.settle();
    assert!(l1.weight() <= 100);
}

/// One thread inserts version after version and takes each away before it says so; another must not see it after that.
fn never_comes_back(kind: EngineKind, versions: u64, take_away: impl Fn(&L1<u64>) + Sync) {
    let l1 = entries(kind, 100);
    let gone = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for version in 1..=versions {
                l1.insert(at("k").to_key(), version);
                take_away(&l1);
                gone.store(version, Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            while gone.load(Ordering::SeqCst) < versions {
                let before = gone.load(Ordering::SeqCst);
                let found = l1.get(at("k"));
                assert!(found.is_none_or(|version| version > before), "{found:?}, but {before} was gone");
            }
        });
    });
}

fn what_was_removed_never_comes_back(kind: EngineKind) {
    never_comes_back(kind, 50_000, |l1| l1.remove(at("k")));
}

fn what_was_cleared_never_comes_back(kind: EngineKind) {
    never_comes_back(kind, 20_000, L1::clear);
}

/// moka settles by the clock, and cannot promise this.
#[test]
fn one_seed_keeps_the_same_entries() {
    let kept = || {
        let l1 = entries(EngineKind::QuickCache, 1_000);
        fill(&l1, 5_000, |number| number);
        (0..5_000).filter(|number: &u64| l1.get(at(&number.to_string())).is_some()).collect::<Vec<_>>()
    };
    assert_eq!(kept(), kept());
}
