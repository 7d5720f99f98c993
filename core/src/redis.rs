//! Redis and Valkey as the store and the bus reach them: addresses, connections, who holds which key.

mod cluster;
mod config;
mod link;
mod servers;

pub use self::config::RedisConfig;
pub(crate) use self::link::{Connected, Identity};
pub(crate) use self::servers::{Servers, tag_of_part};

use redis::{ErrorKind as RedisErrorKind, RedisError, ServerErrorKind};

use crate::error::{Error, ErrorKind};

/// What the engine makes of a client's error: out of reach, too slow, or answered and refused.
pub(crate) fn failure(error: &RedisError) -> Error {
    use ServerErrorKind as Server;
    if error.is_timeout() {
        return Error::timeout(format!("Redis did not answer in time: {error}"));
    }
    match error.kind() {
        // Out of memory, no permission, a foreign type: the server is there, and waiting does not help.
        RedisErrorKind::Server(Server::NoPerm | Server::ResponseError | Server::ExecAbort | Server::CrossSlot)
        | RedisErrorKind::Extension => Error::new(ErrorKind::Refused, format!("Redis refused: {error}")),
        _ => Error::unavailable(format!("Redis is out of reach: {error}")),
    }
}
