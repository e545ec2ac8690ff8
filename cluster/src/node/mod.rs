//! What one host does.
//!
//! ```text
//!  api ──▶ calls ──▶ service ──▶ engine        fork, freeze, kill ...: a seam, see engine.rs
//!          at most    verbs  ──▶ registry      which machines and images there are, and were
//!          so many                  ▲
//!                     reaper ───────┘          hears from the engine which machines ended by themselves
//!  data: the directory that is this node's alone
//! ```

pub mod calls;
pub mod data;
pub mod engine;
pub mod error;
#[cfg(feature = "testing")]
pub mod fake;
pub mod kvm;
pub mod metrics;
pub mod name;
pub mod registry;
pub mod service;
pub mod short_id;

pub use data::{DataDirectory, DataError};
pub use engine::Engine;
pub use error::NodeError;
pub use name::{ImageName, NameError};
pub use service::Service;
pub use short_id::{ShortId, ShortIdError};
