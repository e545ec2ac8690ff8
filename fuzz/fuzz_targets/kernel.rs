//! See `vm::fuzzing::kernel`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::kernel(bytes));
