//! Seeded faults for tests and benchmarks: networks that fail on purpose, and replay; inputs that are malformed; whole clusters in
//! virtual time.
#![forbid(unsafe_code)]

pub mod corpus;
pub mod linearizable;
pub mod network;
pub mod relay;
pub mod simulation;
