//! Address ranges for guest memory, and what is mapped into them.
//!
//! A [`Slot`] owns a range of host addresses for as long as it lives, whether anything is mapped there or not. The range of a
//! shell stays **unmapped**: KVM takes a memory slot over it all the same, and mapping the image into an unmapped range costs
//! 27 us at every size, where replacing a reservation costs 557 us at 4 GiB.
//!
//! Nothing else of this process maps there: the ranges come from a part of the address space that the kernel's own choice of
//! addresses (downwards from the stack) does not reach, and each mapping asks the kernel not to replace what is there.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use types::HostAddress;

/// Between the program's own image and its mappings, below which the kernel does not come.
const ARENA: Range<usize> = 0x2000_0000_0000..0x5000_0000_0000;
/// Left free after each range, so that running over an end is a fault and not another machine's memory.
const GUARD: usize = 2 << 20;

static FREE: Mutex<Arena> = Mutex::new(Arena { fresh: ARENA.start, returned: Vec::new() });

/// Ranges that were given back are handed out again by size; there are only as many sizes as classes of machine.
struct Arena {
    fresh: usize,
    returned: Vec<Range<usize>>,
}

/// A piece of what is mapped into a slot: `bytes` are offsets from the slot's start.
pub(crate) struct Piece<'fd> {
    pub(crate) bytes: Range<u64>,
    pub(crate) content: Content<'fd>,
}

/// What a piece of a slot shows.
#[derive(Clone, Copy)]
pub(crate) enum Content<'fd> {
    /// The file at the same offset; writes go to the file.
    Shared(BorrowedFd<'fd>),
    /// The file at the same offset; written pages are copied and private.
    Private(BorrowedFd<'fd>),
    /// Zeros, private.
    Zero,
}

/// An owned range of host addresses.
#[derive(Debug)]
pub(crate) struct Slot {
    range: Range<usize>,
    /// Up to here the range is mapped by us.
    mapped_end: usize,
    /// Something else has been found in the range, so it is not for use again.
    is_spoiled: bool,
}

impl Slot {
    /// Takes a range of `len` bytes, with nothing mapped.
    pub(crate) fn reserve(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut arena = FREE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let range = match arena.returned.iter().position(|range| range.len() == len) {
            Some(position) => arena.returned.swap_remove(position),
            None => {
                let start = arena.fresh;
                let end = start.checked_add(len).filter(|end| *end <= ARENA.end).ok_or(io::ErrorKind::OutOfMemory)?;
                arena.fresh = end + GUARD;
                start..end
            }
        };
        Ok(Self { mapped_end: range.start, range, is_spoiled: false })
    }

    pub(crate) fn start(&self) -> HostAddress {
        HostAddress(self.range.start)
    }

    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }

    pub(crate) fn is_mapped(&self) -> bool {
        self.mapped_end == self.range.end
    }

    /// Maps `pieces`, which cover the slot in order. The first time, a foreign mapping in the way is an error (`EEXIST`) and
    /// is left alone; later, each piece replaces in one step what is there.
    pub(crate) fn map<'fd>(&mut self, pieces: impl IntoIterator<Item = Piece<'fd>>) -> io::Result<()> {
        self.place(pieces)?;
        // Not inherited by processes that this one starts: only the copier of this machine wants it, and asks for it.
        self.advise(self.range.clone(), Advice::LinuxDontFork)?;
        // One written byte of a zero run must stay one page, not become 2 MiB.
        self.advise(self.range.clone(), Advice::LinuxNoHugepage)
    }

    /// The mappings of [`Slot::map`], without advice to the kernel.
    pub(super) fn place<'fd>(&mut self, pieces: impl IntoIterator<Item = Piece<'fd>>) -> io::Result<()> {
        let placement = if self.is_mapped() { MapFlags::FIXED } else { MapFlags::FIXED_NOREPLACE };
        let mut done = 0u64;
        for piece in pieces {
            assert_eq!(piece.bytes.start, done, "pieces cover the slot in order");
            let at = self.range.start + usize_of(piece.bytes.start);
            let len = usize_of(piece.bytes.end - piece.bytes.start);
            assert!(at + len <= self.range.end, "piece beyond its slot");
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let private = MapFlags::PRIVATE | MapFlags::NORESERVE | placement;
            // In all three, `at..at + len` is inside a range that this slot owns (asserted above). With FIXED_NOREPLACE nothing
            // is replaced; with FIXED only what this slot mapped is. Rust references never point there: guest memory is only
            // reached through volatile access (`guest_memory`), for which changing content is ordinary.
            let mapped = match piece.content {
                Content::Shared(fd) => {
                    let flags = MapFlags::SHARED | placement;
                    // SAFETY: as said above.
                    unsafe { rustix::mm::mmap(at as *mut _, len, prot, flags, fd, piece.bytes.start) }
                }
                Content::Private(fd) => {
                    // SAFETY: as said above.
                    unsafe { rustix::mm::mmap(at as *mut _, len, prot, private, fd, piece.bytes.start) }
                }
                Content::Zero => {
                    // SAFETY: as said above.
                    unsafe { rustix::mm::mmap_anonymous(at as *mut _, len, prot, private) }
                }
            };
            self.is_spoiled |= mapped == Err(rustix::io::Errno::EXIST);
            let mapped = mapped?;
            assert_eq!(mapped as usize, at, "the kernel is older than MAP_FIXED_NOREPLACE (Linux 4.17)");
            done = piece.bytes.end;
            self.mapped_end = self.mapped_end.max(at + len);
        }
        assert_eq!(usize_of(done), self.len(), "pieces cover the whole slot");
        Ok(())
    }

    /// Lets a process forked from this one have the page tables of `len` bytes from `from` on.
    pub(super) fn let_inherit(&self, from: HostAddress, len: usize) -> io::Result<()> {
        assert!(self.contains(from, len));
        self.advise(from.0..from.0 + len, Advice::LinuxDoFork)
    }

    /// Takes back every [`Slot::let_inherit`].
    pub(super) fn let_inherit_nothing(&self) -> io::Result<()> {
        self.advise(self.range.clone(), Advice::LinuxDontFork)
    }

    /// Whether all of these bytes are the slot's.
    pub(super) fn contains(&self, from: HostAddress, len: usize) -> bool {
        self.range.start <= from.0 && from.0.checked_add(len).is_some_and(|end| end <= self.range.end)
    }

    fn advise(&self, bytes: Range<usize>, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is owned and mapped by this slot, and none of the advices used above changes its content. (Errors:
        // NOHUGEPAGE is unknown to kernels without huge pages, which is as good.)
        match unsafe { rustix::mm::madvise(bytes.start as *mut _, bytes.len(), advice) } {
            Err(rustix::io::Errno::INVAL) if matches!(advice, Advice::LinuxNoHugepage) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Takes all access from one page, as a test's way to make the host fail a guest's access to its RAM.
    #[cfg(feature = "testing")]
    pub(crate) fn forbid_page(&self, offset: u64) -> io::Result<()> {
        assert!(self.is_mapped() && usize_of(offset) < self.len());
        let at = self.range.start + usize_of(offset);
        // SAFETY: the page is owned and mapped by this slot; losing access makes later access fault, not misbehave.
        Ok(unsafe { rustix::mm::mprotect(at as *mut _, 4096, rustix::mm::MprotectFlags::empty()) }?)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mapped = self.mapped_end - self.range.start;
        if mapped > 0 {
            // SAFETY: only what this slot mapped is unmapped. Whoever could still reach it (the VM, `GuestMemory`) owns the
            // slot, or is dropped before it: see `Machine`'s order of fields.
            let unmapped = unsafe { rustix::mm::munmap(self.range.start as *mut _, mapped) };
            assert!(unmapped.is_ok(), "unmapping an owned range cannot fail: {unmapped:?}");
        }
        if !self.is_spoiled {
            FREE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).returned.push(self.range.clone());
        }
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_mapping_is_left_alone_and_its_range_not_used_again() {
        let len = 6 << 20;
        let zeros = || [Piece { bytes: 0..len, content: Content::Zero }];
        let mut slot = Slot::reserve(len).unwrap();
        let start = slot.start();
        let at = (start.0 + (2 << 20)) as *mut std::ffi::c_void;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: nothing is mapped there: the range has just been reserved.
        unsafe { rustix::mm::mmap_anonymous(at, 4096, ProtFlags::READ | ProtFlags::WRITE, flags) }.unwrap();
        // SAFETY: mapped above, and nobody else knows of it.
        unsafe { at.cast::<u8>().write_volatile(7) };
        assert_eq!(slot.map(zeros()).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        drop(slot);
        // SAFETY: still mapped, as this test says.
        assert_eq!(unsafe { at.cast::<u8>().read_volatile() }, 7);
        let mut next = Slot::reserve(len).unwrap();
        assert_ne!(next.start(), start, "a spoiled range is handed out again");
        next.map(zeros()).unwrap();
        let good = next.start();
        drop(next);
        assert_eq!(Slot::reserve(len).unwrap().start(), good, "a good range is handed out again");
        // SAFETY: mapped above; nothing points there any more.
        unsafe { rustix::mm::munmap(at, 4096) }.unwrap();
    }
}
