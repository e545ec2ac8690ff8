//! What takes `unsafe`: requests to the kernel that have no safe wrapper. Each block is argued.
#![allow(unsafe_code)]

#[cfg(feature = "guest")]
mod guest;
pub(crate) mod interface;

#[cfg(feature = "guest")]
pub(crate) use guest::{reseed, with_terminal};

use std::io;

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
