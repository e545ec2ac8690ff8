//! Devices in user space, and the bus that finds them. Each device keeps its `persist` beside it. Serial port and doorbell live on
//! I/O ports, which guests of every kind can reach before they know of anything else; the rest are [`virtio`].

use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub mod doorbell;
pub mod reset;
pub mod serial;
pub mod virtio;

use crate::class::{Class, Devices};
use crate::sys::guest_memory::{DiskMemory, Ram};
use doorbell::Doorbell;
use reset::Reset;
use serial::{Console, Serial};
use virtio::console::VirtioConsole;
use virtio::disk::Disk;
use virtio::net::Net;
use virtio::rng::Rng;
use virtio::vsock::Vsock;
use virtio::{Transport, TransportState, VirtioDevice};

/// One device.
pub trait Device {
    /// The name under which its state is kept.
    const NAME: &'static str;
    /// What [`persist`](Device::save) keeps.
    type State: Serialize + for<'de> Deserialize<'de>;

    /// The I/O ports it answers.
    fn ports(&self) -> Range<u16>;
    /// A guest reads `data.len()` bytes from the port `offset` above the first.
    fn read(&mut self, offset: u16, data: &mut [u8]);
    /// A guest writes to the port `offset` above the first.
    fn write(&mut self, offset: u16, data: &[u8]) -> Outcome;
    /// The device's state, while its guest rests.
    fn save(&self) -> Self::State;
    /// Puts the device into a saved state.
    ///
    /// # Errors
    /// If no device of this kind can be in that state.
    fn restore(&mut self, state: Self::State) -> Result<(), BadDeviceState>;
}

/// What a write asks of the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Go on.
    Continue,
    /// The guest has nothing to do until it is rung.
    Rest,
    /// The guest reports a CPU exception that it cannot handle.
    GuestFault,
    /// Go on; there is something for who runs the machine.
    News,
    /// The guest starts anew, which is the end of a machine.
    Reset,
}

/// A saved state that does not fit its device.
#[derive(Debug, Error)]
#[error("the state of device {device} does not decode: {cause}")]
pub struct BadDeviceState {
    /// Which device.
    pub device: String,
    /// What is wrong with it.
    pub cause: String,
}

/// A device's state in an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// [`Device::NAME`].
    pub name: String,
    /// Its state, encoded.
    pub state: Vec<u8>,
}

/// The devices of one machine.
#[derive(Debug)]
pub struct Bus {
    pub(crate) serial: Serial,
    doorbell: Doorbell,
    pub(crate) virtio: Option<Virtio>,
    /// From when the machine has its memory, until it is let go of.
    ram: Option<Ram>,
}

/// The devices of a Linux guest.
#[derive(Debug)]
pub(crate) struct Virtio {
    pub(crate) console: Transport<VirtioConsole>,
    pub(crate) vsock: Transport<Vsock>,
    rng: Transport<Rng>,
    disk: Option<Transport<Disk>>,
    pub(crate) net: Option<Transport<Net>>,
}

impl Virtio {
    /// Those of a class, in the order of their windows; `None` for a class without any.
    fn of(class: Class, vm: &Arc<VmFd>, output: &Console) -> Option<Self> {
        let Devices::Linux { disk, network } = class.devices() else { return None };
        let line = |window: usize| Some(virtio::Line { vm: Arc::clone(vm), number: virtio::INTERRUPTS[window] });
        Some(Self {
            console: Transport::new(VirtioConsole::new(output.clone()), line(0)),
            vsock: Transport::new(Vsock::new(), line(1)),
            rng: Transport::new(Rng, line(2)),
            disk: disk.map(|size| Transport::new(Disk::new(size.bytes()), line(3))),
            net: network.then(|| Transport::new(Net::new(), line(4))),
        })
    }
}

impl Bus {
    pub(crate) fn new(serial: Serial, class: Class, vm: &Arc<VmFd>, output: &Console) -> Self {
        Self { serial, doorbell: Doorbell, virtio: Virtio::of(class, vm, output), ram: None }
    }

    /// The machine has its memory now, or is about to let go of it.
    pub(crate) fn set_memory(&mut self, memory: Option<(Ram, Option<DiskMemory>)>) {
        let (ram, disk) = memory.map_or((None, None), |(ram, disk)| (Some(ram), disk));
        self.ram = ram;
        if let Some(of_disk) = self.virtio.as_mut().and_then(|virtio| virtio.disk.as_mut()) {
            of_disk.device.set_memory(disk);
        }
    }

    /// A guest reads from an address that is not RAM: all ones where there is no device.
    pub(crate) fn read_memory(&self, at: u64, data: &mut [u8]) {
        let Some((window, offset)) = window_of(at) else { return data.fill(0xFF) };
        match (window, &self.virtio) {
            (0, Some(virtio)) => virtio.console.read(offset, data),
            (1, Some(virtio)) => virtio.vsock.read(offset, data),
            (2, Some(virtio)) => virtio.rng.read(offset, data),
            (3, Some(Virtio { disk: Some(disk), .. })) => disk.read(offset, data),
            (4, Some(Virtio { net: Some(net), .. })) => net.read(offset, data),
            _ => data.fill(0xFF),
        }
    }

    /// A guest writes to an address that is not RAM. [`Outcome::News`] if there is something for who runs the machine.
    pub(crate) fn write_memory(&mut self, at: u64, data: &[u8]) -> Outcome {
        let Some((window, offset)) = window_of(at) else { return Outcome::Continue };
        let ram = self.ram.as_ref();
        let is_news = match (window, &mut self.virtio) {
            (0, Some(virtio)) => virtio.console.write(offset, data, ram),
            // What the guest sends is for the sockets of who runs the machine.
            (1, Some(virtio)) => virtio.vsock.write(offset, data, ram),
            (2, Some(virtio)) => {
                virtio.rng.write(offset, data, ram);
                false
            }
            (3, Some(Virtio { disk: Some(disk), .. })) => {
                disk.write(offset, data, ram);
                false
            }
            (4, Some(Virtio { net: Some(net), .. })) => net.write(offset, data, ram),
            _ => false,
        };
        if is_news { Outcome::News } else { Outcome::Continue }
    }

    /// Connects a socket, which does not block, with a vsock port of the guest. What cannot be connected is closed.
    pub(crate) fn connect(&mut self, port: u32, socket: OwnedFd) {
        if let Some(virtio) = &mut self.virtio {
            virtio.vsock.device.connect(port, socket);
        }
    }

    /// Plugs the network card in. Without a card the tap is closed.
    pub(crate) fn plug(&mut self, tap: OwnedFd) {
        if let Some(net) = self.virtio.as_mut().and_then(|virtio| virtio.net.as_mut()) {
            net.device.plug(tap);
            net.config_has_changed();
        }
    }

    /// The descriptors at which to wait for something to [serve](Self::serve), and for what.
    pub(crate) fn descriptors(&self) -> Vec<(Arc<OwnedFd>, PollFlags)> {
        let Some(virtio) = &self.virtio else { return Vec::new() };
        let tap = virtio.net.as_ref().filter(|net| net.serves(virtio::net::RECEIVE)).and_then(|net| net.device.interest());
        virtio.vsock.device.sockets().chain(tap.map(|tap| (tap, PollFlags::IN))).collect()
    }

    /// Moves what can be moved between the guest and the descriptors of who runs the machine.
    pub(crate) fn serve(&mut self) {
        let (Some(virtio), Some(ram)) = (&mut self.virtio, &self.ram) else { return };
        virtio.console.kick(virtio::console::RECEIVE, ram);
        virtio.vsock.device.serve_sockets();
        if virtio.vsock.device.has_packets() {
            virtio.vsock.kick(virtio::vsock::RECEIVE, ram);
        }
        if let Some(net) = &mut virtio.net {
            if !net.device.serve_tap() {
                net.config_has_changed();
            }
            if net.device.has_frames() {
                net.kick(virtio::net::RECEIVE, ram);
            }
        }
    }

    /// Says on the guest's console what it broke of its own devices, once each time.
    pub(crate) fn complain(&mut self, output: &mut Console) {
        let Some(virtio) = &mut self.virtio else { return };
        let Virtio { console, vsock, rng, disk, net } = virtio;
        let all = [
            console.complaint.take(),
            vsock.complaint.take(),
            rng.complaint.take(),
            disk.as_mut().and_then(|disk| disk.complaint.take()),
            net.as_mut().and_then(|net| net.complaint.take()),
        ];
        for complaint in all.into_iter().flatten() {
            writeln!(output, "\nfarfork: the device rests until it is reset: {complaint}").unwrap_or_default();
        }
    }

    /// A guest reads from a port. A port without a device reads as all ones, as on a PC.
    pub(crate) fn read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = offset_in(&self.serial.ports(), port) {
            self.serial.read(offset, data);
        } else if let Some(offset) = offset_in(&self.doorbell.ports(), port) {
            self.doorbell.read(offset, data);
        } else if let Some(offset) = offset_in(&Reset.ports(), port).filter(|_| self.virtio.is_some()) {
            Reset.read(offset, data);
        } else {
            data.fill(0xFF);
        }
    }

    /// A guest writes to a port. Without a device the write goes nowhere, as on a PC.
    pub(crate) fn write(&mut self, port: u16, data: &[u8]) -> Outcome {
        if let Some(offset) = offset_in(&self.serial.ports(), port) {
            self.serial.write(offset, data)
        } else if let Some(offset) = offset_in(&self.doorbell.ports(), port) {
            self.doorbell.write(offset, data)
        } else if let Some(offset) = offset_in(&Reset.ports(), port).filter(|_| self.virtio.is_some()) {
            Reset.write(offset, data)
        } else {
            Outcome::Continue
        }
    }

    pub(crate) fn save(&self) -> Vec<SavedDevice> {
        let mut devices = vec![saved(&self.serial), saved(&self.doorbell)];
        if let Some(Virtio { console, vsock, rng, disk, net }) = &self.virtio {
            devices.extend([saved_virtio(console), saved_virtio(vsock), saved_virtio(rng)]);
            devices.extend(disk.as_ref().map(saved_virtio));
            devices.extend(net.as_ref().map(saved_virtio));
        }
        devices
    }

    pub(crate) fn restore(&mut self, devices: &[SavedDevice]) -> Result<(), BadDeviceState> {
        restored(&mut self.serial, devices)?;
        restored(&mut self.doorbell, devices)?;
        let Some(Virtio { console, vsock, rng, disk, net }) = &mut self.virtio else { return Ok(()) };
        restored_virtio(console, devices)?;
        restored_virtio(vsock, devices)?;
        restored_virtio(rng, devices)?;
        disk.as_mut().map_or(Ok(()), |disk| restored_virtio(disk, devices))?;
        net.as_mut().map_or(Ok(()), |net| restored_virtio(net, devices))?;
        // A shell that rehearses has no memory, no streams that could have been reset, and no link that could be gone.
        if let Some(ram) = &self.ram {
            vsock.kick(virtio::vsock::EVENT, ram);
            net.iter_mut().for_each(Transport::config_has_changed);
        }
        Ok(())
    }
}

fn offset_in(ports: &Range<u16>, port: u16) -> Option<u16> {
    ports.contains(&port).then(|| port - ports.start)
}

fn saved<D: Device>(device: &D) -> SavedDevice {
    let state = postcard::to_stdvec(&device.save()).expect("device states are plain data");
    SavedDevice { name: D::NAME.to_owned(), state }
}

fn restored<D: Device>(device: &mut D, devices: &[SavedDevice]) -> Result<(), BadDeviceState> {
    device.restore(state_of(D::NAME, devices)?)
}

fn saved_virtio<D: VirtioDevice>(device: &Transport<D>) -> SavedDevice {
    let state = postcard::to_stdvec(&device.save()).expect("device states are plain data");
    SavedDevice { name: D::NAME.to_owned(), state }
}

fn restored_virtio<D: VirtioDevice>(device: &mut Transport<D>, devices: &[SavedDevice]) -> Result<(), BadDeviceState> {
    device.restore(&state_of::<TransportState>(D::NAME, devices)?)
}

/// The state that is kept under this name.
fn state_of<S: for<'de> Deserialize<'de>>(name: &str, devices: &[SavedDevice]) -> Result<S, BadDeviceState> {
    let bad = |cause: String| BadDeviceState { device: name.to_owned(), cause };
    let saved = devices.iter().find(|saved| saved.name == name).ok_or_else(|| bad("it is missing".to_owned()))?;
    match postcard::take_from_bytes(&saved.state) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(bad(format!("{} bytes after its end", rest.len()))),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Which window an address lies in, and where in it.
fn window_of(at: u64) -> Option<(u64, u64)> {
    let offset = at.checked_sub(virtio::FIRST_WINDOW)?;
    Some((offset / virtio::WINDOW, offset % virtio::WINDOW))
}

/// Which devices a saved machine has: those whose states there are.
pub(crate) fn devices_of(saved: &[SavedDevice], disk: Option<types::MemorySize>) -> Devices {
    let has = |name: &str| saved.iter().any(|device| device.name == name);
    if has(Vsock::NAME) { Devices::Linux { disk, network: has(Net::NAME) } } else { Devices::None }
}
