//! Starting the probe: tables in its memory, and registers with which it starts in ring 3.

use std::fs::File;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, Msrs, kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use types::{GuestAddress, MachineId, MemorySize, PAGE_SIZE, PageIndex};

use super::{MESSAGE_VECTOR, TIMER_VECTOR, block};
use crate::class::Class;
use crate::host::Host;
use crate::image::memfd::first_memory;
use crate::machine::Machine;
use crate::machine::frame::{BuildError, os_step, step};
use crate::shell::Shell;
use crate::sys::guest_memory::{GuestMemory, GuestMemoryError};
use crate::sys::payload::{BLOCK_SIZE, IDENTITY_PAGE, KVMCLOCK, MB_VCPU, payload};

const GDT: u64 = 0x1000;
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
pub(super) const IDT: u64 = 0x4000;
const TSS: u64 = 0x6000;
const TSS_STRIDE: u64 = 0x100;
const IO_BITMAP: u64 = 0x7000;
const IO_BITMAP_SIZE: u64 = 0x2000;
const CODE: u64 = 0xA000;
const PAGE_DIRECTORIES: u64 = 0x1_0000;
const WORK: u64 = 0x10_0000;

/// Linux's selectors. Under PVM ring 3 runs with the host's own user segments, which have the same numbers.
const KERNEL_CODE: u16 = 0x10;
const USER_DATA: u16 = 0x2B;
const USER_CODE: u16 = 0x33;
const FIRST_TSS: u16 = 0x40;

const LAPIC_PAGE: u64 = 0xFEE0_0000;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;

/// Why a probe could not be started.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum BootError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("writing the probe into its memory failed: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl BootError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Build(error) => error.remedy(),
            Self::Memory(_) => "give it at least 2 MiB",
        }
    }
}

/// Builds a first parent that runs the probe, at rest.
///
/// # Errors
/// [`BootError`].
pub fn boot(host: &Host, class: Class, id: MachineId) -> Result<Machine, BootError> {
    let shell = Shell::build(host, class)?;
    let memory = first_memory(class).map_err(os_step("memfd_create"))?;
    boot_in(shell, memory, id)
}

/// [`boot`] in a shell and in memory that are there already.
pub(crate) fn boot_in(shell: Shell, memory: Vec<File>, id: MachineId) -> Result<Machine, BootError> {
    let class = shell.class();
    shell.boot(id, memory, |memory, frame| {
        write_tables(memory, class)?;
        for index in 0..usize::from(class.vcpu_count()) {
            set_registers(&frame.core.vcpu(index), index)?;
        }
        Ok(Some(GuestAddress(IDENTITY_PAGE)))
    })
}

/// The first page that the probe leaves to commands.
#[must_use]
pub const fn first_work_page() -> PageIndex {
    PageIndex(WORK / PAGE_SIZE)
}

/// How many pages there are for work from [`first_work_page`] on without a gap.
#[must_use]
pub fn work_pages(memory: MemorySize) -> u64 {
    (memory.bytes().min(3 << 30) - WORK) / PAGE_SIZE
}

fn write_tables(memory: &GuestMemory, class: Class) -> Result<(), GuestMemoryError> {
    let word = |at: u64, value: u64| memory.write(GuestAddress(at), &value.to_le_bytes());
    // Segments: flat, with Linux's numbers; then a 16-byte TSS descriptor for each vCPU.
    word(GDT + u64::from(KERNEL_CODE), 0x00AF_9B00_0000_FFFF)?;
    word(GDT + 0x18, 0x00CF_9300_0000_FFFF)?;
    word(GDT + u64::from(USER_DATA & !7), 0x00CF_F300_0000_FFFF)?;
    word(GDT + u64::from(USER_CODE & !7), 0x00AF_FB00_0000_FFFF)?;
    for index in 0..u64::from(class.vcpu_count()) {
        let base = TSS + index * TSS_STRIDE;
        let descriptor = GDT + u64::from(FIRST_TSS) + index * 16;
        let limit = tss_limit(index);
        word(descriptor, limit & 0xFFFF | base << 16 | 0x8B << 40 | limit >> 16 << 48)?;
        word(base + 4, block(usize::try_from(index).expect("small")) + 0x2000)?;
        memory.write(GuestAddress(base + 102), &tss_io_base(index).to_le_bytes())?;
    }
    let payload = payload();
    memory.write(GuestAddress(CODE), payload.code)?;
    for vector in 0..32 {
        write_gate(memory, vector, CODE + payload.exceptions + vector * 16)?;
    }
    write_gate(memory, u64::from(TIMER_VECTOR), CODE + payload.timer)?;
    write_gate(memory, u64::from(MESSAGE_VECTOR), CODE + payload.message)?;
    // Everything mapped onto itself in pages of 2 MiB, open to ring 3; the APIC's page uncached.
    word(PML4, PDPT | 7)?;
    let gib_count = (class.memory().bytes().div_ceil(1 << 30) + 1).max(4);
    for gib in 0..gib_count {
        let directory = PAGE_DIRECTORIES + gib * PAGE_SIZE;
        word(PDPT + gib * 8, directory | 7)?;
        for entry in 0..512 {
            let page = gib << 30 | entry << 21;
            let uncached = if page == LAPIC_PAGE { 0x18 } else { 0 };
            word(directory + entry * 8, page | 0x87 | uncached)?;
        }
    }
    for index in 0..usize::from(class.vcpu_count()) {
        word(block(index) + MB_VCPU, index as u64)?;
    }
    Ok(())
}

/// An interrupt gate into ring 0 (Intel SDM volume 3, figure 6-8).
fn write_gate(memory: &GuestMemory, vector: u64, handler: u64) -> Result<(), GuestMemoryError> {
    let low = handler & 0xFFFF | u64::from(KERNEL_CODE) << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48;
    let gate = [low.to_le_bytes(), (handler >> 32).to_le_bytes()].concat();
    memory.write(GuestAddress(IDT + vector * 16), &gate)
}

/// Offset of the I/O bitmap from a TSS. All TSSs share one bitmap of zeros, which lets ring 3 use every port.
fn tss_io_base(index: u64) -> u16 {
    u16::try_from(IO_BITMAP - (TSS + index * TSS_STRIDE)).expect("the bitmap is near")
}

fn tss_limit(index: u64) -> u64 {
    u64::from(tss_io_base(index)) + IO_BITMAP_SIZE
}

fn set_registers(vcpu: &VcpuFd, index: usize) -> Result<(), BuildError> {
    let mut sregs = vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
    sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT, and OSXSAVE where the CPU has it.
    let has_xsave = vcpu.get_xcrs().is_ok_and(|xcrs| xcrs.nr_xcrs > 0);
    sregs.cr4 = 0x620 | if has_xsave { 1 << 18 } else { 0 };
    sregs.efer = 0x500; // LMA, LME
    sregs.cs = segment(USER_CODE, 11, true);
    sregs.ds = segment(USER_DATA, 3, false);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    let number = index as u64;
    sregs.tr = kvm_segment {
        base: TSS + number * TSS_STRIDE,
        limit: u32::try_from(tss_limit(number)).expect("small"),
        selector: FIRST_TSS + u16::try_from(number * 16).expect("small"),
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable { base: GDT, limit: 0xFFF, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT, limit: 0xFFF, ..Default::default() };
    vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
    if has_xsave {
        let mut xcrs = vcpu.get_xcrs().map_err(step("KVM_GET_XCRS"))?;
        xcrs.xcrs[0].value |= 7; // x87, SSE, AVX
        // A CPU without AVX keeps what it has; the probe's `Hold` is then asked for 16-byte vectors.
        vcpu.set_xcrs(&xcrs)
            .or_else(|error| if error.errno() == libc::EINVAL { Ok(()) } else { Err(error) })
            .map_err(step("KVM_SET_XCRS"))?;
    }
    let regs = kvm_regs {
        rip: CODE + payload().entry,
        rsp: block(index) + 0x3000,
        r15: block(index),
        rflags: 0x202, // interrupts on
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(step("KVM_SET_REGS"))?;
    let mut lapic = vcpu.get_lapic().map_err(step("KVM_GET_LAPIC"))?;
    set_apic_register(&mut lapic, 0xF0, 0x1FF); // software enable, spurious vector 255
    vcpu.set_lapic(&lapic).map_err(step("KVM_SET_LAPIC"))?;
    let mp_state = kvm_bindings::kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(mp_state).map_err(step("KVM_SET_MP_STATE"))?;
    let clock = kvm_msr_entry { index: MSR_KVM_SYSTEM_TIME_NEW, data: (block(index) + KVMCLOCK) | 1, ..Default::default() };
    let msrs = Msrs::from_entries(&[clock]).expect("one entry");
    match vcpu.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(step("switching the clock on (KVM_SET_MSRS)")(kvm_ioctls::Error::new(libc::EINVAL))),
        Err(error) => Err(step("KVM_SET_MSRS")(error)),
    }
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn set_apic_register(lapic: &mut kvm_lapic_state, register: usize, value: u32) {
    for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *byte = value.cast_signed();
    }
}

const _: () = assert!(block(Class::VCPUS_MAX as usize) + BLOCK_SIZE <= WORK, "the blocks end before the pages for work");
const _: () = assert!(PAGE_DIRECTORIES + 34 * PAGE_SIZE <= block(0), "32 GiB and the gap have their page directories");
