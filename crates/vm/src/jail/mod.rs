//! The jail of a worker: what is taken from it, so that a guest that breaks out of its VM has broken out into nothing.
//!
//! Applied in this order, all of it before any guest code runs (`docs/security.md` has the list with what each refuses):
//!
//! ```text
//! zygote, once    net and mount namespace ─▶ empty root ─▶ filter of system calls
//! worker          pid, mount, ipc, uts namespace ─▶ own uid ─▶ user namespace ─▶ no capabilities ─▶ no new privileges
//!                 ─▶ not dumpable ─▶ limits ─▶ Landlock ─▶ cgroup (by the node) ─▶ a filter for each of its threads
//! ```

pub(crate) mod apply;
pub mod cgroup;
pub mod syscalls;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// Whether this kernel has Landlock switched on. Workers run without it as well, behind everything else.
#[must_use]
pub fn has_landlock() -> bool {
    std::fs::read_to_string("/sys/kernel/security/lsm")
        .map_or(true, |list| list.split(',').any(|name| name.trim() == "landlock"))
}

/// One way in which a worker is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants say it; docs/security.md says what each refuses")]
pub enum Mechanism {
    UserNamespace,
    /// With it goes the empty root.
    MountNamespace,
    PidNamespace,
    NetNamespace,
    IpcNamespace,
    UtsNamespace,
    OwnUid,
    NoCapabilities,
    NoNewPrivileges,
    NotDumpable,
    Limits,
    Landlock,
    Seccomp,
    /// Applied by the node, if it has groups (`pool::Settings::groups`): memory and number of processes.
    ControlGroup,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::UserNamespace,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::NetNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::OwnUid,
        Self::NoCapabilities,
        Self::NoNewPrivileges,
        Self::NotDumpable,
        Self::Limits,
        Self::Landlock,
        Self::Seccomp,
        Self::ControlGroup,
    ];
}

/// A jail. Whole, unless a test that shows what a mechanism is for leaves it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    left_out: BTreeSet<Mechanism>,
}

impl Jail {
    /// Everything on.
    #[must_use]
    pub fn whole() -> Self {
        Self { left_out: BTreeSet::new() }
    }

    /// A jail with holes, for tests and for measuring what it costs.
    #[cfg(any(feature = "testing", feature = "bare"))]
    #[must_use]
    pub fn without(left_out: impl IntoIterator<Item = Mechanism>) -> Self {
        Self { left_out: left_out.into_iter().collect() }
    }

    /// Whether a mechanism is on.
    #[must_use]
    pub fn has(&self, mechanism: Mechanism) -> bool {
        !self.left_out.contains(&mechanism)
    }
}
