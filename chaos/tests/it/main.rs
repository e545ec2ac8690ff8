//! What must hold of the faults that other tests rely on.
#![forbid(unsafe_code)]

mod network;
mod quic;
mod relay;
mod support;
