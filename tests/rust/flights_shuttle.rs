//! The registry of flights under every interleaving that a model checker tries: its own source, with the checker's
//! locks in place of the system's.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub, reason = "the engine's source, compiled apart")]

#[path = "../../core/src/flight.rs"]
mod flight;
#[path = "../../core/src/key.rs"]
mod key;
#[path = "../../core/src/pilot.rs"]
mod pilot;

mod sync {
    use shuttle::sync::{Mutex as ShuttleMutex, MutexGuard};

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(ShuttleMutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(ShuttleMutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flight::{Boarded, Filled, Flights, Hear, Purpose, Waiting};
use key::KeyRef;
use shuttle::future::block_on;
use shuttle::thread;

const KEY: KeyRef<'static> = KeyRef { scope: 0, text: "k" };
const ITERATIONS: usize = 20_000;

type Registry = Arc<Flights<u64>>;

fn board(flights: &Registry) -> Boarded<u64> {
    flights.board(KEY, Purpose::Load, 0, 0, 0, Hear::Future)
}

/// Boards, flies at once if it leads, and waits.
fn get(flights: &Registry, source: &AtomicU64, memory: &AtomicU64) -> u64 {
    match board(flights) {
        Boarded::Lead(flight, seat) => {
            let waiting = Waiting::new(Arc::clone(flights), Arc::clone(&flight), seat);
            let value = source.load(Ordering::SeqCst);
            thread::yield_now();
            flights.finish(&flight, value, None, |alive| {
                if !alive {
                    return Filled::Nothing;
                }
                memory.store(value, Ordering::SeqCst);
                Filled::Written
            });
            block_on(waiting)
        }
        Boarded::Joined(flight, seat) => block_on(Waiting::new(Arc::clone(flights), flight, seat)),
        Boarded::Failed(value) => value,
    }
}

#[test]
fn a_load_never_fills_memory_after_an_invalidation() {
    shuttle::check_random(
        || {
            let flights: Registry = Arc::new(Flights::new(1));
            let (source, memory) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(0)));
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let (flights, source, memory) = (Arc::clone(&flights), Arc::clone(&source), Arc::clone(&memory));
                    thread::spawn(move || get(&flights, &source, &memory))
                })
                .collect();
            source.store(2, Ordering::SeqCst);
            flights.invalidate(KEY, None, |_| memory.store(0, Ordering::SeqCst));
            // From here on nobody finds 1 in memory, and nobody who comes now gets it.
            assert_eq!(get(&flights, &source, &memory), 2);
            assert_eq!(memory.load(Ordering::SeqCst), 2);
            readers.into_iter().for_each(|reader| {
                reader.join().unwrap();
            });
            assert_eq!(memory.load(Ordering::SeqCst), 2);
            assert_eq!(flights.in_progress(), 0);
        },
        ITERATIONS,
    );
}

#[test]
fn everyone_who_joins_is_told_and_nobody_is_left_behind() {
    shuttle::check_random(
        || {
            let flights: Registry = Arc::new(Flights::new(1));
            let (source, memory) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(0)));
            let callers: Vec<_> = (0..4)
                .map(|_| {
                    let (flights, source, memory) = (Arc::clone(&flights), Arc::clone(&source), Arc::clone(&memory));
                    thread::spawn(move || get(&flights, &source, &memory))
                })
                .collect();
            for caller in callers {
                assert_eq!(caller.join().unwrap(), 1);
            }
            assert_eq!(flights.in_progress(), 0);
        },
        ITERATIONS,
    );
}

#[test]
fn a_flight_is_abandoned_exactly_when_its_last_caller_goes_and_nobody_joins_it_then() {
    shuttle::check_random(
        || {
            let flights: Registry = Arc::new(Flights::new(1));
            let Boarded::Lead(flight, seat) = board(&flights) else { panic!("the first leads") };
            let leader = Waiting::new(Arc::clone(&flights), Arc::clone(&flight), seat);
            let other = {
                let flights = Arc::clone(&flights);
                thread::spawn(move || match board(&flights) {
                    // Joined: then the flight must be flown to its end for this caller.
                    Boarded::Joined(flight, seat) => {
                        flights.finish(&flight, 7, None, |alive| {
                            assert!(alive, "a flight with a caller is not abandoned");
                            Filled::Nothing
                        });
                        block_on(Waiting::new(Arc::clone(&flights), flight, seat))
                    }
                    // The flight had been abandoned: this caller starts anew.
                    Boarded::Lead(flight, seat) => {
                        flights.finish(&flight, 8, None, |_| Filled::Nothing);
                        block_on(Waiting::new(Arc::clone(&flights), flight, seat))
                    }
                    Boarded::Failed(_) => panic!("nothing has failed"),
                })
            };
            drop(leader);
            let answer = other.join().unwrap();
            assert!(answer == 7 || answer == 8);
            flights.retire(&flight, 0);
            assert_eq!(flights.in_progress(), 0);
        },
        ITERATIONS,
    );
}
