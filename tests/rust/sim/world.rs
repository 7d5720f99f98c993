//! One run: some nodes, some clients, one seed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fleetcache::testing::SimRuntime;
use fleetcache::{EntryOptions, ErrorKind, HybridCache, Loaded, MemoryStore, Runtime, Store};

use crate::faults::{Faults, SharedFaults, SimBus, SimStore};
use crate::model::{How, Model, Read};

/// What a seed decides.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) nodes: usize,
    pub(crate) keys: u64,
    pub(crate) clients: u64,
    pub(crate) operations: u64,
    pub(crate) options: EntryOptions,
    pub(crate) faults: Faults,
    pub(crate) loader_error: u64,
    pub(crate) cancel: u64,
    /// Nobody changes anything and nothing fails: then there is one load at a time in the whole fleet.
    pub(crate) calm: bool,
    pub(crate) skew: u64,
}

/// Nothing is heard for this long: silence. A third of it is the heartbeat.
const MAX_SILENCE: u64 = 900;

/// Within this, everybody has noticed a lost message: a heartbeat, its delay, three missed ones for a lost tail.
const BOUND: u64 = 4 * MAX_SILENCE;

impl Plan {
    pub(crate) fn new(seed: u64, operations: u64) -> Self {
        let dice = SimRuntime::seeded(seed ^ 0xabcd);
        let chance = |percent: u64| dice.below(100) < percent;
        let up_to = |most: u64| dice.below(most + 1);
        let ttl = [30, 200, 1_000, 60_000][up_to(3) as usize];
        let mut options = EntryOptions::new().ttl(Duration::from_millis(ttl));
        if chance(40) {
            options = options.stale_while_revalidate(Duration::from_millis(up_to(2 * ttl)));
        }
        if chance(40) {
            options = options.stale_if_error(Duration::from_millis(up_to(2 * ttl)));
        }
        if chance(25) {
            options = options.refresh_ahead(0.5);
        }
        if chance(25) {
            options = options.soft_timeout(Duration::from_millis(1 + up_to(30)));
        }
        if chance(20) {
            options = options.hard_timeout(Duration::from_millis(31 + up_to(60)));
        }
        if chance(20) {
            options = options.l1_ttl(Duration::from_millis(1 + up_to(ttl)));
        }
        let calm = chance(15);
        let mut faults = Faults { store_latency: up_to(8), bus_delay: up_to(60), ..Faults::default() };
        if !calm {
            if chance(50) {
                faults.bus_drop = up_to(30);
                faults.bus_duplicate = up_to(30);
            }
            if chance(40) {
                faults.store_error = up_to(15);
                faults.store_lost_reply = up_to(10);
                faults.store_late = up_to(6);
            }
            if chance(30) {
                faults.publish_error = up_to(30);
            }
        }
        Self {
            seed,
            nodes: 1 + up_to(3) as usize,
            keys: 1 + up_to(2),
            clients: 2 + up_to(5),
            operations,
            options: if calm { EntryOptions::new().ttl(Duration::from_millis(ttl)) } else { options },
            faults,
            loader_error: if calm || chance(50) { 0 } else { up_to(30) },
            cancel: if calm || chance(50) { 0 } else { up_to(25) },
            calm,
            skew: if chance(30) { up_to(100_000) } else { 0 },
        }
    }

    fn store_is_sound(&self) -> bool {
        self.faults.store_error + self.faults.store_late + self.faults.store_lost_reply == 0
    }

    fn bound(&self) -> Option<u64> {
        (self.store_is_sound() && self.faults.publish_error == 0).then_some(BOUND)
    }
}

struct World {
    plan: Plan,
    runtime: SimRuntime,
    store: MemoryStore,
    nodes: Vec<HybridCache<u64>>,
    faults: SharedFaults,
    model: Model,
}

/// Runs a plan; the violation and the events that led to it, if there is one, and how many reads were checked.
pub(crate) fn run(plan: &Plan) -> (Option<String>, Vec<String>, u64) {
    let runtime = SimRuntime::seeded(plan.seed);
    let model = Model::default();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async {
            let world = Arc::new(World::start(plan, &runtime, &model));
            world.work().await;
            world.quiet_down().await;
        });
    }));
    // What is left holds the runtime in circles: the end of the process.
    runtime.shut_down();
    if let Err(panic) = outcome {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        model.state().violate(format!("panic: {}", message.unwrap_or_default()));
    }
    let (violation, reads) = {
        let state = model.state();
        (state.violation.clone(), state.reads)
    };
    (violation, model.trace(), reads)
}

impl World {
    fn start(plan: &Plan, runtime: &SimRuntime, model: &Model) -> Self {
        let faults: SharedFaults = Arc::new(Mutex::new(plan.faults));
        let store = MemoryStore::on(Arc::new(runtime.clone()));
        let bus = SimBus { runtime: runtime.clone(), faults: Arc::clone(&faults), queues: Arc::default() };
        let mut nodes = Vec::new();
        for _ in 0..plan.nodes {
            let clock = runtime.skewed(Duration::from_millis(if plan.skew > 0 { runtime.below(plan.skew) } else { 0 }));
            let node = HybridCache::builder()
                .options(&plan.options)
                .max_bus_silence(Duration::from_millis(MAX_SILENCE))
                .capacity(1_000)
                .l2(SimStore { inner: store.clone(), runtime: runtime.clone(), faults: Arc::clone(&faults) })
                .bus(bus.clone())
                .runtime(Arc::new(clock))
                .build();
            nodes.push(node.expect("the plan makes sense"));
        }
        Self { plan: plan.clone(), runtime: runtime.clone(), store, nodes, faults, model: model.clone() }
    }

    async fn work(self: &Arc<Self>) {
        let each = self.plan.operations / self.plan.clients + 1;
        let (done, mut finished) = futures_channel::mpsc::unbounded::<()>();
        for _ in 0..self.plan.clients {
            let (world, done) = (Arc::clone(self), done.clone());
            let spawned = self.runtime.spawn(Box::pin(async move {
                for _ in 0..each {
                    if world.model.state().violation.is_some() {
                        break;
                    }
                    world.operation().await;
                    let pause = [0, 3, 20, 200][world.runtime.below(4) as usize];
                    world.runtime.sleep(Duration::from_millis(world.runtime.below(pause + 1))).await;
                }
                drop(done);
            }));
            spawned.expect("the simulation runs tasks");
        }
        drop(done);
        while futures_util::StreamExt::next(&mut finished).await.is_some() {}
    }

    async fn operation(self: &Arc<Self>) {
        let node = self.runtime.below(self.plan.nodes as u64) as usize;
        let key = self.runtime.below(self.plan.keys);
        let cache = &self.nodes[node];
        let dice = self.runtime.below(100);
        if self.plan.calm || dice < 60 {
            self.get_with(node, key).await;
            return;
        }
        match dice {
            60..70 => {
                let (began, at) = (self.model.event(), self.runtime.now_ms());
                let found = cache.get(&name(key)).await;
                self.judge(node, key, began, at, found.map(|found| found.map(|value| *value))).await;
            }
            70..73 => {
                let (began, at) = (self.model.event(), self.runtime.now_ms());
                let names: Vec<_> = (0..self.plan.keys).map(name).collect();
                let found = cache.get_many(&names).await.unwrap_or_default();
                for (key, found) in found.into_iter().enumerate() {
                    self.judge(node, key as u64, began, at, Ok(found.map(|value| *value))).await;
                }
            }
            73..81 => {
                let (version, index) = self.model.change(key, How::Set, node);
                self.model.note(self.runtime.now_ms(), || format!("node {node} sets key {key} to {version}"));
                let outcome = cache.set_with_tags(&name(key), version, [tag(key)]).await;
                self.changed(node, key, version, index, outcome.is_ok()).await;
            }
            81..96 => {
                let (version, index) = self.model.change(key, How::Remove, node);
                self.model.note(self.runtime.now_ms(), || format!("node {node} removes key {key}, now {version}"));
                let outcome = cache.remove(&name(key)).await;
                self.changed(node, key, version, index, outcome.is_ok()).await;
            }
            96..98 => {
                let changes: Vec<_> = (0..self.plan.keys)
                    .filter(|other| tag(*other) == tag(key))
                    .map(|key| (key, self.model.change(key, How::Tag, node)))
                    .collect();
                self.model.note(self.runtime.now_ms(), || format!("node {node} removes tag {}: {changes:?}", tag(key)));
                let _ = cache.remove_by_tag(&tag(key)).await;
                for (key, (_, index)) in changes {
                    self.model.changed(key, index, self.runtime.now_ms());
                }
            }
            98 => {
                let _ = cache.clear().await;
            }
            _ => cache.remove_local(&name(key)),
        }
    }

    /// The version that the store holds.
    async fn stored(&self, key: u64) -> Option<u64> {
        let cell = self.store.get(&format!("fleetcache::{}", name(key))).await.ok().flatten();
        cell.as_deref().and_then(version_in)
    }

    async fn changed(&self, node: usize, key: u64, version: u64, index: usize, ok: bool) {
        let now = self.runtime.now_ms();
        self.model.changed(key, index, now);
        self.model.note(now, || format!("node {node} has changed key {key} to {version}"));
        if ok
            && self.plan.store_is_sound()
            && let Some(version) = self.stored(key).await
        {
            self.model.stored(key, version, index);
        }
    }

    async fn get_with(self: &Arc<Self>, node: usize, key: u64) {
        let (began, at) = (self.model.event(), self.runtime.now_ms());
        self.model.note(at, || format!("node {node} gets key {key} ({began})"));
        let world = Arc::clone(self);
        let key_name = name(key);
        let call = self.nodes[node].get_with_context(&key_name, move |context| async move {
            world.model.load_begins(key, world.plan.calm);
            let ended = Ended(Arc::clone(&world), key);
            world.runtime.sleep(Duration::from_millis(world.runtime.below(15))).await;
            let version = world.model.read_source(key);
            world.model.note(world.runtime.now_ms(), || format!("node {node} loads key {key}: {version}"));
            world.runtime.sleep(Duration::from_millis(world.runtime.below(40))).await;
            drop(ended);
            if world.runtime.below(100) < world.plan.loader_error {
                return Err("simulated");
            }
            match context.stale() {
                Some(stale) if **stale == version => Ok(Loaded::not_modified()),
                _ => Ok(Loaded::value(version).tags([tag(key)])),
            }
        });
        let outcome = if self.runtime.below(100) < self.plan.cancel {
            let patience = self.runtime.sleep(Duration::from_millis(self.runtime.below(40)));
            match futures_util::future::select(std::pin::pin!(call), patience).await {
                futures_util::future::Either::Left((outcome, _)) => outcome,
                futures_util::future::Either::Right(_) => return,
            }
        } else {
            call.await
        };
        self.judge(node, key, began, at, outcome.map(|value| Some(*value))).await;
    }

    async fn judge(&self, node: usize, key: u64, began: u64, began_at: u64, outcome: fleetcache::Result<Option<u64>>) {
        let now = self.runtime.now_ms();
        self.model.note(now, || format!("node {node} got key {key} ({began}): {outcome:?}"));
        if now - began_at > 60_000 {
            self.model.state().violate(format!("3.2 a read took {} ms", now - began_at));
        }
        match outcome {
            Ok(Some(version)) => {
                let in_memory = self.nodes[node].peek(&name(key)).is_some_and(|held| *held == version);
                let kept = in_memory || self.stored(key).await == Some(version);
                self.model.returned(Read { node, key, began, began_at, kept }, version, self.plan.bound());
            }
            Ok(None) => {}
            Err(error) => {
                let expected = matches!(error.kind(), ErrorKind::Loader | ErrorKind::Timeout);
                if !expected || self.plan.calm {
                    self.model.state().violate(format!("3.7 a read failed: {error:?}"));
                }
            }
        }
    }

    /// Nothing goes wrong any more. After a while everybody agrees with the source.
    async fn quiet_down(self: &Arc<Self>) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = Faults::default();
        if self.model.state().violation.is_some() {
            return;
        }
        self.runtime.sleep(Duration::from_secs(40)).await;
        for (number, node) in self.nodes.iter().enumerate() {
            let health = node.health();
            if !health.is_good() {
                self.model.state().violate(format!("4.7 node {number} did not heal: {health:?}"));
            }
            for key in 0..self.plan.keys {
                let found = node.get(&name(key)).await.ok().flatten().map(|value| *value);
                let source = self.model.read_source(key);
                // Of two sets at once the older may have won.
                let (began, at) = (self.model.event(), self.runtime.now_ms());
                if let Some(version) = found.filter(|version| *version != source) {
                    let read = Read { node: number, key, began, began_at: at, kept: true };
                    self.model.returned(read, version, Some(BOUND));
                }
            }
        }
        for node in &self.nodes {
            let _ = node.close().await;
        }
    }
}

struct Ended(Arc<World>, u64);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.model.load_ends(self.1);
    }
}

fn name(key: u64) -> String {
    format!("key-{key}")
}

fn tag(key: u64) -> String {
    format!("tag-{}", key % 2)
}

/// The version in a value's cell: a MessagePack integer behind prefix, header and tags.
fn version_in(cell: &[u8]) -> Option<u64> {
    if cell.get(3) != Some(&b'V') {
        return None;
    }
    let tags = usize::from(*cell.get(31)?);
    let mut at = 28 + 4 + 40;
    for _ in 0..tags {
        at += 2 + usize::from(u16::from_le_bytes(cell.get(at..at + 2)?.try_into().ok()?));
    }
    let body = cell.get(at + 4..cell.len() - 4)?;
    match body {
        [small @ 0..=0x7f] => Some(u64::from(*small)),
        [0xcc, byte] => Some(u64::from(*byte)),
        [0xcd, rest @ ..] => Some(u64::from(u16::from_be_bytes(rest.try_into().ok()?))),
        [0xce, rest @ ..] => Some(u64::from(u32::from_be_bytes(rest.try_into().ok()?))),
        _ => None,
    }
}
