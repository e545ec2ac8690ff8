//! Guest memory as the VMM sees it: volatile access only, since the guest may write at any time.

use std::sync::atomic::Ordering;

use types::{GuestAddress, HostAddress};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::slot::Slot;

/// The mapped RAM of one machine.
#[derive(Debug)]
pub struct GuestMemory {
    // Before the slots: it points into them.
    view: GuestMemoryMmap,
    slots: Vec<(GuestAddress, Slot)>,
}

/// An access outside the guest's RAM.
#[derive(Debug, thiserror::Error)]
#[error("guest memory at {at}: {source}")]
pub struct GuestMemoryError {
    at: GuestAddress,
    source: vm_memory::GuestMemoryError,
}

impl GuestMemory {
    /// Takes over mapped slots, each at its guest address.
    pub(crate) fn over(slots: Vec<(GuestAddress, Slot)>) -> Self {
        let regions = slots.iter().map(|(guest, slot)| {
            assert!(slot.is_mapped());
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the slot is mapped over its whole length (asserted) and owned by the value being built, which drops the
            // view first and hands out no clone of it.
            let region = unsafe { MmapRegion::build_raw(slot.start().0 as *mut u8, slot.len(), prot, flags) };
            let region = region.expect("a slot is page-aligned");
            GuestRegionMmap::new(region, vm_memory::GuestAddress(guest.0)).expect("a region ends within 2^46")
        });
        let view = GuestMemoryMmap::from_regions(regions.collect()).expect("regions are sorted and do not overlap");
        Self { view, slots }
    }

    pub(crate) fn slots(&self) -> &[(GuestAddress, Slot)] {
        &self.slots
    }

    pub(crate) fn slots_mut(&mut self) -> &mut [(GuestAddress, Slot)] {
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
