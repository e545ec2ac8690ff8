//! Files beneath a directory's descriptor: links are not followed, and what is written is written whole or not at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Opens a path beneath `directory`, without following links.
pub(crate) fn open_beneath(directory: &OwnedFd, path: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(directory, path, flags, mode, resolve)
}

/// All bytes of a file, of which there may be at most `bytes_max`.
pub(crate) fn read(directory: &OwnedFd, file: &str, bytes_max: usize) -> io::Result<Vec<u8>> {
    let fd = open_beneath(directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    File::from(fd).take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Replaces a file, readable by its owner alone. It is on disk when this returns, and as it was if this fails.
pub(crate) fn replace(directory: &OwnedFd, file: &str, bytes: &[u8]) -> io::Result<()> {
    let new = format!("{file}.new");
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let mut written = File::from(open_beneath(directory, &new, flags, Mode::from(0o600))?);
    if let Err(error) = written.write_all(bytes).and_then(|()| written.sync_all()) {
        // Best effort: what fills the disk must not stay because of the disk being full.
        let _ = rustix::fs::unlinkat(directory, &new, AtFlags::empty());
        return Err(error);
    }
    rustix::fs::renameat(directory, &new, directory, file)?;
    Ok(rustix::fs::fsync(directory)?)
}

/// Removes a file, for good when this returns.
pub(super) fn remove(directory: &OwnedFd, file: &str) -> io::Result<()> {
    rustix::fs::unlinkat(directory, file, AtFlags::empty())?;
    Ok(rustix::fs::fsync(directory)?)
}
