//! Memfds: the files that hold guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use types::EXTENT_SIZE;

use crate::class::Class;

/// An empty memfd of `bytes`, all holes.
pub(crate) fn create(name: &str, bytes: u64) -> io::Result<File> {
    failpoint!("memfd.create", |source| source);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd: OwnedFd = rustix::fs::memfd_create(name, flags)?;
    rustix::fs::ftruncate(&memfd, bytes)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(File::from(memfd))
}

/// The memory of a first parent: a memfd of zeros for each region.
pub(crate) fn first_memory(class: Class) -> io::Result<Vec<File>> {
    class.regions().into_iter().map(|(_, bytes)| create("farfork-parent", bytes)).collect()
}

/// An empty layer for each region, for what a freeze copies.
pub(crate) fn new_layers(class: Class) -> io::Result<Vec<File>> {
    class.regions().into_iter().map(|(_, bytes)| create("farfork-branch", bytes)).collect()
}

/// Makes its content final: nothing writes to it any more, and nothing maps it to write. The caller has no shared mapping of
/// it left, which alone would still be writable.
///
/// This is F_SEAL_FUTURE_WRITE and not F_SEAL_WRITE, since for the latter the kernel waits until no page is in use elsewhere;
/// pages that were just written are (in another CPU's list of recent ones), and its wait is 5 ms long, on the path of every
/// branch (docs/decisions/0005-seals.md).
pub(crate) fn seal(memfd: &File) -> io::Result<()> {
    failpoint!("memfd.seal", |source| source);
    Ok(rustix::fs::fcntl_add_seals(memfd, SealFlags::FUTURE_WRITE)?)
}

/// Puts on the seal that promises the same to the memory-mapping code of others, at the cost named in [`seal`].
pub(crate) fn seal_for_mapping(memfd: &File) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(memfd, SealFlags::WRITE)?)
}

/// Gives back all memory that it takes. Its content is zero then.
pub(crate) fn empty(memfd: &File) -> io::Result<()> {
    punch(memfd, 0, size(memfd)?)
}

/// Gives back what these bytes take, whole pages; they are a hole then.
pub(crate) fn punch(memfd: &File, at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(memfd, hole, at, len)?)
}

pub(crate) fn size(memfd: &File) -> io::Result<u64> {
    Ok(memfd.metadata()?.len())
}

/// Bytes of memory that it takes.
pub(crate) fn stored_bytes(memfd: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(memfd.metadata()?.blocks() * 512)
}

/// The extents that are not wholly holes, ascending, disjoint and not adjacent.
pub(crate) fn data_extents(memfd: &File) -> io::Result<Vec<Range<u32>>> {
    let mut extents: Vec<Range<u32>> = Vec::new();
    let mut from = 0;
    while let Some(data) = next_data(memfd, from)? {
        let touched = index(data.start / EXTENT_SIZE)..index(data.end.div_ceil(EXTENT_SIZE));
        match extents.last_mut() {
            Some(last) if touched.start <= last.end => last.end = last.end.max(touched.end),
            _ => extents.push(touched),
        }
        from = data.end;
    }
    Ok(extents)
}

/// Allocates every hole in `bytes` as zeros.
pub(crate) fn fill_holes(memfd: &File, bytes: Range<u64>) -> io::Result<()> {
    for hole in holes(memfd, bytes)? {
        failpoint!("memfd.allocate", |source| source);
        rustix::fs::fallocate(memfd, FallocateFlags::empty(), hole.start, hole.end - hole.start)?;
    }
    Ok(())
}

/// The holes in `bytes`, ascending.
pub(crate) fn holes(memfd: &File, bytes: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut holes = Vec::new();
    let mut from = bytes.start;
    while from < bytes.end {
        let data = next_data(memfd, from)?.filter(|data| data.start < bytes.end);
        let (hole_end, next) = data.map_or((bytes.end, bytes.end), |data| (data.start, data.end));
        if hole_end > from {
            holes.push(from..hole_end);
        }
        from = next;
    }
    Ok(holes)
}

/// The first stretch of data at or after `from`.
fn next_data(memfd: &File, from: u64) -> io::Result<Option<Range<u64>>> {
    match rustix::fs::seek(memfd, SeekFrom::Data(from)) {
        Ok(start) => Ok(Some(start..rustix::fs::seek(memfd, SeekFrom::Hole(start))?)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn index(extent: u64) -> u32 {
    u32::try_from(extent).expect("at most 32 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_is_found_by_extents_and_holes_are_filled_where_asked() {
        let memfd = create("test", 64 * EXTENT_SIZE).unwrap();
        assert_eq!(data_extents(&memfd).unwrap(), []);
        memfd.write_all_at(&[1], 5 * EXTENT_SIZE + 4096).unwrap();
        memfd.write_all_at(&[1], 6 * EXTENT_SIZE).unwrap();
        memfd.write_all_at(&[1], 64 * EXTENT_SIZE - 1).unwrap();
        assert_eq!(data_extents(&memfd).unwrap(), [5..7, 63..64]);
        assert_eq!(stored_bytes(&memfd).unwrap(), 3 * 4096);
        fill_holes(&memfd, 5 * EXTENT_SIZE..7 * EXTENT_SIZE).unwrap();
        assert_eq!(stored_bytes(&memfd).unwrap(), 2 * EXTENT_SIZE + 4096);
        fill_holes(&memfd, 0..64 * EXTENT_SIZE).unwrap();
        assert_eq!(stored_bytes(&memfd).unwrap(), 64 * EXTENT_SIZE);
    }

    #[test]
    fn a_sealed_memfd_neither_changes_nor_moves_its_end() {
        let memfd = create("test", EXTENT_SIZE).unwrap();
        seal(&memfd).unwrap();
        assert!(memfd.write_all_at(&[1], 0).is_err());
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        seal_for_mapping(&memfd).unwrap();
        assert!(memfd.write_all_at(&[1], 0).is_err());
        assert!(rustix::fs::fallocate(&memfd, hole, 0, EXTENT_SIZE).is_err());
        assert!(memfd.set_len(0).is_err());
        assert!(memfd.set_len(2 * EXTENT_SIZE).is_err());
    }
}
