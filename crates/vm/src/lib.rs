//! KVM, guest memory, freeze, fork and branch. May not: know the network or the cluster.
//!
//! # Journeys
//!
//! | to | read |
//! |---|---|
//! | start the first parent | [`shell`] `Shell::build`, [`probe`] `boot`, [`machine`] |
//! | fork | [`shell`] `Shell::fork`, `machine::state` restores what it captured |
//! | freeze or branch | [`machine::freeze`], `sys::pagemap`, `sys::copier`, [`types::ExtentMap::overlay`] |
//! | save and load an image | [`image`] `save`, `load`, `file` |
//!
//! # The life of a machine
//!
//! ```text
//!            boot                       run
//! Shell ───────────────▶ Machine at rest ──▶ running ──▶ ended(reason)
//!   │                        ▲    │ ▲           │
//!   │  fork(image)           │    │ └── pause ──┘
//!   └────────────────────────┘    │
//!                                 └── freeze ──▶ Image ──▶ fork, fork, fork ...
//! ```
//!
//! A [`Shell`] is everything of a machine that does not depend on an image, built ahead. [`Shell::fork`] maps an image's runs
//! into it, restores its state, and it is a [`Machine`]. A machine that was booted runs on a shared mapping of its memfd and is
//! frozen without a copy; one that was forked has private pages over an image and is frozen by a copier process that is forked
//! at the instant.
#![deny(unsafe_code)]

/// A place where a test can make the code fail: returns `$error` applied to an I/O error when the failpoint `$name` is armed.
/// Without the feature `testing` it is nothing.
macro_rules! failpoint {
    ($name:literal, |$source:ident| $error:expr) => {
        #[cfg(feature = "testing")]
        crate::failpoint::hit($name).map_err(|$source| $error)?;
    };
}

pub mod class;
pub mod device;
#[cfg(feature = "testing")]
pub mod failpoint;
#[cfg(feature = "testing")]
pub mod fuzzing;
#[cfg(feature = "testing")]
pub mod harness;
pub mod host;
pub mod host_image;
pub mod image;
pub mod jail;
pub mod linux;
pub mod machine;
pub mod pool;
pub mod probe;
pub mod shell;
mod sys;
pub mod worker;

pub use class::Class;
pub use host::{Host, HostError};
pub use host_image::{HostImage, PageSource, Watched};
pub use image::Image;
pub use machine::{Ended, Machine};
pub use pool::Pool;
pub use shell::Shell;
#[cfg(feature = "bare")]
pub use sys::bare;
pub use sys::guest_memory::{GuestMemory, GuestMemoryError};
pub use sys::tap::Tap;
