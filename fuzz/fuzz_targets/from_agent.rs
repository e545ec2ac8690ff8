//! See `farfork::node::fuzzing::from_agent`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::from_agent(bytes));
