//! A network card (virtio 1.2, section 5.1): frames between the guest and a tap device that the node hands over. Without one the
//! link is down. A child has its own or none: frames under way belong to nobody.
//!
//! The tap is read and written by the control thread alone; between it and the rings a few frames wait. What finds no room is lost,
//! as on any network.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use virtio_queue::Queue;

use super::{BadQueue, VirtioDevice, each_chain, reader, used_len, writer};
use crate::device::BadDeviceState;
use crate::sys::guest_memory::Ram;

pub(crate) const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// A frame of 64 KiB, which a tap without offloads never has, and virtio's header.
const FRAME_MAX: usize = (64 << 10) + HEADER;
/// The shortest frame: two addresses and a type.
const FRAME_MIN: usize = HEADER + 14;
/// virtio's header, which is before each frame in the guest's buffers, and not on the tap.
pub(crate) const HEADER: usize = 12;
/// Frames that wait, each way.
const WAITING_MAX: usize = 64;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Net {
    /// Not blocking, one frame a call.
    tap: Option<Arc<OwnedFd>>,
    mac: [u8; 6],
    to_guest: VecDeque<Vec<u8>>,
    to_host: VecDeque<Vec<u8>>,
}

impl Net {
    /// A card without a link.
    pub(crate) fn new() -> Self {
        // Locally administered; each machine has a network of its own.
        let mac = [0x02, b'f', b'a', b'r', b'f', b'k'];
        Self { tap: None, mac, to_guest: VecDeque::new(), to_host: VecDeque::new() }
    }

    /// Plugs it in.
    pub(crate) fn plug(&mut self, tap: OwnedFd) {
        self.reset();
        self.tap = Some(Arc::new(tap));
    }

    /// The tap, if there is room for what may come from it.
    pub(crate) fn interest(&self) -> Option<Arc<OwnedFd>> {
        self.tap.clone().filter(|_| self.to_guest.len() < WAITING_MAX)
    }

    /// Moves what can be moved between the tap and the frames that wait. The control thread's part. `false` if the tap is gone: somebody
    /// has removed the device.
    pub(crate) fn serve_tap(&mut self) -> bool {
        let Some(tap) = &self.tap else {
            self.to_host.clear();
            return true;
        };
        for frame in self.to_host.drain(..) {
            // A tap that is full, or gone, loses it.
            rustix::io::write(tap, &frame).unwrap_or_default();
        }
        let mut buffer = Vec::new();
        while self.to_guest.len() < WAITING_MAX {
            buffer.resize(FRAME_MAX, 0);
            match rustix::io::read(tap, &mut buffer[HEADER..]) {
                Ok(len) if len > 0 => self.to_guest.push_back([&[0; HEADER][..], &buffer[HEADER..HEADER + len]].concat()),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Ok(_) | Err(_) => {
                    self.tap = None;
                    return false;
                }
            }
        }
        true
    }

    /// Whether something waits for the guest.
    pub(crate) fn has_frames(&self) -> bool {
        !self.to_guest.is_empty()
    }
}

impl VirtioDevice for Net {
    const NAME: &'static str = "virtio-net";
    const ID: u32 = 1;
    const QUEUES: &'static [u16] = &[256, 256];
    const FEATURES: u64 = F_MAC | F_STATUS;

    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.extend(u16::from(self.tap.is_some()).to_le_bytes());
        config
    }

    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue> {
        let chains = &mut queues[usize::from(queue)];
        match queue {
            RECEIVE => each_chain(chains, ram, |chain| {
                let Some(mut frame) = self.to_guest.pop_front() else { return Ok(None) };
                let mut room = writer(ram, &chain)?;
                if room.available_bytes() < frame.len() {
                    return Ok(Some(0));
                }
                // One buffer holds the frame.
                frame[10..HEADER].copy_from_slice(&1u16.to_le_bytes());
                room.write_all(&frame)?;
                Ok(Some(used_len(frame.len())))
            }),
            TRANSMIT => each_chain(chains, ram, |chain| {
                let mut sent = reader(ram, &chain)?;
                let len = sent.available_bytes();
                if (FRAME_MIN..=FRAME_MAX).contains(&len) && self.to_host.len() < WAITING_MAX {
                    // No offload was offered: whatever the header asks for is not done.
                    sent.read_exact(&mut [0; HEADER])?;
                    let mut frame = vec![0; len - HEADER];
                    sent.read_exact(&mut frame)?;
                    self.to_host.push_back(frame);
                }
                Ok(Some(0))
            }),
            _ => Ok(false),
        }
    }

    fn reset(&mut self) {
        self.to_guest.clear();
        self.to_host.clear();
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), BadDeviceState> {
        Ok(())
    }
}
