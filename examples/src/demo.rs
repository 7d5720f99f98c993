//! Two nodes of a shop over one shared store and one bus, told as a story; each step is checked as it is told.
//!
//! `make demo` runs it, on a store and a bus in this process's memory, or on the Redis that `FLEETCACHE_REDIS` names.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it tells a story")]

mod database;

use std::sync::Arc;
use std::time::{Duration, Instant};

use database::{Database, DatabaseError, Product};
use fleetcache::{EntryOptions, HybridCache, Loaded, MemoryBus, MemoryStore, RedisStore, RedisStreamsBus};
use futures_util::StreamExt;
use futures_util::future::join_all;

type Cache = HybridCache<Product>;
type Failure = Box<dyn std::error::Error>;

/// Everything the demo's steps need.
struct Shop {
    database: Arc<Database>,
    paris: Cache,
    tokyo: Cache,
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let redis = std::env::var("FLEETCACHE_REDIS").ok().filter(|url| !url.is_empty());
    let (paris, tokyo) = match &redis {
        Some(url) => (node_on(url)?, node_on(url)?),
        None => nodes()?,
    };
    let shop = Shop { database: Arc::new(Database::open()?), paris, tokyo };
    shop.open().await?;
    println!(
        "A shop with 5,000 products. Its database answers in 20 ms. Two nodes, paris and tokyo, share one cache, {}.\n",
        redis.map_or("in memory", |_| "on Redis")
    );
    shop.first_reads().await?;
    shop.whole_catalogue().await?;
    shop.price_change().await?;
    shop.stampede().await?;
    shop.category().await?;
    shop.outage().await?;
    shop.summary();
    shop.paris.close().await?;
    shop.tokyo.close().await?;
    Ok(())
}

/// Two nodes in this process, over a store and a bus in its memory.
fn nodes() -> Result<(Cache, Cache), Failure> {
    let (store, bus) = (MemoryStore::new(), MemoryBus::new());
    let node = || HybridCache::builder().ttl(Duration::from_secs(300)).l2(store.clone()).bus(bus.clone()).build();
    Ok((node()?, node()?))
}

/// A node over the Redis at `url`: its values, and a stream for invalidations.
fn node_on(url: &str) -> Result<Cache, Failure> {
    let builder = HybridCache::builder().ttl(Duration::from_secs(300)).prefix("fleetcache-demo");
    Ok(builder.l2(RedisStore::new(url)?).bus(RedisStreamsBus::new(url)?).build()?)
}

fn key(id: u32) -> String {
    format!("product:{id}")
}

fn now() -> Instant {
    #[allow(clippy::disallowed_methods, reason = "the story says how long each step took")]
    Instant::now()
}

/// Tells a step with the time it took.
fn tell(step: &str, since: Instant) {
    let took = since.elapsed();
    let took = match took.as_nanos() {
        ..1_000 => format!("{} ns", took.as_nanos()),
        1_000..1_000_000 => format!("{:.1} us", took.as_secs_f64() * 1e6),
        _ => format!("{:.1} ms", took.as_secs_f64() * 1e3),
    };
    println!("  {step:<74}{took:>10}");
}

/// Ends the demo where a step did not go as told.
fn check(holds: bool, what: &str) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(format!("this did not hold: {what}").into()) }
}

impl Shop {
    /// Waits until the nodes know each other, and forgets what an earlier demo may have left.
    async fn open(&self) -> Result<(), Failure> {
        let start = now();
        while self.paris.health().peers + self.tokyo.health().peers < 2 {
            check(start.elapsed() < Duration::from_secs(5), "the nodes hear each other: can the bus be reached?")?;
            #[allow(clippy::disallowed_methods, reason = "real time has to pass")]
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.paris.remove_all().await?;
        self.paris.scope("patient")?.remove_all().await?;
        check(self.paris.health().is_good(), "store and bus are well")
    }

    /// A product through a node: from its memory, the shared store or the database.
    async fn product(&self, node: &Cache, id: u32) -> Result<Arc<Product>, fleetcache::Error> {
        let database = Arc::clone(&self.database);
        node.get_with(&key(id), move || async move { database.product(id).await }).await
    }

    async fn first_reads(&self) -> Result<(), Failure> {
        println!("One product");
        let start = now();
        let product = self.product(&self.paris, 1).await?;
        tell(&format!("paris loads it from the database: {}", product.name), start);
        let start = now();
        for _ in 0..100_000 {
            self.product(&self.paris, 1).await?;
        }
        println!(
            "  {:<74}{:>7} ns",
            "paris has it in memory: one of 100,000 hits",
            start.elapsed().as_nanos() / 100_000
        );
        let start = now();
        let same = self.product(&self.tokyo, 1).await?;
        tell("tokyo finds it in the shared store", start);
        check(same == product && self.database.queries() == 1, "one query for both nodes")
    }

    async fn whole_catalogue(&self) -> Result<(), Failure> {
        println!("\nThe whole catalogue");
        let start = now();
        let loads = futures_util::stream::iter(1..=5_000).map(|id| self.product(&self.paris, id)).buffer_unordered(500);
        let failed = loads.filter(|loaded| std::future::ready(loaded.is_err())).count().await;
        tell("paris loads 5,000 products, 500 at a time", start);
        check(failed == 0 && self.database.queries() == 5_000, "5,000 queries, each product once")?;
        let keys: Vec<_> = (1..=5_000).map(key).collect();
        let start = now();
        let found = self.tokyo.get_many(&keys).await?;
        tell("tokyo gets them all in one call to the shared store", start);
        check(found.iter().all(Option::is_some) && self.database.queries() == 5_000, "all found, no query")
    }

    async fn price_change(&self) -> Result<(), Failure> {
        println!("\nA price changes");
        let old = self.product(&self.tokyo, 7).await?.price_cents;
        self.database.reprice(7, old + 100);
        let start = now();
        self.paris.remove(&key(7)).await?;
        tell("paris removes the product from the fleet", start);
        while self.tokyo.peek(&key(7)).is_some() {
            tokio::task::yield_now().await;
        }
        tell("tokyo has dropped it", start);
        let start = now();
        let new = self.product(&self.tokyo, 7).await?.price_cents;
        tell(&format!("tokyo reads the new price: {old} is now {new} cents"), start);
        check(new == old + 100, "nobody sees the old price any more")
    }

    async fn stampede(&self) -> Result<(), Failure> {
        println!("\nA stampede");
        self.paris.remove(&key(42)).await?;
        let before = self.database.queries();
        let start = now();
        let callers =
            (0..1_000).map(|caller| self.product(if caller % 2 == 0 { &self.paris } else { &self.tokyo }, 42));
        let answers = join_all(callers).await;
        tell("1,000 callers on both nodes ask for one missing product", start);
        let queries = self.database.queries() - before;
        println!("  {:<74}{queries:>7}", "queries made for them");
        check(answers.iter().all(Result::is_ok) && queries == 1, "one query for a thousand callers")
    }

    async fn category(&self) -> Result<(), Failure> {
        println!("\nA whole category");
        for id in 1..=20 {
            let database = Arc::clone(&self.database);
            self.paris.remove(&key(id)).await?;
            let load = move |_| async move {
                let product = database.product(id).await?;
                let category = product.category.clone();
                Ok::<_, DatabaseError>(Loaded::value(product).tags([category]))
            };
            self.paris.get_with_context(&key(id), load).await?;
        }
        let category = self.product(&self.paris, 1).await?.category.clone();
        let start = now();
        self.tokyo.remove_by_tag(&category).await?;
        tell(&format!("tokyo removes the tag {category:?}: one step, however many products"), start);
        check(self.tokyo.get(&key(1)).await?.is_none(), "tokyo does not see the product")?;
        while self.paris.peek(&key(1)).is_some() {
            tokio::task::yield_now().await;
        }
        tell("paris has dropped its products too", start);
        Ok(())
    }

    async fn outage(&self) -> Result<(), Failure> {
        println!("\nThe database goes down");
        let options = EntryOptions::new().ttl(Duration::from_millis(100)).stale_if_error(Duration::from_secs(60));
        let patient = self.paris.scope("patient")?.with_options(&options)?;
        let ask = || {
            let database = Arc::clone(&self.database);
            patient.get_with("product:9", move || async move { database.product(9).await })
        };
        let price = ask().await?.price_cents;
        #[allow(clippy::disallowed_methods, reason = "real time has to pass")]
        tokio::time::sleep(Duration::from_millis(150)).await;
        self.database.take_down(true);
        self.database.reprice(9, price + 1);
        let start = now();
        let stale = ask().await?.price_cents;
        tell("the product has expired; the loader fails, the old value is served", start);
        let start = now();
        ask().await?;
        tell("and served again without asking the database for 2 s", start);
        let start = now();
        let error = self.product(&self.paris, 6_000).await.err().map(|error| error.to_string()).unwrap_or_default();
        tell(&format!("a product without an old value: {error:?}"), start);
        self.database.take_down(false);
        let start = now();
        let mut fresh = stale;
        while fresh == stale && start.elapsed() < Duration::from_secs(5) {
            #[allow(clippy::disallowed_methods, reason = "real time has to pass")]
            tokio::time::sleep(Duration::from_millis(50)).await;
            fresh = ask().await?.price_cents;
        }
        tell("the database is back: the new value comes by itself", start);
        check(stale == price && fresh == price + 1, "stale during the outage, fresh after it")
    }

    fn summary(&self) {
        println!("\nIn numbers");
        for (name, node) in [("paris", &self.paris), ("tokyo", &self.tokyo)] {
            let stats = node.stats();
            println!(
                "  {name}: {} hits in memory, {} in the shared store, {} loads, {} callers joined, {} stale served, healthy: {}",
                stats.l1_hits,
                stats.l2_hits,
                stats.loads,
                stats.joined,
                stats.fallbacks_served,
                node.health().is_good()
            );
        }
        println!("  database: {} queries", self.database.queries());
    }
}
