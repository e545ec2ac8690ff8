//! See `farfork::node::fuzzing::join_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::join_request(bytes));
