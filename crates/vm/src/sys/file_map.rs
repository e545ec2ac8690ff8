//! Memfds of images as bytes.

use std::fs::File;
use std::io;
use std::ops::Deref;

use rustix::fs::SealFlags;

use crate::image::memfd;

/// A sealed memfd, mapped for reading.
pub(crate) struct SealedMap(memmap2::Mmap);

impl SealedMap {
    /// Maps `len` bytes of a layer, which is sealed so that it can neither shrink nor be written any more.
    pub(crate) fn of(memfd: &File, offset: u64, len: usize) -> io::Result<Self> {
        memfd::seal_for_mapping(memfd)?;
        let seals = rustix::fs::fcntl_get_seals(memfd)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::WRITE) {
            return Err(io::Error::other("only a sealed memfd may be mapped for reading"));
        }
        // SAFETY: a mapped file must not change while it is borrowed as bytes, nor shrink (SIGBUS). The seals just read forbid
        // both, and seals cannot be taken off.
        let map = unsafe { memmap2::MmapOptions::new().offset(offset).len(len).map(memfd) }?;
        Ok(Self(map))
    }
}

impl Deref for SealedMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
