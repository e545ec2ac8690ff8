//! Shells: machines built ahead of the image they will run.
//!
//! What a shell has done is what does not depend on an image, in the order that costs least (`docs/decisions/0004`): VM,
//! memory slots, interrupt controller, timer, vCPUs, CPUID, one warming run of each vCPU. Slots before vCPUs: after one exists,
//! each slot costs 7 ms. The slots' address ranges are left unmapped.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use types::{GuestAddress, MachineId, MemorySize, RegionKind};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Bus;
use crate::device::serial::{self, Console, Serial};
use crate::host::{Host, HostError};
use crate::image::Image;
use crate::machine::monitor::Monitor;
use crate::machine::state::{self, StateError};
use crate::machine::vcpu::{self, Seat};
use crate::machine::{Backing, Machine};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::kvm::{Kicker, from_errno, set_memory_slot};
use crate::sys::slot::{Content, Piece, Slot};

/// Guest RAM leaves this range free for the interrupt controllers' registers and devices to come.
const GAP_START: u64 = 3 << 30;
const GAP_END: u64 = 4 << 30;
/// Three pages that VMX needs and no guest uses, just below the BIOS area.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// What a shell must have in common with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Class {
    memory: MemorySize,
    vcpu_count: u8,
}

impl Class {
    /// The most vCPUs: the state of eight fits a manifest head even with every vector register in use.
    pub const VCPUS_MAX: u8 = 8;

    /// Checks the number of vCPUs.
    ///
    /// # Errors
    /// [`BuildError::VcpuCount`].
    pub fn new(memory: MemorySize, vcpu_count: u8) -> Result<Self, BuildError> {
        if (1..=Self::VCPUS_MAX).contains(&vcpu_count) {
            Ok(Self { memory, vcpu_count })
        } else {
            Err(BuildError::VcpuCount { asked: vcpu_count })
        }
    }

    /// Guest RAM.
    #[must_use]
    pub fn memory(&self) -> MemorySize {
        self.memory
    }

    /// Number of virtual CPUs.
    #[must_use]
    pub fn vcpu_count(&self) -> u8 {
        self.vcpu_count
    }
}

/// Where a machine's RAM lies in its address space: below the gap, and what does not fit there above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RamLayout {
    low_bytes: u64,
    high_bytes: u64,
}

impl RamLayout {
    pub(crate) fn of(memory: MemorySize) -> Self {
        let low_bytes = memory.bytes().min(GAP_START);
        Self { low_bytes, high_bytes: memory.bytes() - low_bytes }
    }

    /// Start and size of each region.
    pub(crate) fn regions(&self) -> impl Iterator<Item = (GuestAddress, u64)> + use<> {
        [(GuestAddress(0), self.low_bytes), (GuestAddress(GAP_END), self.high_bytes)].into_iter().filter(|(_, len)| *len > 0)
    }

    pub(crate) fn contains(&self, at: GuestAddress) -> bool {
        self.regions().any(|(start, len)| at >= start && at.0 - start.0 < len)
    }
}

/// A machine without memory and without state. See the module.
#[derive(Debug)]
pub struct Shell {
    // Before the slots: the VM must be closed before their addresses can be used again.
    pub(crate) frame: Frame,
    slots: Vec<(GuestAddress, Slot)>,
    class: Class,
}

/// The part of a machine that is KVM's: VM, vCPUs and their threads, devices.
#[derive(Debug)]
pub(crate) struct Frame {
    threads: Vec<JoinHandle<()>>,
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(crate) vm: VmFd,
    pub(crate) bus: Arc<Mutex<Bus>>,
    pub(crate) console: Console,
}

/// Why no shell could be built.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum BuildError {
    #[error("{asked} virtual CPUs where a machine has 1 to 8")]
    VcpuCount { asked: u8 },
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
}

impl BuildError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::VcpuCount { .. } => "ask for 1 to 8",
            Self::Host(error) => error.remedy(),
            Self::Step { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n, fs.file-max)",
                Some(libc::ENOMEM) => "end other machines, or ask for less memory",
                Some(libc::EAGAIN) => "raise the limits on processes and threads (ulimit -u, pids.max)",
                _ => "look for its cause in the kernel log",
            },
        }
    }
}

/// Why an image could not be forked.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ForkError {
    #[error("the image needs {image_memory} and {image_vcpus} vCPUs; the shell was built for {shell_memory} and {shell_vcpus}")]
    OtherClass { image_memory: MemorySize, image_vcpus: u8, shell_memory: MemorySize, shell_vcpus: u8 },
    #[error("mapping the image's memory failed: {source}")]
    Map { source: io::Error },
    #[error("writing the child's identity failed: {source}")]
    Identity { source: crate::GuestMemoryError },
    #[error(transparent)]
    State(#[from] StateError),
}

impl ForkError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::OtherClass { .. } => "build the shell for the class of the image (Image::class)",
            Self::Map { source } if source.raw_os_error() == Some(libc::EEXIST) => {
                "fork again with a new shell: something else was mapped into this one's address range"
            }
            Self::Map { .. } => "raise vm.max_map_count, or end other machines",
            Self::Identity { .. } => "make the image again: its identity page is not in its RAM",
            Self::State(error) => error.remedy(),
        }
    }
}

/// How long the steps of a fork took.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkStages {
    /// Mapping the image's runs.
    pub map: Duration,
    /// Restoring registers and devices, and writing the identity.
    pub restore: Duration,
}

impl Shell {
    /// Builds a shell.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build(host: &Host, class: Class) -> Result<Self, BuildError> {
        host.check_memory(class.memory)?;
        let ram = RamLayout::of(class.memory);
        // Named before the VM, so dropped after it.
        let mut slots = Vec::with_capacity(2);
        let vm = host.kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
        for (number, (guest, len)) in (0u32..).zip(ram.regions()) {
            let slot = Slot::reserve(len).map_err(|source| BuildError::Step { step: "reserving addresses", source })?;
            set_memory_slot(&vm, number, guest, &slot)
                .map_err(|source| BuildError::Step { step: "KVM_SET_USER_MEMORY_REGION", source })?;
            slots.push((guest, slot));
        }
        vm.set_tss_address(TSS_ADDRESS).map_err(step("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(step("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(step("KVM_CREATE_PIT2"))?;
        let console = Console::default();
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os_step("eventfd"))?;
        vm.register_irqfd(&line, serial::INTERRUPT).map_err(step("KVM_IRQFD"))?;
        let bus = Arc::new(Mutex::new(Bus::new(Serial::new(line, console.clone()))));
        let frame = Frame::start(host, class, ram, vm, bus, console)?;
        Ok(Self { frame, slots, class })
    }

    /// What it was built for.
    #[must_use]
    pub fn class(&self) -> Class {
        self.class
    }

    /// Makes the shell a child of `image`: maps its memory, restores its state, tells it who it is. The child is at rest;
    /// [`Machine::resume`] runs it.
    ///
    /// # Errors
    /// [`ForkError`]; the shell is gone, the image is untouched.
    pub fn fork(self, image: &Arc<Image>, id: MachineId) -> Result<Machine, ForkError> {
        let class = image.class();
        if class != self.class {
            return Err(ForkError::OtherClass {
                image_memory: class.memory,
                image_vcpus: class.vcpu_count,
                shell_memory: self.class.memory,
                shell_vcpus: self.class.vcpu_count,
            });
        }
        let started = Instant::now();
        // The order of the names matters: what is named last is dropped first, and the VM must go before its addresses.
        let Self { mut slots, frame, .. } = self;
        for ((_, slot), region) in slots.iter_mut().zip(image.ram()) {
            slot.map(region.pieces()).map_err(|source| ForkError::Map { source })?;
        }
        let mapped = Instant::now();
        let backing = Backing::Image(Arc::clone(image));
        let mut machine = Machine::new(id, frame, GuestMemory::over(slots), backing, class);
        machine.set_identity_page(image.identity_page()).map_err(|source| ForkError::Identity { source })?;
        state::restore(&machine.frame, image.state())?;
        machine.stages = ForkStages { map: mapped - started, restore: mapped.elapsed() };
        Ok(machine)
    }

    /// Makes the shell the first parent: fresh zeroed memory, filled and started by `load`, which returns the guest's identity
    /// page if it has one.
    ///
    /// # Errors
    /// What mapping memory or `load` failed with.
    pub(crate) fn boot<E: From<BuildError>>(
        self,
        id: MachineId,
        load: impl FnOnce(&GuestMemory, &Frame) -> Result<Option<GuestAddress>, E>,
    ) -> Result<Machine, E> {
        // Dropped in the reverse of this order, as in `fork`.
        let Self { mut slots, frame, class } = self;
        let os = |step| move |source| BuildError::Step { step, source };
        let mut memfds = Vec::with_capacity(slots.len());
        for (_, slot) in &mut slots {
            let bytes = slot.len() as u64;
            let memfd = crate::image::memfd::create("farfork-parent", bytes).map_err(os("memfd_create"))?;
            let whole = Piece { bytes: 0..bytes, content: Content::Shared(std::os::fd::AsFd::as_fd(&memfd)) };
            slot.map([whole]).map_err(os("mapping guest memory"))?;
            memfds.push(memfd);
        }
        let mut machine = Machine::new(id, frame, GuestMemory::over(slots), Backing::Own(memfds), class);
        let identity_page = load(machine.memory(), &machine.frame)?;
        let written = machine.set_identity_page(identity_page);
        written.map_err(|error| BuildError::Step { step: "writing the identity", source: io::Error::other(error) })?;
        Ok(machine)
    }
}

impl Frame {
    fn start(
        host: &Host,
        class: Class,
        ram: RamLayout,
        vm: VmFd,
        bus: Arc<Mutex<Bus>>,
        console: Console,
    ) -> Result<Self, BuildError> {
        let mut vcpus = Vec::with_capacity(usize::from(class.vcpu_count));
        let mut kickers = Vec::with_capacity(usize::from(class.vcpu_count));
        for index in 0..class.vcpu_count {
            let vcpu = vm.create_vcpu(u64::from(index)).map_err(step("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpuid_of(&host.cpuid, index)).map_err(step("KVM_SET_CPUID2"))?;
            kickers.push(Kicker::new(&vcpu).map_err(|source| BuildError::Step { step: "mapping the run page", source })?);
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let monitor = Arc::new(Monitor::new(kickers));
        // From here on dropping the frame ends the threads that were started.
        let mut frame = Self { threads: Vec::with_capacity(vcpus.len()), monitor, vcpus, vm, bus, console };
        for index in 0..frame.vcpus.len() {
            let seat = Seat {
                index,
                vcpu: Arc::clone(&frame.vcpus[index]),
                monitor: Arc::clone(&frame.monitor),
                bus: Arc::clone(&frame.bus),
                ram,
            };
            let thread = vcpu::spawn(seat).map_err(|source| BuildError::Step { step: "starting a vCPU thread", source })?;
            frame.threads.push(thread);
        }
        frame.monitor.wait_for_start();
        Ok(frame)
    }

    /// Locks a vCPU's descriptor. Its thread holds the lock while the guest runs, so callers have paused it.
    pub(crate) fn vcpu(&self, index: usize) -> std::sync::MutexGuard<'_, VcpuFd> {
        self.vcpus[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.monitor.stop();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has printed why; the machine is going away all the same.
            thread.join().unwrap_or_default();
        }
    }
}

/// The CPUID entries of one vCPU: KVM's, with its own APIC id (Intel SDM volume 2, leaves 1, 0xB and 0x1F).
fn cpuid_of(host: &CpuId, index: u8) -> CpuId {
    let mut cpuid = host.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00FF_FFFF | u32::from(index) << 24,
            0xB | 0x1F => entry.edx = u32::from(index),
            _ => {}
        }
    }
    cpuid
}

/// The regions that RAM of this size consists of, and their sizes.
pub(crate) fn ram_regions(memory: MemorySize) -> Vec<(RegionKind, u64)> {
    RamLayout::of(memory).regions().map(|(start, len)| (RegionKind::Ram(start), len)).collect()
}

pub(crate) fn step(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Step { step, source: from_errno(error) }
}

fn os_step(step: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Step { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_gap_free() {
        let regions = |gib: u64| -> Vec<_> { RamLayout::of(MemorySize::from_mib(gib << 10).unwrap()).regions().collect() };
        assert_eq!(regions(3), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(regions(4), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
        let four = RamLayout::of(MemorySize::from_mib(4096).unwrap());
        assert!(four.contains(GuestAddress((3 << 30) - 1)));
        assert!(!four.contains(GuestAddress(3 << 30)));
        assert!(!four.contains(GuestAddress(0xFEE0_0000)));
        assert!(four.contains(GuestAddress((5 << 30) - 1)));
        assert!(!four.contains(GuestAddress(5 << 30)));
    }
}
