//! Kernels that are none, for tests and fuzzing.

use std::io::Write;

use types::MemorySize;

use super::{Kernel, LinuxError, Start, load as load_kernel, memory};
use crate::class::{Class, Devices};

/// Loads bytes as a kernel into 32 MiB.
pub(crate) fn load(bytes: &[u8]) -> Option<Result<Start, LinuxError>> {
    let class = Class::with_devices(MemorySize::from_mib(32).expect("valid"), 1, Devices::Linux { disk: None, network: false });
    let class = class.expect("one vCPU");
    let (memory, file) = (memory(class).ok()?, tempfile(bytes)?);
    let what = Kernel { kernel: &file, initrd: None, command_line: "console=ttyS0", seed: [0; 32] };
    Some(load_kernel(class, &memory, &what))
}

fn tempfile(bytes: &[u8]) -> Option<std::fs::File> {
    let memfd = rustix::fs::memfd_create("farfork-test", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let mut file = std::fs::File::from(memfd);
    file.write_all(bytes).ok()?;
    Some(file)
}

/// An ELF file with one segment of 16 bytes at 16 MiB.
pub(crate) fn small_elf() -> Vec<u8> {
    let mut file = vec![0; 64 + 56 + 16];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[20..24].copy_from_slice(&1u32.to_le_bytes());
    file[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..54].copy_from_slice(&64u16.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&1u16.to_le_bytes());
    let segment = &mut file[64..120];
    segment[..4].copy_from_slice(&1u32.to_le_bytes());
    segment[8..16].copy_from_slice(&120u64.to_le_bytes());
    segment[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
    for at in [32, 40] {
        segment[at..at + 8].copy_from_slice(&16u64.to_le_bytes());
    }
    file
}

/// A bzImage of two sectors of set-up and 512 bytes of kernel.
pub(crate) fn small_bzimage() -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    file[0x1F1] = 1;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file[0x22C..0x230].copy_from_slice(&0x7FFF_FFFFu32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(bytes: &[u8]) -> LinuxError {
        load(bytes).unwrap().unwrap_err()
    }

    #[test]
    fn both_kinds_of_kernels_are_loaded() {
        load(&small_elf()).unwrap().unwrap();
        load(&small_bzimage()).unwrap().unwrap();
    }

    #[test]
    fn what_is_no_kernel_for_this_machine_is_told_apart() {
        assert!(matches!(error(b""), LinuxError::NotAKernel));
        assert!(matches!(error(&[0x7F; 4096]), LinuxError::NotAKernel));
        assert!(matches!(error(b"#!/bin/sh\n"), LinuxError::NotAKernel));
        let mut arm = small_elf();
        arm[18] = 183;
        assert!(matches!(error(&arm), LinuxError::OtherMachine(name) if name.contains("Arm")));
        let mut small = small_elf();
        small[4] = 1;
        assert!(matches!(error(&small), LinuxError::OtherMachine(_)));
        let mut old = small_bzimage();
        old[0x236] = 0;
        assert!(matches!(error(&old), LinuxError::OtherMachine(_)));
        let mut high = small_elf();
        high[64 + 24..64 + 32].copy_from_slice(&(40u64 << 20).to_le_bytes());
        assert!(matches!(error(&high), LinuxError::Damaged(_) | LinuxError::NoRoom { .. }));
        let mut hungry = small_bzimage();
        hungry[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(error(&hungry), LinuxError::NoRoom { .. }));
    }

    #[test]
    fn a_kernel_cut_short_at_any_place_is_refused() {
        for whole in [small_elf(), small_bzimage()] {
            for len in 0..whole.len() {
                let loaded = load(&whole[..len]).unwrap();
                // The tail of a bzImage may be short of nothing that its header names.
                assert!(loaded.is_err() || len >= 2 * 512, "{len} of {} bytes were taken", whole.len());
            }
        }
    }

    #[test]
    fn command_lines_and_initrds_that_do_not_fit_are_refused() {
        let class = Class::with_devices(MemorySize::from_mib(32).unwrap(), 1, Devices::Linux { disk: None, network: true });
        let class = class.unwrap();
        let (kernel, memory) = (tempfile(&small_elf()).unwrap(), memory(class).unwrap());
        let load = |initrd: Option<&std::fs::File>, command_line: &str| {
            load_kernel(class, &memory, &Kernel { kernel: &kernel, initrd, command_line, seed: [0; 32] })
        };
        assert!(matches!(load(None, &"x".repeat(2048)), Err(LinuxError::CommandLineTooLong { bytes: 2048 })));
        assert!(matches!(load(None, "console=\n"), Err(LinuxError::CommandLineBytes)));
        let initrd = tempfile(b"x").unwrap();
        load(Some(&initrd), "").unwrap();
        initrd.set_len(16 << 20).unwrap();
        assert!(matches!(load(Some(&initrd), ""), Err(LinuxError::InitrdTooLarge { .. })));
        initrd.set_len(u64::from(u32::MAX)).unwrap();
        assert!(matches!(load(Some(&initrd), ""), Err(LinuxError::InitrdTooLarge { .. })));
        let base = super::super::base_command_line(class, true);
        assert!(base.contains("4K@0xd0004000:11") && !base.contains("0xd0003000"), "{base}");
        let two = Class::with_devices(MemorySize::from_mib(32).unwrap(), 2, Devices::None).unwrap();
        let what = Kernel { kernel: &kernel, initrd: None, command_line: "", seed: [0; 32] };
        assert!(matches!(load_kernel(two, &memory, &what), Err(LinuxError::VcpuCount { asked: 2 })));
    }
}
