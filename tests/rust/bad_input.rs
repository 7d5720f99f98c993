//! What makes no sense is refused at once, by name, value and what is allowed instead.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use fleetcache::{Builder, EntryOptions, ErrorKind, HybridCache, MemoryBus, MemoryStore};
use fleetcache_tests::{Count, Fleet, alone, counting, ms, run};

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let zero = Duration::ZERO;
    let endless = Duration::MAX;
    let table: [(EntryOptions, &str); 15] = [
        (EntryOptions::new().ttl(zero), "ttl = 0ns is not allowed: give at least 1 ms"),
        (EntryOptions::new().ttl(endless), "ttl = "),
        (EntryOptions::new().l1_ttl(zero), "l1_ttl = 0ns"),
        (EntryOptions::new().negative_ttl(zero), "negative_ttl = 0ns"),
        (EntryOptions::new().soft_timeout(zero), "soft_timeout = 0ns"),
        (EntryOptions::new().hard_timeout(zero), "hard_timeout = 0ns"),
        (
            EntryOptions::new().soft_timeout(ms(20)).hard_timeout(ms(10)),
            "soft_timeout = 20ms is not allowed: give at most hard_timeout, 10ms",
        ),
        (EntryOptions::new().refresh_ahead(0.0), "refresh_ahead = 0.0"),
        (EntryOptions::new().refresh_ahead(1.0), "refresh_ahead = 1.0"),
        (EntryOptions::new().refresh_ahead(-0.5), "refresh_ahead = -0.5"),
        (EntryOptions::new().refresh_ahead(f64::NAN), "refresh_ahead = NaN"),
        (EntryOptions::new().jitter(endless), "jitter = "),
        (EntryOptions::new().stale_while_revalidate(endless), "stale_while_revalidate = "),
        (EntryOptions::new().stale_if_error(endless), "stale_if_error = "),
        (EntryOptions::new().l1_ttl(endless), "l1_ttl = "),
    ];
    let sound = HybridCache::<u64>::builder().build().unwrap();
    for (options, message) in table {
        for error in [
            HybridCache::<u64>::builder().options(&options).build().unwrap_err(),
            sound.with_options(&options).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(message), "{error} should say {message}");
        }
    }
}

#[test]
fn a_builder_refuses_what_makes_no_sense() {
    type Change = fn(Builder<u64>) -> Builder<u64>;
    let table: [(Change, &str); 8] = [
        (|b| b.capacity(0), "capacity = 0"),
        (|b| b.max_bytes(0, |_, _| 1), "max_bytes = 0"),
        (|b| b.max_bytes(10, |_, _| 1).capacity(10), "capacity = 10 is not allowed with max_bytes = 10"),
        (|b| b.prefix(""), "prefix = \"\""),
        (|b| b.l2_timeout(Duration::ZERO), "l2_timeout = 0ns"),
        (|b| b.max_bus_silence(ms(1)), "max_bus_silence = 1ms is not allowed: give 30 ms to 1 h"),
        (|b| b.l2(MemoryStore::new()), "no tokio runtime"),
        (|b| b.bus(MemoryBus::new()), "no tokio runtime"),
    ];
    for (change, message) in table {
        let error = change(HybridCache::builder()).build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(message), "{error} should say {message}");
    }
}

#[test]
fn keys_are_any_text_of_a_sensible_length() {
    run(async |runtime| {
        let fleet = Fleet::start(&runtime, 2, &EntryOptions::new()).await;
        let longest = "k".repeat(64 * 1024);
        for (version, key) in
            ["\0", "a\0b", "ключ", ":", "%", "a:b", "!w", "{tag}x", " ", &longest].into_iter().enumerate()
        {
            let version = version as u64;
            fleet.nodes[0].set(key, version).await.unwrap();
            runtime.settle().await;
            assert_eq!(fleet.nodes[1].get(key).await.unwrap().as_deref(), Some(&version), "{key:.20?}");
        }
        let too_long = "k".repeat(1024 * 1024);
        for (key, length) in [("", 0), (too_long.as_str(), 1_048_576)] {
            let cache = &fleet.nodes[0];
            let errors = [
                cache.get(key).await.unwrap_err(),
                cache.get_with(key, counting(&Count::new(), 1)).await.unwrap_err(),
                cache.set(key, 1).await.unwrap_err(),
                cache.remove(key).await.unwrap_err(),
                cache.get_many(&[key]).await.unwrap_err(),
                cache.remove_many(&["fine", key]).await.unwrap_err(),
            ];
            for error in errors {
                assert_eq!(error.kind(), ErrorKind::Config);
                assert_eq!(error.to_string(), format!("key of {length} bytes is not allowed: give 1 to 65536 bytes"));
            }
        }
    });
}

#[test]
fn scopes_and_tags_have_sensible_names() {
    run(async |runtime| {
        let cache = alone(&runtime, &EntryOptions::new());
        assert_eq!(cache.scope("").unwrap_err().kind(), ErrorKind::Config);
        assert_eq!(cache.scope(&"s".repeat(257)).unwrap_err().kind(), ErrorKind::Config);
        for tags in [vec![String::new()], vec!["t".repeat(257)], (0..65).map(|tag| tag.to_string()).collect()] {
            assert_eq!(cache.set_with_tags("k", 1, tags).await.unwrap_err().kind(), ErrorKind::Config);
        }
        assert_eq!(cache.remove_by_tag("").await.unwrap_err().kind(), ErrorKind::Config);
    });
}

#[test]
fn a_value_too_large_for_the_store_is_refused_by_set_and_answered_by_a_load() {
    let runtime = fleetcache::testing::SimRuntime::new();
    runtime.block_on(async {
        let cache = HybridCache::<String>::builder()
            .l2(MemoryStore::on(std::sync::Arc::new(runtime.clone())))
            .runtime(std::sync::Arc::new(runtime.clone()))
            .build()
            .unwrap();
        let large = "x".repeat(17 * 1024 * 1024);
        let error = cache.set("k", large.clone()).await.unwrap_err();
        assert_eq!(error.to_string(), "value of key \"k\" is not allowed: give at most 16777216 encoded bytes");
        let loaded =
            cache.get_with("k", move || std::future::ready(Ok::<_, fleetcache_tests::Broken>(large))).await.unwrap();
        assert_eq!(loaded.len(), 17 * 1024 * 1024);
        assert_eq!(cache.get("k").await.unwrap(), None, "it is not kept");
        assert_eq!(cache.stats().oversized_values, 2);
    });
    runtime.shut_down();
}
