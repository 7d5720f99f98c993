//! Runs `tests/scenarios/*.json`: what the cache promises, as steps on named nodes. Every language runs the same files.
//!
//! A step is a list: a node, a verb and what the verb takes.
//!
//! | step | meaning |
//! | --- | --- |
//! | `["a", "get", key, expected]` | a get without a loader answers `expected`; `null` is a miss |
//! | `["a", "load", key, value, expected]` | a get whose loader gives `value` answers `expected` |
//! | `["a", "fail", key, expected]` | a get whose loader fails answers `expected`; `"error"` is the loader's error |
//! | `["a", "set", key, value, [tags]]` | |
//! | `["a", "remove", key]`, `["a", "remove_by_tag", tag]`, `["a", "remove_all"]`, `["a", "clear"]` | |
//! | `["*", "advance", milliseconds]` | time passes |
//! | `["*", "loads", count]` | so many loaders have run so far |
//! | `["a", "store", "up" or "down"]`, `["a", "bus", "up" or "deaf"]` | the node's way to the store or the bus |
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use fleetcache::{EntryOptions, HybridCache, Loaded};
use fleetcache_tests::{Count, Fleet, counting, failing, run};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    promise: String,
    nodes: Vec<String>,
    /// Milliseconds by option name.
    #[serde(default)]
    options: std::collections::BTreeMap<String, u64>,
    steps: Vec<Vec<Value>>,
}

fn options(scenario: &Scenario) -> EntryOptions {
    scenario.options.iter().fold(EntryOptions::new(), |options, (name, millis)| {
        let duration = Duration::from_millis(*millis);
        match name.as_str() {
            "ttl" => options.ttl(duration),
            "stale_while_revalidate" => options.stale_while_revalidate(duration),
            "stale_if_error" => options.stale_if_error(duration),
            "l1_ttl" => options.l1_ttl(duration),
            other => panic!("option {other:?} is unknown to the runner"),
        }
    })
}

async fn step(fleet: &Fleet, scenario: &Scenario, loads: &Count, step: &[Value]) {
    let text = |index: usize| step[index].as_str().unwrap();
    let number = |index: usize| step[index].as_u64().unwrap();
    let told = format!("{}: {}", scenario.promise, Value::from(step));
    let index = scenario.nodes.iter().position(|name| name == text(0));
    let node = || -> &HybridCache<u64> { &fleet.nodes[index.unwrap_or_else(|| panic!("{told}: no such node"))] };
    match text(1) {
        "get" => assert_eq!(node().get(text(2)).await.unwrap().map(|value| *value), step[3].as_u64(), "{told}"),
        "load" => assert_eq!(*node().get_with(text(2), counting(loads, number(3))).await.unwrap(), number(4), "{told}"),
        "load_tagged" => {
            let (count, value, tag) = (loads.clone(), number(3), text(4).to_owned());
            let load = move |_| async move {
                count.add();
                Ok::<_, fleetcache_tests::Broken>(Loaded::value(value).tags([tag]))
            };
            node().get_with_context(text(2), load).await.unwrap();
        }
        "fail" => {
            let answer = node().get_with(text(2), failing(loads)).await;
            assert_eq!(answer.ok().map(|value| *value), step[3].as_u64(), "{told}");
        }
        "set" => {
            let tags = step.get(4).and_then(Value::as_array).cloned().unwrap_or_default();
            let tags = tags.iter().map(|tag| tag.as_str().unwrap().to_owned());
            node().set_with_tags(text(2), number(3), tags).await.unwrap();
        }
        "remove" => node().remove(text(2)).await.unwrap(),
        "remove_by_tag" => node().remove_by_tag(text(2)).await.unwrap(),
        "remove_all" => node().remove_all().await.unwrap(),
        "clear" => node().clear().await.unwrap(),
        "advance" => fleet.runtime.advance(Duration::from_millis(number(2))).await,
        "loads" => assert_eq!(loads.get(), number(2), "{told}"),
        "store" => fleet.stores[index.unwrap()].down(text(2) == "down"),
        "bus" => fleet.buses[index.unwrap()].lose_received(text(2) == "deaf"),
        other => panic!("{told}: verb {other:?} is unknown"),
    }
    fleet.runtime.settle().await;
}

#[test]
fn every_scenario_holds() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "the scenarios are missing");
    for file in files {
        let scenario: Scenario = serde_json::from_slice(&std::fs::read(&file).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        run(async |runtime| {
            let fleet = Fleet::start(&runtime, scenario.nodes.len(), &options(&scenario)).await;
            let loads = Count::new();
            for words in &scenario.steps {
                step(&fleet, &scenario, &loads, words).await;
            }
        });
    }
}
