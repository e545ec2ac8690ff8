//! The kernel's command line.

use super::{COMMAND_LINE_SIZE, LinuxError};
use crate::class::{Class, Devices};
use crate::device::virtio::{FIRST_WINDOW, INTERRUPTS, WINDOW};

/// For every host: the serial port is the console; a reboot or panic ends the machine by the keyboard controller's reset, which
/// the VMM sees.
const ALWAYS: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable no_timer_check random.trust_cpu=on";
/// Where KVM emulates ring 0 (docs/guests.md): what its emulator does not know is not used. CPU features by number, since kernels
/// read the host's CPUID there whatever KVM was told: SMAP's, POPCNT, MOVBE, CMPXCHG16B, XSAVE's, RDRAND, RDSEED, ERMS, FSRM.
const EMULATED: &str = "earlyprintk=ttyS0 lpj=1000000 mitigations=off init_on_alloc=0 noxsave nosmap nosmep nopku nopcid \
                        nofsgsbase clearcpuid=151,150,308,141,158,306,145,153,156,157,297,580";
/// There the kernel saves no AVX state for programs, which see the host's CPUID all the same: for the first process, and by it
/// for all others, the C library does without.
const NO_AVX: &str =
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD,-AVX2,-AVX,-XSAVE,-XSAVEC";

/// What every Linux guest of this class needs on its command line, here.
#[must_use]
pub fn base_command_line(class: Class, emulates_ring_0: bool) -> String {
    let mut line = ALWAYS.to_owned();
    if emulates_ring_0 {
        line.push(' ');
        line.push_str(EMULATED);
        line.push(' ');
        line.push_str(NO_AVX);
    }
    if let Devices::Linux { disk, network } = class.devices() {
        let there = [true, true, true, disk.is_some(), network];
        for ((window, interrupt), _) in (0..).zip(INTERRUPTS).zip(there).filter(|(_, there)| *there) {
            let at = FIRST_WINDOW + window * WINDOW;
            line.push_str(&format!(" virtio_mmio.device=4K@{at:#x}:{interrupt}"));
        }
    }
    line
}

/// The bytes for the guest, with the zero at their end.
pub(super) fn checked(line: &str) -> Result<Vec<u8>, LinuxError> {
    if line.len() >= COMMAND_LINE_SIZE {
        return Err(LinuxError::CommandLineTooLong { bytes: line.len() });
    }
    if !line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(LinuxError::CommandLineBytes);
    }
    Ok([line.as_bytes(), &[0]].concat())
}
