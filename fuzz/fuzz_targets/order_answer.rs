//! See `farfork::node::fuzzing::answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::node::fuzzing::answer(bytes));
