//! The image file: one image, whole.
//!
//! ```text
//! offset 0      preamble, 4 KiB: magic, version, length of the head, digest of the head; zeros
//! offset 4 KiB  the manifest's head, padded to 64 KiB
//! then          the hash pages of each region, each padded to 4 KiB
//! then          in the file of a branch: for each region a bit for each extent, set where this file has it, padded to 4 KiB
//! then          each region at full size: extents at their own offsets, zero pages as holes
//! ```
//!
//! The file of a **branch** leaves out the extents that the image it was branched from has as well, and its preamble names the
//! digest of that image. The head is the same either way, and with it the image's digest. The bits need no digest: whichever
//! place an extent is taken from, it must have the digest that the hash pages give.
//!
//! All places follow from the head, so a reader knows how long the file must be before it reads any of it. The file is sparse:
//! it takes as much room as it has non-zero pages. Copying tools keep that up with `cp --sparse=auto` (the default), `tar -S`,
//! `rsync -S`.

use types::manifest::{HASH_PAGE_DIGESTS, HEAD_SIZE_MAX};
use types::{Digest, Head, PAGE_SIZE};

pub(super) const PREAMBLE_SIZE: usize = 4096;
pub(super) const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"ffimage\x1a";
const NO_BASE: Digest = Digest::from_bytes([0; 32]);
const HEAD_AT: u64 = PREAMBLE_SIZE as u64;

/// The first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Preamble {
    pub(super) head_len: usize,
    pub(super) head_digest: Digest,
    /// The image that has what is left out of this file.
    pub(super) base: Option<Digest>,
}

/// What a preamble can be instead of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreambleError {
    NotAnImage,
    UnknownVersion(u16),
    Damaged,
}

impl Preamble {
    pub(super) fn encode(&self) -> [u8; PREAMBLE_SIZE] {
        let mut page = [0; PREAMBLE_SIZE];
        page[..8].copy_from_slice(&MAGIC);
        page[8..10].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&u32::try_from(self.head_len).expect("at most 64 KiB").to_le_bytes());
        page[16..48].copy_from_slice(self.head_digest.as_bytes());
        page[48..80].copy_from_slice(self.base.unwrap_or(NO_BASE).as_bytes());
        page
    }

    pub(super) fn decode(page: &[u8; PREAMBLE_SIZE]) -> Result<Self, PreambleError> {
        if page[..8] != MAGIC {
            return Err(PreambleError::NotAnImage);
        }
        let version = u16::from_le_bytes([page[8], page[9]]);
        if version != VERSION {
            return Err(PreambleError::UnknownVersion(version));
        }
        let head_len = u32::from_le_bytes([page[12], page[13], page[14], page[15]]) as usize;
        let rest_is_zero = page[10..12].iter().chain(&page[80..]).all(|byte| *byte == 0);
        if head_len == 0 || head_len > HEAD_SIZE_MAX || !rest_is_zero {
            return Err(PreambleError::Damaged);
        }
        let digest = |at: usize| Digest::from_bytes(page[at..at + 32].try_into().expect("32 bytes"));
        let base = Some(digest(48)).filter(|base| *base != NO_BASE);
        Ok(Self { head_len, head_digest: digest(16), base })
    }
}

/// Where everything is in the file of an image with this head.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// For each region: where each hash page is, and for how many extents.
    pub(super) hash_pages: Vec<Vec<(u64, u32)>>,
    /// For each region: where its bits are, and how many bytes of them. Empty unless it is the file of a branch.
    pub(super) bits: Vec<(u64, usize)>,
    /// For each region: where its first extent is.
    pub(super) regions: Vec<u64>,
    pub(super) file_len: u64,
}

impl Places {
    pub(super) const HEAD: u64 = HEAD_AT;

    pub(super) fn of(head: &Head, is_branch: bool) -> Self {
        let mut at = HEAD_AT + HEAD_SIZE_MAX as u64;
        let mut hash_pages = Vec::with_capacity(head.regions.len());
        for region in &head.regions {
            let mut left = region.map.extent_count();
            let mut pages = Vec::with_capacity(region.hash_pages.len());
            for _ in &region.hash_pages {
                let count = left.min(HASH_PAGE_DIGESTS);
                pages.push((at, count));
                at += (u64::from(count) * 32).next_multiple_of(PAGE_SIZE);
                left -= count;
            }
            hash_pages.push(pages);
        }
        let mut bits = Vec::new();
        for region in head.regions.iter().filter(|_| is_branch) {
            let bytes = region.map.extent_count().div_ceil(8);
            bits.push((at, bytes as usize));
            at += u64::from(bytes).next_multiple_of(PAGE_SIZE);
        }
        let mut regions = Vec::with_capacity(head.regions.len());
        for region in &head.regions {
            regions.push(at);
            at += region.size_bytes();
        }
        Self { hash_pages, bits, regions, file_len: at }
    }
}

/// Reads the part of an image file that comes before its memory, from bytes that anybody may have written. For fuzzing.
///
/// # Errors
/// As text, what [`load`](super::load()) would refuse it for.
pub fn parse(file: &[u8]) -> Result<Head, String> {
    let page = file.first_chunk::<PREAMBLE_SIZE>().ok_or("shorter than a preamble")?;
    let preamble = Preamble::decode(page).map_err(|error| format!("{error:?}"))?;
    let frame = file[PREAMBLE_SIZE..].get(..preamble.head_len).ok_or("shorter than its head")?;
    let head = Head::decode(frame, preamble.head_digest).map_err(|error| error.to_string())?;
    crate::machine::state::MachineState::decode(&head.state).map_err(|error| error.to_string())?;
    let places = Places::of(&head, preamble.base.is_some());
    assert!(places.regions.iter().all(|at| at % PAGE_SIZE == 0 && *at <= places.file_len));
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preambles_read_back_and_refuse_anything_else() {
        let whole = Preamble { head_len: 1234, head_digest: Digest::of(b"head"), base: None };
        assert_eq!(Preamble::decode(&whole.encode()), Ok(whole));
        let preamble = Preamble { base: Some(Digest::of(b"base")), ..whole };
        let page = preamble.encode();
        assert_eq!(Preamble::decode(&page), Ok(preamble));
        let with = |at: usize, value: u8| {
            let mut page = page;
            page[at] = value;
            Preamble::decode(&page)
        };
        assert_eq!(with(0, b'F'), Err(PreambleError::NotAnImage));
        assert_eq!(with(8, 2), Err(PreambleError::UnknownVersion(2)));
        assert_eq!(with(11, 1), Err(PreambleError::Damaged));
        assert_eq!(with(15, 0xFF), Err(PreambleError::Damaged));
        assert_eq!(with(4095, 1), Err(PreambleError::Damaged));
    }
}
