//! The registers of the serial port, and input that its guest has not read yet. Output is not part of a machine's state: each
//! child's console starts empty.

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;

use super::{Console, Device, Line, Serial};
use crate::device::BadDeviceState;

/// As `vm_superio::SerialState`, in our own format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the register names of the 16550A data sheet")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub in_buffer: Vec<u8>,
}

impl SerialState {
    pub(super) fn of(uart: &vm_superio::Serial<Line, NoEvents, Console>) -> Self {
        let state = uart.state();
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    pub(super) fn into_uart(
        self,
        line: Line,
        console: Console,
    ) -> Result<vm_superio::Serial<Line, NoEvents, Console>, BadDeviceState> {
        let state = vm_superio::serial::SerialState {
            baud_divisor_low: self.baud_divisor_low,
            baud_divisor_high: self.baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.in_buffer,
        };
        vm_superio::Serial::from_state(&state, line, NoEvents, console)
            .map_err(|error| BadDeviceState { device: Serial::NAME.to_owned(), cause: format!("{error:?}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    fn port() -> Serial {
        Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), Console::default())
    }

    #[test]
    fn a_restored_port_goes_on_where_the_saved_one_stood() {
        let mut parent = port();
        parent.write(7, &[0x5A]); // scratch
        parent.write(3, &[0x03]); // line control: 8 bits
        parent.uart.enqueue_raw_bytes(b"typed").unwrap();
        let state = parent.save();
        let mut child = port();
        child.restore(state.clone()).unwrap();
        assert_eq!(child.save(), state);
        let mut byte = [0];
        child.read(7, &mut byte);
        assert_eq!(byte, [0x5A]);
        child.read(0, &mut byte);
        assert_eq!(&byte, b"t");
    }

    #[test]
    fn a_state_with_more_input_than_the_port_holds_is_refused() {
        let mut state = port().save();
        state.in_buffer = vec![0; 1000];
        let error = port().restore(state).unwrap_err();
        assert!(error.to_string().contains("serial"), "{error}");
    }
}
