//! A node as its users meet it: the real program, its API on a real socket, and an engine that only pretends. Needs no KVM.
#![forbid(unsafe_code)]

mod api;
mod bad_input;
mod between;
mod cli;
mod cluster;
mod corpora;
mod crowd;
mod data;
mod faults;
mod lifecycle;
mod limits;
mod linux;
mod openapi;
mod peers;
mod real;
mod remote;
mod schemathesis;
mod support;
mod trust;
