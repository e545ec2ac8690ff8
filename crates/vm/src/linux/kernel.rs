//! The kernel's file, and the initrd's. Both come from outside: whatever they say is checked before it is believed.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;

use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, bootparam};
use types::{GuestAddress, MemorySize, PAGE_SIZE};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::{HIGH_MEMORY, LinuxError, low_end};

/// Machine numbers of ELF files, for the message about a kernel that is not ours.
const MACHINES: [(u16, &str); 5] =
    [(3, "32-bit x86"), (40, "32-bit Arm"), (183, "64-bit Arm"), (243, "RISC-V"), (21, "64-bit PowerPC")];
const EM_X86_64: u16 = 62;
/// `XLF_KERNEL_64`: the kernel has a 64-bit entry, 512 bytes after its start.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// A kernel in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded {
    pub(super) entry: GuestAddress,
    /// Where what it needs before it has set up its memory ends.
    pub(super) end: GuestAddress,
    /// The header of a bzImage.
    pub(super) header: Option<bootparam::setup_header>,
}

pub(super) fn load(ram: &GuestMemoryMmap, memory: MemorySize, kernel: &File) -> Result<Loaded, LinuxError> {
    let mut start = [0; 20];
    let len = kernel.read_at(&mut start, 0).map_err(|source| LinuxError::Io { what: "reading the kernel", source })?;
    let mut file = kernel;
    if start[..len].starts_with(b"\x7fELF") {
        if len < start.len() {
            return Err(LinuxError::Damaged("its header is cut short".to_owned()));
        }
        let machine = u16::from_le_bytes([start[18], start[19]]);
        if start[4] != 2 || start[5] != 1 || machine != EM_X86_64 {
            let known = MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| (*name).to_owned());
            return Err(LinuxError::OtherMachine(known.unwrap_or_else(|| format!("ELF machine {machine}"))));
        }
        let loaded = Elf::load(ram, None, &mut file, Some(vm_memory::GuestAddress(HIGH_MEMORY))).map_err(damaged)?;
        let KernelLoaderResult { kernel_load, kernel_end, .. } = loaded;
        return fitting(memory, kernel_load.0, kernel_end, None);
    }
    let mut magic = [0; 4];
    if kernel.read_exact_at(&mut magic, 0x202).is_err() || &magic != b"HdrS" {
        return Err(LinuxError::NotAKernel);
    }
    let loaded = BzImage::load(ram, None, &mut file, Some(vm_memory::GuestAddress(HIGH_MEMORY))).map_err(damaged)?;
    let header = loaded.setup_header.ok_or(LinuxError::NotAKernel)?;
    if header.version < 0x20C || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LinuxError::OtherMachine("32-bit x86, or older than Linux 3.8".to_owned()));
    }
    // It unpacks itself to where it wants to be, and needs that much there.
    let end = loaded.kernel_end.max(header.pref_address.saturating_add(u64::from(header.init_size)));
    fitting(memory, loaded.kernel_load.0.saturating_add(ENTRY_64), end, Some(header))
}

fn fitting(memory: MemorySize, entry: u64, end: u64, header: Option<bootparam::setup_header>) -> Result<Loaded, LinuxError> {
    let low_end = low_end(memory);
    if end > low_end {
        return Err(LinuxError::NoRoom { end: GuestAddress(end), low_end: GuestAddress(low_end), memory });
    }
    if !(HIGH_MEMORY..end).contains(&entry) {
        return Err(LinuxError::Damaged(format!("its entry {entry:#x} is not in what it loads")));
    }
    Ok(Loaded { entry: GuestAddress(entry), end: GuestAddress(end), header })
}

/// As high as the kernel lets it be, on whole pages. Where it lies, and its size.
pub(super) fn load_initrd(
    ram: &GuestMemoryMmap,
    memory: MemorySize,
    initrd: &File,
    kernel: &Loaded,
) -> Result<(u64, u64), LinuxError> {
    let failed = |source| LinuxError::Io { what: "reading the initrd", source };
    let bytes = initrd.metadata().map_err(failed)?.len();
    let highest = kernel.header.map_or(u64::from(u32::MAX), |header| u64::from(header.initrd_addr_max));
    let top = low_end(memory).min(highest.saturating_add(1));
    let at = top.checked_sub(bytes).map(|at| at & !(PAGE_SIZE - 1)).filter(|at| *at >= kernel.end.0);
    let Some(at) = at else { return Err(LinuxError::InitrdTooLarge { bytes, kernel_end: kernel.end, memory }) };
    let mut file = initrd;
    file.rewind().map_err(failed)?;
    let len = usize::try_from(bytes).expect("64-bit host");
    ram.read_exact_volatile_from(vm_memory::GuestAddress(at), &mut file, len)
        .map_err(|error| failed(io::Error::other(error)))?;
    Ok((at, bytes))
}

fn damaged(error: linux_loader::loader::Error) -> LinuxError {
    LinuxError::Damaged(error.to_string())
}
