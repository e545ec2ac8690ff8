//! Where a node listens and keeps its data unless told otherwise. Only these depend on who runs the program.

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

/// The directory of the cluster that `farfork up` brings up: beside the default data directory.
///
/// # Errors
/// [`PathError::NoHome`] for a user without one.
pub fn local() -> Result<PathBuf, PathError> {
    Ok(data()?.with_file_name("farfork-local"))
}

/// Where a voter looks for the passphrase of its cluster's authority: not in the data directory, whose copies it protects.
///
/// # Errors
/// [`PathError::NoConfiguration`] for a user without a place for it.
pub fn passphrase() -> Result<PathBuf, PathError> {
    Ok(configuration()?.join("ca-passphrase"))
}

/// Where configuration is.
///
/// # Errors
/// [`PathError::NoConfiguration`] for a user without a place for it.
pub fn configuration() -> Result<PathBuf, PathError> {
    if is_root() {
        return Ok(PathBuf::from("/etc/farfork"));
    }
    let directory = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    Ok(directory.ok_or(PathError::NoConfiguration)?.join("farfork"))
}

/// Where a user's contexts are.
///
/// # Errors
/// [`PathError::NoConfiguration`] for a user without a place for them.
pub fn contexts() -> Result<PathBuf, PathError> {
    if let Some(named) = variable("FARFORK_CONFIG") {
        return Ok(named);
    }
    let directory = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    Ok(directory.ok_or(PathError::NoConfiguration)?.join("farfork/config.toml"))
}

/// Where `make guest` leaves what Linux guests are made of.
///
/// # Errors
/// [`PathError::NoCache`] for a user without a place for it.
pub fn guests() -> Result<PathBuf, PathError> {
    if let Some(named) = variable("FARFORK_GUESTS") {
        return Ok(named);
    }
    let caches = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let own = variable("FARFORK_CACHE").or_else(|| Some(caches()?.join("farfork")));
    Ok(own.ok_or(PathError::NoCache)?.join("guest/current"))
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
    /// Of configuration.
    #[error("neither XDG_CONFIG_HOME nor HOME is set, so there is no default place for configuration")]
    NoConfiguration,
    /// Of what guests are made of.
    #[error("neither XDG_CACHE_HOME nor HOME is set, so there is no default place for guests' files")]
    NoCache,
}

impl PathError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoRuntimeDirectory => "name the socket with --socket or FARFORK_SOCKET",
            Self::NoHome => "name the directory with --data or FARFORK_DATA",
            Self::NoConfiguration => "set HOME, or name the file",
            Self::NoCache => "name the directory that make guest printed with FARFORK_GUESTS, or name each file",
        }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
