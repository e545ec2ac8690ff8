//! See `pages::fuzzing::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pages::fuzzing::request(bytes));
