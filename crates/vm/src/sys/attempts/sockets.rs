//! Attempts at sockets.

use super::{MARK, NO_EFFECT, Outcome, Scene, at, at_mut, call, does, effect, int, opens};

fn socket(family: libc::c_int, kind: libc::c_int) -> Result<usize, i32> {
    call(libc::SYS_socket, [int(family), int(kind), 0])
}

fn makes(family: libc::c_int, kind: libc::c_int) -> Outcome {
    opens(libc::SYS_socket, [int(family), int(kind), 0])
}

pub(crate) fn unix(_: &Scene) -> Outcome {
    makes(libc::AF_UNIX, libc::SOCK_STREAM)
}

pub(crate) fn inet(_: &Scene) -> Outcome {
    makes(libc::AF_INET, libc::SOCK_STREAM)
}

pub(crate) fn inet6(_: &Scene) -> Outcome {
    makes(libc::AF_INET6, libc::SOCK_DGRAM)
}

pub(crate) fn netlink(_: &Scene) -> Outcome {
    makes(libc::AF_NETLINK, libc::SOCK_RAW)
}

pub(crate) fn vsock(_: &Scene) -> Outcome {
    makes(libc::AF_VSOCK, libc::SOCK_STREAM)
}

pub(crate) fn socketpair(_: &Scene) -> Outcome {
    let mut ends = [-1_i32; 2];
    does(libc::SYS_socketpair, [int(libc::AF_UNIX), int(libc::SOCK_STREAM), 0, at_mut(&mut ends)])?;
    effect(ends[0] >= 0 && ends[1] >= 0)
}

/// The port that is the number, on this host.
fn loopback(scene: &Scene) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&libc::AF_INET.to_le_bytes()[..2]);
    address[2..4].copy_from_slice(&u16::try_from(scene.number).unwrap_or(0).to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    address
}

/// The abstract name that is the number.
fn abstract_name(scene: &Scene) -> Vec<u8> {
    let mut address = libc::AF_UNIX.to_le_bytes()[..2].to_vec();
    address.push(0);
    address.extend(abstract_name_of(scene.number));
    address
}

/// What a socket of the tests is called.
pub(crate) fn abstract_name_of(number: u64) -> Vec<u8> {
    format!("farfork-escape-{number}").into_bytes()
}

pub(crate) fn connect_tcp(scene: &Scene) -> Outcome {
    let address = loopback(scene);
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    does(libc::SYS_connect, [socket, at(&address), address.len()])
}

pub(crate) fn listen_tcp(_: &Scene) -> Outcome {
    let mut address = [0_u8; 16];
    address[..2].copy_from_slice(&libc::AF_INET.to_le_bytes()[..2]);
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    // Port 0 would be the kernel's choice, which is made at `listen` and seen there too.
    address[2..4].copy_from_slice(&44_321_u16.to_be_bytes());
    does(libc::SYS_bind, [socket, at(&address), address.len()])?;
    does(libc::SYS_listen, [socket, 1])
}

pub(crate) fn send_udp(scene: &Scene) -> Outcome {
    let address = loopback(scene);
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let sent = call(libc::SYS_sendto, [socket, at(&MARK), 1, 0, at(&address), address.len()])?;
    effect(sent == 1)
}

pub(crate) fn connect_abstract(scene: &Scene) -> Outcome {
    let address = abstract_name(scene);
    let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
    does(libc::SYS_connect, [socket, at(address.as_slice()), address.len()])
}

/// A UDP socket of the node's is pointed at the port that is the number.
pub(crate) fn connect_given(scene: &Scene) -> Outcome {
    let address = loopback(scene);
    does(libc::SYS_connect, [scene.gift(), at(&address), address.len()])
}

/// A connection to a listener of the node's, which is given, is taken.
pub(crate) fn accept(scene: &Scene) -> Outcome {
    opens(libc::SYS_accept4, [scene.gift(), 0, 0, 0])
}

pub(crate) fn setsockopt(scene: &Scene) -> Outcome {
    let size: libc::c_int = 4096;
    let arguments = [scene.gift(), int(libc::SOL_SOCKET), int(libc::SO_SNDBUF), at(&size), size_of_val(&size)];
    does(libc::SYS_setsockopt, arguments)
}

pub(crate) fn shutdown(scene: &Scene) -> Outcome {
    does(libc::SYS_shutdown, [scene.gift(), int(libc::SHUT_RDWR)])
}

pub(crate) fn recvfrom(scene: &Scene) -> Outcome {
    let mut byte = 0_u8;
    does(libc::SYS_recvfrom, [scene.gift(), at_mut(&mut byte), 1, int(libc::MSG_DONTWAIT), 0, 0])?;
    effect(byte == MARK)
}

pub(crate) fn sendto(scene: &Scene) -> Outcome {
    effect(call(libc::SYS_sendto, [scene.gift(), at(&MARK), 1, 0, 0, 0])? == 1)
}

/// What the node has sent through a given socket: how the control thread takes orders.
pub(crate) fn recvmsg(scene: &Scene) -> Outcome {
    let mut byte = 0_u8;
    let piece = [at_mut(&mut byte), 1];
    let mut message = [0, 0, at(&piece), 1, 0, 0, 0];
    does(libc::SYS_recvmsg, [scene.gift(), at_mut(&mut message), int(libc::MSG_DONTWAIT)])?;
    effect(byte == MARK)
}

pub(crate) fn read(scene: &Scene) -> Outcome {
    let mut byte = 0_u8;
    does(libc::SYS_read, [scene.gift(), at_mut(&mut byte), 1])?;
    effect(byte == MARK)
}

/// How the control thread answers.
pub(crate) fn sendmsg(scene: &Scene) -> Outcome {
    let piece = [at(&MARK), 1];
    let message = [0, 0, at(&piece), 1, 0, 0, 0];
    effect(call(libc::SYS_sendmsg, [scene.gift(), at(&message), 0])? == 1)
}

pub(crate) fn poll(scene: &Scene) -> Outcome {
    let Ok(descriptor) = i32::try_from(scene.gift()) else { return Err(NO_EFFECT) };
    // Descriptor; events and what was found, 16 bits each.
    let mut polled = [descriptor, i32::from(libc::POLLIN)];
    effect(call(libc::SYS_poll, [at_mut(&mut polled), 1, 0])? == 1)
}
