//! One frame of each kind: for the golden file, and as seeds of the fuzz corpora.

use std::time::Duration;

use bytes::Bytes;
use types::manifest::WorkingSetRun;
use types::{Digest, ExtentIndex, Tenant};

use super::{
    Answer, Encoding, ExtentHeader, ExtentId, ExtentsRequest, HashPageBytes, Hints, LeaseToken, Opened, Refusal, RefusalCode,
    Renewed, Request, Urgency, Wanted, frame,
};

/// Every request, by name.
///
/// # Panics
/// Never: the samples are within all bounds.
#[must_use]
pub fn requests() -> Vec<(&'static str, Bytes)> {
    let image = Digest::of(b"image");
    let id = |region, extent| ExtentId { region, extent: ExtentIndex(extent) };
    let extents = ExtentsRequest {
        lease: lease(),
        image,
        urgency: Urgency::Replay,
        extents: Wanted::new(vec![id(0, 7), id(0, 8), id(1, 70_000)]).expect("distinct"),
        may_compress: true,
    };
    let open = Request::Open { tenant: Tenant::default_tenant(), image };
    let hash_page = Request::HashPage { lease: lease(), image, region: 1, page: 300 };
    let hints = Request::Hints { lease: lease(), image, runs: hints() };
    let all = [
        ("open", open),
        ("hash-page", hash_page),
        ("extents", Request::Extents(extents)),
        ("renew", Request::Renew { lease: lease() }),
        ("release", Request::Release { lease: lease() }),
        ("hints", hints),
    ];
    all.into_iter().map(|(name, request)| (name, request.encode())).collect()
}

/// Every answer, by name.
///
/// # Panics
/// Never: the samples are within all bounds.
#[must_use]
pub fn answers() -> Vec<(&'static str, Bytes)> {
    let opened = Opened {
        lease: lease(),
        lease_for: Duration::from_secs(60),
        head: super::Blob::new(&b"head"[..]).expect("short"),
        hints: hints(),
        is_complete: true,
        hash_pages: Opened::pages_ahead([hash_page(), hash_page()]),
        about: super::Blob::new(&b"about"[..]).expect("short"),
    };
    let renewed = Renewed { lease: lease(), lease_for: Duration::from_millis(59_500) };
    let refused = |code| Answer::Refused(Refusal::new(code, "sample"));
    let mut all = vec![
        ("opened", Answer::Opened(opened).encode()),
        ("hash-page", Answer::HashPage(hash_page()).encode()),
        ("renewed", Answer::Renewed(renewed).encode()),
        ("done", Answer::Done.encode()),
        ("refused-no-lease", refused(RefusalCode::NoLease).encode()),
        ("refused-failed", refused(RefusalCode::Failed).encode()),
    ];
    for (name, encoding, payload) in
        [("zero", Encoding::Zero, &b""[..]), ("absent", Encoding::Absent, b""), ("lz4", Encoding::Lz4, &LZ4_OF_SEVENS)]
    {
        let header = ExtentHeader { id: ExtentId { region: 1, extent: ExtentIndex(70_000) }, encoding };
        all.push((name, [&header.encode(payload.len()), payload].concat().into()));
    }
    let order = |kind, body: &[u8]| frame::order(kind, body).expect("short");
    all.push(("order", order(super::Kind::Order, b"fork")));
    all.push(("order-answer", order(super::Kind::OrderAnswer, b"forked")));
    all
}

/// 64 KiB of sevens as an lz4 block: one literal, a match of 65,530, and five literals, since a block ends with those.
const LZ4_OF_SEVENS: [u8; 267] = {
    let mut block = [0xFF; 267];
    [block[0], block[1], block[2], block[3]] = [0x1F, 7, 1, 0];
    // 65,530 = 4 + 15 + 256 * 255 + 231
    [block[260], block[261]] = [231, 0x50];
    [block[262], block[263], block[264], block[265], block[266]] = [7; 5];
    block
};

fn lease() -> LeaseToken {
    LeaseToken::new(&b"lease"[..]).expect("short")
}

fn hash_page() -> HashPageBytes {
    HashPageBytes::new(Digest::of(b"extent").as_bytes().to_vec()).expect("one digest")
}

fn hints() -> Hints {
    Hints::first_of([WorkingSetRun { region: 0, start: ExtentIndex(5), count: 9 }])
}
