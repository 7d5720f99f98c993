//! The contract suites, run on what comes with the crate.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use fleetcache::testing::{SimRuntime, bus_contract, store_contract};
use fleetcache::{Bus, Delivery, MemoryBus, MemoryStore, Store};

#[test]
fn the_memory_store_keeps_its_contract() {
    let runtime = SimRuntime::new();
    runtime.block_on(async { store_contract(&MemoryStore::on(Arc::new(runtime.clone())), &runtime).await });
}

#[test]
fn the_memory_bus_keeps_its_contract() {
    let runtime = SimRuntime::new();
    runtime.block_on(async { bus_contract(Arc::new(MemoryBus::new()), &runtime).await });
}

#[test]
fn a_subscriber_who_falls_behind_gets_a_gap() {
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let bus = MemoryBus::new();
        let mut slow = bus.subscribe().await.unwrap();
        for number in 0..5_000_u32 {
            bus.publish(number.to_le_bytes().to_vec().into()).await.unwrap();
        }
        assert_eq!(slow.next().await.unwrap(), Delivery::Gap);
    });
}

/// A store with the five methods and no more.
struct Plain(MemoryStore);

#[async_trait::async_trait]
impl Store for Plain {
    async fn get(&self, key: &str) -> fleetcache::Result<Option<bytes::Bytes>> {
        self.0.get(key).await
    }

    async fn set(&self, key: &str, value: bytes::Bytes, ttl: std::time::Duration) -> fleetcache::Result<()> {
        self.0.set(key, value, ttl).await
    }

    async fn delete(&self, key: &str) -> fleetcache::Result<()> {
        self.0.delete(key).await
    }

    async fn clear(&self) -> fleetcache::Result<()> {
        self.0.clear().await
    }

    async fn close(&self) {}
}

#[test]
fn a_store_without_compare_and_set_works_and_says_that_it_promises_less() {
    use fleetcache_tests::{Count, counting, ms};
    let runtime = SimRuntime::new();
    runtime.block_on(async {
        let store = MemoryStore::on(Arc::new(runtime.clone()));
        store_contract(&Plain(store.clone()), &runtime).await;
        let node = || {
            let builder = fleetcache::HybridCache::<u64>::builder().l2(Plain(store.clone()));
            builder.runtime(Arc::new(runtime.clone())).build().unwrap()
        };
        let (one, two) = (node(), node());
        let loads = Count::new();
        assert_eq!(*one.get_with("k", counting(&loads, 1)).await.unwrap(), 1);
        assert_eq!(*two.get_with("k", counting(&loads, 2)).await.unwrap(), 1);
        one.set("k", 3).await.unwrap();
        two.remove_local("k");
        assert_eq!(two.get("k").await.unwrap().as_deref(), Some(&3));
        assert!(!one.health().fenced);
        let slow = runtime.clone();
        let late = one.get_with("late", move || async move {
            fleetcache::Runtime::sleep(&slow, ms(2_500)).await;
            Ok::<_, fleetcache_tests::Broken>(1)
        });
        late.await.unwrap();
        assert_eq!(two.get("late").await.unwrap(), None, "a load older than the lease never fills");
    });
}
