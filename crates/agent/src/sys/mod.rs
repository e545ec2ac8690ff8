//! What takes `unsafe`: requests to the kernel that have no safe wrapper. Each block is argued.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` (linux/random.h).
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Of type `sa_family_t` and `short`, as the structures have them (linux/socket.h, linux/if.h).
const AF_INET: libc::sa_family_t = 2;
const IFF_UP: libc::c_short = 1;

/// `struct rand_pool_info` with its bytes behind it.
#[repr(C)]
struct Pool {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; 32],
}

/// Mixes a seed into the kernel's random numbers, credits it, and makes the generator start anew from there.
pub(crate) fn reseed(urandom: &impl AsFd, seed: &[u8; 32]) -> io::Result<()> {
    let pool = Pool { entropy_bits: 256, bytes: 32, data: *seed };
    // SAFETY: the request reads a `rand_pool_info` and as many bytes behind it as that says, 32, all of them in `pool`.
    check(unsafe { libc::ioctl(urandom.as_fd().as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
    // SAFETY: the request has no argument.
    check(unsafe { libc::ioctl(urandom.as_fd().as_raw_fd(), RNDRESEEDCRNG, 0) })
}

/// Gives the program a session of its own, with its standard input as its terminal.
pub(crate) fn with_terminal(command: &mut Command) {
    let take_terminal = || {
        // SAFETY: both calls have no memory among their arguments; they are safe to make between fork and exec.
        check(unsafe { libc::setsid() })?;
        // SAFETY: as above.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })
    };
    // SAFETY: the closure makes system calls alone: it neither allocates nor takes a lock.
    unsafe { command.pre_exec(take_terminal) };
}

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
pub(crate) fn interface_up(socket: &impl AsFd, name: &str) -> io::Result<()> {
    let mut request = request(name);
    // SAFETY: the request reads and writes one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request) })?;
    // SAFETY: SIOCGIFFLAGS has just written this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | IFF_UP;
    // SAFETY: the request reads one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) })
}

/// Gives a network interface its address.
pub(crate) fn interface_address(socket: &impl AsFd, name: &str, address: [u8; 4], prefix: u8) -> io::Result<()> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0).to_be_bytes();
    for (number, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        let mut request = request(name);
        request.ifr_ifru.ifru_addr = socket_address(value);
        // SAFETY: the request reads one `ifreq`.
        check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), number as _, &raw const request) })?;
    }
    Ok(())
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

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
