//! fleetcache against the bare engines and its peers, on the same work, interleaved in one process.
//!
//! `cargo run --release` prints every table; with a name (`hit`, `threads`, `insert`, `bytes`, `ratio`, `stampede`,
//! `redis`), one. `redis` starts a server of its own.
#![allow(clippy::cast_precision_loss, reason = "figures for people")]

mod bytes;
mod ratio;
mod shared;
mod speed;
mod work;

fn main() {
    let only = std::env::args().nth(1);
    if let Some(case) = only.as_deref().and_then(|name| name.strip_prefix("bytes-of:")) {
        bytes::measure(case);
        return;
    }
    let tables: [(&str, fn()); 7] = [
        ("hit", speed::hit),
        ("threads", speed::threads),
        ("insert", speed::insert),
        ("stampede", speed::stampede),
        ("bytes", bytes::table),
        ("ratio", ratio::table),
        ("redis", shared::tables),
    ];
    for (name, run) in tables {
        if only.as_deref().is_none_or(|only| only == name) {
            run();
        }
    }
}
