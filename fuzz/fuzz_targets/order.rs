//! See `farfork::node::fuzzing::order`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::order(bytes));
