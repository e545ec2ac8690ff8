//! What one host does.
//!
//! ```text
//!  api ──▶ calls ──▶ service ──▶ engine        fork, freeze, kill ...: a seam, see engine.rs
//!          at most    verbs  ──▶ registry      which machines and images there are, and were
//!          so many                  ▲
//!                     reaper ───────┘          hears from the engine which machines ended by themselves
//!                   service ──▶ network      trust: which nodes are let in; peers: a seam, to ask them
//!  data: the directory that is this node's alone; audit: who asked for what
//! ```

pub mod address;
pub mod audit;
pub mod calls;
pub mod data;
pub mod engine;
pub mod error;
#[cfg(feature = "testing")]
pub mod fake;
#[cfg(feature = "testing")]
mod fake_guest;
#[cfg(feature = "testing")]
pub mod fake_network;
pub(crate) mod files;
#[cfg(feature = "testing")]
pub mod fuzzing;
pub mod guest;
pub mod kvm;
pub mod metrics;
pub mod network;
pub mod offer;
pub(crate) mod pager;
pub mod peers;
pub mod quic;
pub mod registry;
pub mod service;
pub mod short_id;
pub mod trust;

pub use address::{AddressError, NodeAddress};
pub use data::{DataDirectory, DataError};
pub use engine::Engine;
pub use error::NodeError;
pub use network::{Network, NetworkSettings};
pub use service::Service;
pub use short_id::{ShortId, ShortIdError};
pub use trust::{TrustError, TrustStore};
