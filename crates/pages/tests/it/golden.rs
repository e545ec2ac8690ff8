//! The wire format, frozen.

use bytes::Bytes;
use pages::wire::{BadFrame, Content, ExtentHeader, HEADER_SIZE, Header, Kind, Request, VERSION, samples};

/// `FARFORK_BLESS=1` writes the golden file of a new version.
#[test]
fn frames_are_those_of_the_golden_file() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/wire-v{VERSION}.txt"));
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let all = samples::requests().into_iter().chain(samples::answers());
    let written: String = all.map(|(name, bytes)| format!("{name} {}\n", hex(&bytes))).collect();
    if std::env::var_os("FARFORK_BLESS").is_some() && !path.exists() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &written).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), written);
}

#[test]
fn samples_are_read_and_the_lz4_one_is_64_kib_of_sevens() {
    for (name, frame) in samples::requests() {
        let request = Request::decode(&frame[HEADER_SIZE..]).unwrap();
        assert_eq!(request.encode(), frame, "{name}");
    }
    let lz4 = samples::answers().into_iter().find(|(name, _)| *name == "lz4").unwrap().1;
    let (_, content) = ExtentHeader::decode(&lz4.slice(HEADER_SIZE..)).unwrap();
    assert_eq!(content, Content::Data(Bytes::from(vec![7; 64 << 10])));
}

#[test]
fn anything_else_is_refused_before_anything_is_allocated_for_it() {
    let good: [u8; HEADER_SIZE] = samples::requests()[0].1[..HEADER_SIZE].try_into().unwrap();
    let with = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        Header::decode(&bytes)
    };
    assert_eq!(with(0, b'F'), Err(BadFrame::NoMagic));
    assert_eq!(with(4, 9), Err(BadFrame::UnknownVersion(9)));
    assert_eq!(with(6, 77), Err(BadFrame::UnknownKind(77)));
    assert_eq!(with(7, 1), Err(BadFrame::NoMagic));
    assert!(matches!(with(11, 1), Err(BadFrame::TooLong { kind: Kind::Request, .. })));
    // A list that announces four thousand million elements in a few bytes.
    let hints = samples::requests().into_iter().find(|(name, _)| *name == "hints").unwrap().1;
    let mut body = hints[HEADER_SIZE..].to_vec();
    let announced = body.len() - 4;
    assert_eq!(body[announced], 1);
    body.splice(announced..=announced, [0xFF, 0xFF, 0xFF, 0xFF, 0x0F]);
    assert!(matches!(Request::decode(&body), Err(BadFrame::Malformed(_))));
}
