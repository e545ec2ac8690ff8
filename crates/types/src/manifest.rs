//! The description of an image that leaves the node.
//!
//! ```text
//! head        at most 64 KiB: CPU profile, machine state, regions with their extent maps, digests of the hash pages,
//!             recorded working set, parents. Its BLAKE3 digest is the image's digest.
//! hash pages  1,024 extent digests each, raw, one after the other; verified against the head when they are needed.
//!             The first instruction of a child waits for the head alone.
//! ```
//!
//! A head travels in a frame: magic, version, length, postcard body (postcard is positional: a body is only ever decoded by the
//! code of its own version). Decoding **parses**: what comes out has been checked for everything that can be checked without
//! the host, and nothing larger than the 64 KiB of input is allocated on the way.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::extents::{ExtentMap, LayerIndex, Run, Source};
use crate::profile::CpuProfile;
use crate::unit::{EXTENT_SIZE, GuestAddress, MemorySize};
use crate::{Digest, ExtentIndex};

/// The most bytes that an encoded head may have.
pub const HEAD_SIZE_MAX: usize = 64 << 10;
/// Extent digests in a full hash page.
pub const HASH_PAGE_DIGESTS: u32 = 1024;
/// The version that [`Head::encode`] writes.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"farfork\x1a";
const FRAME_SIZE: usize = 16;
const REGIONS_MAX: usize = 8;
const PARENTS_MAX: usize = 64;
/// The most runs of a recorded working set.
pub const WORKING_SET_RUNS_MAX: usize = 512;
/// Guest RAM ends below this address: the 46 bits that every x86-64 CPU of the last decade has.
const GUEST_ADDRESS_END: u64 = 1 << 46;

/// All that a child needs to know before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The CPU it was made on.
    pub cpu: CpuProfile,
    /// Number of virtual CPUs.
    pub vcpu_count: u8,
    /// Registers and devices, encoded and versioned by `vm`.
    pub state: Vec<u8>,
    /// Guest RAM and disks.
    pub regions: Vec<RegionHead>,
    /// The page into which a child's identity is written before its first instruction, if the guest reserves one.
    pub identity_page: Option<GuestAddress>,
    /// What earlier children touched first, in that order.
    pub working_set: Vec<WorkingSetRun>,
    /// The images that this one was branched from, nearest first.
    pub parents: Vec<Digest>,
}

/// One region of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionHead {
    /// RAM or disk.
    pub kind: RegionKind,
    /// Size and content.
    pub map: ExtentMap,
    /// Digest of each hash page of the region, in order.
    pub hash_pages: Vec<Digest>,
}

/// What a region is to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RegionKind {
    /// Guest RAM from this guest address on.
    Ram(GuestAddress),
    /// The n-th disk.
    Disk(u8),
}

/// A range of extents that children touch early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSetRun {
    /// Position in [`Head::regions`].
    pub region: u8,
    /// First extent.
    pub start: ExtentIndex,
    /// Number of extents.
    pub count: u32,
}

/// A head and all its hash pages, which agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    head: Head,
    extent_digests: Vec<Vec<Digest>>,
}

impl Manifest {
    /// Puts a head and the digests of each region's extents together ([`Digest::ZERO_CONTENT`] where an extent is zero).
    ///
    /// # Errors
    /// [`ManifestError`] if they are not of one image.
    pub fn new(head: Head, extent_digests: Vec<Vec<Digest>>) -> Result<Self, ManifestError> {
        head.validate()?;
        let (expected, actual) = (head.regions.len(), extent_digests.len());
        if expected != actual {
            return Err(ManifestError::RegionCount { expected, actual });
        }
        for (number, (region, digests)) in head.regions.iter().zip(&extent_digests).enumerate() {
            if digests.len() != region.map.extent_count() as usize || hash_page_digests(digests) != region.hash_pages {
                return Err(ManifestError::OtherDigests { region: number });
            }
            let zero_runs = region.map.runs().iter().filter(|run| run.source == Source::Zero);
            let content = |extent: &u32| digests[*extent as usize] != Digest::ZERO_CONTENT;
            if let Some(extent) = zero_runs.flat_map(Run::extents).find(content) {
                return Err(ManifestError::NotZero { region: number, extent: ExtentIndex(extent) });
            }
        }
        Ok(Self { head, extent_digests })
    }

    /// The head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The digest of each extent of a region.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn extent_digests(&self, region: usize) -> &[Digest] {
        &self.extent_digests[region]
    }

    /// The head alone, for when the digests have served.
    #[must_use]
    pub fn into_head(self) -> Head {
        self.head
    }
}

impl RegionHead {
    /// Size of the region in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        u64::from(self.map.extent_count()) * EXTENT_SIZE
    }
}

impl Head {
    /// The frame that leaves the node.
    ///
    /// # Errors
    /// As [`Head::decode`] would refuse it.
    pub fn encode(&self) -> Result<Vec<u8>, HeadError> {
        self.validate()?;
        let body = postcard::to_stdvec(self).map_err(|source| HeadError::Malformed { source })?;
        if FRAME_SIZE + body.len() > HEAD_SIZE_MAX {
            return Err(HeadError::TooLarge { bytes: FRAME_SIZE + body.len() });
        }
        let length = u32::try_from(body.len()).expect("at most 64 KiB");
        let mut frame = Vec::with_capacity(FRAME_SIZE + body.len());
        frame.extend_from_slice(&MAGIC);
        frame.extend_from_slice(&VERSION.to_le_bytes());
        frame.extend_from_slice(&[0; 2]);
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&body);
        Ok(frame)
    }

    /// Reads a frame that came from a file or a peer. `expected` is the digest under which it was asked for.
    ///
    /// # Errors
    /// [`HeadError`] says what is wrong; nothing has been allocated beyond the size of `frame`.
    pub fn decode(frame: &[u8], expected: Digest) -> Result<Self, HeadError> {
        let (header, body) = split_frame(frame)?;
        let actual = Digest::of(frame);
        if actual != expected {
            return Err(HeadError::WrongDigest { expected, actual });
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        let head = match version {
            1 => decode_v1(body)?,
            _ => return Err(HeadError::UnknownVersion { version }),
        };
        head.validate()?;
        Ok(head)
    }

    /// Everything that can be checked without a host.
    fn validate(&self) -> Result<(), HeadError> {
        if self.vcpu_count == 0 {
            return Err(HeadError::NoVcpu);
        }
        bounded("regions", self.regions.len(), REGIONS_MAX)?;
        bounded("parents", self.parents.len(), PARENTS_MAX)?;
        bounded("working set runs", self.working_set.len(), WORKING_SET_RUNS_MAX)?;
        let ram_bytes = self.check_regions()?;
        for run in &self.working_set {
            let extents = self.regions.get(usize::from(run.region)).map_or(0, |region| region.map.extent_count());
            if run.start.0.checked_add(run.count).is_none_or(|end| end > extents) {
                return Err(HeadError::WorkingSetOutside { region: run.region, extent: run.start });
            }
        }
        if ram_bytes == 0 {
            return Err(HeadError::NoRam);
        }
        match self.identity_page {
            Some(page) if page.0 % crate::PAGE_SIZE != 0 || !self.ram_contains(page) => {
                Err(HeadError::IdentityOutside { page })
            }
            _ => Ok(()),
        }
    }

    /// Checks each region by itself, then RAM for overlaps. Returns the bytes of RAM.
    fn check_regions(&self) -> Result<u64, HeadError> {
        let mut ram_bytes = 0u64;
        let mut taken: Vec<(u64, u64)> = Vec::with_capacity(self.regions.len());
        for (position, region) in self.regions.iter().enumerate() {
            let size = region.size_bytes();
            let expected = region.map.extent_count().div_ceil(HASH_PAGE_DIGESTS) as usize;
            if region.hash_pages.len() != expected {
                return Err(HeadError::HashPageCount { region: position, expected, actual: region.hash_pages.len() });
            }
            if size > MemorySize::MAX {
                return Err(HeadError::RegionTooLarge { region: position, bytes: size });
            }
            if let Some(layer) = region.map.used_layers().into_iter().find(|layer| layer.0 != 0) {
                return Err(HeadError::ForeignLayer { region: position, layer });
            }
            let RegionKind::Ram(start) = region.kind else {
                continue;
            };
            let end = start.checked_add(size).filter(|end| end.0 <= GUEST_ADDRESS_END);
            match end {
                Some(end) if start.0 % EXTENT_SIZE == 0 => taken.push((start.0, end.0)),
                _ => {
                    return Err(HeadError::RegionOutside { region: position, start });
                }
            }
            ram_bytes += size;
        }
        if ram_bytes > MemorySize::MAX {
            return Err(HeadError::RamTooLarge { bytes: ram_bytes });
        }
        taken.sort_unstable();
        match taken.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            Some(pair) => Err(HeadError::RegionsOverlap { at: GuestAddress(pair[1].0) }),
            None => Ok(ram_bytes),
        }
    }

    fn ram_contains(&self, address: GuestAddress) -> bool {
        self.regions.iter().any(|region| match region.kind {
            RegionKind::Ram(start) => address >= start && address.0 - start.0 < region.size_bytes(),
            RegionKind::Disk(_) => false,
        })
    }
}

/// The digests of one region's hash pages, as they stand in the head.
#[must_use]
pub fn hash_page_digests(extent_digests: &[Digest]) -> Vec<Digest> {
    extent_digests.chunks(HASH_PAGE_DIGESTS as usize).map(|page| Digest::of(&encode_hash_page(page))).collect()
}

/// The bytes of a hash page.
#[must_use]
pub fn encode_hash_page(extent_digests: &[Digest]) -> Vec<u8> {
    extent_digests.iter().flat_map(|digest| *digest.as_bytes()).collect()
}

/// Reads the hash page whose digest the head gives as `expected`, for `count` extents.
///
/// # Errors
/// [`HashPageError`] if the length or the digest is wrong.
pub fn decode_hash_page(bytes: &[u8], count: u32, expected: Digest) -> Result<Vec<Digest>, HashPageError> {
    if bytes.len() as u64 != u64::from(count) * 32 {
        return Err(HashPageError::Length { expected_digests: count, actual_bytes: bytes.len() });
    }
    let actual = Digest::of(bytes);
    if actual != expected {
        return Err(HashPageError::WrongDigest { expected, actual });
    }
    let digests = bytes.chunks_exact(32).map(|chunk| Digest::from_bytes(chunk.try_into().expect("chunks of 32")));
    Ok(digests.collect())
}

fn split_frame(frame: &[u8]) -> Result<(&[u8], &[u8]), HeadError> {
    if frame.len() > HEAD_SIZE_MAX {
        return Err(HeadError::TooLarge { bytes: frame.len() });
    }
    let Some((header, body)) = frame.split_at_checked(FRAME_SIZE) else {
        return Err(HeadError::Truncated { expected_bytes: FRAME_SIZE, actual_bytes: frame.len() });
    };
    if header[..8] != MAGIC {
        return Err(HeadError::NotAManifest);
    }
    let version = u16::from_le_bytes([header[8], header[9]]);
    if version == 0 || version > VERSION {
        return Err(HeadError::UnknownVersion { version });
    }
    let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
    if body.len() < length {
        return Err(HeadError::Truncated { expected_bytes: FRAME_SIZE + length, actual_bytes: frame.len() });
    }
    if body.len() > length || header[10..12] != [0; 2] {
        return Err(HeadError::TrailingBytes);
    }
    Ok((header, body))
}

fn decode_v1(body: &[u8]) -> Result<Head, HeadError> {
    let (head, rest) = postcard::take_from_bytes::<Head>(body).map_err(|source| HeadError::Malformed { source })?;
    if rest.is_empty() { Ok(head) } else { Err(HeadError::TrailingBytes) }
}

fn bounded(what: &'static str, count: usize, most: usize) -> Result<(), HeadError> {
    if count <= most { Ok(()) } else { Err(HeadError::TooMany { what, count, most }) }
}

/// Why bytes are no manifest head that this version of farfork takes.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum HeadError {
    #[error("this is no farfork manifest: the magic bytes are missing")]
    NotAManifest,
    #[error("the manifest has version {version}; this farfork reads versions 1 to {VERSION}: use a newer farfork")]
    UnknownVersion { version: u16 },
    #[error("the manifest is cut short: {actual_bytes} of {expected_bytes} bytes; copy it again")]
    Truncated { expected_bytes: usize, actual_bytes: usize },
    #[error("the manifest head has {bytes} bytes; the most is {HEAD_SIZE_MAX}")]
    TooLarge { bytes: usize },
    #[error("the manifest is damaged: digest {actual} where {expected} was asked for; copy it again")]
    WrongDigest { expected: Digest, actual: Digest },
    #[error("the manifest has bytes after its end")]
    TrailingBytes,
    #[error("the manifest's body does not decode ({source})")]
    Malformed { source: postcard::Error },
    #[error("the manifest has {count} {what}; the most is {most}")]
    TooMany { what: &'static str, count: usize, most: usize },
    #[error("the manifest has no virtual CPU")]
    NoVcpu,
    #[error("the manifest has no RAM")]
    NoRam,
    #[error("the manifest's RAM regions overlap at {at}")]
    RegionsOverlap { at: GuestAddress },
    #[error("region {region} has {bytes} bytes; the most is 32 GiB")]
    RegionTooLarge { region: usize, bytes: u64 },
    #[error("the manifest's RAM has {bytes} bytes; the most is 32 GiB")]
    RamTooLarge { bytes: u64 },
    #[error("region {region} at {start} is misaligned or beyond the guest's address space")]
    RegionOutside { region: usize, start: GuestAddress },
    #[error("region {region} has {actual} hash pages where its size asks for {expected}")]
    HashPageCount { region: usize, expected: usize, actual: usize },
    #[error("region {region} names layer {layer:?}; a manifest that left its node has one layer a region")]
    ForeignLayer { region: usize, layer: LayerIndex },
    #[error("the working set names extent {extent} of region {region}, which is not there")]
    WorkingSetOutside { region: u8, extent: ExtentIndex },
    #[error("the identity page {page} is misaligned or not in RAM")]
    IdentityOutside { page: GuestAddress },
}

/// Why a head and digests are no manifest.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ManifestError {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("the digests are those of {actual} regions where the head has {expected}")]
    RegionCount { expected: usize, actual: usize },
    #[error("the digests of region {region} are not those that the head has")]
    OtherDigests { region: usize },
    #[error("extent {extent} of region {region} has content where the map says that it is zero")]
    NotZero { region: usize, extent: ExtentIndex },
}

/// Why bytes are not the hash page that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HashPageError {
    /// Too short or too long.
    #[error("a hash page of {actual_bytes} bytes where {expected_digests} digests are due; copy the image again")]
    Length {
        /// Digests that are due.
        expected_digests: u32,
        /// Bytes that came.
        actual_bytes: usize,
    },
    /// Not what the head promises.
    #[error("a damaged hash page: digest {actual} where the head has {expected}; copy the image again")]
    WrongDigest {
        /// In the head.
        expected: Digest,
        /// Of the bytes.
        actual: Digest,
    },
}
