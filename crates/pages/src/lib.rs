//! Moves image extents between hosts, over QUIC. May not: know KVM or Raft.
//!
//! ```text
//!   pager thread (reader)                                             node (holder)
//!   client::Client ── Link ─┬─ demand connection ─┐
//!                           ├─ bulk connection ───┼─ one UDP port ──> server::Server ──> dyn ImageStore
//!                           └─ orders connection ─┘  ALPN, mTLS                     └──> dyn Orders
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`authority`] | who vouches for the nodes of a cluster |
//! | [`identity`] | a node's certificate and key; what a peer's certificate says |
//! | [`trust`] | whose certificates are accepted, and which tenants they may read |
//! | [`wire`] | requests and answers as versioned frames |
//! | [`endpoint`] | the transport's knobs, and the limits on what a peer can make grow |
//! | [`server`] | serves the images of an [`server::ImageStore`], and takes orders |
//! | [`client`] | asks another node |
//! | [`clock`] | the time for dates of certificates |
//! | [`join`] | asks to be let into a cluster |
//! | [`https`] | TLS of the API for users |
//! | [`signature`] | what a node's key has signed beside connections |
//! | [`transfer`] | which extent is asked for next, of whom, and who is woken: pure |
#![forbid(unsafe_code)]

pub mod authority;
pub mod client;
pub mod clock;
pub mod endpoint;
#[cfg(feature = "testing")]
pub mod fakes;
pub mod fuzzing;
pub mod https;
pub mod identity;
pub mod join;
pub mod server;
pub mod signature;
pub mod transfer;
pub mod trust;
mod verify;
pub mod wire;

pub use authority::{Authority, Root};
pub use client::{Client, Link, LinkError};
pub use identity::{Certificate, Identity, Peer, Role};
pub use server::{ImageStore, Orders, Server};
pub use trust::Trust;
