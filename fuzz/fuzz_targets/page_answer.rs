//! See `pages::fuzzing::answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pages::fuzzing::answer(bytes));
