//! What only the first process of a guest asks for.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::check;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` (linux/random.h).
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

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
