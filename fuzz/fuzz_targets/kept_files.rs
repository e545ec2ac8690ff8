//! See `farfork::jobs::fuzzing::files`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::jobs::fuzzing::files(bytes));
