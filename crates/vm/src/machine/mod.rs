//! One machine: its vCPUs, its memory, and what that memory rests on.

pub(crate) mod frame;
pub mod freeze;
pub(crate) mod monitor;
pub mod state;
pub(crate) mod vcpu;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use thiserror::Error;
use types::{GuestAddress, MachineId};

use crate::class::Class;
use crate::device::serial::Console;
use crate::image::Image;
use crate::sys::guest_memory::{GuestMemory, GuestMemoryError};
use frame::Frame;
pub use freeze::{FreezeError, FreezeReport, Freezing, Frozen};
pub use monitor::Ended;

/// How long a vCPU may take to come to rest. A guest's own code stops at once; what takes long is KVM waiting for a page.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// The same where KVM may wait for a page of another host. The node ends a machine that waits in vain long before.
const PAUSE_PATIENCE_ABSENT: Duration = Duration::from_secs(600);

/// One virtual machine of this process. Dropping it ends the guest and gives everything back, which takes KVM 1-25 ms: do it
/// where nobody waits.
#[derive(Debug)]
pub struct Machine {
    id: MachineId,
    // Before the memory: the VM must be closed before its addresses can be used again.
    pub(crate) frame: Frame,
    memory: GuestMemory,
    backing: Backing,
    class: Class,
    identity_page: Option<GuestAddress>,
    running: bool,
    pause_patience: Duration,
    pub(crate) stages: ForkStages,
}

/// How long the steps of a fork took.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkStages {
    /// Mapping the image's runs.
    pub map: Duration,
    /// Restoring registers and devices, and writing the identity.
    pub restore: Duration,
}

/// What a machine's memory rests on.
#[derive(Debug)]
pub(crate) enum Backing {
    /// The first parent: a shared mapping of a memfd of its own for each region.
    Own(Vec<File>),
    /// A child, or a parent that has been frozen: private pages over an image.
    Image(Arc<Image>),
}

/// A machine whose vCPUs did not come to rest. It has been ended.
#[derive(Debug, Error)]
#[error("machine {id} did not come to rest within {patience:?} and was ended")]
pub struct PauseError {
    /// Which machine.
    pub id: MachineId,
    /// How long it was given.
    pub patience: Duration,
}

impl Machine {
    pub(crate) fn new(id: MachineId, frame: Frame, memory: GuestMemory, backing: Backing, class: Class) -> Self {
        frame.core.bus.lock().unwrap_or_else(PoisonError::into_inner).set_memory(Some(memory.for_devices()));
        Self {
            id,
            frame,
            memory,
            backing,
            class,
            identity_page: None,
            running: false,
            pause_patience: PAUSE_PATIENCE,
            stages: ForkStages::default(),
        }
    }

    /// Tells the guest who it is, if it has a page for that.
    pub(crate) fn set_identity_page(&mut self, page: Option<GuestAddress>) -> Result<(), GuestMemoryError> {
        self.identity_page = page;
        page.map_or(Ok(()), |page| self.memory.write(page, self.id.as_uuid().as_bytes()))
    }

    /// Who it is.
    #[must_use]
    pub fn id(&self) -> MachineId {
        self.id
    }

    /// Its memory size and number of vCPUs.
    #[must_use]
    pub fn class(&self) -> Class {
        self.class
    }

    /// The image it was forked from, or frozen into.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<Image>> {
        match &self.backing {
            Backing::Own(_) => None,
            Backing::Image(image) => Some(image),
        }
    }

    /// Its RAM.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// What it printed on its serial port.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.frame.console
    }

    /// The guest was let run by the thread that restored it.
    pub(crate) fn is_now_running(&mut self) {
        self.running = true;
    }

    /// Some of its memory is absent: KVM itself may wait for a page, for as long as the node lets it.
    pub(crate) fn may_wait_for_pages(&mut self) {
        self.pause_patience = PAUSE_PATIENCE_ABSENT;
    }

    /// Where its guest finds out who it is.
    pub(crate) fn identity_page(&self) -> Option<GuestAddress> {
        self.identity_page
    }

    /// Lets the guest run.
    pub fn resume(&mut self) {
        self.running = true;
        self.frame.monitor.run();
    }

    /// Brings the guest to rest between two instructions.
    ///
    /// # Errors
    /// [`PauseError`] if a vCPU does not come out in time; the machine has been ended with `PAUSE_TIMEOUT`.
    pub fn pause(&mut self) -> Result<(), PauseError> {
        self.rest()?;
        self.running = false;
        Ok(())
    }

    /// Whether the guest runs (or would, had it not ended).
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Why the machine ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.frame.monitor.ended()
    }

    /// When its first instruction was observed, which is its first exit.
    #[must_use]
    pub fn first_exit(&self) -> Option<Instant> {
        self.frame.monitor.first_exit()
    }

    /// Waits for the first instruction to be observed. `None` if it is not within `patience`, or the machine ended before.
    #[must_use]
    pub fn wait_for_first_exit(&self, patience: Duration) -> Option<Instant> {
        self.frame.monitor.wait_for_first_exit(patience)
    }

    /// How long the last pause (also that of a freeze) has kept a vCPU from running, from the end of its last guest code until
    /// it enters the guest again. `None` if one that ran does not run again within `patience`.
    #[must_use]
    pub fn last_stall(&self, patience: Duration) -> Option<Duration> {
        self.frame.monitor.stall(patience)
    }

    /// How long the steps of its fork took.
    #[must_use]
    pub fn stages(&self) -> ForkStages {
        self.stages
    }

    /// Raises a message-signalled interrupt on vCPU 0, as a device would. At rest it stays pending.
    ///
    /// # Errors
    /// If KVM does not take it.
    pub fn interrupt(&self, vector: u8) -> std::io::Result<()> {
        let message = kvm_bindings::kvm_msi { address_lo: 0xFEE0_0000, data: u32::from(vector), ..Default::default() };
        self.frame.core.vm.signal_msi(message).map(drop).map_err(crate::sys::kvm::from_errno)
    }

    /// Types on its serial port.
    ///
    /// # Errors
    /// If the port's input buffer has no room for all of it.
    pub fn type_in(&self, input: &[u8]) -> std::io::Result<()> {
        self.frame.core.bus.lock().unwrap_or_else(PoisonError::into_inner).serial.type_in(input)
    }

    /// Connects a socket with a vsock port of the guest. It must not block; what cannot be connected is closed.
    pub fn connect(&self, port: u32, socket: OwnedFd) {
        self.bus().connect(port, socket);
    }

    /// Plugs its network card into a tap, which must not block. Without a card the tap is closed.
    pub fn plug(&self, tap: OwnedFd) {
        self.bus().plug(tap);
    }

    /// The descriptors at which to wait for something to [serve](Self::serve_devices), and for what.
    #[must_use]
    pub fn device_descriptors(&self) -> Vec<(Arc<OwnedFd>, PollFlags)> {
        self.bus().descriptors()
    }

    /// Moves what can be moved between the guest's devices and the descriptors of this process. To be called when one of them is
    /// ready, and when the guest has done something (see `Witness`).
    pub fn serve_devices(&self) {
        let mut bus = self.bus();
        bus.serve();
        bus.complain(&mut self.console().clone());
    }

    fn bus(&self) -> std::sync::MutexGuard<'_, crate::device::Bus> {
        self.frame.core.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the vCPUs to rest without changing whether the machine counts as running.
    fn rest(&self) -> Result<(), PauseError> {
        let patience = self.pause_patience;
        if self.frame.monitor.pause(patience) {
            return Ok(());
        }
        let detail = format!("a vCPU did not come to rest within {patience:?}");
        self.frame.monitor.end(Ended { reason: types::Reason::PauseTimeout, detail });
        Err(PauseError { id: self.id, patience })
    }
}
