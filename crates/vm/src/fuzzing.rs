//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of bytes from outside, with
//! what must hold when it accepts them.

use types::manifest::{decode_hash_page, encode_hash_page, hash_page_digests};
use types::{Digest, Head};

use crate::image::file;
use crate::machine::state::MachineState;

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 4] =
    [("head", head), ("hash_page", hash_page), ("image_file", image_file), ("machine_state", machine_state)];

/// A manifest head of somebody who can compute digests.
pub fn head(bytes: &[u8]) {
    let Ok(head) = Head::decode(bytes, Digest::of(bytes)) else { return };
    let encoded = head.encode().expect("a head that decodes is valid");
    assert_eq!(Head::decode(&encoded, Digest::of(&encoded)).as_ref(), Ok(&head));
}

/// A hash page: the first two bytes choose for how many extents.
pub fn hash_page(bytes: &[u8]) {
    let Some((count, page)) = bytes.split_first_chunk::<2>() else { return };
    let count = u32::from(u16::from_le_bytes(*count));
    let Ok(digests) = decode_hash_page(page, count, Digest::of(page)) else { return };
    assert_eq!(digests.len(), count as usize);
    assert_eq!(encode_hash_page(&digests), page);
    assert_eq!(hash_page_digests(&digests).len(), digests.len().div_ceil(1024));
}

/// An image file up to its memory, as it is and with the digest that its head has.
pub fn image_file(bytes: &[u8]) {
    file::parse(bytes).map(drop).unwrap_or_default();
    let mut fixed = bytes.to_vec();
    if fixed.len() > 4096 {
        let head_len = u32::from_le_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]) as usize;
        if let Some(frame) = fixed[4096..].get(..head_len) {
            let digest = Digest::of(frame);
            fixed[16..48].copy_from_slice(digest.as_bytes());
            file::parse(&fixed).map(drop).unwrap_or_default();
        }
    }
}

/// Registers and devices.
pub fn machine_state(bytes: &[u8]) {
    let Ok(state) = MachineState::decode(bytes) else { return };
    let encoded = state.encode();
    let again = MachineState::decode(&encoded).expect("a state that decodes is valid");
    assert_eq!(again.encode(), encoded);
}
