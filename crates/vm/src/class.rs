//! The class of a machine: what a shell can be built for before its image is known, and where RAM of a size lies.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{GuestAddress, MemorySize, RegionKind};

/// Guest RAM leaves this range free for the interrupt controllers' registers and devices to come.
const GAP_START: u64 = 3 << 30;
const GAP_END: u64 = 4 << 30;

/// What a shell must have in common with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Class {
    memory: MemorySize,
    vcpu_count: u8,
    devices: Devices,
}

/// Which devices a machine has besides its serial port and its doorbell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Devices {
    /// None: the probe's.
    #[default]
    None,
    /// Those of a Linux guest: console, vsock, random numbers, and what is asked for.
    Linux {
        /// A disk of this size.
        disk: Option<MemorySize>,
        /// A network card.
        network: bool,
    },
}

impl Class {
    /// The most vCPUs: the state of eight fits a manifest head even with every vector register in use.
    pub const VCPUS_MAX: u8 = 8;

    /// Checks the number of vCPUs.
    ///
    /// # Errors
    /// [`VcpuCountError`].
    pub fn new(memory: MemorySize, vcpu_count: u8) -> Result<Self, VcpuCountError> {
        Self::with_devices(memory, vcpu_count, Devices::None)
    }

    /// [`Class::new`], with devices.
    ///
    /// # Errors
    /// [`VcpuCountError`].
    pub fn with_devices(memory: MemorySize, vcpu_count: u8, devices: Devices) -> Result<Self, VcpuCountError> {
        if (1..=Self::VCPUS_MAX).contains(&vcpu_count) {
            Ok(Self { memory, vcpu_count, devices })
        } else {
            Err(VcpuCountError { asked: vcpu_count })
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

    /// Its devices.
    #[must_use]
    pub fn devices(&self) -> Devices {
        self.devices
    }

    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> Option<MemorySize> {
        match self.devices {
            Devices::None => None,
            Devices::Linux { disk, .. } => disk,
        }
    }

    /// RAM and disk: all that its machines may write.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        self.memory.bytes() + self.disk().map_or(0, MemorySize::bytes)
    }

    /// The regions that a machine of this class consists of, and their sizes: RAM by address, then the disk.
    pub(crate) fn regions(&self) -> Vec<(RegionKind, u64)> {
        let ram = RamLayout::of(self.memory).regions().map(|(start, len)| (RegionKind::Ram(start), len));
        ram.chain(self.disk().map(|disk| (RegionKind::Disk(0), disk.bytes()))).collect()
    }
}

/// A number of vCPUs that no machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{asked} virtual CPUs where a machine has 1 to 8")]
pub struct VcpuCountError {
    /// What was asked for.
    pub asked: u8,
}

impl VcpuCountError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "ask for 1 to 8"
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
