//! Attempts by way of KVM.

use super::{Outcome, PAGE_SIZE, Scene, at, at_mut, call, does, effect, int, opens};

/// Requests (`linux/kvm.h`).
const CREATE_VM: usize = 0xAE01;
const CREATE_VCPU: usize = 0xAE41;
const SET_USER_MEMORY_REGION: usize = 0x4020_AE46;
const GET_REGS: usize = 0x8090_AE81;
const SET_REGS: usize = 0x4090_AE82;
const IRQFD: usize = 0x4020_AE76;

pub(crate) fn create_vm(scene: &Scene) -> Outcome {
    opens(libc::SYS_ioctl, [scene.gift(), CREATE_VM, 0])
}

pub(crate) fn create_vcpu(scene: &Scene) -> Outcome {
    opens(libc::SYS_ioctl, [int(scene.vm), CREATE_VCPU, 200])
}

/// Shows the guest the worker's own memory, at 1 TiB.
pub(crate) fn show_worker_to_guest(scene: &Scene) -> Outcome {
    #[repr(C)]
    struct Slot {
        slot: u32,
        flags: u32,
        guest: u64,
        size: u64,
        host: usize,
    }
    static SECRET: [u8; 2 * PAGE_SIZE] = [1; 2 * PAGE_SIZE];
    let host = at(&SECRET).next_multiple_of(PAGE_SIZE);
    let slot = Slot { slot: 100, flags: 0, guest: 1 << 40, size: PAGE_SIZE as u64, host };
    does(libc::SYS_ioctl, [int(scene.vm), SET_USER_MEMORY_REGION, at(&slot)])
}

pub(crate) fn get_regs(scene: &Scene) -> Outcome {
    let mut registers = [0_u64; 18];
    does(libc::SYS_ioctl, [int(scene.vcpu), GET_REGS, at_mut(&mut registers)])?;
    // The last is rflags, of which one bit is always set.
    effect(registers[17] & 2 != 0)
}

pub(crate) fn set_regs(scene: &Scene) -> Outcome {
    // No register of it but rflags; the guest will not go on.
    let mut registers = [0_u64; 18];
    registers[17] = 2;
    does(libc::SYS_ioctl, [int(scene.vcpu), SET_REGS, at(&registers)])
}

pub(crate) fn irqfd(scene: &Scene) -> Outcome {
    let event = call(libc::SYS_eventfd2, [0, 0])?;
    let mut irqfd = [0_u32; 8];
    irqfd[0] = u32::try_from(event).unwrap_or(u32::MAX);
    irqfd[1] = 5;
    does(libc::SYS_ioctl, [int(scene.vm), IRQFD, at(&irqfd)])
}
