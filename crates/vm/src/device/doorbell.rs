//! The doorbell: one I/O port through which a guest says that it waits for work, or that it is broken. It keeps no state, so
//! its `persist` is the empty one below.

use std::ops::Range;

use super::{BadDeviceState, Device, Outcome};
use crate::sys::payload::{DOORBELL_PORT, EVENT_FAULT, EVENT_WAIT};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Doorbell;

impl Device for Doorbell {
    const NAME: &'static str = "doorbell";
    type State = ();

    fn ports(&self) -> Range<u16> {
        DOORBELL_PORT..DOORBELL_PORT + 4
    }

    fn read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) -> Outcome {
        match (offset, <[u8; 4]>::try_from(data).map(u32::from_le_bytes)) {
            (0, Ok(EVENT_WAIT)) => Outcome::Rest,
            (0, Ok(EVENT_FAULT)) => Outcome::GuestFault,
            _ => Outcome::Continue,
        }
    }

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), BadDeviceState> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_known_events_count() {
        let mut bell = Doorbell;
        assert_eq!(bell.write(0, &EVENT_WAIT.to_le_bytes()), Outcome::Rest);
        assert_eq!(bell.write(0, &EVENT_FAULT.to_le_bytes()), Outcome::GuestFault);
        assert_eq!(bell.write(0, &[1]), Outcome::Continue);
        assert_eq!(bell.write(1, &EVENT_WAIT.to_le_bytes()), Outcome::Continue);
        assert_eq!(bell.write(0, &u32::MAX.to_le_bytes()), Outcome::Continue);
    }
}
