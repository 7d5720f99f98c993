//! Keys in the shared store, the same in every language.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

/// Longer keys are hashed.
const LONGEST: usize = 512;

/// The store key of a user's key. Two different (prefix, scope, key) never share one.
pub(crate) fn store_key(prefix: &str, scope: &str, key: &str) -> String {
    let (prefix, scope) = (escape(prefix), escape(scope));
    let head = prefix.len() + scope.len() + 2;
    if head + key.len() > LONGEST {
        // A user's key never begins with a bare colon, so a hash is never taken for one.
        return format!("{prefix}:{scope}::{}", hex(&Sha256::digest(key)));
    }
    match key.as_bytes().first() {
        Some(b':') => format!("{prefix}:{scope}:%3A{}", &key[1..]),
        Some(b'%') => format!("{prefix}:{scope}:%25{}", &key[1..]),
        _ => format!("{prefix}:{scope}:{key}"),
    }
}

/// A key of the cache's own. With one colon, where every user's key has two.
pub(crate) fn system_key(prefix: &str, name: &str) -> String {
    format!("{}:!{name}", escape(prefix))
}

fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(['%', ':']) { text.replace('%', "%25").replace(':', "%3A").into() } else { text.into() }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}
