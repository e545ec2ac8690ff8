//! See `farfork::jobs::fuzzing::outputs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::jobs::fuzzing::outputs(bytes));
