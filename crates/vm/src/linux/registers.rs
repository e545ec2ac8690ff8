//! The first vCPU as the 64-bit boot protocol wants it: long mode, low memory mapped onto itself, interrupts off, RSI at the boot
//! parameters.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use types::GuestAddress;

use super::{LinuxError, Start};
use crate::machine::frame::{BuildError, step};
use crate::sys::guest_memory::{GuestMemory, GuestMemoryError};

const GDT: u64 = 0x500;
const STACK: u64 = 0x8FF0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const PAGE_DIRECTORIES: u64 = 0xB000;
/// How much is mapped: all low memory that a kernel may lie in.
const MAPPED_GIB: u64 = 4;
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;
/// IA32_MISC_ENABLE with fast strings; IA32_MTRR_DEF_TYPE enabled, write-back.
const MSRS: [(u32, u64); 2] = [(0x1A0, 1), (0x2FF, 1 << 11 | 6)];
/// Local vectors of the APIC (Intel SDM volume 3, 10.5.1), and how they deliver: the PIC's interrupts, and NMI.
const LVT0: usize = 0x350;
const LVT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;

pub(super) fn set(vcpu: &VcpuFd, memory: &GuestMemory, start: Start) -> Result<(), LinuxError> {
    write_tables(memory)?;
    Ok(set_registers(vcpu, start)?)
}

fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let word = |at: u64, value: u64| memory.write(GuestAddress(at), &value.to_le_bytes());
    word(GDT + u64::from(CODE), 0x00AF_9B00_0000_FFFF)?;
    word(GDT + u64::from(DATA), 0x00CF_9300_0000_FFFF)?;
    word(GDT + u64::from(TSS), 0x008F_8B00_0000_FFFF)?;
    word(PML4, PDPT | 3)?;
    for gib in 0..MAPPED_GIB {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        word(PDPT + gib * 8, directory | 3)?;
        for entry in 0..512 {
            // Pages of 2 MiB: present, writable, large.
            word(directory + entry * 8, gib << 30 | entry << 21 | 0x83)?;
        }
    }
    Ok(())
}

fn set_registers(vcpu: &VcpuFd, start: Start) -> Result<(), BuildError> {
    let mut sregs = vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
    sregs.cr0 = 0x8000_0011; // PG, ET, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    sregs.cs = segment(CODE, 11, true);
    sregs.ds = segment(DATA, 3, false);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.tr = kvm_segment { s: 0, ..segment(TSS, 11, false) };
    sregs.gdt = kvm_dtable { base: GDT, limit: 0x27, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
    let regs =
        kvm_regs { rip: start.entry.0, rsp: STACK, rbp: STACK, rsi: start.boot_params.0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(step("KVM_SET_REGS"))?;
    let mut lapic = vcpu.get_lapic().map_err(step("KVM_GET_LAPIC"))?;
    for (register, delivery) in [(LVT0, DELIVER_EXTINT), (LVT1, DELIVER_NMI)] {
        for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(delivery.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(step("KVM_SET_LAPIC"))?;
    let entries = MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    // Advice to the kernel; a host without one of them boots as well.
    vcpu.set_msrs(&Msrs::from_entries(&entries).expect("two entries")).map_err(step("KVM_SET_MSRS")).map(drop)
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
