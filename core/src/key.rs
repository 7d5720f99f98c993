//! Keys inside one process.

use std::hash::{Hash, Hasher};

use equivalent::Equivalent;

/// A key as L1 and the registry of flights hold it: the scope's number and the caller's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) scope: u32,
    pub(crate) text: Box<str>,
}

/// A key to look up, without a copy of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyRef<'a> {
    pub(crate) scope: u32,
    pub(crate) text: &'a str,
}

impl Key {
    pub(crate) fn as_ref(&self) -> KeyRef<'_> {
        KeyRef { scope: self.scope, text: &self.text }
    }
}

impl KeyRef<'_> {
    pub(crate) fn to_key(self) -> Key {
        Key { scope: self.scope, text: self.text.into() }
    }
}

// Both forms hash alike, or a lookup by reference would miss.
impl Hash for KeyRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u32(self.scope);
        self.text.hash(state);
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_ref().hash(state);
    }
}

impl Equivalent<Key> for KeyRef<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        *self == key.as_ref()
    }
}
