//! How values become bytes for the shared store.

use crate::error::Result;

/// Turns values into bytes for the shared store and back.
pub trait Codec<V>: Send + Sync + 'static {
    /// The number that marks this codec's bytes: 1 MessagePack, 2 JSON, 3 pickle, 128 to 255 for your own. An entry
    /// with another number is a miss, so two codecs never read each other's bytes.
    fn id(&self) -> u8;

    /// The bytes of `value`.
    fn encode(&self, value: &V) -> Result<Vec<u8>>;

    /// The value in `bytes`, which may be anything: refuse what is not yours.
    fn decode(&self, bytes: &[u8]) -> Result<V>;
}

/// MessagePack with named fields: what Python, Node and Rust all read. The default.
#[cfg(feature = "msgpack")]
#[derive(Clone, Copy, Debug, Default)]
pub struct MessagePack;

#[cfg(feature = "msgpack")]
impl<V: serde::Serialize + serde::de::DeserializeOwned> Codec<V> for MessagePack {
    fn id(&self) -> u8 {
        1
    }

    fn encode(&self, value: &V) -> Result<Vec<u8>> {
        rmp_serde::to_vec_named(value)
            .map_err(|error| crate::Error::codec(format!("the value cannot be encoded: {error}")).with_source(error))
    }

    fn decode(&self, bytes: &[u8]) -> Result<V> {
        rmp_serde::from_slice(bytes)
            .map_err(|error| crate::Error::codec(format!("not a value of this type: {error}")).with_source(error))
    }
}
