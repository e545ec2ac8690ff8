//! virtio over MMIO, in user space (virtio 1.2, sections 4.2 and 5).
//!
//! ```text
//! guest: QueueNotify ──▶ Transport ──▶ Device::notified ──▶ chains of descriptors, each checked on use
//!                            │                                   └── bad ──▶ DEVICE_NEEDS_RESET; the device rests until then
//!                            └──▶ interrupt line (edge)
//! ```
//!
//! Everything here is driven by a guest that may be hostile. What it says of its queues is taken when it says DRIVER_OK and not
//! changed afterwards; rings, descriptors and lengths are checked each time they are used; no work is done without bound.

pub mod console;
pub mod disk;
pub mod net;
mod persist;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod transport;
pub mod vsock;

use std::fmt;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};

use super::BadDeviceState;
use crate::sys::guest_memory::Ram;
pub use persist::TransportState;
pub(crate) use transport::{Line, Transport};

/// Bytes of a device's window of registers.
pub(crate) const WINDOW: u64 = 0x1000;
/// Where the first window begins: in the gap below 4 GiB that RAM leaves free.
pub(crate) const FIRST_WINDOW: u64 = 0xD000_0000;
/// The devices' interrupt lines, in the order of their windows: those of a PC that no other device of ours has.
pub(crate) const INTERRUPTS: [u32; 5] = [5, 6, 9, 10, 11];

/// A device behind a [`Transport`].
pub(crate) trait VirtioDevice: fmt::Debug + Send {
    /// The name under which its state is kept.
    const NAME: &'static str;
    /// Its number (virtio 1.2, section 5).
    const ID: u32;
    /// The most descriptors of each of its queues.
    const QUEUES: &'static [u16];
    /// What it can do besides `VIRTIO_F_VERSION_1`.
    const FEATURES: u64;

    /// Its configuration space, read by the guest.
    fn config(&self) -> Vec<u8>;
    /// The guest has put something into a queue, or more may be put into it now. `Ok(true)` if something was given back.
    ///
    /// # Errors
    /// [`BadQueue`]: the guest broke its own rings.
    fn notified(&mut self, queue: u16, queues: &mut [Queue], ram: &Ram) -> Result<bool, BadQueue>;
    /// The guest starts anew.
    fn reset(&mut self);
    /// Its own state, besides that of its queues.
    fn save(&self) -> Vec<u8>;
    /// Puts it into a saved state.
    ///
    /// # Errors
    /// If no device of this kind can be in that state.
    fn restore(&mut self, state: &[u8]) -> Result<(), BadDeviceState>;
}

/// What a guest broke.
#[derive(Debug, Error)]
pub(crate) enum BadQueue {
    #[error("its rings or descriptors are not ones ({0})")]
    Rings(#[from] virtio_queue::Error),
    #[error("its memory could not be reached ({0})")]
    Access(#[from] std::io::Error),
}

/// Goes through what the guest has put into a queue, at most one ring full: `each` is given a chain and says how many bytes it
/// wrote into it, or that this chain has to wait (`None`). Says whether any was given back.
pub(crate) fn each_chain<'ram>(
    queue: &mut Queue,
    ram: &'ram Ram,
    mut each: impl FnMut(DescriptorChain<&'ram Ram>) -> Result<Option<u32>, BadQueue>,
) -> Result<bool, BadQueue> {
    let mut is_any_used = false;
    for _ in 0..queue.size() {
        let Some(chain) = queue.iter(ram)?.next() else { break };
        let head = chain.head_index();
        let Some(written) = each(chain)? else {
            queue.iter(ram)?.go_to_previous_position();
            break;
        };
        queue.add_used(ram, head, written)?;
        is_any_used = true;
    }
    Ok(is_any_used)
}

/// What a chain holds for the device to read.
pub(crate) fn reader<'ram>(ram: &'ram Ram, chain: &DescriptorChain<&'ram Ram>) -> Result<Reader<'ram>, BadQueue> {
    Ok(chain.clone().reader(ram)?)
}

/// What a chain has room for.
pub(crate) fn writer<'ram>(ram: &'ram Ram, chain: &DescriptorChain<&'ram Ram>) -> Result<Writer<'ram>, BadQueue> {
    Ok(chain.clone().writer(ram)?)
}

/// A number of bytes as the used ring takes it.
pub(crate) fn used_len(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
