//! A UDP socket that receives and sends batches.

use std::array;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

/// What one message of a batch can hold: the kernel's most, for one datagram or several that it has put together.
const MESSAGE_BYTES: usize = 1 << 16;
/// Half a second of 128 Mbit/s, 60 ms of 1 Gbit/s.
const BUFFER_BYTES: usize = 8 << 20;
/// How long the relay waits for the kernel to take what it sends, before it drops it as a switch would.
const PATIENCE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

/// Room for a batch, used again and again.
pub(super) struct Inbox {
    bytes: Vec<u8>,
    metas: [RecvMeta; BATCH_SIZE],
}

impl Socket {
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        // Past the limit for all only root may go; others get as much as there is.
        if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES)?;
        }
        if sockopt::set_socket_send_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
            sockopt::set_socket_send_buffer_size(&socket, BUFFER_BYTES)?;
        }
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self { socket, state })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The number of messages that came, without waiting.
    pub(super) fn receive(&self, inbox: &mut Inbox) -> usize {
        let mut rooms = inbox.bytes.chunks_exact_mut(MESSAGE_BYTES);
        let mut slices: [_; BATCH_SIZE] = array::from_fn(|_| IoSliceMut::new(rooms.next().expect("room for each message")));
        // An error is either that there is nothing, or one that an earlier datagram has met on its way, which is its loss.
        self.state.recv(UdpSockRef::from(&self.socket), &mut slices, &mut inbox.metas).unwrap_or(0)
    }

    /// Sends datagrams of `stride` bytes, of which the last may be shorter, and says what the kernel has taken.
    pub(super) fn send(&self, transmit: &Transmit<'_>, stride: usize) -> Sent {
        let mut sent = Sent::default();
        let send = |contents| self.send_batch(&Transmit { contents, ..transmit.clone() });
        for batch in pieces(transmit.contents.len(), stride.saturating_mul(self.state.max_gso_segments())) {
            let batch = &transmit.contents[batch];
            match send(batch) {
                Ok(()) => sent.add(batch, stride),
                // The device cannot cut it up, or something is too long: each goes for itself.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock && batch.len() > stride => {
                    for datagram in pieces(batch.len(), stride) {
                        let datagram = &batch[datagram];
                        if send(datagram).is_ok() {
                            sent.add(datagram, stride);
                        }
                    }
                }
                Err(_) => {}
            }
        }
        sent
    }

    fn send_batch(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let send = || self.state.try_send(UdpSockRef::from(&self.socket), transmit);
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let timeout = Timespec::try_from(PATIENCE).expect("short");
                poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout))?;
                send()
            }
            sent => sent,
        }
    }
}

/// What the kernel has taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
}

impl Sent {
    fn add(&mut self, bytes: &[u8], stride: usize) {
        self.datagrams += count_of(bytes.len(), stride);
        self.bytes += bytes_of(bytes.len());
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; MESSAGE_BYTES * BATCH_SIZE], metas: [RecvMeta::default(); BATCH_SIZE] }
    }

    /// The first `count` messages, each of one datagram or several of the same length, of which the last may be shorter.
    pub(super) fn messages(&mut self, count: usize) -> impl Iterator<Item = (RecvMeta, &mut [u8])> {
        let rooms = self.bytes.chunks_exact_mut(MESSAGE_BYTES);
        self.metas.iter().zip(rooms).take(count).map(|(meta, room)| (*meta, &mut room[..meta.len]))
    }
}

/// Where the datagrams of a message lie, or batches of them. An empty message is one empty datagram.
pub(super) fn pieces(length: usize, stride: usize) -> impl Iterator<Item = Range<usize>> {
    let stride = stride.max(1);
    (0..length.div_ceil(stride).max(1)).map(move |index| index * stride..length.min((index + 1) * stride))
}

/// How many datagrams a message of `length` bytes is.
pub(super) fn count_of(length: usize, stride: usize) -> u64 {
    bytes_of(length.div_ceil(stride.max(1)).max(1))
}

pub(super) fn bytes_of(length: usize) -> u64 {
    u64::try_from(length).expect("a length fits into 64 bits")
}
