//! A driver for tests and fuzzing: memory, rings at fixed places, and all devices without a machine around them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::console::VirtioConsole;
use super::disk::Disk;
use super::net::Net;
use super::rng::Rng;
use super::transport::{F_VERSION_1, status};
use super::vsock::Vsock;
use super::{Transport, VirtioDevice};
use crate::device::serial::Console;
use crate::sys::guest_memory::Ram;

/// All of the guest's memory.
pub(super) const RAM_BYTES: u64 = 1 << 20;
/// All of its disk.
pub(super) const DISK_BYTES: u64 = 1 << 20;
/// The rings of a queue: descriptors, available ring, used ring; and where the next queue's are.
pub(super) const RINGS: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
pub(super) const USED: u64 = 0x800;
pub(super) const STRIDE: u64 = 0x1000;
/// The sizes that drivers choose here.
pub(super) const SIZE: u16 = 16;
/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Memory for devices.
pub(crate) fn ram() -> Ram {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(RAM_BYTES).expect("64-bit"))]).expect("a megabyte")
}

/// A disk whose sector n begins with n.
pub(crate) fn disk() -> Disk {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(DISK_BYTES).expect("64-bit"))]);
    let memory = memory.expect("a megabyte");
    for sector in 0..DISK_BYTES / 512 {
        memory.write_obj(sector, GuestAddress(sector * 512)).expect("within");
    }
    let mut disk = Disk::new(DISK_BYTES);
    disk.set_memory(Some(memory));
    disk
}

/// A driver of one device.
pub(crate) struct Driver<D> {
    pub(crate) ram: Ram,
    pub(crate) transport: Transport<D>,
    available: Vec<u16>,
}

impl<D: VirtioDevice> Driver<D> {
    /// A device as after power-on.
    pub(crate) fn reset(device: D) -> Self {
        Self { ram: ram(), transport: Transport::new(device, None), available: vec![0; D::QUEUES.len()] }
    }

    pub(crate) fn set_up(&mut self) {
        for value in [0, 1, 1 | status::DRIVER] {
            self.write(0x70, value);
        }
        for (half, value) in (0u32..).zip([0, F_VERSION_1 >> 32]) {
            self.write(0x24, half);
            self.write(0x20, u32::try_from(value).expect("half a word"));
        }
        self.write(0x70, 3 | status::FEATURES_OK);
        for (number, queue) in (0u32..).zip(0..D::QUEUES.len() as u64) {
            let at = RINGS + queue * STRIDE;
            let word = |address: u64| u32::try_from(address).expect("within a megabyte");
            self.write(0x30, number);
            self.write(0x38, u32::from(SIZE));
            for (register, address) in [(0x80, at), (0x90, at + AVAILABLE), (0xA0, at + USED)] {
                self.write(register, word(address));
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 0xB | status::DRIVER_OK);
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes(), Some(&self.ram));
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a descriptor of a queue.
    pub(crate) fn describe(&self, queue: u64, index: u64, descriptor: Descriptor) {
        let at = GuestAddress(RINGS + queue * STRIDE + index * 16);
        let Descriptor { address, len, flags, next } = descriptor;
        let word = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.ram.write_slice(&word.to_le_bytes(), at).expect("within");
    }

    /// Puts a chain's head into the available ring, and tells the device.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) {
        let ring = RINGS + u64::from(queue) * STRIDE + AVAILABLE;
        let count = &mut self.available[usize::from(queue)];
        self.ram.write_obj(head, GuestAddress(ring + 4 + u64::from(*count % SIZE) * 2)).expect("within");
        *count = count.wrapping_add(1);
        self.set_available(queue, self.available[usize::from(queue)]);
        self.write(0x50, u32::from(queue));
    }

    /// Says how many chains were made available, true or not.
    pub(crate) fn set_available(&self, queue: u16, index: u16) {
        let ring = RINGS + u64::from(queue) * STRIDE + AVAILABLE;
        self.ram.write_obj(index, GuestAddress(ring + 2)).expect("within");
    }
}

/// What a guest does to a device, from bytes: for fuzzing. Whatever that is, the device stays within its memory, does a bounded
/// amount of work, and can be saved and restored.
pub(crate) fn play(bytes: &[u8]) {
    let Some((kind, script)) = bytes.split_first() else { return };
    match kind % 5 {
        0 => play_on(disk(), script, |_, _| {}),
        1 => play_on(Rng, script, |_, _| {}),
        2 => play_on(VirtioConsole::new(Console::default()), script, |_, _| {}),
        3 => play_on(Net::new(), script, |_, _| {}),
        _ => {
            let mut ours = None;
            play_on(Vsock::new(), script, move |driver: &mut Driver<Vsock>, value| match value % 3 {
                0 => {
                    let Ok((socket, its)) = UnixStream::pair() else { return };
                    its.set_nonblocking(true).unwrap_or_default();
                    socket.set_nonblocking(true).unwrap_or_default();
                    driver.transport.device.connect(1024, its.into());
                    ours = Some(socket);
                }
                1 => {
                    if let Some(mut socket) = ours.as_ref() {
                        socket.write(&[0; 3000]).unwrap_or_default();
                    }
                }
                _ => {
                    driver.transport.device.serve_sockets();
                    driver.transport.kick(super::vsock::RECEIVE, &driver.ram);
                    if let Some(mut socket) = ours.as_ref() {
                        socket.read(&mut [0; 4096]).unwrap_or_default();
                    }
                }
            });
        }
    }
}

fn play_on<D: VirtioDevice>(device: D, script: &[u8], mut outside: impl FnMut(&mut Driver<D>, u8)) {
    let mut driver = Driver::reset(device);
    let mut rest = script;
    while let Some(([what, a, b, c, d, e, f, g], after)) = rest.split_first_chunk::<8>() {
        rest = after;
        let (near, value) = (u16::from_le_bytes([*a, *b]), u32::from_le_bytes([*c, *d, *e, *f]));
        match what % 8 {
            0 => driver.set_up(),
            1 => driver.write(u64::from(near) & 0xFFC, value),
            // Rings and the first buffers.
            2 => driver.ram.write_obj(value, GuestAddress(u64::from(near) & !3)).unwrap_or_default(),
            3 => driver.write(0x50, u32::from(*a % 4)),
            4 => {
                let flags = u16::from(*d) & 7;
                let descriptor =
                    Descriptor { address: u64::from(near) << 4, len: value & 0x1_FFFF, flags, next: u16::from(*g) };
                driver.describe(u64::from(*g % 3), u64::from(*f % 16), descriptor);
            }
            5 => driver.offer(u16::from(*a) % u16::try_from(D::QUEUES.len()).expect("few"), u16::from(*b)),
            6 => {
                let state = driver.transport.save();
                if driver.transport.restore(&state).is_ok() {
                    assert_eq!(driver.transport.save(), state);
                }
            }
            _ => outside(&mut driver, *a),
        }
        driver.read(u64::from(near));
    }
}
