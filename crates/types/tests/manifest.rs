//! Manifests: every version that was ever written still reads, and nothing else does.

use std::path::{Path, PathBuf};

use types::manifest::{
    HASH_PAGE_DIGESTS, HEAD_SIZE_MAX, HashPageError, HeadError, VERSION, WorkingSetRun, decode_hash_page, encode_hash_page,
    hash_page_digests,
};
use types::{
    CpuProfile, Digest, ExtentIndex, ExtentMap, GuestAddress, Head, LayerIndex, MemorySize, RegionHead, RegionKind, Source,
};

fn region(kind: RegionKind, extents: u32, data: &[std::ops::Range<u32>]) -> RegionHead {
    let map = ExtentMap::from_data(extents, data, LayerIndex(0));
    let digests: Vec<Digest> = (0..extents)
        .map(|extent| match map.source_of(ExtentIndex(extent)) {
            Some(Source::Layer(_)) => Digest::of(&extent.to_le_bytes()),
            _ => Digest::ZERO_CONTENT,
        })
        .collect();
    RegionHead { kind, map, hash_pages: hash_page_digests(&digests) }
}

/// Every field with a value that tells it from the others.
fn head() -> Head {
    Head {
        cpu: CpuProfile {
            vendor: "GenuineIntel".into(),
            family: 6,
            model: 143,
            cpuid: Digest::of(b"cpuid"),
            tsc_khz: 2_700_000,
        },
        vcpu_count: 2,
        state: (0..=255).collect(),
        regions: vec![
            region(RegionKind::Ram(GuestAddress(0)), 49152, &[0..100, 40_000..49_000]),
            region(RegionKind::Ram(GuestAddress(4 << 30)), 1500, std::slice::from_ref(&(3..4))),
            region(RegionKind::Disk(0), 64, &[]),
        ],
        identity_page: Some(GuestAddress(0x5000)),
        working_set: vec![WorkingSetRun { region: 1, start: ExtentIndex(3), count: 1 }],
        parents: vec![Digest::of(b"parent")],
    }
}

fn golden(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/head-v{version}.bin"))
}

#[test]
fn golden_files_of_every_version_read_as_they_were_written() {
    for version in 1..=VERSION {
        let path = golden(version);
        if std::env::var_os("FARFORK_BLESS").is_some() && version == VERSION && !path.exists() {
            std::fs::write(&path, head().encode().unwrap()).unwrap();
        }
        let frame = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(Head::decode(&frame, Digest::of(&frame)).unwrap(), head(), "version {version}");
    }
    // What is written now is the newest golden file, byte for byte: its digest is the name of images.
    assert_eq!(head().encode().unwrap(), std::fs::read(golden(VERSION)).unwrap());
}

#[test]
fn a_head_cut_short_at_any_offset_is_refused() {
    let frame = head().encode().unwrap();
    for len in 0..frame.len() {
        let cut = &frame[..len];
        let error = Head::decode(cut, Digest::of(cut)).unwrap_err();
        assert!(matches!(error, HeadError::Truncated { .. }), "{len}: {error}");
    }
    let mut longer = frame.clone();
    longer.push(0);
    assert_eq!(Head::decode(&longer, Digest::of(&longer)), Err(HeadError::TrailingBytes));
}

#[test]
fn a_head_with_any_changed_byte_is_refused() {
    let frame = head().encode().unwrap();
    let digest = Digest::of(&frame);
    for at in 0..frame.len() {
        let mut changed = frame.clone();
        changed[at] ^= 1;
        Head::decode(&changed, digest).unwrap_err();
    }
}

/// Whoever can compute a digest can write any head: it decodes to something valid, or is refused.
#[test]
fn changed_heads_with_the_right_digest_are_refused_or_valid() {
    let frame = head().encode().unwrap();
    let mut accepted = 0;
    for at in 0..frame.len() {
        for value in [0, 1, 0x7F, 0x80, 0xFF] {
            let mut changed = frame.clone();
            changed[at] = value;
            if let Ok(head) = Head::decode(&changed, Digest::of(&changed)) {
                head.encode().expect("what decodes is valid");
                accepted += 1;
            }
        }
    }
    assert!(accepted > 0, "digests and state bytes may have any value");
}

#[test]
fn each_refusal_is_typed() {
    let refused = |change: &dyn Fn(&mut Head)| {
        let mut head = head();
        change(&mut head);
        head.encode().unwrap_err()
    };
    let ram = |at: u64, extents: u32| region(RegionKind::Ram(GuestAddress(at)), extents, &[]);
    assert_eq!(refused(&|head| head.vcpu_count = 0), HeadError::NoVcpu);
    assert_eq!(refused(&|head| head.regions[1] = ram(0x2_0000, 64)), HeadError::RegionsOverlap { at: GuestAddress(0x2_0000) });
    assert!(matches!(refused(&|head| head.regions[1] = ram(0x2_0001, 64)), HeadError::RegionOutside { region: 1, .. }));
    assert!(matches!(refused(&|head| head.regions[1] = ram(1 << 46, 64)), HeadError::RegionOutside { .. }));
    assert!(matches!(refused(&|head| head.regions[1] = ram(u64::MAX - 0xFFFF, 64)), HeadError::RegionOutside { .. }));
    let most = u32::try_from(MemorySize::MAX >> 16).unwrap();
    assert!(matches!(refused(&|head| head.regions[1] = ram(4 << 30, most + 1)), HeadError::RegionTooLarge { region: 1, .. }));
    assert!(matches!(refused(&|head| head.regions[1] = ram(4 << 30, most)), HeadError::RamTooLarge { .. }));
    assert!(matches!(refused(&|head| head.regions = vec![head.regions[2].clone()]), HeadError::WorkingSetOutside { .. }));
    assert_eq!(
        refused(&|head| {
            head.working_set.clear();
            head.regions = vec![head.regions[2].clone()];
        }),
        HeadError::NoRam
    );
    assert!(matches!(refused(&|head| head.regions = vec![ram(0, 1); 9]), HeadError::TooMany { what: "regions", count: 9, .. }));
    assert!(matches!(refused(&|head| head.parents = vec![Digest::of(b""); 65]), HeadError::TooMany { what: "parents", .. }));
    assert!(matches!(refused(&|head| head.hash_pages_of(1).push(Digest::of(b""))), HeadError::HashPageCount { region: 1, .. }));
    assert!(matches!(refused(&|head| head.working_set[0].count = u32::MAX), HeadError::WorkingSetOutside { region: 1, .. }));
    assert!(matches!(refused(&|head| head.working_set[0].region = 9), HeadError::WorkingSetOutside { region: 9, .. }));
    assert!(matches!(refused(&|head| head.identity_page = Some(GuestAddress(0x5001))), HeadError::IdentityOutside { .. }));
    assert!(matches!(refused(&|head| head.identity_page = Some(GuestAddress(3 << 30))), HeadError::IdentityOutside { .. }));
    assert!(matches!(
        refused(&|head| head.regions[0].map = head.regions[0].map.renumbered(|_| LayerIndex(1))),
        HeadError::ForeignLayer { region: 0, layer: LayerIndex(1) }
    ));
    assert!(matches!(refused(&|head| head.state = vec![0; HEAD_SIZE_MAX]), HeadError::TooLarge { .. }));
}

trait HashPages {
    fn hash_pages_of(&mut self, region: usize) -> &mut Vec<Digest>;
}

impl HashPages for Head {
    fn hash_pages_of(&mut self, region: usize) -> &mut Vec<Digest> {
        &mut self.regions[region].hash_pages
    }
}

#[test]
fn frames_of_other_things_and_versions_are_refused() {
    let frame = head().encode().unwrap();
    let decode = |frame: &[u8]| Head::decode(frame, Digest::of(frame)).unwrap_err();
    let with = |at: usize, value: u8| {
        let mut changed = frame.clone();
        changed[at] = value;
        decode(&changed)
    };
    assert_eq!(with(0, b'F'), HeadError::NotAManifest);
    assert_eq!(with(8, 0), HeadError::UnknownVersion { version: 0 });
    assert_eq!(with(8, 2), HeadError::UnknownVersion { version: 2 });
    assert_eq!(with(9, 1), HeadError::UnknownVersion { version: 257 });
    assert_eq!(with(10, 1), HeadError::TrailingBytes);
    assert_eq!(decode(&vec![0; HEAD_SIZE_MAX + 1]), HeadError::TooLarge { bytes: HEAD_SIZE_MAX + 1 });
    let other = Digest::of(b"other");
    assert_eq!(Head::decode(&frame, other), Err(HeadError::WrongDigest { expected: other, actual: Digest::of(&frame) }));
}

/// A few bytes that claim to hold billions of elements must be refused by their lack of bytes, not by a lack of memory.
#[test]
fn giant_lengths_are_refused_without_allocating() {
    let valid = head().encode().unwrap();
    for at in 16..valid.len().min(400) {
        let mut body = valid[16..at].to_vec();
        body.extend_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]);
        let mut frame = valid[..16].to_vec();
        frame[12..16].copy_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
        frame.extend_from_slice(&body);
        Head::decode(&frame, Digest::of(&frame)).unwrap_err();
    }
}

#[test]
fn the_largest_machine_fits_a_head() {
    let extents = u32::try_from(MemorySize::MAX >> 16).unwrap();
    let every_other: Vec<_> = (0..extents / 64).map(|n| n * 64..n * 64 + 32).collect();
    let mut head = head();
    head.regions = vec![region(RegionKind::Ram(GuestAddress(0)), extents, &every_other)];
    head.working_set.clear();
    head.state = vec![1; 40 << 10];
    assert!(head.regions[0].map.runs().len() > 100, "many runs");
    assert_eq!(head.regions[0].hash_pages.len(), 512);
    let frame = head.encode().unwrap();
    assert_eq!(Head::decode(&frame, Digest::of(&frame)).unwrap(), head);
}

#[test]
fn hash_pages_are_verified() {
    let digests: Vec<Digest> = (0..HASH_PAGE_DIGESTS + 5).map(|n| Digest::of(&n.to_le_bytes())).collect();
    let expected = hash_page_digests(&digests);
    assert_eq!(expected.len(), 2);
    let last = encode_hash_page(&digests[HASH_PAGE_DIGESTS as usize..]);
    assert_eq!(decode_hash_page(&last, 5, expected[1]).unwrap(), digests[HASH_PAGE_DIGESTS as usize..]);
    assert!(matches!(decode_hash_page(&last, 6, expected[1]), Err(HashPageError::Length { .. })));
    assert!(matches!(decode_hash_page(&last[1..], 5, expected[1]), Err(HashPageError::Length { .. })));
    assert!(matches!(decode_hash_page(&last, 5, expected[0]), Err(HashPageError::WrongDigest { .. })));
}
