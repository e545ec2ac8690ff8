//! See `farfork::node::fuzzing::about`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::about(bytes));
