//! Starting a Linux kernel: an ELF `vmlinux` or a `bzImage`, with or without an initrd, by the 64-bit boot protocol.
//!
//! ```text
//! files ──load──▶ memfds: kernel, initrd, command line, boot parameters, MP tables       (by the node; nothing runs yet)
//!                   │
//!                   └──boot_in──▶ a shell's memory, its registers ──▶ a first parent at rest   (by a worker, or in-process)
//! ```
//!
//! Sources: Documentation/x86/boot.rst and zero-page.rst of Linux; Intel MultiProcessor Specification 1.4.

mod command_line;
mod kernel;
mod mp_tables;
mod params;
mod registers;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod testing;

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{GuestAddress, MachineId, MemorySize, RegionKind};
use vm_memory::{FileOffset, GuestMemoryMmap};

use crate::class::Class;
use crate::host::Host;
use crate::machine::Machine;
use crate::machine::frame::{BuildError, os_step};
use crate::shell::Shell;
use crate::sys::guest_memory::GuestMemoryError;

pub use command_line::base_command_line;

/// Where low memory ends for a PC, and where kernels begin.
const HIGH_MEMORY: u64 = 1 << 20;
/// Where the boot parameters, the command line and the seed lie.
const BOOT_PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line of x86 kernels, with its zero.
const COMMAND_LINE_SIZE: usize = 2048;
const SEED: u64 = 0x2_1000;

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'a> {
    /// `vmlinux` or `bzImage`.
    pub kernel: &'a File,
    /// An initial RAM disk, in whatever format the kernel takes.
    pub initrd: Option<&'a File>,
    /// All of the kernel's command line: see [`base_command_line`].
    pub command_line: &'a str,
    /// What its random numbers start from (SETUP_RNG_SEED, Linux 6.0 and newer): fresh for each boot.
    pub seed: [u8; 32],
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub(crate) entry: GuestAddress,
    pub(crate) boot_params: GuestAddress,
}

/// Why a kernel could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum LinuxError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("it is neither an ELF vmlinux nor a bzImage")]
    NotAKernel,
    #[error("it is a kernel for another machine than x86-64 ({0})")]
    OtherMachine(String),
    #[error("it is damaged, or cut short: {0}")]
    Damaged(String),
    #[error("it needs memory up to {end}; the machine has {memory}, with room for kernels from 1 MiB to {low_end}")]
    NoRoom { end: GuestAddress, low_end: GuestAddress, memory: MemorySize },
    #[error("its initrd of {bytes} bytes does not fit beside the kernel, which ends at {kernel_end}, into {memory}")]
    InitrdTooLarge { bytes: u64, kernel_end: GuestAddress, memory: MemorySize },
    #[error("the command line has {bytes} bytes; a kernel takes 2047")]
    CommandLineTooLong { bytes: usize },
    #[error("the command line has a byte that is not printable ASCII")]
    CommandLineBytes,
    #[error("Linux guests have one virtual CPU; {asked} were asked for")]
    VcpuCount { asked: u8 },
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("writing the guest's memory failed: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl LinuxError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Build(error) => error.remedy(),
            Self::NotAKernel => "name a vmlinux or bzImage; `make guest` builds one",
            Self::OtherMachine(_) => "use a kernel for x86-64; `make guest` builds one",
            Self::Damaged(_) => "copy or build it again",
            Self::NoRoom { .. } | Self::InitrdTooLarge { .. } => "ask for more memory",
            Self::CommandLineTooLong { .. } | Self::CommandLineBytes => "shorten or correct what was added to it",
            Self::VcpuCount { .. } => "ask for 1 (docs/guests.md says why)",
            Self::Io { .. } => "look for its cause in the kernel log",
            Self::Memory(_) => "ask for more memory",
        }
    }
}

/// Puts a kernel and what it needs into `memory`, a memfd for each region of the class.
///
/// # Errors
/// [`LinuxError`]; the memfds hold some of it then.
pub fn load(class: Class, memory: &[File], what: &Kernel<'_>) -> Result<Start, LinuxError> {
    if class.vcpu_count() != 1 {
        return Err(LinuxError::VcpuCount { asked: class.vcpu_count() });
    }
    let command_line = command_line::checked(what.command_line)?;
    let ram = map(class, memory)?;
    let loaded = kernel::load(&ram, class.memory(), what.kernel)?;
    let initrd = what.initrd.map(|initrd| kernel::load_initrd(&ram, class.memory(), initrd, &loaded)).transpose()?;
    mp_tables::write(&ram, class.vcpu_count())?;
    params::write(&ram, class.memory(), &loaded, initrd, &command_line, &what.seed)?;
    Ok(Start { entry: loaded.entry, boot_params: GuestAddress(BOOT_PARAMS) })
}

/// Builds a first parent from memory that [`load`] has filled, at rest.
///
/// # Errors
/// [`LinuxError`].
pub fn boot(host: &Host, class: Class, id: MachineId, memory: Vec<File>, start: Start) -> Result<Machine, LinuxError> {
    boot_in(Shell::build(host, class)?, memory, id, start)
}

/// The memory for [`load`] and [`boot`]: zeros.
///
/// # Errors
/// If the host has none.
pub fn memory(class: Class) -> Result<Vec<File>, LinuxError> {
    Ok(crate::image::memfd::first_memory(class).map_err(os_step("memfd_create"))?)
}

/// [`boot`] in a shell that is there already.
pub(crate) fn boot_in(shell: Shell, memory: Vec<File>, id: MachineId, start: Start) -> Result<Machine, LinuxError> {
    shell.boot(id, memory, |memory, frame| {
        registers::set(&frame.core.vcpu(0), memory, start)?;
        // A Linux guest is told who it is by its agent.
        Ok(None)
    })
}

/// The RAM of a class over its memfds.
fn map(class: Class, memory: &[File]) -> Result<GuestMemoryMmap, LinuxError> {
    let failed = |source| LinuxError::Io { what: "mapping the guest's memory", source };
    let mut ranges = Vec::with_capacity(2);
    for ((kind, bytes), memfd) in class.regions().into_iter().zip(memory) {
        if let RegionKind::Ram(start) = kind {
            let len = usize::try_from(bytes).expect("64-bit host");
            let file = FileOffset::new(memfd.try_clone().map_err(failed)?, 0);
            ranges.push((vm_memory::GuestAddress(start.0), len, Some(file)));
        }
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|error| failed(io::Error::other(error)))
}

/// Where RAM that begins at 0 ends.
fn low_end(memory: MemorySize) -> u64 {
    let low = crate::class::RamLayout::of(memory).regions().next();
    low.map_or(0, |(_, bytes)| bytes)
}

fn outside(error: vm_memory::GuestMemoryError) -> LinuxError {
    LinuxError::Io { what: "writing the guest's memory", source: io::Error::other(error) }
}
