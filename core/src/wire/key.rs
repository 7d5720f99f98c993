//! Keys in the shared store, the same in every language.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

/// The longest store key, and the longest prefix and scope in one, escaped. What is longer is hashed.
pub(super) const LONGEST: usize = 512;
const LONGEST_PREFIX: usize = 128;
const LONGEST_SCOPE: usize = 256;

/// The store key of a user's key. Two different (prefix, scope, key) never share one.
pub(crate) fn store_key(prefix: &str, scope: &str, key: &str) -> String {
    let (prefix, scope) = (name(prefix, LONGEST_PREFIX), name(scope, LONGEST_SCOPE));
    let (first, rest) = match key.as_bytes().first() {
        Some(b':') => ("%3A", &key[1..]),
        Some(b'%') => ("%25", &key[1..]),
        _ => ("", key),
    };
    if prefix.len() + scope.len() + 2 + first.len() + rest.len() > LONGEST {
        // A user's key never begins with a bare colon, so a hash is never taken for one.
        return format!("{prefix}:{scope}::{}", hash(key));
    }
    // Made for every read of the store: `format!` takes three times as long.
    let mut whole = String::with_capacity(prefix.len() + scope.len() + 2 + first.len() + rest.len());
    for part in [&*prefix, ":", &*scope, ":", first, rest] {
        whole.push_str(part);
    }
    whole
}

/// A key of the cache's own. With one colon, where every user's key has two.
pub(crate) fn system_key(prefix: &str, what: &str) -> String {
    format!("{}:!{}", name(prefix, LONGEST_PREFIX), escape(what))
}

/// No escape begins with `%x`, so a hash is never taken for a name.
fn name(text: &str, longest: usize) -> Cow<'_, str> {
    let escaped = escape(text);
    if escaped.len() > longest { format!("%x{}", hash(text)).into() } else { escaped }
}

fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(['%', ':']) { text.replace('%', "%25").replace(':', "%3A").into() } else { text.into() }
}

fn hash(text: &str) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let hash = Sha256::digest(text);
    hash.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}
