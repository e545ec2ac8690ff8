//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of bytes from outside, with
//! what must hold when it accepts them.

use types::manifest::{decode_hash_page, encode_hash_page, hash_page_digests};
use types::{CpuProfile, Digest, Head};

use crate::image::{Image, check_map, file};
use crate::machine::state::MachineState;
use crate::worker::protocol::{self, FromWorker, FromZygote, ToWorker};

/// Seeds for the corpora of the messages: one of each kind, with this machine state in those that have one.
#[must_use]
pub fn message_seeds(state: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    crate::worker::samples::all(state)
}

/// Seeds for the corpora of what guests do and what they are made of.
#[must_use]
pub fn guest_seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let step = |what: u8, near: u16, value: u32, last: u8| {
        let ([a, b], [c, d, e, f]) = (near.to_le_bytes(), value.to_le_bytes());
        [what, a, b, c, d, e, f, last]
    };
    // Set up, describe a buffer, offer it, save; then the device's outside.
    let script = [step(0, 0, 0, 0), step(4, 0x800, 0x0200_0040, 0), step(5, 0, 0, 0), step(6, 0, 0, 0), step(7, 0, 0, 0)];
    let devices = ["disk", "rng", "console", "net", "vsock"];
    let of_device = |(kind, name): (u8, &'static str)| ("virtio", name, [&[kind][..], &script.concat()].concat());
    let kernels = [("elf", crate::linux::testing::small_elf()), ("bzimage", crate::linux::testing::small_bzimage())];
    let kernels = kernels.into_iter().map(|(name, bytes)| ("kernel", name, bytes));
    (0..).zip(devices).map(of_device).chain(kernels).collect()
}

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 8] = [
    ("head", head),
    ("hash_page", hash_page),
    ("image_file", image_file),
    ("machine_state", machine_state),
    ("from_worker", from_worker),
    ("to_worker", to_worker),
    ("virtio", virtio),
    ("kernel", kernel),
];

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

/// What a worker says, which its guest may have taken over.
pub fn from_worker(bytes: &[u8]) {
    if let Ok(message) = protocol::decode::<FromWorker>(bytes) {
        let encoded = protocol::encode(&message);
        assert_eq!(protocol::decode::<FromWorker>(&encoded).as_ref(), Ok(&message));
        if let FromWorker::Frozen(frozen) = message {
            for map in &frozen.maps {
                check_map(map, 64 << 20, 2).unwrap_or_default();
            }
            machine_state(&frozen.state);
        }
    }
    if let Ok(message) = protocol::decode::<FromZygote>(bytes) {
        assert_eq!(protocol::decode::<FromZygote>(&protocol::encode(&message)).as_ref(), Ok(&message));
    }
}

/// What a worker is told, and the image with it.
pub fn to_worker(bytes: &[u8]) {
    let Ok(message) = protocol::decode::<ToWorker>(bytes) else { return };
    assert_eq!(protocol::decode::<ToWorker>(&protocol::encode(&message)).as_ref(), Ok(&message));
    if let ToWorker::Fork { image, .. } = message
        && let Ok(wire) = postcard::from_bytes(&image)
    {
        let cpu = CpuProfile { vendor: String::new(), family: 0, model: 0, cpuid: Digest::of(&[]), tsc_khz: 1 };
        Image::received(cpu, wire, Vec::new()).map(drop).unwrap_or_default();
    }
}

/// What a guest does to its devices.
pub fn virtio(bytes: &[u8]) {
    crate::device::virtio::testing::play(bytes);
}

/// The start of a kernel's file, as it is and with more behind it.
pub fn kernel(bytes: &[u8]) {
    crate::linux::testing::load(bytes);
}

/// Registers and devices.
pub fn machine_state(bytes: &[u8]) {
    let Ok(state) = MachineState::decode(bytes) else { return };
    let encoded = state.encode();
    let again = MachineState::decode(&encoded).expect("a state that decodes is valid");
    assert_eq!(again.encode(), encoded);
}
