//! See `vm::fuzzing::to_worker`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::to_worker(bytes));
