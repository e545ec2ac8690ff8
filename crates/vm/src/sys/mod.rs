//! The island of unsafe code: mappings, the few ioctls that take addresses, the copier process, the probe's payload.
//!
//! The rest of the crate denies `unsafe`. What this module hands out is safe to use in any order; each block says which line
//! upholds what it relies on.
#![expect(unsafe_code, reason = "this is the island")]

#[cfg(feature = "testing")]
pub(crate) mod attempts;
#[cfg(feature = "bare")]
pub mod bare;
pub(crate) mod copier;
pub(crate) mod file_map;
pub(crate) mod guest_memory;
pub(crate) mod kvm;
pub(crate) mod pagemap;
pub(crate) mod payload;
pub(crate) mod process;
pub(crate) mod slot;
pub(crate) mod tap;
pub(crate) mod uffd;

use std::os::fd::{AsRawFd, BorrowedFd};

/// Borrows the descriptor of something that owns one, but only shows its number.
pub(crate) fn borrow_fd(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the types this is called with (`EventFd`, `Kvm`) own their descriptor and close it when they are dropped, which
    // the borrow outlives not.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
