//! Why a local cluster was not brought up, or down.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use types::ExitCode;

use crate::node::DataError;

/// Of `farfork up` and `farfork down`.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum UpError {
    #[error("another `farfork up` or `farfork down` is at work on {}", directory.display())]
    Busy { directory: PathBuf },
    #[error("{} has files, and they are not of a local cluster", directory.display())]
    Foreign { directory: PathBuf },
    #[error("{} belongs to the user with id {owner}", directory.display())]
    Owner { directory: PathBuf, owner: u32 },
    #[error("{} is damaged: {source}", file.display())]
    Damaged { file: PathBuf, source: serde_json::Error },
    #[error("{} is of format {found}; this farfork knows up to {known}", file.display())]
    Newer { file: PathBuf, found: u64, known: u32 },
    #[error("{} cannot be used: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("{} has {} bytes; the path of a socket has at most 107", path.display(), path.as_os_str().len())]
    TooLong { path: PathBuf },
    #[error("the local cluster in {} has {has}", directory.display())]
    Different { directory: PathBuf, has: String },
    #[error("there is no program `ip`, which gives each node a network of its own")]
    NoIp,
    #[error("`{command}` failed: {message}")]
    Ip { command: String, message: String },
    #[error("the network namespace {name} cannot be entered: {source}")]
    Namespace { name: String, source: io::Error },
    #[error("{name} cannot be started: {source}")]
    Start { name: String, source: io::Error },
    #[error("{name} ended while it started: {said} (its log is {})", log.display())]
    Ended { name: String, log: PathBuf, said: String, remedy: Option<String>, code: Option<i32> },
    #[error("not within {} s: {what}", within.as_secs())]
    Late { what: String, within: Duration, directory: PathBuf },
    #[error("{name} (process {pid}) does not end, not even by SIGKILL")]
    Immortal { name: String, pid: i32 },
}

impl UpError {
    pub(super) fn io(path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source: source.into() }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Busy { .. } => "wait until that has ended, or name another directory with --data".to_owned(),
            Self::Foreign { .. } => "name a new or an empty directory with --data".to_owned(),
            Self::Owner { .. } => "run as that user, or name another directory with --data".to_owned(),
            Self::Damaged { file, .. } => {
                format!("end the nodes that `ps ax` shows with this directory, then remove {}", parent(file).display())
            }
            Self::Newer { .. } => "use the newer farfork".to_owned(),
            Self::Io { .. } => "name a directory on a local file system that this user may write with --data".to_owned(),
            Self::Data(error) => error.remedy().to_owned(),
            Self::TooLong { .. } => "name a directory with a shorter path with --data".to_owned(),
            Self::Different { .. } => {
                "leave these flags out, name another directory with --data, or remove it first with `farfork down --purge`"
                    .to_owned()
            }
            Self::NoIp => "install iproute2, or have all nodes on the loopback with --no-namespaces".to_owned(),
            Self::Ip { .. } | Self::Namespace { .. } => {
                "load the modules veth and bridge; where namespaces may not be made: --no-namespaces".to_owned()
            }
            Self::Start { .. } => "look at the limits of processes and descriptors (`farfork doctor`)".to_owned(),
            Self::Ended { remedy, log, .. } => {
                remedy.clone().unwrap_or_else(|| format!("read {}; `farfork doctor` says what this host lacks", log.display()))
            }
            Self::Late { directory, .. } => format!("read the logs, {}/node-*/log, and try again", directory.display()),
            Self::Immortal { pid, .. } => format!("see in /proc/{pid}/stack what it waits for, then `farfork down` again"),
        }
    }

    /// What it is in JSON.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "BUSY",
            Self::NoIp | Self::Ip { .. } | Self::Namespace { .. } => "NAMESPACES",
            Self::Start { .. } | Self::Ended { .. } => "NODE_ENDED",
            Self::Late { .. } => "DEADLINE_EXCEEDED",
            Self::Different { .. } | Self::TooLong { .. } => "USAGE",
            _ => "LOCAL_CLUSTER",
        }
    }

    /// What the program exits with: with what the node did, if that says more.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        const UNREACHABLE: Option<i32> = Some(ExitCode::Unreachable as i32);
        match self {
            Self::Ended { code, .. } if *code == UNREACHABLE => ExitCode::Unreachable,
            Self::Different { .. } | Self::TooLong { .. } | Self::Foreign { .. } => ExitCode::Usage,
            _ => ExitCode::Refused,
        }
    }
}

fn parent(file: &Path) -> &Path {
    file.parent().unwrap_or(file)
}
