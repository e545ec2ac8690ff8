//! The directory that is one node's alone.
//!
//! ```text
//! /var/lib/farfork   0700
//!   lock             held (flock) as long as the node lives; holds its process id
//!   node.json        {"format":1,"node":"<uuid>"}
//!   images/          the store of saved images
//!   trust/           certificates of nodes that are trusted, see trust.rs
//! ```
//!
//! Every path in it is opened beneath the directory's descriptor, without following links: whatever lies in there, nothing
//! outside is ever read or written.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::files::{self, open_beneath};

/// Of `node.json`. What a newer farfork has written is not touched.
const FORMAT: u32 = 1;
const LOCK: &str = "lock";
const NODE: &str = "node.json";
/// More than any format of it needs.
const NODE_BYTES_MAX: usize = 1 << 16;
const IMAGES: &str = "images";
const TRUST: &str = "trust";

/// The directory, locked.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    node: Uuid,
    directory: OwnedFd,
    images: OwnedFd,
    trust: OwnedFd,
    /// Unlocked by the kernel when the node is gone, however it went.
    _lock: File,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    format: u32,
    node: Uuid,
}

impl NodeFile {
    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a map with text keys")
    }
}

impl DataDirectory {
    /// Creates the directory if need be, locks it, and proves that it can be written.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let at = Place { directory: path };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| at.error("", error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| at.error("", error))?;
        let lock = at.lock(&directory)?;
        at.close_to_others(&directory)?;
        let node = at.identity(&directory)?;
        let images = at.subdirectory(&directory, IMAGES)?;
        let trust = at.subdirectory(&directory, TRUST)?;
        Ok(Self { path: path.to_owned(), node, directory, images, trust, _lock: lock })
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id of this node, drawn when the directory was made, or when it lost its log.
    #[must_use]
    pub fn node(&self) -> Uuid {
        self.node
    }

    /// The store of saved images.
    #[must_use]
    pub fn images(&self) -> BorrowedFd<'_> {
        self.images.as_fd()
    }

    /// The certificates of nodes that are trusted.
    #[must_use]
    pub fn trust(&self) -> BorrowedFd<'_> {
        self.trust.as_fd()
    }

    /// Reads a file of the directory, if there is one.
    ///
    /// # Errors
    /// Of openat2(2) and read(2); `InvalidData` if it is longer than `bytes_max`.
    pub fn read(&self, file: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        match files::read(&self.directory, file, bytes_max) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        }
    }

    /// Writes a file of the directory, for its owner alone, whole or not at all; on disk when this returns.
    ///
    /// # Errors
    /// Of openat2(2), write(2), fsync(2) and rename(2); the file is as it was.
    pub fn replace(&self, file: &str, bytes: &[u8]) -> io::Result<()> {
        files::replace(&self.directory, file, bytes)
    }

    /// Gives a file of the directory another name, that none has yet; for good when this returns.
    ///
    /// # Errors
    /// Of renameat2(2) and fsync(2).
    pub fn rename(&self, file: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat_with(&self.directory, file, &self.directory, to, RenameFlags::NOREPLACE)?;
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    /// Removes a file of the directory, for good when this returns. One that is not there was removed before.
    ///
    /// # Errors
    /// Of unlinkat(2) and fsync(2).
    pub fn remove(&self, file: &str) -> io::Result<()> {
        match files::remove(&self.directory, file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Whether there is a file of this name.
    ///
    /// # Errors
    /// Of statx(2).
    pub fn has(&self, file: &str) -> io::Result<bool> {
        match rustix::fs::statat(&self.directory, file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// From now on this directory is that node's.
    ///
    /// # Errors
    /// As of [`DataDirectory::replace`]; it is whose it was.
    pub fn become_node(&mut self, node: Uuid) -> io::Result<()> {
        files::replace(&self.directory, NODE, &NodeFile { format: FORMAT, node }.to_bytes())?;
        self.node = node;
        Ok(())
    }

    /// Opens a file beneath the directory.
    ///
    /// # Errors
    /// Of openat2(2); `EXDEV` or `ELOOP` if the path leads out of the directory or over a link.
    pub fn open_beneath(&self, path: &str, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        Ok(open_beneath(&self.directory, path, flags, mode)?)
    }
}

/// Why a directory cannot be a node's.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum DataError {
    #[error("another node{} uses {}", pid.map_or_else(String::new, |pid| format!(" (process {pid})")), path.display())]
    Taken { path: PathBuf, pid: Option<u32> },
    #[error("{} is on a file system that is read-only", path.display())]
    ReadOnly { path: PathBuf },
    #[error("{} is on a file system that is full", path.display())]
    Full { path: PathBuf },
    #[error("{} may not be used by this user", path.display())]
    Forbidden { path: PathBuf },
    #[error("{} is of format {found}; this farfork knows up to {FORMAT}", path.display())]
    Newer { path: PathBuf, found: u32 },
    #[error("{} is damaged: {source}", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{} cannot be used: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl DataError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Taken { .. } => "stop that node, or give this one another directory with --data",
            Self::ReadOnly { .. } => "mount it writable, or name another directory with --data",
            Self::Full { .. } => "make room, or name a directory on another file system with --data",
            Self::Forbidden { .. } => "run as the user who owns it, or name another directory with --data",
            Self::Newer { .. } => "use the farfork that wrote it, or a newer one",
            Self::Damaged { .. } => "restore the file from a backup, or move it away: the node draws a new id then",
            Self::Io { .. } => "name a directory on a local file system with --data (Linux 5.6 or newer)",
        }
    }
}

/// Knows the whole path, for errors.
struct Place<'a> {
    directory: &'a Path,
}

impl Place<'_> {
    fn error(&self, name: &str, error: impl Into<io::Error>) -> DataError {
        let source = error.into();
        let path = if name.is_empty() { self.directory.to_owned() } else { self.directory.join(name) };
        match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => DataError::ReadOnly { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DataError::Full { path },
            io::ErrorKind::PermissionDenied => DataError::Forbidden { path },
            _ => DataError::Io { path, source },
        }
    }

    fn lock(&self, directory: &OwnedFd) -> Result<File, DataError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = open_beneath(directory, LOCK, flags, Mode::from(0o600)).map_err(|error| self.error(LOCK, error))?;
        let mut file = File::from(fd);
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(DataError::Taken { path: self.directory.to_owned(), pid });
            }
            Err(error) => return Err(self.error(LOCK, error)),
        }
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|error| self.error(LOCK, error))?;
        Ok(file)
    }

    /// Images hold the memory of guests: nobody else's to read.
    fn close_to_others(&self, directory: &OwnedFd) -> Result<(), DataError> {
        let mode = rustix::fs::fstat(directory).map_err(|error| self.error("", error))?.st_mode;
        if mode & 0o077 != 0 {
            rustix::fs::fchmod(directory, Mode::from(0o700)).map_err(|error| self.error("", error))?;
        }
        Ok(())
    }

    /// Reads the node's id, or draws it. Written anew at each start, whole or not at all: that proves that there is room.
    fn identity(&self, directory: &OwnedFd) -> Result<Uuid, DataError> {
        let path = || self.directory.join(NODE);
        let node = match files::read(directory, NODE, NODE_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Uuid::now_v7(),
            Err(error) => return Err(self.error(NODE, error)),
            Ok(text) => {
                let format_of: FormatOnly = parse(&text, path)?;
                if format_of.format > FORMAT {
                    return Err(DataError::Newer { path: path(), found: format_of.format });
                }
                parse::<NodeFile>(&text, path)?.node
            }
        };
        files::replace(directory, NODE, &NodeFile { format: FORMAT, node }.to_bytes())
            .map_err(|error| self.error(NODE, error))?;
        Ok(node)
    }

    fn subdirectory(&self, directory: &OwnedFd, name: &str) -> Result<OwnedFd, DataError> {
        match rustix::fs::mkdirat(directory, name, Mode::from(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(self.error(name, error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open_beneath(directory, name, flags, Mode::empty()).map_err(|error| self.error(name, error))
    }
}

/// Only as much of a file of an unknown format as every format has.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

fn parse<T: for<'de> Deserialize<'de>>(text: &[u8], path: impl Fn() -> PathBuf) -> Result<T, DataError> {
    serde_json::from_slice(text).map_err(|source| DataError::Damaged { path: path(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_node_keeps_its_id() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state/farfork");
        let first = DataDirectory::open(&path).unwrap().node();
        let again = DataDirectory::open(&path).unwrap();
        assert_eq!(again.node(), first);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(path.join(IMAGES).metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert!(!path.join("node.json.new").exists());
    }

    #[test]
    fn a_directory_has_one_node_and_says_which() {
        let path = tempfile::tempdir().unwrap();
        let held = DataDirectory::open(path.path()).unwrap();
        let error = DataDirectory::open(path.path()).unwrap_err();
        assert!(matches!(error, DataError::Taken { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
        drop(held);
        assert!(DataDirectory::open(path.path()).is_ok());
    }

    #[test]
    fn what_is_damaged_or_newer_is_left_alone() {
        let path = tempfile::tempdir().unwrap();
        for (text, newer) in [("", false), ("{\"format\":1}", false), ("{\"format\":2,\"more\":[]}", true), ("[", false)] {
            std::fs::write(path.path().join(NODE), text).unwrap();
            let error = DataDirectory::open(path.path()).unwrap_err();
            assert_eq!(matches!(error, DataError::Newer { found: 2, .. }), newer, "{error}");
            assert_eq!(matches!(error, DataError::Damaged { .. }), !newer, "{error}");
            assert_eq!(std::fs::read_to_string(path.path().join(NODE)).unwrap(), text);
        }
    }

    #[test]
    fn links_are_not_followed() {
        let (path, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(elsewhere.path(), path.path().join(IMAGES)).unwrap();
        let error = DataDirectory::open(path.path()).unwrap_err();
        assert!(matches!(error, DataError::Io { .. }), "{error}");
        std::fs::remove_file(path.path().join(IMAGES)).unwrap();
        let data = DataDirectory::open(path.path()).unwrap();
        symlink("/etc/passwd", path.path().join("link")).unwrap();
        for escape in ["link", "../x", "/etc/passwd", "images/../../x"] {
            assert!(data.open_beneath(escape, OFlags::RDONLY, Mode::empty()).is_err(), "{escape}");
        }
        assert!(data.open_beneath(NODE, OFlags::RDONLY, Mode::empty()).is_ok());
    }

    #[test]
    fn a_file_in_its_place_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = DataDirectory::open(file.path()).unwrap_err();
        assert!(matches!(error, DataError::Io { .. }), "{error}");
        assert!(!error.remedy().is_empty());
    }
}
