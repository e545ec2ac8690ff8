//! The nouns that every farfork crate shares. May not: do I/O, read a clock, draw randomness, use async, touch KVM.
//!
//! | module | holds |
//! |---|---|
//! | [`id`] | ids of images, machines and nodes, tenants, epochs, BLAKE3 digests |
//! | [`name`] | names of images and templates |
//! | [`unit`] | pages, extents, guest and host addresses, memory sizes: every number that is a place has its own type |
//! | [`extents`] | [`extents::ExtentMap`], the flat index from a region's extents to the layer that holds them |
//! | [`profile`] | what CPU an image was made on, and whether this host may resume it |
//! | [`manifest`] | the description of an image that leaves the node: a head of at most 64 KiB, and hash pages |
//! | [`reason`] | the closed list of reasons why a machine or an operation ended, with the exit codes of the CLI |
#![forbid(unsafe_code)]

pub mod extents;
pub mod id;
pub mod manifest;
pub mod name;
pub mod profile;
pub mod reason;
pub mod unit;

pub use extents::{ExtentMap, LayerIndex, Run, Source};
pub use id::{Digest, Epoch, ImageId, MachineId, NodeId, Tenant};
pub use manifest::{Head, Manifest, RegionHead, RegionKind};
pub use name::{FullName, Name, NameError};
pub use profile::CpuProfile;
pub use reason::{ExitCode, Reason};
pub use unit::{EXTENT_PAGES, EXTENT_SIZE, ExtentIndex, GuestAddress, HostAddress, MemorySize, PAGE_SIZE, PageIndex};
