//! Guest memory as the VMM sees it: volatile access only, since the guest may write at any time.

use std::sync::atomic::Ordering;

use types::{GuestAddress, HostAddress, RegionKind};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::slot::Slot;

/// A machine's RAM, as its devices see it.
pub(crate) type Ram = GuestMemoryMmap;
/// A machine's disk from address 0 on, as its device sees it.
pub(crate) type DiskMemory = GuestMemoryMmap;

/// The mapped regions of one machine.
#[derive(Debug)]
pub struct GuestMemory {
    // Before the slots: they point into them.
    view: Ram,
    disk: Option<DiskMemory>,
    slots: Vec<(RegionKind, Slot)>,
}

/// An access outside the guest's RAM.
#[derive(Debug, thiserror::Error)]
#[error("guest memory at {at}: {source}")]
pub struct GuestMemoryError {
    at: GuestAddress,
    source: vm_memory::GuestMemoryError,
}

impl GuestMemory {
    /// Takes over mapped slots.
    pub(crate) fn over(slots: Vec<(RegionKind, Slot)>) -> Self {
        let region_at = |guest: GuestAddress, slot: &Slot| {
            assert!(slot.is_mapped());
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the slot is mapped over its whole length (asserted) and owned by the value being built, which drops its
            // views first. Clones of them go to the machine's devices alone (`for_devices`), which are dropped before.
            let region = unsafe { MmapRegion::build_raw(slot.start().0 as *mut u8, slot.len(), prot, flags) };
            let region = region.expect("a slot is page-aligned");
            GuestRegionMmap::new(region, vm_memory::GuestAddress(guest.0)).expect("a region ends within 2^46")
        };
        let ram = slots.iter().filter_map(|(kind, slot)| match kind {
            RegionKind::Ram(start) => Some(region_at(*start, slot)),
            RegionKind::Disk(_) => None,
        });
        let view = GuestMemoryMmap::from_regions(ram.collect()).expect("regions are sorted and do not overlap");
        let disk = slots
            .iter()
            .find(|(kind, _)| matches!(kind, RegionKind::Disk(_)))
            .map(|(_, slot)| GuestMemoryMmap::from_regions(vec![region_at(GuestAddress(0), slot)]).expect("one region"));
        Self { view, disk, slots }
    }

    /// What the machine's devices reach. They give it back before this is dropped: see `Frame`'s `Drop`.
    pub(crate) fn for_devices(&self) -> (Ram, Option<DiskMemory>) {
        (self.view.clone(), self.disk.clone())
    }

    pub(crate) fn slots(&self) -> &[(RegionKind, Slot)] {
        &self.slots
    }

    /// The region of RAM that begins at 0, which every machine has.
    #[cfg(feature = "testing")]
    pub(crate) fn low_ram(&self) -> (GuestAddress, &Slot) {
        (GuestAddress(0), &self.slots[0].1)
    }

    pub(crate) fn slots_mut(&mut self) -> &mut [(RegionKind, Slot)] {
        &mut self.slots
    }

    /// Whether the guest address is RAM.
    #[must_use]
    pub fn contains(&self, at: GuestAddress) -> bool {
        self.view.address_in_range(vm_memory::GuestAddress(at.0))
    }

    /// Copies RAM from `at` on into `buffer`.
    ///
    /// # Errors
    /// If any byte of it is not RAM.
    pub fn read(&self, at: GuestAddress, buffer: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.view.read_slice(buffer, vm_memory::GuestAddress(at.0)).map_err(|source| GuestMemoryError { at, source })
    }

    /// Copies `bytes` into RAM from `at` on.
    ///
    /// # Errors
    /// If any byte of it is not RAM; then an unknown part has been written.
    pub fn write(&self, at: GuestAddress, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        self.view.write_slice(bytes, vm_memory::GuestAddress(at.0)).map_err(|source| GuestMemoryError { at, source })
    }

    /// Reads an aligned word in one access, after which later reads see what the guest wrote before it.
    ///
    /// # Errors
    /// If it is not RAM or not aligned to 8 bytes.
    pub fn load_u64(&self, at: GuestAddress) -> Result<u64, GuestMemoryError> {
        let address = vm_memory::GuestAddress(at.0);
        self.view.load(address, Ordering::Acquire).map_err(|source| GuestMemoryError { at, source })
    }

    /// Writes an aligned word in one access, after which a guest that sees it also sees earlier writes.
    ///
    /// # Errors
    /// If it is not RAM or not aligned to 8 bytes.
    pub fn store_u64(&self, at: GuestAddress, value: u64) -> Result<(), GuestMemoryError> {
        let address = vm_memory::GuestAddress(at.0);
        self.view.store(value, address, Ordering::Release).map_err(|source| GuestMemoryError { at, source })
    }

    /// Where a slot's bytes are in this process.
    pub(crate) fn slot_address(&self, slot: usize, offset: u64) -> HostAddress {
        let start = self.slots[slot].1.start().0;
        HostAddress(start + usize::try_from(offset).expect("64-bit host"))
    }
}
