//! Devices in user space, and the bus that finds them. Each device keeps its `persist` beside it; both devices so far live on
//! I/O ports, which guests of every kind can reach before they know of anything else.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub mod doorbell;
pub mod serial;

use doorbell::Doorbell;
use serial::Serial;

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
}

impl Bus {
    pub(crate) fn new(serial: Serial) -> Self {
        Self { serial, doorbell: Doorbell }
    }

    /// A guest reads from a port. A port without a device reads as all ones, as on a PC.
    pub(crate) fn read(&mut self, port: u16, data: &mut [u8]) {
        if let Some(offset) = offset_in(&self.serial.ports(), port) {
            self.serial.read(offset, data);
        } else if let Some(offset) = offset_in(&self.doorbell.ports(), port) {
            self.doorbell.read(offset, data);
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
        } else {
            Outcome::Continue
        }
    }

    pub(crate) fn save(&self) -> Vec<SavedDevice> {
        vec![saved(&self.serial), saved(&self.doorbell)]
    }

    pub(crate) fn restore(&mut self, devices: &[SavedDevice]) -> Result<(), BadDeviceState> {
        restored(&mut self.serial, devices)?;
        restored(&mut self.doorbell, devices)
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
    let bad = |cause: String| BadDeviceState { device: D::NAME.to_owned(), cause };
    let saved = devices.iter().find(|saved| saved.name == D::NAME).ok_or_else(|| bad("it is missing".to_owned()))?;
    match postcard::take_from_bytes(&saved.state) {
        Ok((state, [])) => device.restore(state),
        Ok((_, rest)) => Err(bad(format!("{} bytes after its end", rest.len()))),
        Err(error) => Err(bad(error.to_string())),
    }
}
