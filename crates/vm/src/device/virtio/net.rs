//! A network card (virtio 1.2, section 5.1): frames between the guest and a tap device that the node hands over. Without one the
//! link is down. A child has its own or none: frames under way belong to nobody.

use std::fs::File;
use std::io::{Read, Write};

use virtio_queue::Queue;

use super::{BadQueue, VirtioDevice, each_chain, reader, used_len, writer};
use crate::device::BadDeviceState;
use crate::sys::guest_memory::Ram;

pub(crate) const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// A frame of 64 KiB, which a tap without offloads never has, and virtio's header.
const FRAME_MAX: usize = (64 << 10) + HEADER;
/// The header that is before each frame, also on the tap (`IFF_VNET_HDR`).
pub(crate) const HEADER: usize = 12;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Net {
    /// Not blocking, one frame a call.
    pub(crate) tap: Option<File>,
    mac: [u8; 6],
    buffer: Vec<u8>,
}

impl Net {
    /// A card without a link.
    pub(crate) fn new() -> Self {
        // Locally administered; each machine has a network of its own.
        Self { tap: None, mac: [0x02, b'f', b'a', b'r', b'f', b'k'], buffer: Vec::new() }
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
        self.buffer.resize(FRAME_MAX, 0);
        let Self { tap, buffer, .. } = self;
        let chains = &mut queues[usize::from(queue)];
        let used = match queue {
            RECEIVE => each_chain(chains, ram, |chain| {
                let mut room = writer(ram, &chain)?;
                // No frame, or no tap: the buffer waits.
                let Some(len) = tap.as_mut().and_then(|tap| tap.read(buffer).ok()).filter(|len| *len >= HEADER) else {
                    return Ok(None);
                };
                if room.available_bytes() < len {
                    // Lost, as on any network.
                    return Ok(Some(0));
                }
                // One buffer holds the frame.
                buffer[10..HEADER].copy_from_slice(&1u16.to_le_bytes());
                room.write_all(&buffer[..len])?;
                Ok(Some(used_len(len)))
            }),
            TRANSMIT => each_chain(chains, ram, |chain| {
                let mut frame = reader(ram, &chain)?;
                let len = frame.available_bytes();
                if (HEADER + 14..=FRAME_MAX).contains(&len) {
                    frame.read_exact(&mut buffer[..len])?;
                    // No offload was offered: whatever the header asks for is not done.
                    buffer[..HEADER].fill(0);
                    // A frame that a full or missing tap does not take is lost, as on any network.
                    tap.as_mut().map_or(Ok(0), |tap| tap.write(&buffer[..len])).unwrap_or_default();
                }
                Ok(Some(0))
            }),
            _ => Ok(false),
        };
        self.buffer = Vec::new();
        used
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), BadDeviceState> {
        Ok(())
    }
}
