//! What should be true of the cluster. May not: do I/O, read a clock, draw randomness, spawn.
#![forbid(unsafe_code)]
