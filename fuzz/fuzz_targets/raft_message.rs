//! See `farfork::node::fuzzing::raft_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::raft_message(bytes));
