//! See `vm::fuzzing::hash_page`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::hash_page(bytes));
