//! The floor: the system calls that a fork cannot do without, in a row, with nothing of the engine around them. What the
//! engine takes is given as a multiple of this, measured in the same run on the same machine.
//!
//! Guest: one vCPU in ring 3, identity-mapped, which writes to a port, touches pages if it is told to, and writes to the port
//! again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_irqchip, kvm_msr_entry};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_dtable, kvm_pit_config, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use types::{GuestAddress, HostAddress};

use super::kvm::{from_errno, set_memory_slot, set_xsave};
use super::slot::{Content, Piece, Slot};
use super::uffd::{Alias, Device, Stop, Watch};
use crate::Host;
use crate::image::memfd;

const PML4: usize = 0x2000;
const PDPT: usize = 0x3000;
const DIRECTORIES: usize = 0x10000;
const CODE: usize = 0x1000;
/// The first page that [`touch`] touches.
const TOUCHED: usize = 16 << 20;

/// What the guest does between its two port writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Reads a byte of each page.
    Read,
    /// Writes a byte of each page.
    Write,
}

/// A bare fork, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct BareFork {
    /// One private mapping of the memfd.
    pub map: Duration,
    /// Every ioctl that restores state.
    pub restore: Duration,
    /// KVM_RUN until the guest's first port write.
    pub run: Duration,
}

impl BareFork {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.map + self.restore + self.run
    }
}

/// Builds everything that does not depend on an image, untimed, then forks, timed. Run it in a process of its own: other VMs
/// in the process slow it down.
///
/// # Errors
/// What a system call failed with.
pub fn fork(host: &Host, bytes: u64, idle: Duration) -> io::Result<BareFork> {
    let memfd = guest(bytes, &[0xE6, 0x10, 0xEB, 0xFC])?;
    let mut shell = BareShell::build(host, bytes)?;
    let saved = Saved::of(host, &shell)?;
    std::thread::sleep(idle);
    let started = Instant::now();
    shell.map(&memfd, bytes)?;
    let mapped = Instant::now();
    saved.restore(&shell)?;
    let restored = Instant::now();
    expect_port(&mut shell.vcpu)?;
    Ok(BareFork { map: mapped - started, restore: restored - mapped, run: restored.elapsed() })
}

/// Time for a guest to touch `pages` pages that are present in the memfd under its private mapping.
///
/// # Errors
/// What a system call failed with.
pub fn touch(host: &Host, bytes: u64, pages: u32, touch: Touch) -> io::Result<Duration> {
    let code = touching(pages, 4096, touch)?;
    let memfd = guest(bytes, &code)?;
    let file = std::fs::File::from(memfd);
    let ones = vec![1; pages as usize * 4096];
    std::os::unix::fs::FileExt::write_all_at(&file, &ones, TOUCHED as u64)?;
    let memfd = OwnedFd::from(file);
    let mut shell = BareShell::build(host, bytes)?;
    let saved = Saved::of(host, &shell)?;
    shell.map(&memfd, bytes)?;
    saved.restore(&shell)?;
    expect_port(&mut shell.vcpu)?;
    let started = Instant::now();
    expect_port(&mut shell.vcpu)?;
    Ok(started.elapsed())
}

/// Time to write so many bytes from private memory into a fresh memfd, in one go. The source is as large as the copy: one that
/// fits the CPU's caches would flatter the control.
///
/// # Errors
/// What a system call failed with.
pub fn copy(bytes: u64) -> io::Result<Duration> {
    let memfd = memfd::create("farfork-floor", bytes)?;
    let source = vec![1; usize::try_from(bytes).map_err(io::Error::other)?];
    let started = Instant::now();
    std::os::unix::fs::FileExt::write_all_at(&memfd, &source, 0)?;
    Ok(started.elapsed())
}

const EXTENT: u32 = 1 << 16;

/// What a fault costs that another thread answers, and what placing an extent costs: each the mean of many.
#[derive(Clone, Copy, Debug)]
pub struct BareFault {
    /// From the touch until the guest goes on: one page was placed, and the guest woken.
    pub fault: Duration,
    /// One `UFFDIO_COPY` of 16 pages into a file that others map.
    pub publication: Duration,
}

/// What a child's touches of all pages of an extent cost when a pager copies the extent into memory of the child's own, at the
/// first of them: the mean of many. Every child pays it anew, and the memory.
///
/// # Errors
/// What a system call failed with.
pub fn copied(host: &Host, count: u32) -> io::Result<Duration> {
    let (each, first) = (u64::from(EXTENT), TOUCHED as u64);
    let touched = first..first + u64::from(count) * each;
    let bytes = touched.end.next_multiple_of(2 << 20);
    let memfd = guest(bytes, &touching(count * (EXTENT / 4096), 4096, Touch::Read)?)?;
    let mut shell = BareShell::build(host, bytes)?;
    let saved = Saved::of(host, &shell)?;
    shell.map(&memfd, bytes)?;
    let watch = Device::open()?.watch()?;
    watch.register(&shell.slot, &touched)?;
    saved.restore(&shell)?;
    expect_port(&mut shell.vcpu)?;
    let BareShell { vcpu, slot, .. } = &mut shell;
    let extent = [7; EXTENT as usize];
    let took = answered(&watch, vcpu, count, EXTENT as usize, |at| {
        placed(watch.place(slot, at, &extent), extent.len())?;
        watch.wake(at, extent.len())
    })?;
    Ok(took / count)
}

/// Has a guest touch `count` pages, each of another extent, that are not in the memfd until this places them; and then places
/// as many extents that nobody waits for.
///
/// # Errors
/// What a system call failed with.
pub fn fault(host: &Host, count: u32) -> io::Result<BareFault> {
    let (each, first) = (u64::from(EXTENT), TOUCHED as u64);
    let touched = first..first + u64::from(count) * each;
    let bytes = (touched.end + u64::from(count) * each).next_multiple_of(2 << 20);
    let memfd = std::fs::File::from(guest(bytes, &touching(count, EXTENT, Touch::Read)?)?);
    let device = Device::open()?;
    let alias = Alias::of(&memfd, bytes, &device)?;
    let memfd = OwnedFd::from(memfd);
    let mut shell = BareShell::build(host, bytes)?;
    let saved = Saved::of(host, &shell)?;
    shell.map(&memfd, bytes)?;
    let watch = device.watch()?;
    watch.register(&shell.slot, &touched)?;
    saved.restore(&shell)?;
    expect_port(&mut shell.vcpu)?;
    let start = shell.slot.start().0;
    let page = [7; 4096];
    let fault = answered(&watch, &mut shell.vcpu, count, 4096, |at| {
        placed(alias.place((at.0 - start) as u64, &page), page.len())?;
        watch.wake(at, page.len())
    })?;
    let extent = vec![7; EXTENT as usize];
    let began = Instant::now();
    for number in 0..u64::from(count) {
        placed(alias.place(touched.end + number * each, &extent), extent.len())?;
    }
    Ok(BareFault { fault: fault / count, publication: began.elapsed() / count })
}

/// Runs a guest until it has made so many faults, which another thread answers; how long that took.
fn answered(
    watch: &Watch,
    vcpu: &mut VcpuFd,
    count: u32,
    unit: usize,
    answer: impl Fn(HostAddress) -> io::Result<()> + Send,
) -> io::Result<Duration> {
    std::thread::scope(|scope| {
        let answers = scope.spawn(move || answer_all(watch, count, unit, answer));
        let began = Instant::now();
        expect_port(vcpu)?;
        let took = began.elapsed();
        answers.join().expect("it does not panic")?;
        Ok(took)
    })
}

fn answer_all(watch: &Watch, count: u32, unit: usize, answer: impl Fn(HostAddress) -> io::Result<()>) -> io::Result<()> {
    let mut answered = 0;
    while answered < count {
        let mut waiting = [PollFd::new(watch, PollFlags::IN)];
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        if rustix::event::poll(&mut waiting, Some(&patience))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut touched = Vec::new();
        watch.read(|at| touched.push(HostAddress(at.0 - at.0 % unit)))?;
        for at in touched {
            answer(at)?;
            answered += 1;
        }
    }
    Ok(())
}

fn placed((bytes, stop): (usize, Option<Stop>), due: usize) -> io::Result<()> {
    if bytes == due { Ok(()) } else { Err(io::Error::other(format!("{bytes} of {due} bytes were placed: {stop:?}"))) }
}

/// Code that writes to a port, touches so many pages, each `stride` bytes after the last, and writes to another port.
fn touching(pages: u32, stride: u32, touch: Touch) -> io::Result<Vec<u8>> {
    let access: &[u8] = match touch {
        Touch::Read => &[0x8A, 0x07],  // mov al, [rdi]
        Touch::Write => &[0x88, 0x07], // mov [rdi], al
    };
    let mut code = vec![0xE6, 0x10]; // out 0x10, al
    code.extend([0x48, 0xC7, 0xC7]); // mov rdi, TOUCHED
    code.extend(u32::try_from(TOUCHED).map_err(io::Error::other)?.to_le_bytes());
    code.extend([0x48, 0xC7, 0xC1]); // mov rcx, pages
    code.extend(pages.to_le_bytes());
    let top = code.len();
    code.extend(access);
    code.extend([0x48, 0x81, 0xC7]); // add rdi, stride
    code.extend(stride.to_le_bytes());
    code.extend([0x48, 0xFF, 0xC9, 0x75]); // dec rcx; jnz top
    code.push(u8::try_from(256 + top - (code.len() + 1)).map_err(io::Error::other)?);
    code.extend([0xE6, 0x11, 0xEB, 0xFE]); // out 0x11, al
    Ok(code)
}

/// A memfd with the guest's tables and code.
fn guest(bytes: u64, code: &[u8]) -> io::Result<OwnedFd> {
    let memfd = memfd::create("farfork-floor", bytes)?;
    let write = |at: usize, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&memfd, bytes, at as u64);
    write(PML4, &(PDPT as u64 | 7).to_le_bytes())?;
    for gib in 0..bytes.div_ceil(1 << 30) {
        let directory = DIRECTORIES as u64 + gib * 4096;
        write(PDPT + usize::try_from(gib).map_err(io::Error::other)? * 8, &(directory | 7).to_le_bytes())?;
        let entries: Vec<u8> = (0..512u64).flat_map(|entry| (gib << 30 | entry << 21 | 0x87).to_le_bytes()).collect();
        write(usize::try_from(directory).map_err(io::Error::other)?, &entries)?;
    }
    write(CODE, code)?;
    Ok(memfd.into())
}

struct BareShell {
    vcpu: VcpuFd,
    vm: VmFd,
    // After the VM: its addresses must outlive it.
    slot: Slot,
}

impl BareShell {
    fn build(host: &Host, bytes: u64) -> io::Result<Self> {
        let vm = host.kvm().create_vm().map_err(from_errno)?;
        let slot = Slot::reserve(bytes)?;
        set_memory_slot(&vm, 0, GuestAddress(0), &slot)?;
        vm.create_irq_chip().map_err(from_errno)?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).map_err(from_errno)?;
        let mut vcpu = vm.create_vcpu(0).map_err(from_errno)?;
        vcpu.set_cpuid2(&host.facts.cpuid).map_err(from_errno)?;
        vcpu.set_kvm_immediate_exit(1);
        match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => {}
            _ => return Err(io::Error::other("the warming run did not come straight back")),
        }
        vcpu.set_kvm_immediate_exit(0);
        Ok(Self { vcpu, vm, slot })
    }

    /// One mmap.
    fn map(&mut self, memfd: &OwnedFd, bytes: u64) -> io::Result<()> {
        self.slot.place([Piece { bytes: 0..bytes, content: Content::Private(memfd.as_fd()) }])
    }
}

/// What a fork restores, read beforehand.
struct Saved {
    sregs: kvm_bindings::kvm_sregs,
    xsave: kvm_bindings::kvm_xsave,
    xcrs: kvm_bindings::kvm_xcrs,
    debug_regs: kvm_bindings::kvm_debugregs,
    lapic: kvm_bindings::kvm_lapic_state,
    msrs: Msrs,
    events: kvm_bindings::kvm_vcpu_events,
    mp_state: kvm_bindings::kvm_mp_state,
    pit: kvm_bindings::kvm_pit_state2,
    clock: kvm_clock_data,
    irqchips: Vec<kvm_irqchip>,
}

impl Saved {
    fn of(host: &Host, shell: &BareShell) -> io::Result<Self> {
        let BareShell { vcpu, vm, .. } = shell;
        let mut sregs = vcpu.get_sregs().map_err(from_errno)?;
        sregs.cr3 = PML4 as u64;
        sregs.cr4 = 0x20;
        sregs.cr0 = 0x8005_0033;
        sregs.efer = 0x500;
        let segment = kvm_segment { limit: 0xFFFF_FFFF, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x33, type_: 11, l: 1, ..segment };
        sregs.ds = kvm_segment { selector: 0x2B, type_: 3, db: 1, ..segment };
        (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
        // A TSS whose I/O bitmap lies in zeroed memory, for CPUs that check it.
        sregs.tr = kvm_segment { base: 0x8000, limit: 0x4068, selector: 0x40, type_: 11, present: 1, ..Default::default() };
        sregs.gdt = kvm_dtable { base: 0x7000, limit: 0xFFF, ..Default::default() };
        let entries: Vec<_> =
            host.facts.msrs.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| io::Error::other("too many MSRs"))?;
        vcpu.get_msrs(&mut msrs).map_err(from_errno)?;
        let irqchips: io::Result<Vec<_>> = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map_err(from_errno).map(|()| chip)
            })
            .collect();
        Ok(Self {
            sregs,
            xsave: vcpu.get_xsave().map_err(from_errno)?,
            xcrs: vcpu.get_xcrs().map_err(from_errno)?,
            debug_regs: vcpu.get_debug_regs().map_err(from_errno)?,
            lapic: vcpu.get_lapic().map_err(from_errno)?,
            msrs,
            events: vcpu.get_vcpu_events().map_err(from_errno)?,
            mp_state: vcpu.get_mp_state().map_err(from_errno)?,
            pit: vm.get_pit2().map_err(from_errno)?,
            clock: kvm_clock_data { clock: vm.get_clock().map_err(from_errno)?.clock, ..Default::default() },
            irqchips: irqchips?,
        })
    }

    fn restore(&self, shell: &BareShell) -> io::Result<()> {
        let BareShell { vcpu, vm, .. } = shell;
        vcpu.set_mp_state(self.mp_state).map_err(from_errno)?;
        let regs = kvm_regs { rip: CODE as u64, rflags: 0x3002, rsp: 0x10_0000, ..Default::default() };
        vcpu.set_regs(&regs).map_err(from_errno)?;
        vcpu.set_sregs(&self.sregs).map_err(from_errno)?;
        set_xsave(vcpu, &self.xsave)?;
        vcpu.set_xcrs(&self.xcrs).map_err(from_errno)?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(from_errno)?;
        vcpu.set_lapic(&self.lapic).map_err(from_errno)?;
        vcpu.set_msrs(&self.msrs).map_err(from_errno)?;
        vcpu.set_vcpu_events(&self.events).map_err(from_errno)?;
        vm.set_pit2(&self.pit).map_err(from_errno)?;
        vm.set_clock(&self.clock).map_err(from_errno)?;
        self.irqchips.iter().try_for_each(|chip| vm.set_irqchip(chip).map_err(from_errno))
    }
}

fn expect_port(vcpu: &mut VcpuFd) -> io::Result<()> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(..)) => Ok(()),
        other => Err(io::Error::other(format!("the floor's guest came out with {other:?}"))),
    }
}
