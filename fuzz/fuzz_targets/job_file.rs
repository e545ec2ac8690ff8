//! See `farfork::cli::fuzzing::job_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farfork::cli::fuzzing::job_file(bytes));
