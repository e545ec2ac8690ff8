//! MP tables (Intel MultiProcessor Specification 1.4, chapter 4): which interrupt controllers there are, for kernels without ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{LinuxError, outside};

/// Where they lie: at the end of base memory, where kernels look for them; not listed as RAM.
pub(super) const START: u64 = 0x9_FC00;
const SPEC_1_4: u8 = 4;
const LOCAL_APIC: u32 = 0xFEE0_0000;
const IO_APIC: u32 = 0xFEC0_0000;
const APIC_VERSION: u8 = 0x14;
const ISA_LINES: u8 = 16;
/// Kinds of entries, and of interrupts.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

pub(super) fn write(ram: &GuestMemoryMmap, vcpu_count: u8) -> Result<(), LinuxError> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpu_count {
        // Enabled, and the first is the one that boots. Signature and features are for kernels that have no CPUID.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        entries.push([&[PROCESSOR, id, APIC_VERSION, flags][..], &[0; 16]].concat());
    }
    let bus = 0;
    entries.push([&[BUS, bus][..], b"ISA   "].concat());
    let io_apic = vcpu_count;
    entries.push([&[IO_APIC_ENTRY, io_apic, APIC_VERSION, 1][..], &IO_APIC.to_le_bytes()].concat());
    for line in 0..ISA_LINES {
        entries.push(vec![IO_INTERRUPT, INT, 0, 0, bus, line, io_apic, line]);
    }
    entries.push(vec![LOCAL_INTERRUPT, EXTINT, 0, 0, bus, 0, 0, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, bus, 0, 0xFF, 1]);

    let body = entries.concat();
    let length = u16::try_from(HEADER_LEN + body.len()).expect("a few hundred bytes");
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&length.to_le_bytes());
    table.extend_from_slice(&[SPEC_1_4, 0]);
    table.extend_from_slice(b"FARFORK microVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&u16::try_from(entries.len()).expect("a few dozen").to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&body);
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(16);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&u32::try_from(START + 16).expect("in base memory").to_le_bytes());
    pointer.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);

    ram.write_slice(&pointer, GuestAddress(START)).map_err(outside)?;
    ram.write_slice(&table, GuestAddress(START + 16)).map_err(outside)
}

const HEADER_LEN: usize = 44;

/// What makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tables_add_up_and_say_how_long_they_are() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram, 1).unwrap();
        let sum = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        };
        assert_eq!(sum(START, 16), 0);
        let length: u16 = ram.read_obj(GuestAddress(START + 16 + 4)).unwrap();
        assert_eq!(sum(START + 16, usize::from(length)), 0);
        // Processor 20, all others 8 bytes: bus, controller, 16 lines, two local ones.
        assert_eq!(usize::from(length), HEADER_LEN + 20 + 20 * 8);
    }
}
