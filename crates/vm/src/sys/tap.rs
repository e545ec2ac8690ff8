//! Tap devices: the host's end of a machine's network card. One lives for as long as somebody has its descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `IFNAMSIZ` without the zero.
const NAME_MAX: usize = 15;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
/// `TUNSETIFF` (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54CA;

/// See the module.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes a device of this name, which is down. A frame is read or written by each call, bare: no header of its own with which a
    /// worker that was taken over could ask anything of the host's kernel. It does not wait.
    ///
    /// # Errors
    /// `EBUSY` if a device of this name is in use; `EPERM` without `CAP_NET_ADMIN`; `ENOENT` without `/dev/net/tun`.
    pub fn create(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open("/dev/net/tun", flags, rustix::fs::Mode::empty())?);
        // SAFETY: a structure of numbers and a union of numbers, for which all zeros are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI;
        // SAFETY: the request reads and writes one `ifreq`.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        Ok(Self(file))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
