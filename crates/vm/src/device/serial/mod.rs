//! The first serial port (16550A at 0x3F8, interrupt 4), whose output goes into a bounded ring.
//!
//! The 16550A itself is `vm_superio`'s. A guest that prints for ever costs [`Console::CAPACITY_BYTES`] and no more: the oldest
//! output makes room, and is counted.

mod persist;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use super::{BadDeviceState, Device, Outcome};
pub use persist::SerialState;

const FIRST_PORT: u16 = 0x3F8;
/// The interrupt line of the first serial port.
pub(crate) const INTERRUPT: u32 = 4;

/// What a guest printed, the newest [`Console::CAPACITY_BYTES`] of it.
#[derive(Clone, Debug, Default)]
pub struct Console(Arc<Mutex<Ring>>);

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Console {
    /// The most that is kept.
    pub const CAPACITY_BYTES: usize = 64 << 10;

    /// What is kept, oldest first, and how many older bytes made room for it.
    #[must_use]
    pub fn contents(&self) -> (Vec<u8>, u64) {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (ring.bytes.iter().copied().collect(), ring.dropped)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(Self::CAPACITY_BYTES);
        ring.bytes.drain(..excess);
        ring.dropped += excess as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port of one machine.
pub struct Serial {
    uart: vm_superio::Serial<Line, NoEvents, Console>,
    console: Console,
    line: Arc<EventFd>,
}

/// The port's interrupt line into the VM.
#[derive(Clone, Debug)]
pub(super) struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Serial {
    /// A port whose interrupts go to `line` and whose output goes to `console`.
    pub(crate) fn new(line: EventFd, console: Console) -> Self {
        let line = Arc::new(line);
        let uart = vm_superio::Serial::new(Line(Arc::clone(&line)), console.clone());
        Self { uart, console, line }
    }

    /// What the guest printed: see [`Console::contents`].
    pub(crate) fn printed(&self) -> (Vec<u8>, u64) {
        self.console.contents()
    }

    /// Types on the port's keyboard.
    pub(crate) fn type_in(&mut self, input: &[u8]) -> io::Result<()> {
        let taken = self.uart.enqueue_raw_bytes(input).map_err(|error| io::Error::other(format!("{error:?}")))?;
        if taken < input.len() {
            return Err(io::Error::other(format!("the port took {taken} of {} bytes", input.len())));
        }
        Ok(())
    }
}

impl Device for Serial {
    const NAME: &'static str = "serial";
    type State = SerialState;

    fn ports(&self) -> Range<u16> {
        FIRST_PORT..FIRST_PORT + 8
    }

    fn read(&mut self, offset: u16, data: &mut [u8]) {
        // The registers are one byte wide; a wider access reads the rest as ones, as from ports without a device.
        data.fill(0xFF);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Outcome {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            // An error means that the interrupt line or, in loopback mode, the input buffer is full: a real port loses the
            // byte or the edge as well, and the guest polls the line status.
            self.uart.write(offset, *value).unwrap_or_default();
        }
        Outcome::Continue
    }

    fn save(&self) -> SerialState {
        SerialState::of(&self.uart)
    }

    fn restore(&mut self, state: SerialState) -> Result<(), BadDeviceState> {
        self.uart = state.into_uart(Line(Arc::clone(&self.line)), self.console.clone())?;
        Ok(())
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("line", &self.line).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> Serial {
        Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), Console::default())
    }

    #[test]
    fn the_ring_keeps_the_newest_output_and_counts_the_rest() {
        let mut serial = port();
        let printed: Vec<u8> = (0..Console::CAPACITY_BYTES + 10).map(|n| u8::try_from(n % 251).unwrap()).collect();
        for byte in &printed {
            serial.write(0, &[*byte]);
        }
        let (kept, dropped) = serial.console.contents();
        assert_eq!(dropped, 10);
        assert_eq!(kept, printed[10..]);
    }

    #[test]
    fn odd_widths_and_registers_are_harmless() {
        let mut serial = port();
        let mut wide = [0; 4];
        serial.read(5, &mut wide);
        assert_eq!(wide[1..], [0xFF; 3]);
        serial.read(7, &mut []);
        serial.write(0, b"wide");
        serial.write(0, &[]);
        assert_eq!(serial.console.contents().0, b"");
    }
}
