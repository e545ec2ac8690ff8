//! What should be true of the cluster. May not: do I/O, read a clock, draw randomness, spawn.
//!
//! | module | holds |
//! |---|---|
//! | [`lease`] | read leases: a node's right to read an image's extents |
#![forbid(unsafe_code)]

pub mod lease;
