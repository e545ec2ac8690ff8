//! The probe guest: a small program in this binary that is the oracle of the tests and the workload of the benches. A child
//! proves with its own instructions what its memory holds, who it is and what its clocks say.
//!
//! It works in ring 3 and takes commands through a mailbox page for each vCPU ([`Probe`]); ring 0 only counts timer ticks and
//! messages and reports CPU exceptions. Its code is `sys/probe.s`.
//!
//! ```text
//! 0x01000  GDT            0x06000  a TSS for each vCPU     0x0A000  code
//! 0x02000  PML4           0x07000  I/O bitmap, all zero    0x10000  page directories, one for each GiB
//! 0x03000  PDPT           0x05000  identity page           0x60000  a block of 16 KiB for each vCPU
//! 0x04000  IDT                                             0x100000 pages for work, to the end of RAM
//! ```

mod boot;
mod pattern;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{GuestAddress, MachineId, PAGE_SIZE, PageIndex};
use uuid::Uuid;

use crate::machine::{Ended, Machine};
use crate::sys::payload::{
    BLOCK_SIZE, KVMCLOCK, MB_ARG0, MB_BUFFER, MB_DONE, MB_FAULT, MB_HELD, MB_MESSAGES, MB_OP, MB_RESULT0, MB_SEQ, MB_STOP,
    MB_TICKS, PATTERN_STEP,
};
pub(crate) use boot::boot_in;
pub use boot::{BootError, boot, first_work_page, work_pages};
pub use pattern::{checksum, fill_page, page_word};

/// The interrupt vector whose deliveries [`Probe::messages`] counts.
pub const MESSAGE_VECTOR: u8 = 0x41;
/// The interrupt vector of the timer.
const TIMER_VECTOR: u8 = 0x40;
/// LVT entry: periodic.
const PERIODIC: u64 = 1 << 17;

/// How long a command may take before the guest counts as stuck. Generous: the hosts of tests are slow and shared.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The guest address of vCPU `index`'s block.
pub(crate) const fn block(index: usize) -> u64 {
    0x6_0000 + index as u64 * BLOCK_SIZE
}

/// Where KVM keeps the clock of vCPU `index` up to date.
#[must_use]
pub const fn clock_page(index: usize) -> GuestAddress {
    GuestAddress(block(index) + KVMCLOCK)
}

/// What a probe can be asked to do. Pages are numbered from guest address 0; commands that work on many take a first page and
/// a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "field names say it; what comes back is in `Reply`")]
pub enum Command {
    /// -> ticks counted so far
    Ping,
    /// -> identity (two words), vCPU, ticks
    Who,
    /// Fills pages with the pattern of (page, epoch). -> pages filled
    Fill { first: PageIndex, count: u64, epoch: u64 },
    /// Compares pages with the pattern of (page, epoch). -> pages that differ, the first of them, pages compared
    Verify { first: PageIndex, count: u64, epoch: u64 },
    /// Reads a byte of every `stride`-th page. -> sum, pages touched
    TouchRead { first: PageIndex, count: u64, stride: u64, shuffle: Option<u64> },
    /// Writes `value` (when shuffled: the seed) into the first word of every `stride`-th page. -> 0, pages touched
    TouchWrite { first: PageIndex, count: u64, stride: u64, shuffle: bool, value: u64 },
    /// -> the checksum of [`checksum`]
    Checksum { first: PageIndex, count: u64 },
    /// Counts, for so many rounds or until told to stop. -> rounds, TSC ticks that passed
    Spin { rounds: Option<u64> },
    /// Breaks something.
    Fault(Fault),
    /// Until told to stop: counts epochs, and writes each into the first word of every page, in order. -> last epoch
    Epochs { first: PageIndex, count: u64 },
    /// Loads its registers, holds them until told to stop, compares them. Vectors of 16 or 32 bytes. -> registers that differ
    Hold { vector_bytes: u64 },
    /// Starts the local APIC's timer, or stops it with an initial count of 0. The divide register as Intel's SDM has it.
    Ticks { initial_count: u32, divide: u32 },
    /// Waits until so many more ticks were counted. -> ticks before, ticks after
    WaitTicks { count: u64 },
    /// -> TSC, nanoseconds of kvmclock, its version
    Clock,
    /// Prints so many bytes of the buffer on the serial port. -> bytes
    Print { bytes: u64 },
}

/// Ways to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants say it")]
pub enum Fault {
    Undefined,
    DivideByZero,
    Read(GuestAddress),
    Write(GuestAddress),
    Privileged,
    Triple,
}

/// Four words; which mean what depends on the command.
pub type Reply = [u64; 4];

/// A CPU exception that the guest took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "Intel SDM volume 3, chapter 6")]
pub struct Exception {
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub cr2: u64,
}

/// Why a command has no reply.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ProbeError {
    #[error("the machine ended ({0})")]
    Ended(Ended),
    #[error("the guest took CPU exception {}, error code {:#x}, at {:#x}, CR2 {:#x}", .0.vector, .0.error_code, .0.rip, .0.cr2)]
    Exception(Exception),
    #[error("the guest did not answer {command:?} within {patience:?}")]
    Stuck { command: Command, patience: Duration },
    #[error(transparent)]
    Memory(#[from] crate::GuestMemoryError),
}

/// One vCPU of a machine that runs the probe.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'machine> {
    machine: &'machine Machine,
    vcpu: usize,
}

/// A command under way.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    command: Command,
    seq: u64,
    faults_before: u64,
}

impl<'machine> Probe<'machine> {
    /// The first vCPU's.
    #[must_use]
    pub fn of(machine: &'machine Machine) -> Self {
        Self::on(machine, 0)
    }

    /// Any vCPU's.
    #[must_use]
    pub fn on(machine: &'machine Machine, vcpu: usize) -> Self {
        assert!(vcpu < usize::from(machine.class().vcpu_count()), "the machine has no vCPU {vcpu}");
        Self { machine, vcpu }
    }

    /// Gives a command and waits for its reply.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn call(&self, command: Command) -> Result<Reply, ProbeError> {
        self.wait(self.post(command)?)
    }

    /// Gives a command. The one before must have been answered.
    ///
    /// # Errors
    /// Only if the machine's memory is too small for a probe.
    pub fn post(&self, command: Command) -> Result<Pending, ProbeError> {
        let (op, args) = command.encode();
        self.store(MB_STOP, 0)?;
        self.store(MB_OP, op)?;
        for (at, arg) in (MB_ARG0..).step_by(8).zip(args) {
            self.store(at, arg)?;
        }
        let seq = self.load(MB_DONE)? + 1;
        let faults_before = self.machine.frame.monitor.faults(self.vcpu);
        self.store(MB_SEQ, seq)?;
        self.machine.frame.monitor.ring(self.vcpu);
        Ok(Pending { command, seq, faults_before })
    }

    /// Waits for the reply.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn wait(&self, pending: Pending) -> Result<Reply, ProbeError> {
        let Pending { command, seq, faults_before } = pending;
        let monitor = &self.machine.frame.monitor;
        let answered = |faults: u64| faults > faults_before || self.load(MB_DONE).is_ok_and(|done| done == seq);
        let in_time = monitor.wait_until(self.vcpu, PATIENCE, answered).map_err(ProbeError::Ended)?;
        if !in_time {
            return Err(ProbeError::Stuck { command, patience: PATIENCE });
        }
        if monitor.faults(self.vcpu) > faults_before {
            return Err(ProbeError::Exception(self.exception()?));
        }
        let mut reply = [0; 4];
        for (at, word) in (MB_RESULT0..).step_by(8).zip(&mut reply) {
            *word = self.load(at)?;
        }
        Ok(reply)
    }

    /// The reply, if it is there; what [`Probe::wait`] would return without waiting.
    pub(crate) fn look(&self, pending: Pending) -> Option<Result<Reply, ProbeError>> {
        let Pending { seq, faults_before, .. } = pending;
        let monitor = &self.machine.frame.monitor;
        let is_answered = self.load(MB_DONE).is_ok_and(|done| done == seq);
        if is_answered || monitor.faults(self.vcpu) > faults_before || monitor.ended().is_some() {
            return Some(self.wait(pending));
        }
        None
    }

    /// Tells a command that runs until told to stop, to stop.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn stop(&self, pending: Pending) -> Result<Reply, ProbeError> {
        self.tell_to_stop()?;
        self.wait(pending)
    }

    /// The first half of [`Probe::stop`]. A child at rest that inherited a command ends it with its first instructions.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn tell_to_stop(&self) -> Result<(), ProbeError> {
        self.store(MB_STOP, 1)
    }

    /// The command that its parent was working on when it was frozen, which this child now works on too.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn inherited(&self, command: Command) -> Result<Pending, ProbeError> {
        Ok(Pending { command, seq: self.load(MB_SEQ)?, faults_before: 0 })
    }

    /// Fills pages, checked.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn fill(&self, first: PageIndex, count: u64, epoch: u64) -> Result<(), ProbeError> {
        let [filled, ..] = self.call(Command::Fill { first, count, epoch })?;
        assert_eq!(filled, count, "the probe filled fewer pages than it was told to");
        Ok(())
    }

    /// How many of the pages differ from the pattern of (page, epoch), and the first that does.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn verify(&self, first: PageIndex, count: u64, epoch: u64) -> Result<Option<(u64, PageIndex)>, ProbeError> {
        let [differ, at, compared, _] = self.call(Command::Verify { first, count, epoch })?;
        assert_eq!(compared, count, "the probe compared fewer pages than it was told to");
        Ok((differ > 0).then_some((differ, PageIndex(at))))
    }

    /// What the guest read from its identity page.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn who(&self) -> Result<MachineId, ProbeError> {
        let [low, high, ..] = self.call(Command::Who)?;
        let bytes = [low.to_le_bytes(), high.to_le_bytes()].concat();
        Ok(MachineId::from_uuid(Uuid::from_slice(&bytes).expect("16 bytes")))
    }

    /// Whether a [`Command::Hold`] has loaded its registers.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn is_held(&self) -> Result<bool, ProbeError> {
        Ok(self.load(MB_HELD)? == 1)
    }

    /// Timer ticks that the guest has counted.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn ticks(&self) -> Result<u64, ProbeError> {
        self.load(MB_TICKS)
    }

    /// Deliveries of [`MESSAGE_VECTOR`] that the guest has counted.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn messages(&self) -> Result<u64, ProbeError> {
        self.load(MB_MESSAGES)
    }

    /// Fills the buffer that [`Command::Hold`] and [`Command::Print`] use.
    ///
    /// # Errors
    /// As [`Probe::post`].
    pub fn set_buffer(&self, bytes: &[u8]) -> Result<(), ProbeError> {
        assert!(bytes.len() as u64 <= PAGE_SIZE - MB_BUFFER, "the buffer is half a page");
        Ok(self.machine.memory().write(self.address(MB_BUFFER), bytes)?)
    }

    fn exception(&self) -> Result<Exception, ProbeError> {
        Ok(Exception {
            vector: self.load(MB_FAULT)?,
            error_code: self.load(MB_FAULT + 8)?,
            rip: self.load(MB_FAULT + 16)?,
            cr2: self.load(MB_FAULT + 24)?,
        })
    }

    fn load(&self, offset: u64) -> Result<u64, ProbeError> {
        Ok(self.machine.memory().load_u64(self.address(offset))?)
    }

    fn store(&self, offset: u64, value: u64) -> Result<(), ProbeError> {
        Ok(self.machine.memory().store_u64(self.address(offset), value)?)
    }

    fn address(&self, offset: u64) -> GuestAddress {
        GuestAddress(block(self.vcpu) + offset)
    }
}

impl Command {
    /// Operation number (the order of `probe_ops` in probe.s) and arguments.
    fn encode(self) -> (u64, [u64; 6]) {
        match self {
            Self::Ping => (0, [0; 6]),
            Self::Who => (1, [0; 6]),
            Self::Fill { first, count, epoch } => (2, [first.0, count, epoch, 0, 0, 0]),
            Self::Verify { first, count, epoch } => (3, [first.0, count, epoch, 0, 0, 0]),
            Self::TouchRead { first, count, stride, shuffle } => {
                let flags = if shuffle.is_some() { 2 } else { 0 };
                (4, [first.0, count, stride, flags, shuffle.unwrap_or(0), count.next_power_of_two()])
            }
            Self::TouchWrite { first, count, stride, shuffle, value } => {
                (4, [first.0, count, stride, if shuffle { 3 } else { 1 }, value, count.next_power_of_two()])
            }
            Self::Checksum { first, count } => (5, [first.0, count, 0, 0, 0, 0]),
            Self::Spin { rounds } => (6, [rounds.unwrap_or(0), 0, 0, 0, 0, 0]),
            Self::Fault(fault) => {
                let (kind, address) = match fault {
                    Fault::Undefined => (0, 0),
                    Fault::DivideByZero => (1, 0),
                    Fault::Read(at) => (2, at.0),
                    Fault::Write(at) => (3, at.0),
                    Fault::Privileged => (4, 0),
                    Fault::Triple => (5, boot::IDT),
                };
                (7, [kind, address, PATTERN_STEP, 0, 0, 0])
            }
            Self::Epochs { first, count } => (8, [first.0, count, 0, 0, 0, 0]),
            Self::Hold { vector_bytes } => (9, [vector_bytes, 0, 0, 0, 0, 0]),
            Self::Ticks { initial_count, divide } => {
                let entry = u64::from(TIMER_VECTOR) | PERIODIC;
                (10, [u64::from(initial_count), u64::from(divide), entry, 0, 0, 0])
            }
            Self::WaitTicks { count } => (11, [count, 0, 0, 0, 0, 0]),
            Self::Clock => (12, [0; 6]),
            Self::Print { bytes } => (13, [bytes, 0, 0, 0, 0, 0]),
        }
    }
}
