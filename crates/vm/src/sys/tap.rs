//! Tap devices: the host's end of a machine's network card. One lives for as long as somebody has its descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `IFNAMSIZ` without the zero.
const NAME_MAX: usize = 15;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// `TUNSETIFF`, `TUNSETVNETHDRSZ` (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54CA;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54D8;

/// See the module.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Makes a device of this name, which is down. Its frames have virtio's header before them, and reading and writing them does
    /// not wait.
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
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        // SAFETY: the request reads and writes one `ifreq`.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        let header = libc::c_int::try_from(crate::device::virtio::net::HEADER).expect("twelve");
        // SAFETY: the request reads one `int`.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) })?;
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
