//! Seeded faults for tests and benchmarks: networks that fail on purpose, and replay; inputs that are malformed.
#![forbid(unsafe_code)]

pub mod corpus;
pub mod network;
pub mod relay;
