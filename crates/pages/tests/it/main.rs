//! Two nodes and their enemies, over loopback.

mod abuse;
mod cluster;
mod common;
mod corpora;
mod golden;
mod hostile;
mod liars;
mod round_trips;
mod trust;
