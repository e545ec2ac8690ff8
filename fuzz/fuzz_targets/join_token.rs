//! See `farfork::node::fuzzing::token`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::token(bytes));
