//! Real servers for tests: started on free ports of 127.0.0.1 with their data in temporary folders, to be killed,
//! paused and cut off, and gone when their handle is dropped, also where the test's process is killed.
//!
//! The command `services` does the same for tests in other languages: see `main.rs`.

#![allow(clippy::disallowed_methods, reason = "servers run in the machine's time")]

mod certificates;
mod process;
mod proxy;
mod redis;

pub use self::certificates::Certificates;
pub use self::process::Process;
pub use self::proxy::{Fault, Proxy};
pub use self::redis::{Redis, RedisCluster, RedisSentinel, redis_cli};

/// What went wrong, with what to do about it.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Waits until `ready` says so, and no longer than ten seconds.
pub fn until(what: &str, mut ready: impl FnMut() -> bool) -> Result<(), Failure> {
    let start = std::time::Instant::now();
    while !ready() {
        if start.elapsed() > std::time::Duration::from_secs(10) {
            return Err(format!("waited for 10 s: {what}").into());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(())
}

/// A port of 127.0.0.1 that nobody listens on.
pub fn free_port() -> Result<u16, Failure> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
