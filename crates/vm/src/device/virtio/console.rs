//! A console (virtio 1.2, section 5.3) with one port. Its output goes where the serial port's goes.

use std::collections::VecDeque;
use std::io::{Read, Write};

use virtio_queue::Queue;

use super::{BadQueue, VirtioDevice, each_chain, reader, used_len, writer};
use crate::device::BadDeviceState;
use crate::device::serial::Console;
use crate::sys::guest_memory::Ram;

pub(crate) const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// What was typed and not read yet; more is refused.
const TYPED_MAX: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct VirtioConsole {
    output: Console,
    typed: VecDeque<u8>,
}

impl VirtioConsole {
    pub(crate) fn new(output: Console) -> Self {
        Self { output, typed: VecDeque::new() }
    }
}

impl VirtioDevice for VirtioConsole {
    const NAME: &'static str = "virtio-console";
    const ID: u32 = 3;
    const QUEUES: &'static [u16] = &[64, 64];
    const FEATURES: u64 = 0;

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue> {
        let Self { output, typed } = self;
        let chains = &mut queues[usize::from(queue)];
        match queue {
            RECEIVE => each_chain(chains, ram, |chain| {
                if typed.is_empty() {
                    return Ok(None);
                }
                let mut room = writer(ram, &chain)?;
                let some: Vec<u8> = typed.drain(..typed.len().min(room.available_bytes())).collect();
                room.write_all(&some)?;
                Ok(Some(used_len(some.len())))
            }),
            TRANSMIT => each_chain(chains, ram, |chain| {
                let mut printed = reader(ram, &chain)?;
                let mut buffer = [0; 4096];
                // A chain may name the same page a thousand times: no more of it is looked at than is kept.
                let mut left = Console::CAPACITY_BYTES;
                while left > 0 {
                    let count = printed.read(&mut buffer)?;
                    if count == 0 {
                        break;
                    }
                    output.write_all(&buffer[..count])?;
                    left = left.saturating_sub(count);
                }
                Ok(Some(0))
            }),
            _ => Ok(false),
        }
    }

    fn reset(&mut self) {
        self.typed.clear();
    }

    fn save(&self) -> Vec<u8> {
        self.typed.iter().copied().collect()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), BadDeviceState> {
        if state.len() > TYPED_MAX {
            return Err(BadDeviceState { device: Self::NAME.to_owned(), cause: format!("{} bytes typed", state.len()) });
        }
        self.typed = state.iter().copied().collect();
        Ok(())
    }
}
