//! One stream: a socket of the host's, a port of the guest's, and what is on its way between them.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::num::Wrapping;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::packet::{Header, Op};
use super::{BadQueue, GUEST_CID, HOST_CID};

/// What the guest may send before the host has taken it, and how much of the host's is read ahead.
const BUFFER: usize = BUFFER_WORD as usize;
const BUFFER_WORD: u32 = 64 << 10;
/// The guest is told of new room when so much of it is new.
const CREDIT_STEP: u32 = BUFFER_WORD / 2;
const SHUTDOWN_SEND: u32 = 2;
const SHUTDOWN_BOTH: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not been asked yet.
    New,
    Asked,
    Open,
    /// The guest is still to be told that this is over.
    Broken,
    /// Nobody is.
    Over,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) guest_port: u32,
    socket: Arc<OwnedFd>,
    phase: Phase,
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
    /// The host's end has said its last word.
    is_host_done: bool,
    has_told_guest: bool,
    /// The guest has said that it neither sends nor receives any more.
    is_guest_done: bool,
    /// The guest's room, and what it has taken of all that was sent.
    guest_room: u32,
    guest_taken: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// What the host has taken of all that the guest sent, and what of that the guest has been told.
    taken: Wrapping<u32>,
    told_taken: Wrapping<u32>,
    owes_credit: bool,
}

impl Stream {
    pub(super) fn new(guest_port: u32, socket: OwnedFd) -> Self {
        Self {
            guest_port,
            socket: Arc::new(socket),
            phase: Phase::New,
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            is_host_done: false,
            has_told_guest: false,
            is_guest_done: false,
            guest_room: 0,
            guest_taken: Wrapping(0),
            sent: Wrapping(0),
            taken: Wrapping(0),
            told_taken: Wrapping(0),
            owes_credit: false,
        }
    }

    /// What its socket is looked at for. Nothing, while there is nothing to be done with it.
    pub(super) fn interest(&self) -> Option<(Arc<OwnedFd>, PollFlags)> {
        let mut interest = PollFlags::empty();
        if !self.is_host_done && self.to_guest.len() < BUFFER {
            interest |= PollFlags::IN;
        }
        if !self.to_host.is_empty() {
            interest |= PollFlags::OUT;
        }
        let is_of_use = !interest.is_empty() && !matches!(self.phase, Phase::Broken | Phase::Over);
        is_of_use.then(|| (Arc::clone(&self.socket), interest))
    }

    /// Moves what can be moved without waiting.
    pub(super) fn serve_socket(&mut self) {
        if matches!(self.phase, Phase::Broken | Phase::Over) {
            return;
        }
        while !self.to_host.is_empty() {
            match rustix::io::write(&self.socket, self.to_host.as_slices().0) {
                Ok(count) => {
                    self.to_host.drain(..count);
                    self.taken += u32::try_from(count).expect("within the buffer");
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return self.phase = Phase::Broken,
            }
        }
        if self.to_host.is_empty() {
            self.to_host.shrink_to(0);
        }
        if self.is_guest_done && self.to_host.is_empty() {
            self.phase = Phase::Broken;
            return;
        }
        let mut buffer = [0; 16 << 10];
        while !self.is_host_done && self.to_guest.len() < BUFFER {
            let room = (BUFFER - self.to_guest.len()).min(buffer.len());
            match rustix::io::read(&self.socket, &mut buffer[..room]) {
                Ok(0) => self.is_host_done = true,
                Ok(count) => self.to_guest.extend(&buffer[..count]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return self.phase = Phase::Broken,
            }
        }
    }

    /// A packet of the guest's. `false` if the guest broke the rules of streams, which ends this one.
    pub(super) fn take(&mut self, packet: &Header, data: &mut impl Read) -> Result<bool, BadQueue> {
        (self.guest_room, self.guest_taken) = (packet.buf_alloc, Wrapping(packet.fwd_cnt));
        match (packet.op, self.phase) {
            (Op::Response, Phase::Asked) => self.phase = Phase::Open,
            (Op::Reset, _) => self.phase = Phase::Over,
            (Op::Data, Phase::Open) => {
                let len = usize::try_from(packet.len).unwrap_or(usize::MAX);
                if len > BUFFER - self.to_host.len().min(BUFFER) {
                    return Ok(false);
                }
                let before = self.to_host.len();
                let there = append(&mut self.to_host, &mut data.take(u64::from(packet.len)))?;
                if there != len {
                    self.to_host.truncate(before);
                    return Ok(false);
                }
            }
            (Op::Shutdown, Phase::Open) => self.is_guest_done |= packet.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH,
            (Op::CreditUpdate, Phase::Open) | (_, Phase::Broken | Phase::Over) => {}
            (Op::CreditRequest, Phase::Open) => self.owes_credit = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether nothing more is to come of it, but perhaps one last packet.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Broken | Phase::Over)
    }

    /// Whether nobody is to be told anything of it any more.
    pub(super) fn is_forgotten(&self) -> bool {
        self.phase == Phase::Over
    }

    fn credit(&self) -> usize {
        let under_way = (self.sent - self.guest_taken).0;
        usize::try_from(self.guest_room.saturating_sub(under_way)).expect("64-bit")
    }

    fn is_credit_due(&self) -> bool {
        self.owes_credit || (self.taken - self.told_taken).0 >= CREDIT_STEP
    }

    fn is_end_due(&self) -> bool {
        self.is_host_done && self.to_guest.is_empty() && !self.has_told_guest
    }

    /// Whether there is something for the guest, and the guest has room for it.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::New | Phase::Broken => true,
            Phase::Asked | Phase::Over => false,
            Phase::Open => self.is_credit_due() || self.is_end_due() || (!self.to_guest.is_empty() && self.credit() > 0),
        }
    }

    /// The next packet for the guest, with at most `room` bytes of data.
    pub(super) fn next_packet(&mut self, port: u32, room: usize) -> Option<(Header, Vec<u8>)> {
        if !self.has_packet() {
            return None;
        }
        let (op, flags, data) = match self.phase {
            Phase::New => {
                self.phase = Phase::Asked;
                (Op::Request, 0, Vec::new())
            }
            Phase::Broken => {
                self.phase = Phase::Over;
                (Op::Reset, 0, Vec::new())
            }
            _ if self.is_credit_due() => (Op::CreditUpdate, 0, Vec::new()),
            _ if self.is_end_due() => {
                self.has_told_guest = true;
                (Op::Shutdown, SHUTDOWN_SEND, Vec::new())
            }
            _ => {
                let count = self.to_guest.len().min(self.credit()).min(room);
                let data: Vec<u8> = self.to_guest.drain(..count).collect();
                if self.to_guest.is_empty() {
                    self.to_guest.shrink_to(0);
                }
                self.sent += u32::try_from(count).expect("within the buffer");
                (Op::Data, 0, data)
            }
        };
        self.owes_credit = false;
        self.told_taken = self.taken;
        let header = Header {
            source_cid: HOST_CID,
            destination_cid: GUEST_CID,
            source_port: port,
            destination_port: self.guest_port,
            len: u32::try_from(data.len()).expect("within the buffer"),
            is_stream: true,
            op,
            flags,
            buf_alloc: BUFFER_WORD,
            fwd_cnt: self.taken.0,
        };
        Some((header, data))
    }
}

/// Appends all that there is to a queue of bytes; says how much that was.
fn append(queue: &mut VecDeque<u8>, data: &mut impl Read) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let mut done = 0;
    loop {
        match data.read(&mut buffer)? {
            0 => return Ok(done),
            count => {
                queue.extend(&buffer[..count]);
                done += count;
            }
        }
    }
}
