//! A node in a process of its own, for tests that need several or that kill one.
//!
//! `worker URL KEY MILLIS VALUE` reads the key through a loader that says `loading`, takes so long and answers the value;
//! then it says what it got.

#![allow(clippy::print_stdout, reason = "its answers")]

use std::io::Write;
use std::time::Duration;

use fleetcache::{HybridCache, RedisStore, RedisStreamsBus, Runtime, SystemRuntime};

fn say(what: &str) {
    println!("{what}");
    let _ = std::io::stdout().flush();
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [url, key, millis, value] = &arguments[..] else { return Err("worker URL KEY MILLIS VALUE".into()) };
    let (pause, value) = (Duration::from_millis(millis.parse()?), value.clone());
    let cache: HybridCache<String> =
        HybridCache::builder().l2(RedisStore::new(url)?).bus(RedisStreamsBus::new(url)?).build()?;
    let loader = move || async move {
        say("loading");
        SystemRuntime::current().sleep(pause).await;
        Ok::<_, std::convert::Infallible>(value)
    };
    let got = cache.get_with(key, loader).await?;
    say(&format!("got {got}"));
    cache.close().await?;
    Ok(())
}
