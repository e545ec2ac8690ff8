//! The island of unsafe code: mappings, the few ioctls that take addresses, the copier process, the probe's payload.
//!
//! The rest of the crate denies `unsafe`. What this module hands out is safe to use in any order; each block says which line
//! upholds what it relies on.
#![expect(unsafe_code, reason = "this is the island")]

#[cfg(feature = "bare")]
pub mod bare;
pub(crate) mod copier;
pub(crate) mod file_map;
pub(crate) mod guest_memory;
pub(crate) mod kvm;
pub(crate) mod pagemap;
pub(crate) mod payload;
pub(crate) mod slot;
