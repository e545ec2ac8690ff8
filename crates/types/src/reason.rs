//! The closed list of reasons. Whatever ends a machine, a task or an operation carries one of these, so that programs can
//! match on it and people can look it up. The list grows only at its end, and a code never changes its meaning.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why something ended or was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[non_exhaustive]
pub enum Reason {
    /// Somebody asked for it.
    Killed,
    /// The guest shut itself down.
    GuestShutdown,
    /// The guest crashed so that its CPU reset (a triple fault).
    GuestTripleFault,
    /// The guest broke the rules of a device.
    GuestProtocol,
    /// KVM gave up on the guest (an instruction that it cannot emulate, an entry that failed).
    KvmInternal,
    /// The guest's access to its own RAM failed on the host: the page could not be had.
    RamUnavailable,
    /// A virtual CPU did not come to rest before the deadline.
    PauseTimeout,
    /// No holder could supply a page that the machine needs.
    PageSourceLost,
    /// Bytes of unknown origin were found in a host image.
    ImagePoisoned,
    /// The machine went over its memory limit, or the host has none left.
    Oom,
    /// The node that ran it was lost.
    NodeLost,
    /// The task ended, but its output is gone.
    OutputLost,
    /// No majority of the voters can be reached.
    NoQuorum,
    /// The deadline passed.
    DeadlineExceeded,
    /// The machine's worker process ended by itself (a signal, a panic), and not for lack of memory.
    WorkerCrashed,
    /// The machine's worker made a system call that it may not make, and the kernel killed it: its guest may have taken it over.
    JailViolation,
    /// The kernel of the guest panicked.
    GuestPanic,
    /// The node could not fork a child for the task.
    ForkFailed,
}

impl Reason {
    /// Every reason, in the order of the list.
    pub const ALL: [Self; 18] = [
        Self::Killed,
        Self::GuestShutdown,
        Self::GuestTripleFault,
        Self::GuestProtocol,
        Self::KvmInternal,
        Self::RamUnavailable,
        Self::PauseTimeout,
        Self::PageSourceLost,
        Self::ImagePoisoned,
        Self::Oom,
        Self::NodeLost,
        Self::OutputLost,
        Self::NoQuorum,
        Self::DeadlineExceeded,
        Self::WorkerCrashed,
        Self::JailViolation,
        Self::GuestPanic,
        Self::ForkFailed,
    ];

    /// The code that logs, CLI and API show.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Killed => "KILLED",
            Self::GuestShutdown => "GUEST_SHUTDOWN",
            Self::GuestTripleFault => "GUEST_TRIPLE_FAULT",
            Self::GuestProtocol => "GUEST_PROTOCOL",
            Self::KvmInternal => "KVM_INTERNAL",
            Self::RamUnavailable => "RAM_UNAVAILABLE",
            Self::PauseTimeout => "PAUSE_TIMEOUT",
            Self::PageSourceLost => "PAGE_SOURCE_LOST",
            Self::ImagePoisoned => "IMAGE_POISONED",
            Self::Oom => "OOM",
            Self::NodeLost => "NODE_LOST",
            Self::OutputLost => "OUTPUT_LOST",
            Self::NoQuorum => "NO_QUORUM",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::WorkerCrashed => "WORKER_CRASHED",
            Self::JailViolation => "JAIL_VIOLATION",
            Self::GuestPanic => "GUEST_PANIC",
            Self::ForkFailed => "FORK_FAILED",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// What the programs of farfork exit with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// All that was asked for was done.
    Ok = 0,
    /// The command line or its input is wrong.
    Usage = 2,
    /// A node, device or peer cannot be reached.
    Unreachable = 3,
    /// It was understood and refused.
    Refused = 4,
    /// Some of it was done.
    Partial = 5,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_stable_on_the_wire() {
        for (position, reason) in Reason::ALL.into_iter().enumerate() {
            // postcard writes an enum as its position: a reason that moved would change its meaning for old peers.
            assert_eq!(postcard::to_stdvec(&reason).unwrap(), [u8::try_from(position).unwrap()], "{reason} moved in the list");
        }
        let codes: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        assert_eq!(codes.len(), Reason::ALL.len());
    }
}
