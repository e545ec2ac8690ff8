//! Requests about network interfaces.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// Of type `sa_family_t` and `short`, as the structures have them (linux/socket.h, linux/if.h).
const AF_INET: libc::sa_family_t = 2;
const IFF_UP: libc::c_short = 1;

/// An IPv4 address as `ifreq` has it.
fn socket_address(address: [u8; 4]) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data[2..6].iter_mut().zip(address) {
        *place = byte.cast_signed();
    }
    libc::sockaddr { sa_family: AF_INET, sa_data: data }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: a structure of numbers and a union of numbers, for which all zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request
}

/// Switches a network interface on.
pub(crate) fn set_up(socket: &impl AsFd, name: &str) -> io::Result<()> {
    let mut request = request(name);
    // SAFETY: the request reads and writes one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) })?;
    // SAFETY: SIOCGIFFLAGS has just written this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | IFF_UP;
    // SAFETY: the request reads one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) })
}

/// Gives a network interface its address. Those that it had go first, and their routes with them, also if one is the same.
pub(crate) fn set_address(socket: &impl AsFd, name: &str, address: [u8; 4], prefix: u8) -> io::Result<()> {
    let mut before = request(name);
    // SAFETY: the request reads and writes one `ifreq`. It says which address is the first, until there is none.
    while check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCGIFADDR as _, &raw mut before) }).is_ok() {
        change(socket, name, libc::SIOCSIFADDR, [0; 4])?;
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0).to_be_bytes();
    change(socket, name, libc::SIOCSIFADDR, address)?;
    change(socket, name, libc::SIOCSIFNETMASK, mask)
}

fn change(socket: &impl AsFd, name: &str, number: libc::Ioctl, value: [u8; 4]) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_addr = socket_address(value);
    // SAFETY: the request reads one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), number, &raw const request) })
}

/// Sends what is not of a network to a gateway.
pub(crate) fn default_route(socket: &impl AsFd, gateway: [u8; 4]) -> io::Result<()> {
    // SAFETY: a structure of numbers and pointers, for which all zeros are a value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address([0; 4]);
    route.rt_genmask = socket_address([0; 4]);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the request reads one `rtentry`, whose pointer to a device name is null, which means none.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCADDRT as _, &raw const route) })
}
