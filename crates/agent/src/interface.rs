//! Network interfaces get addresses: the guest's by its agent, the host's end by the node. IPv4, over any socket of that family.

use std::io;
use std::os::fd::AsFd;

use crate::sys;

/// Switches an interface on.
///
/// # Errors
/// As the kernel says, `ENODEV` if there is none of that name.
pub fn set_up(socket: &impl AsFd, name: &str) -> io::Result<()> {
    sys::interface::set_up(socket, name)
}

/// Gives an interface its address, instead of those that it had, and of the routes that came with them.
///
/// # Errors
/// As the kernel says, `ENODEV` if there is none of that name.
pub fn set_address(socket: &impl AsFd, name: &str, address: [u8; 4], prefix: u8) -> io::Result<()> {
    sys::interface::set_address(socket, name, address, prefix)
}

/// Sends what is not of a network to a gateway.
///
/// # Errors
/// As the kernel says, `ENETUNREACH` if the gateway is not of a network that an interface is on.
pub fn set_default_route(socket: &impl AsFd, gateway: [u8; 4]) -> io::Result<()> {
    sys::interface::default_route(socket, gateway)
}
