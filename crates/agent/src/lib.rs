//! The program inside a Linux guest. May not: use anything but types and the OS.
//!
//! | module | holds |
//! |---|---|
//! | [`interface`] | network interfaces get addresses, here and on the host |
//! | [`protocol`] | what it and its host say to each other over vsock |
//! | `guest` | the program: the first process, its sessions, what it does after a fork (feature `guest`) |
#![deny(unsafe_code)]

pub mod interface;
pub mod protocol;

#[cfg(feature = "guest")]
pub mod guest;
mod sys;
