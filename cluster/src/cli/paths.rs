//! Where a node listens and keeps its data unless told otherwise. Only these two depend on who runs the program.

use std::path::PathBuf;

use thiserror::Error;

/// The default socket.
///
/// # Errors
/// [`PathError::NoRuntimeDirectory`] for a user without one.
pub fn socket() -> Result<PathBuf, PathError> {
    if is_root() {
        return Ok(PathBuf::from("/run/farfork/farfork.sock"));
    }
    let directory = variable("XDG_RUNTIME_DIR").ok_or(PathError::NoRuntimeDirectory)?;
    Ok(directory.join("farfork/farfork.sock"))
}

/// The default data directory.
///
/// # Errors
/// [`PathError::NoHome`] for a user without one.
pub fn data() -> Result<PathBuf, PathError> {
    if is_root() {
        return Ok(PathBuf::from("/var/lib/farfork"));
    }
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")));
    Ok(state.ok_or(PathError::NoHome)?.join("farfork"))
}

/// Why there is no default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PathError {
    /// Of the socket.
    #[error("XDG_RUNTIME_DIR is not set, so there is no default socket")]
    NoRuntimeDirectory,
    /// Of the data directory.
    #[error("neither XDG_STATE_HOME nor HOME is set, so there is no default data directory")]
    NoHome,
}

impl PathError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoRuntimeDirectory => "name the socket with --socket or FARFORK_SOCKET",
            Self::NoHome => "name the directory with --data or FARFORK_DATA",
        }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
