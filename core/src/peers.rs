//! Who else is on the bus, and whether anything they sent was missed.
//!
//! Every batch is numbered per sender and incarnation, and heartbeats repeat the last number: a hole, a first sight in
//! the middle, or a sender that falls silent without goodbye is a gap.

use hashbrown::HashMap;

/// One life of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sender {
    pub(crate) node: u64,
    pub(crate) incarnation: u64,
}

/// What a message says about its sender's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbered {
    /// This is the batch with the number.
    Batch,
    /// The sender's last batch so far has the number.
    Last,
    /// The same, and the sender leaves.
    Goodbye,
}

#[derive(Default)]
pub(crate) struct Peers {
    known: HashMap<Sender, Peer, foldhash::fast::FixedState>,
}

struct Peer {
    last: u64,
    heard_at: u64,
    heartbeat: u64,
}

/// How many senders are remembered; beyond, the one heard longest ago is forgotten, which costs a gap if it speaks.
const MAX_PEERS: usize = 4096;

/// How many of its own heartbeats a sender may miss.
const MISSED_HEARTBEATS: u64 = 3;

impl Peers {
    /// Takes note of a message and says whether it shows a gap.
    pub(crate) fn heard(&mut self, sender: Sender, kind: Numbered, number: u64, heartbeat: u64, now: u64) -> bool {
        let known = self.known.get_mut(&sender);
        let gap = match (&known, kind) {
            (None, Numbered::Batch) => number > 1,
            (None, Numbered::Last | Numbered::Goodbye) => number > 0,
            (Some(peer), Numbered::Batch) => number > peer.last + 1,
            (Some(peer), Numbered::Last | Numbered::Goodbye) => number > peer.last,
        };
        if kind == Numbered::Goodbye {
            self.known.remove(&sender);
            return gap;
        }
        if let Some(peer) = known {
            *peer = Peer { last: peer.last.max(number), heard_at: now, heartbeat };
            return gap;
        }
        if self.known.len() >= MAX_PEERS
            && let Some(oldest) = self.known.iter().min_by_key(|(_, peer)| peer.heard_at).map(|(sender, _)| *sender)
        {
            self.known.remove(&oldest);
        }
        self.known.insert(sender, Peer { last: number, heard_at: now, heartbeat });
        gap
    }

    /// Forgets those who fell silent without goodbye and says whether there were any: their last batches may be lost.
    pub(crate) fn lost(&mut self, now: u64) -> bool {
        let before = self.known.len();
        self.known
            .retain(|_, peer| now.saturating_sub(peer.heard_at) <= peer.heartbeat.saturating_mul(MISSED_HEARTBEATS));
        self.known.len() < before
    }

    pub(crate) fn others(&self, me: Sender) -> usize {
        self.known.keys().filter(|sender| **sender != me).count()
    }
}
