//! The boot parameters ("zero page"): where everything lies (Documentation/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use types::MemorySize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel::Loaded;
use super::{BOOT_PARAMS, COMMAND_LINE, HIGH_MEMORY, LinuxError, SEED, mp_tables, outside};
use crate::class::RamLayout;

const E820_RAM: u32 = 1;
/// "Undefined", for loaders without a number of their own.
const LOADER: u8 = 0xFF;
const CAN_USE_HEAP: u8 = 0x80;
const SETUP_RNG_SEED: u32 = 9;

pub(super) fn write(
    ram: &GuestMemoryMmap,
    memory: MemorySize,
    kernel: &Loaded,
    initrd: Option<(u64, u64)>,
    command_line: &[u8],
    seed: &[u8; 32],
) -> Result<(), LinuxError> {
    let word = |bytes: u64| u32::try_from(bytes).expect("in low memory");
    let mut params = boot_params::default();
    if let Some(header) = kernel.header {
        params.hdr = header;
    } else {
        // What a vmlinux does not say of itself.
        params.hdr.boot_flag = 0xAA55;
        params.hdr.header = u32::from_le_bytes(*b"HdrS");
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = LOADER;
    params.hdr.loadflags |= CAN_USE_HEAP;
    params.hdr.heap_end_ptr = 0xFE00;
    params.hdr.cmd_line_ptr = word(COMMAND_LINE);
    params.hdr.cmdline_size = u32::try_from(command_line.len()).expect("at most 2048");
    params.hdr.setup_data = SEED;
    if let Some((at, bytes)) = initrd {
        params.hdr.ramdisk_image = word(at);
        params.hdr.ramdisk_size = word(bytes);
    }
    let mut entries = vec![boot_e820_entry { addr: 0, size: mp_tables::START, r#type: E820_RAM }];
    for (start, bytes) in RamLayout::of(memory).regions() {
        let skipped = if start.0 == 0 { HIGH_MEMORY } else { 0 };
        entries.push(boot_e820_entry { addr: start.0 + skipped, size: bytes - skipped, r#type: E820_RAM });
    }
    params.e820_entries = u8::try_from(entries.len()).expect("at most three");
    params.e820_table[..entries.len()].copy_from_slice(&entries);

    ram.write_slice(command_line, GuestAddress(COMMAND_LINE)).map_err(outside)?;
    // `struct setup_data`: next, type, length, data.
    let mut data = Vec::with_capacity(48);
    data.extend_from_slice(&0u64.to_le_bytes());
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&32u32.to_le_bytes());
    data.extend_from_slice(seed);
    ram.write_slice(&data, GuestAddress(SEED)).map_err(outside)?;
    ram.write_obj(params, GuestAddress(BOOT_PARAMS)).map_err(outside)
}
