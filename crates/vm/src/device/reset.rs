//! The keyboard controller's one command that matters here: the pulse on the CPU's reset line, by which a PC is restarted. For a
//! machine that is its end. It keeps no state.

use std::ops::Range;

use super::{BadDeviceState, Device, Outcome};

const COMMAND_PORT: u16 = 0x64;
const PULSE_RESET: u8 = 0xFE;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Reset;

impl Device for Reset {
    const NAME: &'static str = "reset";
    type State = ();

    fn ports(&self) -> Range<u16> {
        COMMAND_PORT..COMMAND_PORT + 1
    }

    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        // Its buffers are empty: ready for a command.
        data.fill(0);
    }

    fn write(&mut self, _offset: u16, data: &[u8]) -> Outcome {
        if data == [PULSE_RESET] { Outcome::Reset } else { Outcome::Continue }
    }

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), BadDeviceState> {
        Ok(())
    }
}
