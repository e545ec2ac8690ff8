//! Where a node listens: one Unix socket, this node's alone.
//!
//! Two nodes that start at the same moment must not take a stale socket from each other, so whoever may replace the socket is
//! decided by a lock on the file `<socket>.lock` beside it, which the kernel gives back however a node ends. The socket gets
//! its mode before it listens, so that nobody connects in between.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

/// As many connections may wait to be accepted (the kernel's own bound is net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// A socket that listens. Its file is removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
    _lock: File,
}

impl Socket {
    /// Creates the socket, mode 0600, in a directory that is made with mode 0700 if there is none.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |source| SocketError::Io { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path)
            .map_err(|_| SocketError::TooLong { path: path.to_owned(), bytes: path.as_os_str().len() })?;
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        }
        let lock = lock(path)?;
        remove_stale(path)?;
        let socket = listening(&address, path).map_err(|error| io(error.into()))?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(io)?;
        Ok(Self { path: path.to_owned(), listener, _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to accept connections on.
    ///
    /// # Errors
    /// Of dup(2), or of the runtime.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone()?)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket's file stays");
        }
    }
}

/// Why a node cannot listen there.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SocketError {
    #[error("another node listens on {}", path.display())]
    Taken { path: PathBuf },
    #[error("{} exists and is no socket", path.display())]
    NoSocket { path: PathBuf },
    #[error("{} has {bytes} bytes; the path of a socket has at most 107", path.display())]
    TooLong { path: PathBuf, bytes: usize },
    #[error("{} cannot be made: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl SocketError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Taken { .. } => "stop that node, or give this one another socket with --socket",
            Self::NoSocket { .. } => "move that file away, or name another socket with --socket",
            Self::TooLong { .. } => "name a shorter path with --socket",
            Self::Io { .. } => "name a socket in a directory that this user may write with --socket",
        }
    }
}

fn lock(path: &Path) -> Result<File, SocketError> {
    let io = |source| SocketError::Io { path: path.to_owned(), source };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(name).map_err(io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(SocketError::Taken { path: path.to_owned() }),
        Err(error) => Err(io(error.into())),
    }
}

/// Removes what a node that is gone has left; not what anybody answers on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SocketError::Io { path: path.to_owned(), source }),
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NoSocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "a stale socket is replaced");
            std::fs::remove_file(path).map_err(|source| SocketError::Io { path: path.to_owned(), source })
        }
        _ => Err(SocketError::Taken { path: path.to_owned() }),
    }
}

fn listening(address: &SocketAddrUnix, path: &Path) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, address)?;
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, mode).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_one_node_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/farfork.sock");
        let first = Socket::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(Socket::bind(&path), Err(SocketError::Taken { .. })));
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a listener of std leaves its file");
        drop(Socket::bind(&path).unwrap());
    }

    #[test]
    fn what_others_listen_on_or_keep_there_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let foreign = UnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::Taken { .. })));
        drop(foreign);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NoSocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        let long = directory.path().join("x".repeat(200));
        let error = Socket::bind(&long).unwrap_err();
        assert!(matches!(error, SocketError::TooLong { .. }), "{error}");
        assert!(!error.remedy().is_empty());
    }
}
