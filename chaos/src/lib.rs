//! Seeded faults for tests and benchmarks: networks that fail on purpose, and replay.
#![forbid(unsafe_code)]

pub mod network;
pub mod relay;
