//! See `vm::fuzzing::virtio`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::virtio(bytes));
