//! Several processes, one cache.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use fleetcache_services::Redis;
use fleetcache_tests::ms;
use fleetcache_tests::real::now;

struct Worker {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Worker {
    fn start(server: &Redis, key: &str, millis: u64, value: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
        command.args([&server.url(), key, &millis.to_string(), value]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_cold_key_is_loaded_once_by_all_processes_together() {
    let server = Redis::start().unwrap();
    let mut workers: Vec<_> = (0..6).map(|value| Worker::start(&server, "cold", 400, &value.to_string())).collect();
    let (mut loads, mut answers) = (0, Vec::new());
    for worker in &mut workers {
        let mut line = worker.line();
        if line == "loading" {
            loads += 1;
            line = worker.line();
        }
        answers.push(line);
    }
    assert_eq!(loads, 1, "{answers:?}");
    assert!(answers.iter().all(|answer| answer.starts_with("got") && *answer == answers[0]), "{answers:?}");
}

#[test]
fn a_load_longer_than_the_lease_is_still_one() {
    let server = Redis::start().unwrap();
    let mut first = Worker::start(&server, "slow", 5_000, "1");
    assert_eq!(first.line(), "loading");
    let mut second = Worker::start(&server, "slow", 0, "2");
    assert_eq!(second.line(), "got 1", "it waited for the lease that was renewed");
    assert_eq!(first.line(), "got 1");
}

#[test]
fn another_process_takes_over_from_one_that_was_killed_while_it_loaded() {
    let server = Redis::start().unwrap();
    let mut holder = Worker::start(&server, "k", 60_000, "1");
    assert_eq!(holder.line(), "loading");
    let mut waiting: Vec<_> = ["2", "3"].map(|value| Worker::start(&server, "k", 50, value)).into();
    // Both have asked for the lease: they read the key again and again.
    let reads = || -> u64 {
        let stats = server.command(&["INFO", "commandstats"]).unwrap();
        let get =
            stats.lines().find_map(|line| line.strip_prefix("cmdstat_get:calls=")?.split(',').next()?.parse().ok());
        get.unwrap_or(0)
    };
    fleetcache_services::until("the others wait", || reads() > 20).unwrap();
    let start = now();
    holder.child.kill().unwrap();
    let mut loads = 0;
    for worker in &mut waiting {
        let mut line = worker.line();
        if line == "loading" {
            loads += 1;
            line = worker.line();
        }
        assert!(line.starts_with("got"), "{line}");
    }
    assert_eq!(loads, 1, "one of those who waited");
    assert!(start.elapsed() < Duration::from_secs(2) + ms(3_000), "the lease had run out: {:?}", start.elapsed());
}
