//! See `vm::fuzzing::machine_state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::machine_state(bytes));
