//! Random numbers (virtio 1.2, section 5.4): the host's own. It keeps nothing, so two children never have the same from it.

use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::Queue;

use super::{BadQueue, VirtioDevice, each_chain, used_len, writer};
use crate::device::BadDeviceState;
use crate::sys::guest_memory::Ram;

/// The most bytes for one request: a guest that asks for more is given less, as the standard allows.
const REQUEST_MAX: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct Rng;

impl VirtioDevice for Rng {
    const NAME: &'static str = "virtio-rng";
    const ID: u32 = 4;
    const QUEUES: &'static [u16] = &[16];
    const FEATURES: u64 = 0;

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue> {
        each_chain(&mut queues[usize::from(queue)], ram, |chain| {
            let mut room = writer(ram, &chain)?;
            let mut bytes = [0; REQUEST_MAX];
            let some = &mut bytes[..room.available_bytes().min(REQUEST_MAX)];
            // Up to 256 bytes come whole; what a signal cuts short of more is shorter, and said to be.
            let there = getrandom(&mut *some, GetRandomFlags::empty()).map_err(std::io::Error::from)?;
            room.write_all(&some[..there])?;
            Ok(Some(used_len(there)))
        })
    }

    fn reset(&mut self) {}

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), BadDeviceState> {
        Ok(())
    }
}
