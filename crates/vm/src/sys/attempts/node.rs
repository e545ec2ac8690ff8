//! What the tests do at the node's side, and rustix has not.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::thread::UnshareFlags;

use super::{MARK, PAGE_SIZE, at_mut, call, int};

fn io_error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// A shared memory segment of System V that any user may read, full of [`MARK`]; it goes when it is dropped.
#[derive(Debug)]
pub(crate) struct Segment {
    id: usize,
}

impl Segment {
    pub(crate) fn new(key: u64) -> io::Result<Self> {
        let key = usize::try_from(key).map_err(io::Error::other)?;
        let id = call(libc::SYS_shmget, [key, PAGE_SIZE, int(libc::IPC_CREAT | libc::IPC_EXCL | 0o666)]).map_err(io_error)?;
        let segment = Self { id };
        let address = call(libc::SYS_shmat, [id, 0, 0]).map_err(io_error)?;
        super::poke(address, &[MARK; PAGE_SIZE]).map_err(io_error)?;
        call(libc::SYS_shmdt, [address]).map_err(io_error)?;
        Ok(segment)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        call(libc::SYS_shmctl, [self.id, int(libc::IPC_RMID), 0]).map(drop).unwrap_or_default();
    }
}

/// A userfaultfd of this process over a page that nothing else uses.
#[derive(Debug)]
pub(crate) struct Watched {
    page: NonNull<libc::c_void>,
}

impl Watched {
    /// With `device`, `/dev/userfaultfd`. The descriptor has said hello and watches the page if that is asked for.
    pub(crate) fn new(device: &File, is_ready: bool) -> io::Result<(Self, OwnedFd)> {
        const NEW: usize = 0xAA00;
        const HELLO: usize = 0xC018_AA3F;
        const REGISTER: usize = 0xC020_AA00;
        const MISSING: u64 = 1;
        let number = call(libc::SYS_ioctl, [int(device.as_raw_fd()), NEW, int(libc::O_CLOEXEC)]).map_err(io_error)?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        let descriptor = unsafe { OwnedFd::from_raw_fd(i32::try_from(number).expect("a descriptor")) };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let page = super::memory::map(0, PAGE_SIZE, access, 0).map_err(io_error)?;
        let watched = Self { page: NonNull::new(page as *mut libc::c_void).ok_or(io::ErrorKind::OutOfMemory)? };
        if is_ready {
            let mut hello = [0xAA_u64, 0, 0];
            call(libc::SYS_ioctl, [number, HELLO, at_mut(&mut hello)]).map_err(io_error)?;
            let mut range = [page as u64, PAGE_SIZE as u64, MISSING, 0];
            call(libc::SYS_ioctl, [number, REGISTER, at_mut(&mut range)]).map_err(io_error)?;
        }
        Ok((watched, descriptor))
    }

    pub(crate) fn address(&self) -> u64 {
        self.page.as_ptr() as u64
    }

    /// Whether somebody has filled the page with [`MARK`].
    pub(crate) fn is_marked(&self) -> bool {
        // By way of the kernel, which faults as any reader would; so only a page that is there is looked at.
        let mut present = 0_u8;
        let page = self.page.as_ptr() as usize;
        call(libc::SYS_mincore, [page, PAGE_SIZE, at_mut(&mut present)]) == Ok(0)
            && present & 1 == 1
            && super::peek(page) == Ok(MARK)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        call(libc::SYS_munmap, [self.page.as_ptr() as usize, PAGE_SIZE]).map(drop).unwrap_or_default();
    }
}

/// Gives the calling thread, and those that it starts, a host name of its own: no test changes the host's.
pub(crate) fn own_hostname() -> io::Result<()> {
    crate::sys::process::unshare(UnshareFlags::NEWUTS)
}

/// Lets the other end of a terminal be opened.
pub(crate) fn unlock_terminal(terminal: &File) -> io::Result<()> {
    const TIOCSPTLCK: usize = 0x4004_5431;
    let unlocked: libc::c_int = 0;
    call(libc::SYS_ioctl, [int(terminal.as_raw_fd()), TIOCSPTLCK, super::at(&unlocked)]).map(drop).map_err(io_error)
}

/// Whether this kernel takes the system calls of 32-bit programs.
pub(crate) fn has_calls_of_32_bits() -> bool {
    let nothing = super::Scene { given: Vec::new(), number: 0, page: 0, vm: -1, vcpu: -1 };
    super::process::in_child(|| super::kernel::call_of_32_bits(&nothing)).is_ok()
}
