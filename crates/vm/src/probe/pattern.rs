//! The probe's pattern and checksum, as the host computes them.

use types::{PAGE_SIZE, PageIndex};

use crate::sys::payload::{CHECKSUM_START, PATTERN_EPOCH, PATTERN_MIX, PATTERN_PAGE, PATTERN_STEP};

/// Word `word` (0 to 511) of `page` in `epoch`.
#[must_use]
pub fn page_word(page: PageIndex, epoch: u64, word: u64) -> u64 {
    let start = page.0.wrapping_mul(PATTERN_PAGE).wrapping_add(epoch.wrapping_mul(PATTERN_EPOCH));
    let state = start.wrapping_add((word + 1).wrapping_mul(PATTERN_STEP));
    let mixed = (state ^ state >> 32).wrapping_mul(PATTERN_MIX);
    mixed ^ mixed >> 29
}

/// What [`Command::Fill`](super::Command::Fill) leaves in a page.
#[must_use]
pub fn fill_page(page: PageIndex, epoch: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|word| page_word(page, epoch, word).to_le_bytes()).collect()
}

/// What [`Command::Checksum`](super::Command::Checksum) answers for these bytes, whose number is a multiple of 8.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty(), "whole words");
    words.iter().fold(CHECKSUM_START, |sum, word| (sum ^ u64::from_le_bytes(*word)).wrapping_mul(PATTERN_MIX).rotate_left(23))
}
