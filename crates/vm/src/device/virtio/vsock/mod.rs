//! vsock (virtio 1.2, section 5.10): byte streams from the host to ports of the guest.
//!
//! The host's end of a stream is a socket that the node hands over, already connected; this device has no name in any file
//! system, and the guest cannot call out: whoever asks for a port of the host's is refused.
//!
//! ```text
//! socket ──read──▶ to_guest ──▶ receive queue ──▶ guest
//! socket ◀─write── to_host  ◀── transmit queue ◀── guest
//!    └── by the control thread ──┘ └── by whoever holds the device; no system calls ──┘
//! ```
//!
//! Both buffers are bounded by the credit that the two sides announce. Streams are not part of an image: a child's driver is
//! told that its transport was reset, which ends those that it inherited, and it listens on where its parent listened.

mod packet;
mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::PollFlags;
use virtio_queue::Queue;

use super::{BadQueue, VirtioDevice, each_chain, reader, used_len, writer};
use crate::device::BadDeviceState;
use crate::sys::guest_memory::Ram;
use packet::{HEADER_LEN, Header, Op};
use stream::Stream;

pub(crate) const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
pub(crate) const EVENT: u16 = 2;
/// The host's address, and every guest's: each has a network of its own.
const HOST_CID: u64 = 2;
const GUEST_CID: u64 = 3;
/// The most streams at a time.
pub const STREAMS_MAX: usize = 64;
/// Refusals that the guest has made no room for; more are forgotten.
const REFUSALS_MAX: usize = 64;
/// Ports of the host's ends: above what anybody names.
const FIRST_PORT: u32 = 1 << 30;
const EVENT_TRANSPORT_RESET: u32 = 0;
/// The longest packet that is made for the guest, less its header.
const PACKET_MAX: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Vsock {
    /// By the host's port.
    streams: BTreeMap<u32, Stream>,
    /// Streams that ended while a vCPU held the device. Their sockets are the control thread's to close: a vCPU's makes no system
    /// calls.
    ended: Vec<Stream>,
    next_port: u32,
    refusals: VecDeque<Header>,
    /// Whether the guest knows that the streams of its parent are gone.
    reset: ResetNews,
    /// The stream that was served last, so that each has its turn.
    last_served: u32,
}

/// The news for a child's driver that its transport was reset. While it works on that it ends every stream that it has, new ones
/// too: none is begun before it gives the buffer back that the news came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetNews {
    Known,
    Owed,
    Told,
}

impl Vsock {
    pub(crate) fn new() -> Self {
        let (streams, ended, refusals) = (BTreeMap::new(), Vec::new(), VecDeque::new());
        Self { streams, ended, next_port: FIRST_PORT, refusals, reset: ResetNews::Known, last_served: 0 }
    }

    /// Connects a socket, which does not block, with a port of the guest's. `false` if there are too many streams already.
    pub(crate) fn connect(&mut self, guest_port: u32, socket: OwnedFd) -> bool {
        if self.streams.len() >= STREAMS_MAX {
            return false;
        }
        while self.streams.contains_key(&self.next_port) {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        }
        self.streams.insert(self.next_port, Stream::new(guest_port, socket));
        self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
        true
    }

    /// The sockets to look at, and for what.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (Arc<OwnedFd>, PollFlags)> {
        self.streams.values().filter_map(Stream::interest)
    }

    /// Moves what can be moved between sockets and buffers. The control thread's part.
    pub(crate) fn serve_sockets(&mut self) {
        self.ended.clear();
        self.streams.values_mut().for_each(Stream::serve_socket);
        // Whatever the guest does: nobody waits for a socket whose stream is over.
        self.streams.retain(|_, stream| !stream.is_forgotten());
    }

    /// Whether there is something for the guest.
    pub(crate) fn has_packets(&self) -> bool {
        if self.reset != ResetNews::Known {
            return false;
        }
        !self.refusals.is_empty() || self.streams.values().any(|stream| stream.is_over() || stream.has_packet())
    }

    fn end(&mut self, port: u32) {
        self.ended.extend(self.streams.remove(&port));
    }

    fn refuse(&mut self, packet: &Header) {
        if packet.op != Op::Reset && self.refusals.len() < REFUSALS_MAX {
            let header =
                Header { source_port: packet.destination_port, destination_port: packet.source_port, ..packet.answer() };
            self.refusals.push_back(Header { op: Op::Reset, ..header });
        }
    }

    /// A packet from the guest.
    fn take(&mut self, packet: &Header, data: &mut impl Read) -> Result<(), BadQueue> {
        let is_for_us = packet.is_stream && packet.destination_cid == HOST_CID && packet.source_cid == GUEST_CID;
        let stream = self.streams.get_mut(&packet.destination_port);
        match stream.filter(|stream| is_for_us && stream.guest_port == packet.source_port) {
            None => self.refuse(packet),
            Some(stream) => {
                if !stream.take(packet, data)? {
                    self.end(packet.destination_port);
                    self.refuse(packet);
                }
            }
        }
        Ok(())
    }

    /// The next packet for a guest that has room for so many bytes of data.
    fn next_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        if self.reset != ResetNews::Known {
            return None;
        }
        if let Some(refusal) = self.refusals.pop_front() {
            return Some((refusal, Vec::new()));
        }
        let after = self.streams.range(self.last_served.wrapping_add(1)..).map(|(port, _)| *port);
        let ports: Vec<u32> = after.chain(self.streams.range(..=self.last_served).map(|(port, _)| *port)).collect();
        for port in ports {
            // Listed twice where the last one served had the highest number, and gone the second time.
            let Some(stream) = self.streams.get_mut(&port) else { continue };
            let next = stream.next_packet(port, room);
            if stream.is_over() && next.as_ref().is_none_or(|(header, _)| header.op == Op::Reset) {
                self.end(port);
            }
            if next.is_some() {
                self.last_served = port;
                return next;
            }
        }
        None
    }
}

impl VirtioDevice for Vsock {
    const NAME: &'static str = "virtio-vsock";
    const ID: u32 = 19;
    const QUEUES: &'static [u16] = &[128, 128, 16];
    const FEATURES: u64 = 0;

    fn config(&self) -> Vec<u8> {
        GUEST_CID.to_le_bytes().to_vec()
    }

    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue> {
        let chains = &mut queues[usize::from(queue)];
        match queue {
            TRANSMIT => each_chain(chains, ram, |chain| {
                let mut packet = reader(ram, &chain)?;
                let mut bytes = [0; HEADER_LEN];
                // What is no packet is dropped, as on any network.
                if packet.read_exact(&mut bytes).is_ok()
                    && let Some(header) = Header::decode(&bytes)
                {
                    self.take(&header, &mut packet)?;
                }
                Ok(Some(0))
            }),
            RECEIVE => each_chain(chains, ram, |chain| {
                let mut room = writer(ram, &chain)?;
                let Some(data_room) = room.available_bytes().checked_sub(HEADER_LEN) else { return Ok(Some(0)) };
                let Some((header, data)) = self.next_packet(data_room.min(PACKET_MAX)) else { return Ok(None) };
                room.write_all(&header.encode())?;
                room.write_all(&data)?;
                Ok(Some(used_len(HEADER_LEN + data.len())))
            }),
            EVENT if self.reset == ResetNews::Told => {
                self.reset = ResetNews::Known;
                Ok(false)
            }
            EVENT => each_chain(chains, ram, |chain| {
                if self.reset != ResetNews::Owed {
                    return Ok(None);
                }
                writer(ram, &chain)?.write_all(&EVENT_TRANSPORT_RESET.to_le_bytes())?;
                self.reset = ResetNews::Told;
                Ok(Some(4))
            }),
            _ => Ok(false),
        }
    }

    fn reset(&mut self) {
        self.ended.extend(std::mem::take(&mut self.streams).into_values());
        self.refusals.clear();
        self.reset = ResetNews::Known;
    }

    /// The next port: a child must not take one that its parent has had, since its driver may still keep what became of that
    /// stream, and would answer for it.
    fn save(&self) -> Vec<u8> {
        self.next_port.to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadDeviceState> {
        let port = <[u8; 4]>::try_from(state).map(u32::from_le_bytes).ok().filter(|port| *port >= FIRST_PORT);
        let bad = || BadDeviceState { device: Self::NAME.to_owned(), cause: "its next port is none".to_owned() };
        self.next_port = port.ok_or_else(bad)?;
        self.reset();
        self.reset = ResetNews::Owed;
        Ok(())
    }
}
