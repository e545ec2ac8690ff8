//! Userfaultfd (Documentation/admin-guide/mm/userfaultfd.rst): who answers when memory is touched that is not there yet.
//!
//! Two kinds of descriptors: a [`Watch`] reports the touches of one process and wakes who waits; an [`Alias`] is the pager's own
//! view of an image's memfd, through which a page appears for all children at once, whole or not at all.
//!
//! When the last descriptor of a userfaultfd closes, whoever waits in a fault goes on with a page of zeros, and that page goes
//! into the memfd. So worker and node each hold one, and a child never outlives the one that is left by more than its death.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::mm::{MapFlags, ProtFlags};
use types::HostAddress;
use userfaultfd::{Event, EventBuffer, Uffd};

use super::slot::Slot;

/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0)`
const IOC_NEW: libc::c_ulong = 0xAA00;
/// `UFFDIO_API`: `_IOWR(0xAA, 0x3F, struct uffdio_api)`
const API: libc::c_ulong = 0xC018_AA3F;
/// `UFFDIO_POISON`: `_IOWR(0xAA, 0x08, struct uffdio_poison)`
const POISON: libc::c_ulong = 0xC020_AA08;
/// How often a copy is tried again that the kernel could not make for the moment.
const ATTEMPTS: u32 = 1000;
const PAGE_LEN: usize = 4096;
/// Mappings begin and end with extents.
const EXTENT_LEN: usize = 64 << 10;
/// Touches that are read at once.
const EVENTS: usize = 64;

/// `struct uffdio_api`
#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_poison`
#[repr(C)]
struct PoisonArg {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

/// `/dev/userfaultfd`. What it makes also sees the accesses of the kernel itself, which KVM's are.
#[derive(Debug)]
pub(crate) struct Device(File);

impl Device {
    pub(crate) const PATH: &'static str = "/dev/userfaultfd";

    pub(crate) fn open() -> io::Result<Self> {
        File::options().read(true).write(true).open(Self::PATH).map(Self)
    }

    pub(crate) fn over(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// A userfaultfd of this process, which alone can register its memory with it.
    pub(crate) fn watch(&self) -> io::Result<Watch> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes flags and no address; the descriptor that comes back is new and nobody else's.
        let fd = unsafe { libc::ioctl(self.0.as_raw_fd(), IOC_NEW, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as just said.
        let watch = Watch::over(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut arg = ApiArg { api: 0xAA, features: 0, ioctls: 0 };
        // SAFETY: the kernel reads and writes `arg`, which lives here.
        let answered = unsafe { libc::ioctl(watch.0.as_raw_fd(), API, &raw mut arg) };
        if answered < 0 { Err(io::Error::last_os_error()) } else { Ok(watch) }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Watch(Uffd);

impl Watch {
    /// One that another process made, or this one.
    pub(crate) fn over(descriptor: OwnedFd) -> Self {
        // Not by `IntoRawFd`: what the crate takes over, it closes.
        let raw = std::os::fd::IntoRawFd::into_raw_fd(descriptor);
        // SAFETY: given up by its owner in the line above.
        Self(unsafe { Uffd::from_raw_fd(raw) })
    }

    /// Reports touches of absent pages in these bytes of a slot from now on.
    pub(crate) fn register(&self, slot: &Slot, bytes: &Range<u64>) -> io::Result<()> {
        let (at, len) = (slot.start().0 + usize_of(bytes.start), usize_of(bytes.end - bytes.start));
        assert!(slot.is_mapped() && slot.contains(HostAddress(at), len), "only what the slot owns is watched");
        self.0.register(at as *mut _, len).map(drop).map_err(io_error)
    }

    /// Calls `each` with the address of every touch that has not been read yet, as far as a buffer holds them; says how many.
    /// Does not wait.
    pub(crate) fn read(&self, mut each: impl FnMut(HostAddress)) -> io::Result<usize> {
        let mut buffer = EventBuffer::new(EVENTS);
        let mut count = 0;
        for event in self.0.read_events(&mut buffer).map_err(io_error)? {
            // No other kind was asked for.
            if let Event::Pagefault { addr, .. } = event.map_err(io_error)? {
                each(HostAddress(addr as usize));
                count += 1;
            }
        }
        Ok(count)
    }

    /// Lets go on who waits for a page in this range, which looks again.
    pub(crate) fn wake(&self, at: HostAddress, len: usize) -> io::Result<()> {
        self.0.wake(at.0 as *mut _, len).map_err(io_error)
    }

    /// Gives a slot pages of its own where nobody else would see them: what a pager without a host image does. For measurements.
    #[cfg(feature = "bare")]
    pub(crate) fn place(&self, slot: &Slot, at: HostAddress, bytes: &[u8]) -> (usize, Option<Stop>) {
        assert!(slot.is_mapped() && slot.contains(at, bytes.len()), "only what the slot owns is filled");
        // SAFETY: guest memory, to which no reference exists.
        unsafe { copy_in(&self.0, at.0, bytes) }
    }

    /// Whoever touches an absent page in this range from now on, or waits for one, is refused it for good; where the range is not
    /// registered everything stays as it is. Says whether there is still a memory to touch: `false` once it has gone with its
    /// process.
    pub(crate) fn refuse(&self, at: HostAddress, len: usize) -> io::Result<bool> {
        let (mut start, end) = (at.0, at.0 + len);
        let mut len = end - start;
        let mut attempts = 0;
        while start < end {
            len = len.min(end - start);
            let mut arg = PoisonArg { start: start as u64, len: len as u64, mode: 0, updated: 0 };
            // SAFETY: the kernel reads and writes `arg`, which lives here; what it changes is the memory of another process.
            let refused = unsafe { libc::ioctl(self.0.as_raw_fd(), POISON, &raw mut arg) };
            let error = io::Error::last_os_error();
            let updated = usize::try_from(arg.updated).unwrap_or(0);
            match error.raw_os_error() {
                _ if refused == 0 => (start, len) = (start + len, end - start),
                Some(libc::ESRCH) => return Ok(false),
                // There is a page.
                Some(libc::EEXIST) => start += PAGE_LEN,
                // Not all in one registered mapping: piece by piece.
                Some(libc::ENOENT) if len > EXTENT_LEN => len = EXTENT_LEN,
                Some(libc::ENOENT) => start += len,
                Some(libc::EAGAIN) if updated > 0 => start += updated,
                Some(libc::EAGAIN) if attempts < ATTEMPTS => {
                    attempts += 1;
                    std::thread::yield_now();
                }
                _ => return Err(error),
            }
        }
        Ok(true)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A shared mapping of a memfd that nobody reads or writes: pages are placed into the file through it.
#[derive(Debug)]
pub(crate) struct Alias {
    watch: Watch,
    range: Range<usize>,
}

/// Why no more was placed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// There is a page already where the next one was due.
    Exists,
    /// The host, or this process's control group, has no memory left.
    NoMemory,
    /// Anything else: an error number.
    Error(i32),
}

impl Alias {
    /// Maps the whole of a memfd and registers the mapping, so that not even an access of our own by mistake could make a page
    /// of zeros.
    pub(crate) fn of(memfd: &File, len: u64, device: &Device) -> io::Result<Self> {
        let watch = device.watch()?;
        let len = usize_of(len);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping where nothing is; no reference ever points there.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, memfd, 0) }? as usize;
        // From here on dropping it unmaps.
        let alias = Self { watch, range: at..at + len };
        // SAFETY: the mapping is ours; the advice keeps it from processes that we fork, and changes no content.
        unsafe { rustix::mm::madvise(at as *mut _, len, rustix::mm::Advice::LinuxDontFork) }?;
        // SAFETY: as above. (A huge page would be made of what is there and zeros. EINVAL: the kernel has none.)
        match unsafe { rustix::mm::madvise(at as *mut _, len, rustix::mm::Advice::LinuxNoHugepage) } {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
        alias.watch.0.register(at as *mut _, len).map_err(io_error)?;
        Ok(alias)
    }

    /// Places whole pages from `offset` on. Returns the bytes that were, and why not all.
    pub(crate) fn place(&self, offset: u64, bytes: &[u8]) -> (usize, Option<Stop>) {
        let at = self.range.start + usize_of(offset);
        let is_whole = at.is_multiple_of(4096) && bytes.len().is_multiple_of(4096);
        assert!(is_whole && at + bytes.len() <= self.range.end, "whole pages within the file");
        // SAFETY: our own mapping, to which no reference exists.
        unsafe { copy_in(&self.watch.0, at, bytes) }
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and no reference ever pointed there.
        let unmapped = unsafe { rustix::mm::munmap(self.range.start as *mut _, self.range.len()) };
        assert!(unmapped.is_ok(), "unmapping an owned range cannot fail: {unmapped:?}");
    }
}

/// Copies whole pages to `at`. Returns the bytes that were, and why not all.
///
/// # Safety
/// No reference may point to where they go.
unsafe fn copy_in(uffd: &Uffd, at: usize, bytes: &[u8]) -> (usize, Option<Stop>) {
    let mut done = 0;
    let mut attempts = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: the kernel reads `rest`, which is borrowed, and writes where the caller has said that no reference points.
        let copied = unsafe { uffd.copy(rest.as_ptr().cast(), (at + done) as *mut _, rest.len(), true) };
        match copied {
            Ok(copied) => done += copied,
            // EAGAIN with a count is progress; what looks like a huge count is -EAGAIN or another error, negated.
            Err(userfaultfd::Error::PartiallyCopied(copied)) if copied <= rest.len() && copied > 0 => done += copied,
            Err(userfaultfd::Error::PartiallyCopied(_)) if attempts < ATTEMPTS => {
                attempts += 1;
                std::thread::yield_now();
            }
            Err(userfaultfd::Error::CopyFailed(errno)) => {
                return (
                    done,
                    Some(match errno as i32 {
                        libc::EEXIST => Stop::Exists,
                        libc::ENOMEM => Stop::NoMemory,
                        errno => Stop::Error(errno),
                    }),
                );
            }
            Err(_) => return (done, Some(Stop::Error(libc::EAGAIN))),
        }
    }
    (done, None)
}

fn io_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) | userfaultfd::Error::CopyFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        error => io::Error::other(error),
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64-bit host")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::memfd;
    use crate::sys::slot::{Content, Piece};
    use std::os::unix::fs::FileExt;

    const LEN: u64 = 2 << 20;

    /// What docs/decisions/0011 stands on, as this kernel does it.
    #[test]
    fn a_page_that_is_placed_is_there_for_all_and_one_that_exists_is_told() {
        let device = Device::open().unwrap();
        let file = memfd::create("test", LEN).unwrap();
        let alias = Alias::of(&file, LEN, &device).unwrap();
        let mut slot = Slot::reserve(LEN).unwrap();
        slot.map([Piece { bytes: 0..LEN, content: Content::Private(file.as_fd()) }]).unwrap();
        let watch = device.watch().unwrap();
        watch.register(&slot, &(0..LEN)).unwrap();
        let at = slot.start().0 + 3 * 4096;
        let reader = std::thread::spawn(move || {
            // SAFETY: mapped above, until this thread was joined.
            unsafe { (at as *const u8).read_volatile() }
        });
        let mut touched = Vec::new();
        while touched.is_empty() {
            watch.read(|address| touched.push(address)).unwrap();
        }
        assert_eq!(touched, [HostAddress(at)]);
        assert_eq!(alias.place(3 * 4096, &[7; 4096]), (4096, None));
        // Placing it wakes nobody in another mapping.
        watch.wake(HostAddress(at), 4096).unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        // A page in the middle stops a longer copy, and says so.
        assert_eq!(alias.place(0, &[1; 4 * 4096]), (3 * 4096, Some(Stop::Exists)));
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 2 * 4096).unwrap();
        assert_eq!(page, [1; 4096]);
        file.read_exact_at(&mut page, 3 * 4096).unwrap();
        assert_eq!(page, [7; 4096]);
        // Reading a hole through the file makes no page.
        let before = memfd::stored_bytes(&file).unwrap();
        file.read_exact_at(&mut page, 100 * 4096).unwrap();
        assert_eq!(memfd::stored_bytes(&file).unwrap(), before);
        assert_eq!(alias.place(100 * 4096, &[2; 4096]), (4096, None));
    }

    /// What [`Watch::refuse`] stands on: the page of zeros of the test below does not come.
    #[test]
    fn a_touch_that_was_refused_makes_no_page() {
        let device = Device::open().unwrap();
        let file = memfd::create("test", LEN).unwrap();
        let mut slot = Slot::reserve(LEN).unwrap();
        slot.map([Piece { bytes: 0..LEN, content: Content::Private(file.as_fd()) }]).unwrap();
        let watch = device.watch().unwrap();
        watch.register(&slot, &(0..LEN)).unwrap();
        file.write_all_at(&[5; 4096], 4096).unwrap();
        let (at, there) = (slot.start().0, slot.start().0 + 4096);
        // SAFETY: mapped above, and that page is there.
        assert_eq!(unsafe { (there as *const u8).read_volatile() }, 5);
        let stored = memfd::stored_bytes(&file).unwrap();
        // By the kernel, which is told that there is no page; a thread would be killed.
        let reader = std::thread::spawn(move || {
            let (_reading, mut writing) = io::pipe().unwrap();
            // SAFETY: mapped above, until this thread was joined.
            let page = unsafe { std::slice::from_raw_parts(at as *const u8, 1) };
            io::Write::write(&mut writing, page).map_err(|error| error.raw_os_error())
        });
        while watch.read(|_| {}).unwrap() == 0 {}
        assert!(watch.refuse(slot.start(), usize_of(LEN)).unwrap(), "this process lives");
        assert_eq!(reader.join().unwrap(), Err(Some(libc::EFAULT)));
        drop(watch);
        assert_eq!(memfd::stored_bytes(&file).unwrap(), stored);
        // SAFETY: as above.
        assert_eq!(unsafe { (there as *const u8).read_volatile() }, 5);
    }

    #[test]
    fn the_last_descriptor_to_close_makes_a_page_of_zeros() {
        let device = Device::open().unwrap();
        let file = memfd::create("test", LEN).unwrap();
        let alias = Alias::of(&file, LEN, &device).unwrap();
        let mut slot = Slot::reserve(LEN).unwrap();
        slot.map([Piece { bytes: 0..LEN, content: Content::Private(file.as_fd()) }]).unwrap();
        let watch = device.watch().unwrap();
        watch.register(&slot, &(0..LEN)).unwrap();
        let at = slot.start().0;
        // SAFETY: mapped above, until this thread was joined.
        let reader = std::thread::spawn(move || unsafe { (at as *const u8).read_volatile() });
        while watch.read(|_| {}).unwrap() == 0 {}
        drop(watch);
        assert_eq!(reader.join().unwrap(), 0);
        assert_eq!(alias.place(0, &[9; 4096]), (0, Some(Stop::Exists)), "the zeros are in the file, for all to see");
    }
}
