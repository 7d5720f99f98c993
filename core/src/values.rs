//! Values on their way to L2 and back: encoded under a new id, judged when read.

use std::sync::Arc;

use bytes::Bytes;

use crate::engine::{Core, SharedTier};
use crate::entry::{Deadlines, Entry, Freshness, Lifetime, clamp, part};
use crate::error::{Error, Result};
use crate::fly::Plan;
use crate::options::Resolved;
use crate::wire::cell::{Cell, Kind, NONE};
use crate::wire::value::{
    Codec as CodecId, MAX_TAG_BYTES, MAX_TAGS, MAX_VALUE_BYTES, ValueHeader, decode_value, encode_value,
};

/// What a cell of L2 is worth.
pub(crate) enum Found<V> {
    Usable(Entry<V>, Freshness),
    /// Nothing to answer; the id of what is there, for the lease to be laid over.
    Nothing(u64),
}

impl<V: Send + Sync + 'static> Plan<V> {
    /// What the bytes of a cell are worth to this node now.
    pub(crate) fn judge(&self, shared: &SharedTier<V>, bytes: Option<Bytes>, read_at: u64) -> Found<V> {
        let Some(bytes) = bytes else { return Found::Nothing(0) };
        let malformed = |id: u64, why: &dyn std::fmt::Display| {
            self.core.counters.malformed_values.add_one();
            tracing::warn!(key = &*self.key, %why, "an entry of the shared store cannot be read: taken for a miss");
            Found::Nothing(id)
        };
        let (cell, blob) = match Cell::decode(&bytes) {
            Ok((Cell { kind: Kind::Lease, .. }, _)) => return Found::Nothing(0),
            Ok((cell, blob)) if cell.kind == Kind::Value => (cell, blob),
            Ok(_) => return malformed(0, &"it is no value"),
            Err(why) => return malformed(0, &why),
        };
        let (header, body) = match decode_value(blob) {
            Ok(decoded) => decoded,
            Err(why) => return malformed(cell.id, &why),
        };
        if header.codec.0 != shared.codec.id() {
            return malformed(cell.id, &format_args!("codec {} is not this cache's", header.codec.0));
        }
        if self.core.marks.dead(header.stamp, None, &self.place.scope.name, &header.tags) {
            return Found::Nothing(cell.id);
        }
        let now = shared.l2.now_at_most();
        let left = |deadline: u64| deadline.saturating_sub(now);
        let remaining = Lifetime {
            fresh: left(header.fresh_until),
            stale: left(header.stale_until),
            fallback: left(header.error_until),
        };
        let whole = header.fresh_until.saturating_sub(header.created);
        let deadlines = self.deadlines_from_l2(&remaining, whole, self.core.runtime.now_ms().saturating_sub(read_at));
        let value = match shared.codec.decode(&body) {
            Ok(value) => value,
            Err(why) => return malformed(cell.id, &why),
        };
        let entry = Entry {
            value: Arc::new(value),
            read_at,
            deadlines,
            stamp: header.stamp,
            checked: self.flight.born(),
            id: cell.id,
            tags: (!header.tags.is_empty()).then(|| Arc::new(header.tags)),
        };
        match entry.freshness(self.core.runtime.now_ms()) {
            Freshness::Expired => Found::Nothing(cell.id),
            Freshness::RefreshAhead => Found::Usable(entry, Freshness::Fresh),
            freshness => Found::Usable(entry, freshness),
        }
    }

    /// L1's deadlines for a value of L2: what remains of its own, refreshed ahead at a fraction of its whole life.
    fn deadlines_from_l2(&self, remaining: &Lifetime, whole: u64, elapsed: u64) -> Deadlines {
        let options = &self.place.options;
        // `deadlines` takes the fraction of what it is given, so the whole life's is worked out here.
        let plain = Resolved { refresh_ahead: None, ..(**options).clone() };
        let mut deadlines = remaining.deadlines(elapsed, &plain);
        if let Some(fraction) = options.refresh_ahead {
            let behind = whole.saturating_sub(part(whole, fraction));
            deadlines.hot = deadlines.hot.min(clamp(remaining.fresh.saturating_sub(behind).saturating_add(elapsed)));
        }
        deadlines
    }
}

impl<V: Send + Sync + 'static> Core<V> {
    /// The cell for L2, under a new id, which the entry takes. `None` where the value is too large.
    pub(crate) fn encode(
        &self,
        shared: &SharedTier<V>,
        entry: &mut Entry<V>,
        lifetime: &Lifetime,
    ) -> Result<Option<Bytes>> {
        let body = shared.codec.encode(&entry.value)?;
        if body.len() > MAX_VALUE_BYTES {
            self.counters.oversized_values.add_one();
            tracing::warn!(
                bytes = body.len(),
                "a value is too large for the shared store ({MAX_VALUE_BYTES} bytes at most)"
            );
            return Ok(None);
        }
        entry.id = self.runtime.random() | 1;
        // In the store's time, at its earliest: a deadline is early rather than late.
        let created = shared.l2.now_at_least();
        let header = ValueHeader {
            codec: CodecId(shared.codec.id()),
            null: self.is_null.is_some_and(|is_null| is_null(&entry.value)),
            created,
            fresh_until: created.saturating_add(lifetime.fresh),
            stale_until: created.saturating_add(lifetime.stale),
            error_until: created.saturating_add(lifetime.fallback),
            stamp: entry.stamp,
            tags: entry.tags().to_vec(),
        };
        let cell = Cell { kind: Kind::Value, id: entry.id, token: NONE, until: 0 };
        Ok(Some(encode_value(&cell, &header, &body, shared.compress_from).into()))
    }
}

/// Refuses tags that make no sense; in order, each once.
pub(crate) fn checked_tags(mut tags: Vec<Box<str>>) -> Result<Arc<Vec<Box<str>>>> {
    if tags.len() > MAX_TAGS {
        return Err(Error::config(format!("{} tags are not allowed: give at most {MAX_TAGS}", tags.len())));
    }
    if let Some(tag) = tags.iter().find(|tag| tag.is_empty() || tag.len() > MAX_TAG_BYTES) {
        return Err(Error::config(format!(
            "tag of {} bytes is not allowed: give 1 to {MAX_TAG_BYTES} bytes",
            tag.len()
        )));
    }
    tags.sort_unstable();
    tags.dedup();
    Ok(Arc::new(tags))
}
