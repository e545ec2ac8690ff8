//! What should be true of the cluster. May not: do I/O, read a clock, draw randomness, spawn.
//!
//! ```text
//!              plan, tend ──▶ Command ──▶ log ──▶ apply ──▶ State ──▶ reconcile ──▶ Actions of one node
//!  (the leader's choices)      (agreed on)        (on every node)         (each node's own)
//!                 ▲                                                            │
//!                 └───────────────────────── reports ◀─────────────────────────┘
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`state`] | all that a cluster agrees on |
//! | [`command`] | what is written into the log, and what is answered |
//! | [`apply`] | how an entry changes the state; nothing else does |
//! | [`validate`] | what is true of every state |
//! | [`place`] | where tasks and images go, and why |
//! | [`leader`] | what a leader sees to: nodes that fall silent, images at risk, tasks that wait |
//! | [`reconcile`] | what a node does to become what the state says |
//! | [`clock`] | time, as the cluster has it |
//! | [`lease`] | read leases: a node's right to read an image's extents |
#![forbid(unsafe_code)]

pub mod apply;
pub mod clock;
pub mod command;
pub mod leader;
pub mod lease;
pub mod place;
pub mod reconcile;
pub mod state;
pub mod validate;

pub use apply::apply;
pub use clock::Tick;
pub use command::{Answer, Command, Entry, Key, Refusal};
pub use state::State;
