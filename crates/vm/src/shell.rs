//! Shells: machines built ahead of the image they will run.
//!
//! What a shell has done is what does not depend on an image, in the order that costs least (`docs/decisions/0004`): VM,
//! memory slots, interrupt controller, timer, vCPUs, CPUID, one warming run of each vCPU. Slots before vCPUs: after one exists,
//! each slot costs 7 ms. The slots' address ranges are left unmapped.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use thiserror::Error;
use types::{GuestAddress, MachineId, MemorySize, RegionKind};
use vmm_sys_util::eventfd::EventFd;

use crate::class::{Class, RamLayout};
use crate::device::Bus;
use crate::device::serial::{self, Console, Serial};
use crate::host::Host;
use crate::image::Image;
pub use crate::machine::frame::BuildError;
use crate::machine::frame::{Frame, Keeping, os_step, step};
use crate::machine::state::{self, StateError};
use crate::machine::{Backing, ForkStages, Machine};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::kvm::set_memory_slot;
use crate::sys::slot::{Content, Piece, Slot};

/// Three pages that VMX needs and no guest uses, just below the BIOS area.
const TSS_ADDRESS: usize = 0xFFFB_D000;

/// A machine without memory and without state. See the module.
#[derive(Debug)]
pub struct Shell {
    // Before the slots: the VM must be closed before their addresses can be used again.
    pub(crate) frame: Frame,
    slots: Vec<(RegionKind, Slot)>,
    class: Class,
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
    #[error("some of the image's memory is still on its way; only a machine of a pool can wait for it")]
    Arriving,
    #[error("the child's absent memory cannot be watched: {source}")]
    Watch { source: io::Error },
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
            Self::Arriving => "fork it with a pool, or when it has settled",
            Self::Watch { .. } => "let the node open /dev/userfaultfd (farfork doctor says how)",
            Self::Identity { .. } => "make the image again: its identity page is not in its RAM",
            Self::State(error) => error.remedy(),
        }
    }
}

impl Shell {
    /// Builds a shell.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build(host: &Host, class: Class) -> Result<Self, BuildError> {
        Self::build_kept(host, class, Keeping::default())
    }

    /// [`Shell::build`], with vCPU threads that are kept as said.
    pub(crate) fn build_kept(host: &Host, class: Class, keeping: Keeping) -> Result<Self, BuildError> {
        host.check_class(class)?;
        let ram = RamLayout::of(class.memory());
        // Named before the VM, so dropped after it.
        let mut slots = Vec::with_capacity(3);
        let vm = host.kvm().create_vm().map_err(step("KVM_CREATE_VM"))?;
        for (number, (kind, len)) in (0u32..).zip(class.regions()) {
            let slot = Slot::reserve(len).map_err(|source| BuildError::Step { step: "reserving addresses", source })?;
            // A disk is memory of the machine's that its guest reaches through a device.
            if let RegionKind::Ram(guest) = kind {
                set_memory_slot(&vm, number, guest, &slot)
                    .map_err(|source| BuildError::Step { step: "KVM_SET_USER_MEMORY_REGION", source })?;
            }
            slots.push((kind, slot));
        }
        vm.set_tss_address(TSS_ADDRESS).map_err(step("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(step("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(step("KVM_CREATE_PIT2"))?;
        let console = Console::default();
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os_step("eventfd"))?;
        vm.register_irqfd(&line, serial::INTERRUPT).map_err(step("KVM_IRQFD"))?;
        let vm = Arc::new(vm);
        let bus = Arc::new(Mutex::new(Bus::new(Serial::new(line, console.clone()), class, &vm, &console)));
        let frame = Frame::start(host, class, ram, vm, bus, console, keeping)?;
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
        if image.unsettled().is_some() {
            return Err(ForkError::Arriving);
        }
        let mut machine = self.map(image, id, |_| Ok(()))?;
        let mapped = Instant::now();
        state::restore(&machine.frame.core, image.state(), None)?;
        machine.stages.restore = mapped.elapsed();
        Ok(machine)
    }

    /// The first part of [`Shell::fork`]: the child has its memory and knows who it is, and its state is still to be restored.
    /// `watch` is called when its memory is mapped and before any of it is touched.
    pub(crate) fn map(
        self,
        image: &Arc<Image>,
        id: MachineId,
        watch: impl FnOnce(&[(RegionKind, Slot)]) -> Result<(), ForkError>,
    ) -> Result<Machine, ForkError> {
        let class = image.class();
        if class != self.class {
            return Err(ForkError::OtherClass {
                image_memory: class.memory(),
                image_vcpus: class.vcpu_count(),
                shell_memory: self.class.memory(),
                shell_vcpus: self.class.vcpu_count(),
            });
        }
        let started = Instant::now();
        // The order of the names matters: what is named last is dropped first, and the VM must go before its addresses.
        let Self { mut slots, frame, .. } = self;
        for ((_, slot), region) in slots.iter_mut().zip(image.regions()) {
            slot.map(region.pieces()).map_err(|source| ForkError::Map { source })?;
        }
        watch(&slots)?;
        let backing = Backing::Image(Arc::clone(image));
        let mut machine = Machine::new(id, frame, GuestMemory::over(slots), backing, class);
        machine.set_identity_page(image.identity_page()).map_err(|source| ForkError::Identity { source })?;
        machine.stages = ForkStages { map: started.elapsed(), restore: Duration::ZERO };
        Ok(machine)
    }

    /// Makes the shell the first parent, on memory of its own (see [`first_memory`](crate::image::memfd::first_memory)), filled
    /// and started by `load`, which returns the guest's identity page if it has one.
    ///
    /// # Errors
    /// What mapping memory or `load` failed with.
    pub(crate) fn boot<E: From<BuildError>>(
        self,
        id: MachineId,
        memfds: Vec<File>,
        load: impl FnOnce(&GuestMemory, &Frame) -> Result<Option<GuestAddress>, E>,
    ) -> Result<Machine, E> {
        // Dropped in the reverse of this order, as in `map`.
        let Self { mut slots, frame, class } = self;
        assert_eq!(memfds.len(), slots.len(), "a memfd for each region");
        for ((_, slot), memfd) in slots.iter_mut().zip(&memfds) {
            let whole = Piece { bytes: 0..slot.len() as u64, content: Content::Shared(std::os::fd::AsFd::as_fd(memfd)) };
            slot.map([whole]).map_err(os_step("mapping guest memory"))?;
        }
        let mut machine = Machine::new(id, frame, GuestMemory::over(slots), Backing::Own(memfds), class);
        let identity_page = load(machine.memory(), &machine.frame)?;
        let written = machine.set_identity_page(identity_page);
        written.map_err(|error| BuildError::Step { step: "writing the identity", source: io::Error::other(error) })?;
        Ok(machine)
    }
}
