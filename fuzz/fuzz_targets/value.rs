#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fleetcache::testing::fuzz::value(bytes));
