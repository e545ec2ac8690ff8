//! The registers of one device (virtio 1.2, section 4.2.2), and its interrupt line.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use virtio_queue::{Queue, QueueT};

use super::VirtioDevice;
use crate::sys::guest_memory::Ram;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"fark");
/// `VIRTIO_F_VERSION_1`: nothing else is spoken here.
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// Bits of the device status.
pub(super) mod status {
    pub(in super::super) const DRIVER: u32 = 2;
    pub(in super::super) const DRIVER_OK: u32 = 4;
    pub(in super::super) const FEATURES_OK: u32 = 8;
    pub(in super::super) const NEEDS_RESET: u32 = 64;
    pub(in super::super) const FAILED: u32 = 128;
}

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What a driver has set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    pub(super) features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) status: u32,
    pub(super) interrupts: u32,
}

/// A device's interrupt line into its VM.
#[derive(Clone)]
pub(crate) struct Line {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) number: u32,
}

impl Line {
    /// An edge. By a system call and not an eventfd: those are passed on by a thread of the kernel's, and a freeze could fall
    /// between the two.
    fn raise(&self) {
        for level in [true, false] {
            // It can only fail for a line that the machine does not have.
            self.vm.set_irq_line(self.number, level).unwrap_or_default();
        }
    }
}

/// See the module.
pub(crate) struct Transport<D> {
    pub(crate) device: D,
    pub(super) registers: Registers,
    pub(super) queues: Vec<Queue>,
    line: Option<Line>,
    /// What the guest did for which the device rests, for whoever looks.
    pub(crate) complaint: Option<String>,
}

impl<D: VirtioDevice> Transport<D> {
    /// A device as after power-on. Without a line (tests) its interrupts go nowhere.
    pub(crate) fn new(device: D, line: Option<Line>) -> Self {
        let queues = D::QUEUES.iter().map(|size| Queue::new(*size).expect("sizes are powers of two")).collect();
        Self { device, registers: Registers::default(), queues, line, complaint: None }
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(0x100) {
            let config = self.device.config();
            for (at, byte) in (offset..).zip(data.iter_mut()) {
                *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
            }
            return;
        }
        // Registers are words; another width reads as nothing.
        let word = if data.len() == 4 { self.register(offset) } else { 0 };
        for (byte, value) in data.iter_mut().zip(word.to_le_bytes()) {
            *byte = value;
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let selected = self.selected();
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => D::ID,
            0x0C => VENDOR,
            0x10 => half(self.offered(), self.registers.features_select),
            0x34 => selected.map_or(0, |queue| u32::from(queue.max_size())),
            0x44 => selected.map_or(0, |queue| u32::from(queue.ready())),
            0x60 => self.registers.interrupts,
            0x70 => self.registers.status,
            // Shared memory regions: a length of all ones says that there is none. 0xFC is the configuration's generation.
            0xB0..=0xBC => u32::MAX,
            _ => 0,
        }
    }

    /// The guest writes a register; `true` if that is for whoever runs the machine to look at.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], ram: Option<&Ram>) -> bool {
        // Nobody's configuration space is to be written.
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return false };
        match offset {
            0x14 => self.registers.features_select = value,
            0x20 if !self.has(status::FEATURES_OK) => {
                let shift = if self.registers.driver_features_select == 0 { 0 } else { 32 };
                let kept = self.registers.driver_features & !(u64::from(u32::MAX) << shift);
                if self.registers.driver_features_select <= 1 {
                    self.registers.driver_features = kept | u64::from(value) << shift;
                }
            }
            0x24 => self.registers.driver_features_select = value,
            0x30 => self.registers.queue_select = value,
            0x38 => self.set_queue(|queue| queue.set_size(u16::try_from(value).unwrap_or(0))),
            0x44 => self.set_queue(|queue| queue.set_ready(value == 1)),
            0x50 => return self.notify(value, ram),
            0x64 => self.registers.interrupts &= !value,
            0x70 => return self.set_status(value, ram),
            0x80 => self.set_queue(|queue| queue.set_desc_table_address(Some(value), None)),
            0x84 => self.set_queue(|queue| queue.set_desc_table_address(None, Some(value))),
            0x90 => self.set_queue(|queue| queue.set_avail_ring_address(Some(value), None)),
            0x94 => self.set_queue(|queue| queue.set_avail_ring_address(None, Some(value))),
            0xA0 => self.set_queue(|queue| queue.set_used_ring_address(Some(value), None)),
            0xA4 => self.set_queue(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
        false
    }

    /// Whether the device works: its driver has said so, and has broken nothing since.
    pub(crate) fn is_live(&self) -> bool {
        self.has(status::DRIVER_OK) && !self.has(status::NEEDS_RESET) && !self.has(status::FAILED)
    }

    /// Lets the device look at a queue: the guest has put something into it, or something has come for the guest.
    pub(crate) fn kick(&mut self, queue: u16, ram: &Ram) {
        if !self.serves(queue) {
            return;
        }
        match self.device.notified(queue, &mut self.queues, ram) {
            Ok(false) => {}
            Ok(true) => self.interrupt(INTERRUPT_USED),
            Err(error) => self.fail(format!("{} queue {queue}: {error}", D::NAME)),
        }
    }

    /// Whether the device works, and looks at a queue.
    pub(crate) fn serves(&self, queue: u16) -> bool {
        self.is_live() && self.queues.get(usize::from(queue)).is_some_and(QueueT::ready)
    }

    /// Tells the driver to read the configuration again.
    pub(crate) fn config_has_changed(&mut self) {
        if self.is_live() {
            self.interrupt(INTERRUPT_CONFIG);
        }
    }

    /// The line again, for interrupts that its guest has not seen to.
    pub(crate) fn interrupt_again(&self) {
        if let (Some(line), true) = (&self.line, self.registers.interrupts != 0) {
            line.raise();
        }
    }

    fn interrupt(&mut self, why: u32) {
        self.registers.interrupts |= why;
        self.interrupt_again();
    }

    fn notify(&mut self, queue: u32, ram: Option<&Ram>) -> bool {
        if let (Some(ram), Ok(queue)) = (ram, u16::try_from(queue)) {
            self.kick(queue, ram);
        }
        true
    }

    fn fail(&mut self, complaint: String) {
        self.registers.status |= status::NEEDS_RESET;
        self.complaint = Some(complaint);
        self.interrupt(INTERRUPT_CONFIG);
    }

    /// `true` for a reset: what the device then lets go of is for whoever runs the machine.
    fn set_status(&mut self, value: u32, ram: Option<&Ram>) -> bool {
        if value == 0 {
            self.device.reset();
            self.queues.iter_mut().for_each(Queue::reset);
            (self.registers, self.complaint) = (Registers::default(), None);
            return true;
        }
        let mut new = value & !(self.registers.status | status::NEEDS_RESET);
        if new & status::FEATURES_OK != 0 {
            let wanted = self.registers.driver_features;
            if wanted & !self.offered() != 0 || wanted & F_VERSION_1 == 0 || !self.has(status::DRIVER) {
                new &= !status::FEATURES_OK;
            }
        }
        let becomes_live = new & status::DRIVER_OK != 0;
        if becomes_live && !(self.has(status::FEATURES_OK) || new & status::FEATURES_OK != 0) {
            new &= !status::DRIVER_OK;
        }
        self.registers.status |= new;
        if new & status::DRIVER_OK != 0 {
            let is_bad = |queue: &Queue| queue.ready() && ram.is_none_or(|ram| !queue.is_valid(ram));
            if let Some(bad) = self.queues.iter().position(is_bad) {
                self.fail(format!("{} queue {bad}: its rings are not in memory", D::NAME));
            }
        }
        false
    }

    fn set_queue(&mut self, set: impl FnOnce(&mut Queue)) {
        // Frozen once the driver has said that it is done.
        if !self.has(status::DRIVER_OK)
            && let Some(queue) = usize::try_from(self.registers.queue_select).ok().and_then(|index| self.queues.get_mut(index))
        {
            set(queue);
        }
    }

    fn selected(&self) -> Option<&Queue> {
        usize::try_from(self.registers.queue_select).ok().and_then(|index| self.queues.get(index))
    }

    pub(super) fn offered(&self) -> u64 {
        D::FEATURES | F_VERSION_1
    }

    fn has(&self, bit: u32) -> bool {
        self.registers.status & bit != 0
    }
}

impl<D: std::fmt::Debug> std::fmt::Debug for Transport<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").field("device", &self.device).field("registers", &self.registers).finish_non_exhaustive()
    }
}

fn half(word: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
