//! See `vm::fuzzing::image_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vm::fuzzing::image_file(bytes));
