//! Frames: the header, the bound of each kind, and how messages become bytes and back.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::{Answer, Content, EXTENT_BYTES, Encoding, ExtentHeader, ExtentId, ORDER_ANSWER_SIZE_MAX, ORDER_SIZE_MAX, Request};

/// The version that is written, and the only one that is read.
pub const VERSION: u16 = 1;
/// Bytes of a frame before its body.
pub const HEADER_SIZE: usize = 12;

const MAGIC: [u8; 4] = *b"ffpg";
/// A region, an extent and an encoding in postcard's variable lengths, with room.
const EXTENT_HEADER_MAX: usize = 16;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A [`Request`].
    Request,
    /// An [`Answer`].
    Answer,
    /// An extent.
    Extent,
    /// An order.
    Order,
    /// What came of an order.
    OrderAnswer,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Request, Self::Answer, Self::Extent, Self::Order, Self::OrderAnswer];

    const fn number(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Answer => 2,
            Self::Extent => 3,
            Self::Order => 4,
            Self::OrderAnswer => 5,
        }
    }

    /// The longest body of this kind, in bytes.
    #[must_use]
    pub const fn body_max(self) -> usize {
        match self {
            // A lease, an image and 4,096 hints of at most 12 bytes.
            Self::Request => 56 << 10,
            // A head, as much of hash pages, and 4,096 hints.
            Self::Answer => 192 << 10,
            Self::Extent => EXTENT_BYTES + EXTENT_HEADER_MAX,
            Self::Order => ORDER_SIZE_MAX,
            Self::OrderAnswer => ORDER_ANSWER_SIZE_MAX,
        }
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// How long it is, within the kind's bound.
    pub body_len: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`BadFrame`] if it is none, or its body is longer than its kind may be.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, BadFrame> {
        let [m0, m1, m2, m3, v0, v1, kind, zero, l0, l1, l2, l3] = *bytes;
        if [m0, m1, m2, m3] != MAGIC || zero != 0 {
            return Err(BadFrame::NoMagic);
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(BadFrame::UnknownVersion(version));
        }
        let kind = Kind::ALL.into_iter().find(|known| known.number() == kind).ok_or(BadFrame::UnknownKind(kind))?;
        let body_len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if body_len > kind.body_max() {
            return Err(BadFrame::TooLong { kind, bytes: body_len });
        }
        Ok(Self { kind, body_len })
    }

    fn encode(self) -> [u8; HEADER_SIZE] {
        assert!(self.body_len <= self.kind.body_max(), "a {:?} of {} bytes", self.kind, self.body_len);
        let [v0, v1] = VERSION.to_le_bytes();
        let [l0, l1, l2, l3] = u32::try_from(self.body_len).expect("bounded").to_le_bytes();
        let [m0, m1, m2, m3] = MAGIC;
        [m0, m1, m2, m3, v0, v1, self.kind.number(), 0, l0, l1, l2, l3]
    }
}

impl Request {
    /// The frame.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        message(Kind::Request, self)
    }

    /// Reads the body of a [`Kind::Request`].
    ///
    /// # Errors
    /// [`BadFrame`].
    pub fn decode(body: &[u8]) -> Result<Self, BadFrame> {
        whole(body)
    }
}

impl Answer {
    /// The frame.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        message(Kind::Answer, self)
    }

    /// Reads the body of a [`Kind::Answer`].
    ///
    /// # Errors
    /// [`BadFrame`].
    pub fn decode(body: &[u8]) -> Result<Self, BadFrame> {
        let answer = whole(body)?;
        if let Self::Opened(opened) = &answer {
            let ahead: usize = opened.hash_pages.iter().map(|page| page.len()).sum();
            if ahead > super::HASH_PAGES_AHEAD_MAX {
                return Err(BadFrame::TooManyHashPages { bytes: ahead });
            }
        }
        Ok(answer)
    }
}

impl ExtentHeader {
    /// The frame up to its payload, which follows as it is.
    #[must_use]
    pub fn encode(&self, payload_len: usize) -> Bytes {
        let mut body = [0; EXTENT_HEADER_MAX];
        let body = postcard::to_slice(self, &mut body).expect("small");
        let mut frame = BytesMut::with_capacity(HEADER_SIZE + body.len());
        frame.put_slice(&Header { kind: Kind::Extent, body_len: body.len() + payload_len }.encode());
        frame.put_slice(body);
        frame.freeze()
    }

    /// Reads the body of a [`Kind::Extent`] and undoes its encoding. Data has 64 KiB, always.
    ///
    /// # Errors
    /// [`BadFrame`].
    pub fn decode(body: &Bytes) -> Result<(ExtentId, Content), BadFrame> {
        let (header, payload) = postcard::take_from_bytes::<Self>(body).map_err(BadFrame::Malformed)?;
        let payload = body.slice_ref(payload);
        let wrong_length = BadFrame::ExtentLength { encoding: header.encoding, bytes: payload.len() };
        let content = match header.encoding {
            Encoding::Raw if payload.len() == EXTENT_BYTES => Content::Data(payload),
            Encoding::Lz4 if payload.len() <= EXTENT_BYTES => Content::Data(decompress(&payload)?),
            Encoding::Zero if payload.is_empty() => Content::Zero,
            Encoding::Absent if payload.is_empty() => Content::Absent,
            _ => return Err(wrong_length),
        };
        Ok((header.id, content))
    }
}

/// The frame of an order or its answer.
///
/// # Errors
/// [`BadFrame::TooLong`].
pub(crate) fn order(kind: Kind, body: &[u8]) -> Result<Bytes, BadFrame> {
    if body.len() > kind.body_max() {
        return Err(BadFrame::TooLong { kind, bytes: body.len() });
    }
    let mut frame = BytesMut::with_capacity(HEADER_SIZE + body.len());
    frame.put_slice(&Header { kind, body_len: body.len() }.encode());
    frame.put_slice(body);
    Ok(frame.freeze())
}

/// 64 KiB as an lz4 block, if that saves an eighth.
pub(crate) fn compress(extent: &[u8]) -> Option<Bytes> {
    let compressed = lz4_flex::block::compress(extent);
    (compressed.len() <= extent.len() / 8 * 7).then(|| compressed.into())
}

fn decompress(block: &[u8]) -> Result<Bytes, BadFrame> {
    let mut extent = vec![0; EXTENT_BYTES];
    match lz4_flex::block::decompress_into(block, &mut extent) {
        Ok(EXTENT_BYTES) => Ok(extent.into()),
        Ok(bytes) => Err(BadFrame::ExtentLength { encoding: Encoding::Lz4, bytes }),
        Err(_) => Err(BadFrame::Lz4),
    }
}

fn message<M: Serialize>(kind: Kind, message: &M) -> Bytes {
    let mut frame = postcard::to_extend(message, vec![0; HEADER_SIZE]).expect("plain data");
    let header = Header { kind, body_len: frame.len() - HEADER_SIZE };
    frame[..HEADER_SIZE].copy_from_slice(&header.encode());
    frame.into()
}

fn whole<M: DeserializeOwned>(body: &[u8]) -> Result<M, BadFrame> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(BadFrame::TrailingBytes(rest.len())),
        Err(error) => Err(BadFrame::Malformed(error)),
    }
}

/// Bytes that are no frame, or not one that may stand there.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum BadFrame {
    #[error("a frame does not begin as one")]
    NoMagic,
    #[error("a frame has version {0}; this farfork speaks version {VERSION}")]
    UnknownVersion(u16),
    #[error("a frame has the unknown kind {0}")]
    UnknownKind(u8),
    #[error("a frame of kind {0:?} where none is due")]
    OtherKind(Kind),
    #[error("a frame of kind {kind:?} has {bytes} bytes; the most is {}", kind.body_max())]
    TooLong { kind: Kind, bytes: usize },
    #[error("a frame is cut short")]
    Truncated,
    #[error("a frame does not decode: {0}")]
    Malformed(postcard::Error),
    #[error("a frame has {0} bytes after its end")]
    TrailingBytes(usize),
    #[error("an answer has {bytes} bytes of hash pages ahead; the most is 64 KiB")]
    TooManyHashPages { bytes: usize },
    #[error("an extent came as {encoding:?} with {bytes} bytes")]
    ExtentLength { encoding: Encoding, bytes: usize },
    #[error("an extent does not decompress to 64 KiB")]
    Lz4,
}
