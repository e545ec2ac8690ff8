//! See `pages::fuzzing::certificate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pages::fuzzing::certificate(bytes));
