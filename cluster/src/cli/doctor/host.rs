//! The host as the checks see it. Files are read beneath a root, so that tests bring their own trees.

use std::path::{Path, PathBuf};

use rustix::fs::Access;
use rustix::process::Resource;
use vm::{Host, HostError};

/// What checks may look at.
pub(super) struct HostView {
    pub(super) root: PathBuf,
    pub(super) uid: u32,
    /// What opening KVM said.
    pub(super) kvm: Result<(), HostError>,
    /// The hard limit of descriptors; `None` is unlimited.
    pub(super) nofile: Option<u64>,
    /// The limit of processes of this user; `None` is unlimited.
    pub(super) nproc: Option<u64>,
}

/// Whether a device is there for this user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    Opens,
    Missing,
    Forbidden,
}

impl HostView {
    /// This host.
    pub(super) fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
            uid: rustix::process::geteuid().as_raw(),
            kvm: Host::open().map(drop),
            nofile: rustix::process::getrlimit(Resource::Nofile).maximum,
            nproc: rustix::process::getrlimit(Resource::Nproc).current,
        }
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// The text of a file, trimmed; `None` if it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.at(path)).ok().map(|text| text.trim().to_owned())
    }

    /// The number in a file.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    pub(super) fn device(&self, path: &str) -> Device {
        let at = self.at(path);
        if std::fs::OpenOptions::new().read(true).write(true).open(&at).is_ok() {
            Device::Opens
        } else if at.exists() {
            Device::Forbidden
        } else {
            Device::Missing
        }
    }

    pub(super) fn is_writable(&self, path: &str) -> bool {
        rustix::fs::access(self.at(path), Access::WRITE_OK).is_ok()
    }

    pub(super) fn is_directory(&self, path: &str) -> bool {
        self.at(path).is_dir()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(Path::new(path).strip_prefix("/").unwrap_or(Path::new(path)))
    }
}
