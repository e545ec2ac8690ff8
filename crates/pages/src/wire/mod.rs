//! What two nodes say to each other.
//!
//! One bidirectional stream a request. The reader sends one frame and finishes its side; the holder answers with one frame, or
//! with one for each extent, and finishes too. A refusal is a frame like any other, and the last.
//!
//! ```text
//! frame    magic "ffpg", u16 version, u8 kind, u8 zero, u32 length of the body (little endian), body
//! request  postcard of Request
//! answer   postcard of Answer
//! extent   postcard of ExtentHeader, then the payload, to the end of the body
//! order    bytes of the node's own (ALPN farfork-node/3), and its answer
//! ```
//!
//! Each kind has a longest body, looked at before anything is allocated. postcard is positional: a change of what is here is a
//! new version; new variants go to the end. `tests/golden/wire-v1.txt` holds one frame of each.

mod bounded;
mod frame;
pub mod samples;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::manifest::{HEAD_SIZE_MAX, WorkingSetRun};
use types::{Digest, EXTENT_SIZE, ExtentIndex, Tenant};

pub use bounded::{Blob, List, TooMany};
pub use frame::{BadFrame, HEADER_SIZE, Header, Kind, VERSION};
pub(crate) use frame::{compress, order as order_frame};

/// ALPN of page requests.
pub const ALPN_PAGES: &[u8] = b"farfork-pages/1";
/// ALPN of orders.
pub const ALPN_NODE: &[u8] = b"farfork-node/3";

/// The most extents in a request.
pub const EXTENTS_MAX: usize = 16;
/// The most bytes of a lease's token.
pub const LEASE_SIZE_MAX: usize = 512;
/// The most runs of hints: more than a head has, since what children touch first is scattered.
pub const HINTS_MAX: usize = 4096;
/// The most bytes of a hash page: 1,024 digests.
pub const HASH_PAGE_SIZE_MAX: usize = 32 << 10;
/// The most bytes of hash pages that come with a head.
pub const HASH_PAGES_AHEAD_MAX: usize = 64 << 10;
/// The most bytes of what a holder says of an image besides its head.
pub const ABOUT_SIZE_MAX: usize = 256;
/// The most hash pages that come with a head.
pub const HASH_PAGES_AHEAD_COUNT_MAX: usize = 64;
/// The most bytes of an order.
pub const ORDER_SIZE_MAX: usize = 64 << 10;
/// The most bytes of an order's answer.
pub const ORDER_ANSWER_SIZE_MAX: usize = 4 << 20;
/// The most bytes of a refusal's message.
pub const REFUSAL_MESSAGE_MAX: usize = 256;
/// Bytes in an extent, as a length of buffers.
pub const EXTENT_BYTES: usize = 64 << 10;
const _: () = assert!(EXTENT_BYTES as u64 == EXTENT_SIZE);

/// A read lease as its holder signed it: opaque to everybody else.
pub type LeaseToken = Blob<LEASE_SIZE_MAX>;
/// A hash page, not verified.
pub type HashPageBytes = Blob<HASH_PAGE_SIZE_MAX>;
/// Runs in first-touch order.
pub type Hints = List<WorkingSetRun, HINTS_MAX>;

/// One extent of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExtentId {
    /// Position in the head's regions.
    pub region: u8,
    /// Which of the region.
    pub extent: ExtentIndex,
}

/// How soon extents are needed, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Urgency {
    /// A child waits for the first of them.
    Demand,
    /// The recorded working set.
    Replay,
    /// Everything else.
    Stream,
}

impl std::fmt::Display for ExtentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.region, self.extent)
    }
}

impl std::fmt::Display for Urgency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Demand => "demand",
            Self::Replay => "replay",
            Self::Stream => "stream",
        })
    }
}

/// From a reader to a holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Describe an image, and let me read it. Answered with [`Answer::Opened`].
    Open {
        /// Whose it is.
        tenant: Tenant,
        /// Which.
        image: Digest,
    },
    /// Send a hash page. Answered with [`Answer::HashPage`].
    HashPage {
        /// The right to.
        lease: LeaseToken,
        /// Of which image.
        image: Digest,
        /// Of which region.
        region: u8,
        /// Which of the region.
        page: u32,
    },
    /// Send extents. Answered with a frame for each, in the order asked for.
    Extents(ExtentsRequest),
    /// Let me read on. Answered with [`Answer::Renewed`].
    Renew {
        /// The right so far.
        lease: LeaseToken,
    },
    /// I read no longer. Answered with [`Answer::Done`].
    Release {
        /// The right to give back.
        lease: LeaseToken,
    },
    /// What my children touched first. Advice. Answered with [`Answer::Done`].
    Hints {
        /// The right to speak of it.
        lease: LeaseToken,
        /// Of which image.
        image: Digest,
        /// In first-touch order.
        runs: Hints,
    },
}

/// See [`Request::Extents`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentsRequest {
    /// The right to.
    pub lease: LeaseToken,
    /// Of which image.
    pub image: Digest,
    /// How soon. Demand goes over a connection of its own.
    pub urgency: Urgency,
    /// Which, the most wanted first.
    pub extents: Wanted,
    /// Whether they may come compressed, where that saves an eighth.
    pub may_compress: bool,
}

/// 1 to [`EXTENTS_MAX`] extents, each once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "List<ExtentId, EXTENTS_MAX>", into = "List<ExtentId, EXTENTS_MAX>")]
pub struct Wanted(Vec<ExtentId>);

impl Wanted {
    /// Checks a list.
    ///
    /// # Errors
    /// [`WantedError`].
    pub fn new(extents: Vec<ExtentId>) -> Result<Self, WantedError> {
        let distinct: BTreeSet<_> = extents.iter().take(EXTENTS_MAX + 1).collect();
        match extents.len() {
            0 => Err(WantedError::Empty),
            count if count > EXTENTS_MAX => Err(WantedError::TooMany { count }),
            count if count > distinct.len() => Err(WantedError::Twice),
            _ => Ok(Self(extents)),
        }
    }

    /// The extents.
    #[must_use]
    pub fn as_slice(&self) -> &[ExtentId] {
        &self.0
    }
}

impl TryFrom<List<ExtentId, EXTENTS_MAX>> for Wanted {
    type Error = WantedError;

    fn try_from(list: List<ExtentId, EXTENTS_MAX>) -> Result<Self, Self::Error> {
        Self::new(list.into_vec())
    }
}

impl From<Wanted> for List<ExtentId, EXTENTS_MAX> {
    fn from(wanted: Wanted) -> Self {
        Self::first_of(wanted.0)
    }
}

/// Extents that cannot be asked for in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum WantedError {
    #[error("a request for no extent")]
    Empty,
    #[error("a request for {count} extents; the most is {EXTENTS_MAX}")]
    TooMany { count: usize },
    #[error("a request for an extent twice")]
    Twice,
}

/// From a holder to a reader; extents and orders have frames of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// No, whatever was asked.
    Refused(Refusal),
    /// To [`Request::Open`].
    Opened(Opened),
    /// To [`Request::HashPage`].
    HashPage(HashPageBytes),
    /// To [`Request::Renew`].
    Renewed(Renewed),
    /// To what has no other answer.
    Done,
}

/// The description of an image and the right to read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The right.
    pub lease: LeaseToken,
    /// How long it lasts from when it was signed. A reader renews it after a third.
    pub lease_for: Duration,
    /// The encoded head. Whoever receives it verifies it against the image's digest.
    pub head: Blob<HEAD_SIZE_MAX>,
    /// What children touched first since the head was made, in that order.
    pub hints: Hints,
    /// Whether this holder has every extent.
    pub is_complete: bool,
    /// Hash pages that are needed first, at most [`HASH_PAGES_AHEAD_MAX`] bytes. Whoever receives one verifies it, which tells where it
    /// belongs.
    pub hash_pages: List<HashPageBytes, HASH_PAGES_AHEAD_COUNT_MAX>,
    /// What its holder says of the image besides: opaque here, and advice.
    pub about: Blob<ABOUT_SIZE_MAX>,
}

impl Opened {
    /// As many of `pages` as may come with a head.
    pub fn pages_ahead(pages: impl IntoIterator<Item = HashPageBytes>) -> List<HashPageBytes, HASH_PAGES_AHEAD_COUNT_MAX> {
        let mut bytes = 0;
        List::first_of(pages.into_iter().take_while(|page| {
            bytes += page.len();
            bytes <= HASH_PAGES_AHEAD_MAX
        }))
    }
}

/// A lease with a new term. The old token is good for a few seconds more, for what is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// The right.
    pub lease: LeaseToken,
    /// How long it lasts from when it was signed.
    pub lease_for: Duration,
}

/// A typed no.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{code}: {}", self.message())]
pub struct Refusal {
    /// Why.
    pub code: RefusalCode,
    message: Blob<REFUSAL_MESSAGE_MAX>,
}

impl Refusal {
    /// A refusal; of a long message the start.
    #[must_use]
    pub fn new(code: RefusalCode, message: impl std::fmt::Display) -> Self {
        let mut message = message.to_string();
        message.truncate(message.floor_char_boundary(REFUSAL_MESSAGE_MAX));
        Self { code, message: Blob::new(message).expect("truncated") }
    }

    /// The numbers. From a peer: not to be believed, and without what would disturb a terminal.
    #[must_use]
    pub fn message(&self) -> String {
        let text = String::from_utf8_lossy(&self.message);
        text.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self.code {
            RefusalCode::NoLease
            | RefusalCode::Forged
            | RefusalCode::Expired
            | RefusalCode::OtherNode
            | RefusalCode::OtherImage
            | RefusalCode::Replayed => "open the image anew",
            RefusalCode::OtherTenant => "have the tenant added to this node with `farfork trust add --tenant` over there",
            RefusalCode::Revoked => "ask whoever revoked it",
            RefusalCode::OutOfRange | RefusalCode::Malformed => "update farfork on both nodes to one version",
            RefusalCode::UnknownImage => "ask another holder: this one does not have the image, or no longer",
            RefusalCode::Busy => "ask again later, or another holder",
            RefusalCode::Failed => "look into the log of the node that was asked",
        }
    }
}

/// Why a holder refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Error, Serialize, Deserialize)]
pub enum RefusalCode {
    /// No lease came with the request.
    #[error("NO_LEASE")]
    NoLease,
    /// The lease was not signed by this holder since it started.
    #[error("FORGED")]
    Forged,
    /// The lease's term is over.
    #[error("EXPIRED")]
    Expired,
    /// The lease is another node's.
    #[error("OTHER_NODE")]
    OtherNode,
    /// The lease, or the peer's permission, is for another tenant.
    #[error("OTHER_TENANT")]
    OtherTenant,
    /// The lease is for another image.
    #[error("OTHER_IMAGE")]
    OtherImage,
    /// The lease was renewed or given back since.
    #[error("REPLAYED")]
    Replayed,
    /// The lease was taken back.
    #[error("REVOKED")]
    Revoked,
    /// Beyond the image.
    #[error("OUT_OF_RANGE")]
    OutOfRange,
    /// This holder does not have the image.
    #[error("UNKNOWN_IMAGE")]
    UnknownImage,
    /// A limit is reached; what was asked may be asked again.
    #[error("BUSY")]
    Busy,
    /// The request is none.
    #[error("MALFORMED")]
    Malformed,
    /// It was tried, and failed.
    #[error("FAILED")]
    Failed,
}

impl RefusalCode {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::NoLease,
        Self::Forged,
        Self::Expired,
        Self::OtherNode,
        Self::OtherTenant,
        Self::OtherImage,
        Self::Replayed,
        Self::Revoked,
        Self::OutOfRange,
        Self::UnknownImage,
        Self::Busy,
        Self::Malformed,
        Self::Failed,
    ];
}

/// What stands before an extent's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentHeader {
    /// Which.
    pub id: ExtentId,
    /// What the payload is.
    pub encoding: Encoding,
}

/// What an extent's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// The 64 KiB.
    Raw,
    /// The 64 KiB, as one lz4 block.
    Lz4,
    /// Empty: every byte is zero.
    Zero,
    /// Empty: this holder does not have it (yet).
    Absent,
}

/// An extent as it came, not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Exactly 64 KiB.
    Data(Bytes),
    /// Every byte is zero.
    Zero,
    /// The holder does not have it (yet).
    Absent,
}
