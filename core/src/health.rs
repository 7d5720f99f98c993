//! How the parts are doing.

/// How the parts of a cache are doing. Reads keep working whatever it says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// The shared store.
    pub l2: PartHealth,
    /// The invalidation bus.
    pub bus: PartHealth,
    /// Whether the shared store can compare and set, so that no stale load ever gets into it. Without, a stale fill can
    /// live for a lease time.
    pub fenced: bool,
    /// Other nodes heard on the bus.
    pub peers: usize,
    /// Keys that could not be invalidated everywhere yet.
    pub repairs: usize,
    /// Scopes that are not read from the shared store until a watermark is in.
    pub closed_scopes: usize,
    /// How long this node's last own message took to come back, in milliseconds.
    pub bus_lag_ms: Option<u64>,
}

/// How one part is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PartHealth {
    /// There is none.
    Absent,
    /// It answers.
    Up,
    /// It answers, but refuses changes: it is out of memory, read-only, or does not permit them.
    Degraded,
    /// It does not, and the cache goes on without it.
    Down,
}

impl Health {
    /// Whether everything there is works and nothing waits for repair.
    pub fn is_good(&self) -> bool {
        let works = |part| matches!(part, PartHealth::Absent | PartHealth::Up);
        works(self.l2) && works(self.bus) && self.repairs == 0 && self.closed_scopes == 0
    }
}
