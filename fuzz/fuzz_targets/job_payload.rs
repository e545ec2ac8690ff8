//! See `farfork::jobs::fuzzing::payload`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::jobs::fuzzing::payload(bytes));
