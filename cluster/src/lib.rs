//! farfork as a program: the node daemon, its API and the command line. The only place that sees all other crates.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | one file per verb; what people and scripts see |
//! | [`api`] | HTTP/1.1 with JSON over a Unix socket: routes, wire types, who is let in, limits |
//! | [`node`] | what one host does: the verbs, its registry of machines and images, its data directory, its [engine](node::engine) |
//! | [`jobs`] | tasks of jobs on a node, and their outputs |
//! | [`member`] | a node's part in a cluster: how it gets in, and what it does for the others |
//! | [`raft`] | the log that a cluster agrees on: openraft on redb |
//!
//! A journey reads downwards, `cli -> api -> node -> engine`; only an answer travels up.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod jobs;
pub mod member;
pub mod node;
pub mod raft;
