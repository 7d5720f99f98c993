//! "Everything in this tag or scope made before this number is dead": the node's copy of the fleet's watermarks, and
//! what was cleared on this node alone.
//!
//! A watermark's number is issued by L2 and only grows; an entry carries the highest number its node knew when its
//! load *began* (its stamp). Dead is whoever's stamp is below the number of its tag, its scope or the floor. No clocks
//! are compared, and not knowing a newer number errs to a miss.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hashbrown::HashMap;

use crate::entry::Entry;
use crate::sync::RwLock;
use crate::wire::message::Item;

/// How many watermarks are kept; beyond, the lowest is merged into the floor, which kills a little too much.
pub(crate) const MAX_WATERMARKS: usize = 10_000;

/// The member that every entry of the fleet is under.
pub(crate) const FLOOR: &str = "*";

/// The watermark member of a scope.
pub(crate) fn scope_member(scope: &str) -> String {
    format!("s/{}", escape(scope))
}

/// The watermark member of a tag in a scope.
pub(crate) fn tag_member(scope: &str, tag: &str) -> String {
    format!("t/{}/{tag}", escape(scope))
}

/// The member that stands for one key, where the bus cannot carry its message. It says what the message would: it is no
/// watermark, and kills nothing by its number.
pub(crate) fn key_member(scope: &str, key: &str) -> String {
    format!("k/{}/{key}", escape(scope))
}

/// The message that a member stands for.
pub(crate) fn member_item(member: &str) -> Option<Item> {
    let (kind, rest) = member.split_once('/')?;
    let unescape = |scope: &str| scope.replace("%2F", "/").replace("%25", "%").into_boxed_str();
    match kind {
        "s" => Some(Item::Scope { scope: unescape(rest), number: None }),
        "t" => {
            rest.split_once('/').map(|(scope, tag)| Item::Tag { scope: unescape(scope), tag: tag.into(), number: None })
        }
        "k" => rest.split_once('/').map(|(scope, key)| Item::Key {
            scope: unescape(scope),
            key: key.into(),
            l2_pending: false,
        }),
        _ => None,
    }
}

fn escape(scope: &str) -> String {
    scope.replace('%', "%25").replace('/', "%2F")
}

/// A member that waits for its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suspension {
    /// The node's time when it was invalidated.
    since: u64,
    /// Tells it from a later one of the same member.
    serial: u64,
}

/// The node's view of what is dead though nobody named its key.
pub(crate) struct Watermarks {
    /// Bumped *after* anything here changes. A hit compares it with the entry's `checked`.
    generation: AtomicU64,
    /// The highest number known; the stamp of what begins to load now.
    known: AtomicU64,
    state: RwLock<State>,
    /// What decides while no scope or tag is marked, waited for or cleared, which is nearly always: read by every load
    /// instead of the lock, whose counter would travel between the cores. Invariant: changed under the lock, after the
    /// state and before the generation; of several, the one that decides less comes last.
    plain: AtomicBool,
    floor: AtomicU64,
    cleared: AtomicU64,
}

#[derive(Default)]
struct State {
    marks: HashMap<String, u64, foldhash::fast::FixedState>,
    floor: u64,
    /// Generation below which what is in L1 was cleared: on the whole node, and by scope number.
    cleared: u64,
    cleared_scopes: HashMap<u32, u64, foldhash::fast::FixedState>,
    /// Members invalidated while no number was to be had, with the node's time then. Alive is only what this node
    /// itself began to load later.
    pending: HashMap<String, Suspension, foldhash::fast::FixedState>,
    suspensions: u64,
}

impl Watermarks {
    pub(crate) fn new() -> Self {
        // Generation 1: an entry's `checked` of 0 never matches.
        Self {
            generation: AtomicU64::new(1),
            known: AtomicU64::new(0),
            state: RwLock::default(),
            plain: AtomicBool::new(true),
            floor: AtomicU64::new(0),
            cleared: AtomicU64::new(0),
        }
    }

    /// The highest number that a caller who comes now must see heeded; while a number is waited for, any.
    pub(crate) fn horizon(&self) -> u64 {
        if self.is_plain() || self.state.read().pending.is_empty() { self.known() } else { u64::MAX }
    }

    fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Acquire)
    }

    /// Ends every change of the state.
    fn publish(&self, state: &State) {
        self.floor.store(state.floor, Ordering::Release);
        self.cleared.store(state.cleared, Ordering::Release);
        let plain = state.marks.is_empty() && state.pending.is_empty() && state.cleared_scopes.is_empty();
        self.plain.store(plain, Ordering::Release);
    }

    /// Read before the state it vouches for: see [`Self::alive`].
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The stamp of a load that begins now.
    pub(crate) fn known(&self) -> u64 {
        self.known.load(Ordering::Acquire)
    }

    /// Everything in L1 that was read or loaded from before this call is dead.
    pub(crate) fn clear(&self) {
        let mut state = self.state.write();
        let next = self.generation.load(Ordering::Relaxed) + 1;
        state.cleared = next;
        state.cleared_scopes.clear();
        self.publish(&state);
        // Invariant: the generation moves after the state, inside the lock. A hit that still sees the old number began
        // before the clear returned; one that sees the new number finds the state.
        self.generation.store(next, Ordering::Release);
    }

    /// The same for one scope.
    pub(crate) fn clear_scope(&self, scope: u32) {
        let mut state = self.state.write();
        let next = self.generation.load(Ordering::Relaxed) + 1;
        state.cleared_scopes.insert(scope, next);
        self.publish(&state);
        self.generation.store(next, Ordering::Release);
    }

    /// Makes every hit look twice once, without killing anything.
    pub(crate) fn recheck(&self) {
        let _state = self.state.write();
        let next = self.generation.load(Ordering::Relaxed) + 1;
        self.generation.store(next, Ordering::Release);
    }

    /// The generation below which a flight must not be joined by a caller who comes now.
    pub(crate) fn not_before(&self, scope: u32) -> u64 {
        if self.is_plain() {
            return self.cleared.load(Ordering::Acquire);
        }
        let state = self.state.read();
        state.cleared_scopes.get(&scope).copied().unwrap_or(0).max(state.cleared)
    }

    /// Takes in numbers issued by L2. Numbers only grow, so order and repetition do not matter.
    pub(crate) fn raise<'a>(&self, members: impl IntoIterator<Item = (&'a str, u64)>, top: u64) {
        let mut state = self.state.write();
        let mut changed = false;
        for (member, number) in members {
            self.known.fetch_max(number, Ordering::AcqRel);
            if member == FLOOR {
                changed |= number > state.floor;
                state.floor = state.floor.max(number);
                continue;
            }
            let mark = state.marks.entry_ref(member).or_insert(0);
            changed |= number > *mark;
            *mark = (*mark).max(number);
        }
        self.known.fetch_max(top, Ordering::AcqRel);
        while state.marks.len() > MAX_WATERMARKS {
            let Some((lowest, number)) =
                state.marks.iter().min_by_key(|(_, number)| **number).map(|(m, n)| (m.clone(), *n))
            else {
                break;
            };
            state.marks.remove(&lowest);
            state.floor = state.floor.max(number);
        }
        self.publish(&state);
        if changed {
            let next = self.generation.load(Ordering::Relaxed) + 1;
            self.generation.store(next, Ordering::Release);
        }
    }

    /// Kills a member while no number can be had: everything from L2, and what this node began to load until `now`.
    pub(crate) fn suspend(&self, member: String, now: u64) {
        let mut state = self.state.write();
        state.suspensions += 1;
        let suspension = Suspension { since: now, serial: state.suspensions };
        state.pending.insert(member, suspension);
        self.publish(&state);
        let next = self.generation.load(Ordering::Relaxed) + 1;
        self.generation.store(next, Ordering::Release);
    }

    /// Members that wait for a number.
    pub(crate) fn suspended(&self) -> Vec<(String, Suspension)> {
        self.state.read().pending.iter().map(|(member, suspension)| (member.clone(), *suspension)).collect()
    }

    /// A member has its number, issued after it was suspended. One that is suspended again meanwhile stays: a number
    /// heard from elsewhere may be older than the suspension, so only this ends it.
    pub(crate) fn settle(&self, member: &str, suspension: Suspension) {
        let mut state = self.state.write();
        if state.pending.get(member) == Some(&suspension) {
            state.pending.remove(member);
        }
        self.publish(&state);
    }

    /// A number for an invalidation on a node without L2, where numbers are its own.
    pub(crate) fn issue(&self) -> u64 {
        self.known.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Everything known, to be written back to an L2 that has lost it.
    pub(crate) fn all(&self) -> Vec<(String, u64)> {
        let state = self.state.read();
        let mut all: Vec<_> = state.marks.iter().map(|(member, number)| (member.clone(), *number)).collect();
        all.push((FLOOR.to_owned(), state.floor));
        all
    }

    /// Whether the entry may be answered, and the generation for which that holds.
    pub(crate) fn alive<V>(&self, entry: &Entry<V>, scope: u32, scope_name: &str) -> Option<u64> {
        // Read first: what changes after it makes the verdict one of an older generation.
        let generation = self.generation();
        if self.is_plain() {
            let dead = entry.checked < self.cleared.load(Ordering::Acquire)
                || self.floor.load(Ordering::Acquire) > entry.stamp;
            return (!dead).then_some(generation);
        }
        let state = self.state.read();
        if entry.checked < state.cleared
            || state.cleared_scopes.get(&scope).is_some_and(|cleared| entry.checked < *cleared)
        {
            return None;
        }
        // What was read from L2 after a member was suspended did not get past `dead`, so its reading time judges it too.
        if state.dead(entry.stamp, Some(entry.read_at), scope_name, entry.tags()) {
            return None;
        }
        Some(self.generation.load(Ordering::Relaxed))
    }

    /// Whether a value with this stamp is dead. `loaded_here` is when this node began to load it, or `None` where it came
    /// from L2.
    pub(crate) fn dead(&self, stamp: u64, loaded_here: Option<u64>, scope: &str, tags: &[Box<str>]) -> bool {
        if self.is_plain() {
            return self.floor.load(Ordering::Acquire) > stamp;
        }
        self.state.read().dead(stamp, loaded_here, scope, tags)
    }
}

impl State {
    fn dead(&self, stamp: u64, loaded_here: Option<u64>, scope: &str, tags: &[Box<str>]) -> bool {
        let above = |number: u64| number > stamp;
        if above(self.floor) {
            return true;
        }
        if self.marks.is_empty() && self.pending.is_empty() {
            return false;
        }
        let dead = |member: &str| {
            self.marks.get(member).is_some_and(|number| above(*number))
                || self
                    .pending
                    .get(member)
                    .is_some_and(|pending| loaded_here.is_none_or(|began| began <= pending.since))
        };
        dead(&scope_member(scope)) || tags.iter().any(|tag| dead(&tag_member(scope, tag)))
    }
}
