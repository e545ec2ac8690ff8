//! See `vm::fuzzing::from_worker`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::from_worker(bytes));
