//! What can go wrong with a host image.

use std::io;
use std::time::Duration;

use thiserror::Error;
use types::{Digest, ExtentIndex};

use crate::image::load::LoadErrorKind;
use crate::machine::Ended;
use crate::sys::uffd::Device;

/// Why there is no host image.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum OpenError {
    #[error("this host cannot watch memory: {} is missing, or not for this user", Device::PATH)]
    NoDevice,
    #[error("the image cannot run on this host: {0}")]
    Unfit(LoadErrorKind),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
}

impl OpenError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoDevice => "use Linux 6.1 or newer, and let this user open /dev/userfaultfd (farfork doctor says how)",
            Self::Unfit(_) => "fork it on a host with the CPU and the memory of the image",
            Self::Step { .. } => "end other machines, or raise the limit on open files (ulimit -n)",
        }
    }
}

/// Why an extent was not published.
#[derive(Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PublishError {
    #[error("extent {extent} of region {region} is not one that the image has")]
    Outside { region: usize, extent: ExtentIndex },
    #[error("the digest of extent {extent} of region {region} is not known yet")]
    NoDigest { region: usize, extent: ExtentIndex },
    #[error("extent {extent} of region {region} has digest {actual} where the image has {expected}")]
    Wrong { region: usize, extent: ExtentIndex, expected: Digest, actual: Digest },
    #[error("the host has no memory for extent {extent} of region {region}")]
    NoMemory { region: usize, extent: ExtentIndex },
    #[error("the host image is poisoned: {0}")]
    Poisoned(String),
    #[error("placing a page failed with error number {0}")]
    Place(i32),
}

/// Why a host image did not settle.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SettleError {
    #[error("extent {extent} of region {region} is absent")]
    Absent { region: usize, extent: ExtentIndex },
    #[error("the host image is poisoned: {0}")]
    Poisoned(String),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
}

/// Why an extent did not come.
#[derive(Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum AwaitError {
    #[error("extent {extent} of region {region} did not come within {patience:?}")]
    TimedOut { region: usize, extent: ExtentIndex, patience: Duration },
    #[error("the host image has failed ({0})")]
    Failed(Ended),
}
