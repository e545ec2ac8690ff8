//! Pages, extents, addresses and sizes. Each is a type of its own, and arithmetic between them is spelled out, so that a page
//! number can never be taken for an extent number, nor a guest address for a host address.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes in a page: the unit in which the CPU maps memory.
pub const PAGE_SIZE: u64 = 4096;
/// Pages in an extent.
pub const EXTENT_PAGES: u64 = 16;
/// Bytes in an extent (64 KiB): the unit of hashing, transfer and publication.
pub const EXTENT_SIZE: u64 = PAGE_SIZE * EXTENT_PAGES;

/// The n-th page of a region, counted from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The extent that this page is part of.
    ///
    /// # Panics
    /// If the page lies beyond 2^36, which no valid region does.
    #[must_use]
    pub fn extent(self) -> ExtentIndex {
        ExtentIndex(u32::try_from(self.0 / EXTENT_PAGES).expect("a page index of a valid region fits"))
    }

    /// Offset of the page's first byte from the start of the region.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// The n-th extent of a region, counted from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExtentIndex(pub u32);

impl ExtentIndex {
    /// Offset of the extent's first byte from the start of the region.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * EXTENT_SIZE
    }

    /// The first of the extent's 16 pages.
    #[must_use]
    pub const fn first_page(self) -> PageIndex {
        PageIndex(self.0 as u64 * EXTENT_PAGES)
    }
}

impl fmt::Display for ExtentIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A physical address as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestAddress(pub u64);

impl GuestAddress {
    /// `self + bytes`, or `None` past the end of the address space.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestAddress({self})")
    }
}

/// A virtual address of this process. Only a number: whoever dereferences it argues why in `vm::sys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress(pub usize);

/// The size of a machine's RAM: a multiple of 2 MiB from 2 MiB to 32 GiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct MemorySize(u64);

impl MemorySize {
    /// Sizes are multiples of this: one page-table entry of the guest's large mappings.
    pub const STEP: u64 = 2 << 20;
    /// The largest size: its extent digests fill 512 hash pages, whose digests are a quarter of a manifest head.
    pub const MAX: u64 = 32 << 30;

    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`MemorySizeError`] names the bound that `bytes` breaks.
    pub const fn from_bytes(bytes: u64) -> Result<Self, MemorySizeError> {
        match bytes {
            0 => Err(MemorySizeError::Zero),
            b if b > Self::MAX => Err(MemorySizeError::TooLarge { asked_bytes: b }),
            b if b % Self::STEP != 0 => Err(MemorySizeError::Odd { asked_bytes: b }),
            b => Ok(Self(b)),
        }
    }

    /// `mib` times 2^20 bytes, checked.
    ///
    /// # Errors
    /// As [`MemorySize::from_bytes`].
    pub const fn from_mib(mib: u64) -> Result<Self, MemorySizeError> {
        match mib.checked_mul(1 << 20) {
            Some(bytes) => Self::from_bytes(bytes),
            None => Err(MemorySizeError::TooLarge { asked_bytes: u64::MAX }),
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for MemorySize {
    type Error = MemorySizeError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        Self::from_bytes(bytes)
    }
}

impl From<MemorySize> for u64 {
    fn from(size: MemorySize) -> Self {
        size.0
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0 >> 20)
    }
}

impl fmt::Debug for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySize({self})")
    }
}

/// Why a number of bytes is no memory size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MemorySizeError {
    /// Nothing can run in no memory.
    #[error("memory of 0 bytes; ask for at least 2 MiB")]
    Zero,
    /// Not a multiple of [`MemorySize::STEP`].
    #[error(
        "memory of {asked_bytes} bytes is no multiple of 2 MiB; the nearest size above is {} MiB",
        asked_bytes.div_ceil(MemorySize::STEP) * 2
    )]
    Odd {
        /// What was asked for.
        asked_bytes: u64,
    },
    /// Above [`MemorySize::MAX`].
    #[error("memory of {asked_bytes} bytes is more than a machine can have; the most is 32768 MiB (32 GiB)")]
    TooLarge {
        /// What was asked for.
        asked_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes_are_checked() {
        assert_eq!(MemorySize::from_bytes(0), Err(MemorySizeError::Zero));
        assert_eq!(MemorySize::from_bytes((2 << 20) + 1), Err(MemorySizeError::Odd { asked_bytes: (2 << 20) + 1 }));
        assert!(matches!(MemorySize::from_mib(u64::MAX), Err(MemorySizeError::TooLarge { .. })));
        assert!(matches!(MemorySize::from_mib((32 << 10) + 2), Err(MemorySizeError::TooLarge { .. })));
        assert_eq!(MemorySize::from_mib(32 << 10).unwrap().bytes(), MemorySize::MAX);
        assert!(MemorySizeError::Odd { asked_bytes: 1 }.to_string().ends_with("2 MiB"));
    }

    #[test]
    fn a_page_knows_its_extent() {
        assert_eq!(PageIndex(15).extent(), ExtentIndex(0));
        assert_eq!(PageIndex(16).extent(), ExtentIndex(1));
        assert_eq!(ExtentIndex(3).first_page(), PageIndex(48));
        assert_eq!(ExtentIndex(3).byte_offset(), PageIndex(48).byte_offset());
    }
}
