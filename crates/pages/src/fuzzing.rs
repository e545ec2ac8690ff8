//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of a peer's bytes, with what
//! must hold when it accepts them.

use bytes::Bytes;

use crate::identity::Certificate;
use crate::wire::{Answer, Content, EXTENT_BYTES, ExtentHeader, HEADER_SIZE, Header, Kind, Request};

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 3] = [("page_request", request), ("page_answer", answer), ("certificate", certificate)];

/// What a holder takes from a reader.
pub fn request(bytes: &[u8]) {
    let Some((header, body)) = frame(bytes) else { return };
    if header.kind == Kind::Request
        && let Ok(request) = Request::decode(body)
    {
        let encoded = request.encode();
        assert_eq!(Request::decode(&encoded[HEADER_SIZE..]).as_ref(), Ok(&request));
        if let Request::Extents(request) = request {
            assert!((1..=16).contains(&request.extents.as_slice().len()));
        }
    }
}

/// What a reader takes from a holder.
pub fn answer(bytes: &[u8]) {
    let Some((header, body)) = frame(bytes) else { return };
    match header.kind {
        Kind::Answer => {
            let Ok(answer) = Answer::decode(body) else { return };
            let encoded = answer.encode();
            assert_eq!(Answer::decode(&encoded[HEADER_SIZE..]).as_ref(), Ok(&answer));
            if let Answer::Refused(refusal) = answer {
                assert!(!refusal.to_string().chars().any(char::is_control));
            }
        }
        Kind::Extent => {
            if let Ok((_, Content::Data(data))) = ExtentHeader::decode(&Bytes::copy_from_slice(body)) {
                assert_eq!(data.len(), EXTENT_BYTES);
            }
        }
        Kind::Request | Kind::Order | Kind::OrderAnswer => {}
    }
}

/// A certificate, as in a handshake and as in a file.
pub fn certificate(bytes: &[u8]) {
    for certificate in [Certificate::from_der(bytes), Certificate::from_pem(bytes)].into_iter().flatten() {
        let again = Certificate::from_der(certificate.der());
        assert_eq!(again.as_ref(), Ok(&certificate));
    }
}

fn frame(bytes: &[u8]) -> Option<(Header, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_SIZE>()?;
    let header = Header::decode(header).ok()?;
    Some((header, rest.get(..header.body_len)?))
}
