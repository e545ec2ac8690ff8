//! See `vm::fuzzing::head`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::head(bytes));
