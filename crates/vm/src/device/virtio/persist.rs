//! A device in an image: its registers, the state of its queues, and what it keeps itself. Nothing of it is trusted.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::transport::{Registers, status};
use super::{Transport, VirtioDevice};
use crate::device::BadDeviceState;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    registers: [u32; 5],
    driver_features: u64,
    queues: Vec<SavedQueue>,
    device: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    size: u16,
    is_ready: bool,
    next_avail: u16,
    next_used: u16,
    /// Of descriptors, available ring and used ring.
    addresses: [u64; 3],
}

impl<D: VirtioDevice> Transport<D> {
    pub(crate) fn save(&self) -> TransportState {
        let Registers { features_select, driver_features_select, driver_features, queue_select, status, interrupts } =
            self.registers;
        TransportState {
            registers: [features_select, driver_features_select, queue_select, status, interrupts],
            driver_features,
            queues: self.queues.iter().map(|queue| SavedQueue::of(queue.state())).collect(),
            device: self.device.save(),
        }
    }

    /// Puts the device into a saved state; the guest's memory is there already.
    pub(crate) fn restore(&mut self, state: &TransportState) -> Result<(), BadDeviceState> {
        let bad = |cause: String| BadDeviceState { device: D::NAME.to_owned(), cause };
        let [features_select, driver_features_select, queue_select, status, interrupts] = state.registers;
        if state.queues.len() != D::QUEUES.len() {
            return Err(bad(format!("{} queues where it has {}", state.queues.len(), D::QUEUES.len())));
        }
        if status & status::FEATURES_OK != 0 && state.driver_features & !self.offered() != 0 {
            return Err(bad(format!("features {:#x} that it does not offer", state.driver_features)));
        }
        let queues = state.queues.iter().zip(D::QUEUES).map(|(saved, max_size)| saved.into_queue(*max_size));
        let queues: Result<Vec<Queue>, _> = queues.collect();
        self.queues = queues.map_err(|error| bad(error.to_string()))?;
        let driver_features = state.driver_features;
        self.registers =
            Registers { features_select, driver_features_select, driver_features, queue_select, status, interrupts };
        self.device.restore(&state.device)?;
        // An interrupt that was under way when the image was made may have been lost with it; one too many does no harm.
        self.interrupt_again();
        Ok(())
    }
}

impl SavedQueue {
    fn of(state: QueueState) -> Self {
        let QueueState { size, ready, next_avail, next_used, desc_table, avail_ring, used_ring, .. } = state;
        Self { size, is_ready: ready, next_avail, next_used, addresses: [desc_table, avail_ring, used_ring] }
    }

    fn into_queue(self, max_size: u16) -> Result<Queue, virtio_queue::Error> {
        let [desc_table, avail_ring, used_ring] = self.addresses;
        QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: false,
            size: self.size,
            ready: self.is_ready,
            desc_table,
            avail_ring,
            used_ring,
        }
        .try_into()
    }
}
