//! What nodes ask of one another besides pages: to fork children there of an image that is here. A seam, [`Peers`]: the real
//! one speaks QUIC, the one of tests TCP. What is said is the same, [`Order`] and [`Answer`].

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, MachineId, NodeId, Reason, Tenant};

use super::engine::Forked;
use super::error::NodeError;
use super::guest::network::Link;

/// The most bytes of an encoded [`Order`].
pub const ORDER_BYTES_MAX: usize = 64 << 10;
/// The most bytes of an encoded [`Answer`]: 10,000 failures take less than 4 MB, as many children about 1 MB.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The most holders that one order names.
pub const HOLDERS_MAX: usize = 16;

/// Other nodes, as this one can ask them.
pub trait Peers: Send + Sync + 'static {
    /// Lets the node at `address` fork children of an image that this node holds, and waits for its answer, at most for the
    /// order's deadline. Blocks.
    ///
    /// # Errors
    /// [`PeerError`]. Only [`PeerError::NoAnswer`] leaves open whether children run there.
    fn fork_on(&self, address: SocketAddr, order: &PeerForkOrder) -> Result<PeerForkReport, PeerError>;
}

/// To fork children of an image that the asking node holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerForkOrder {
    /// The image's name everywhere.
    pub image: Digest,
    /// Whose it is.
    pub tenant: Tenant,
    /// How many children.
    pub count: u64,
    /// The most memory of its own in bytes that each may have.
    pub limit_bytes: Option<u64>,
    /// Whether each has to prove its memory and identity.
    pub verify: bool,
    /// Whether each is plugged into that node's network of guests.
    pub network: bool,
    /// Nodes that hold the image, the asking one first; at most [`HOLDERS_MAX`].
    pub holders: Vec<SocketAddr>,
    /// How long the asking node waits for the answer.
    pub deadline: Duration,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerForkReport {
    /// The node that runs the children.
    pub node: NodeId,
    /// Children that run there.
    pub children: Vec<ForkedChild>,
    /// Children that do not.
    pub failures: Vec<PeerFailure>,
}

/// A child that runs, wherever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkedChild {
    /// What the engine said when it was forked.
    pub forked: Forked,
    /// Pages that it has proved to be its image's, if it was asked.
    pub verified_pages: Option<u64>,
    /// From the call of the fork until it knew who it is: a Linux guest.
    pub ready: Option<Duration>,
    /// Where it is on the network, if that was asked for.
    pub link: Option<Link>,
}

/// A child that does not run there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerFailure {
    /// The id that it would have had.
    pub id: MachineId,
    /// Why not.
    pub refusal: PeerRefusal,
}

/// A refusal or failure, in the words of the node that it happened on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRefusal {
    /// For programs: a code of that node's API.
    pub code: String,
    /// For people: what.
    pub message: String,
    /// For people: what to do.
    pub remedy: String,
    /// Why the machine ended, if that is what happened.
    pub reason: Option<Reason>,
}

impl PeerRefusal {
    /// The most bytes of each of its texts, so that 10,000 of them are one answer.
    const TEXT_BYTES_MAX: usize = 160;

    /// To be told to another node.
    #[must_use]
    pub fn of(error: &NodeError) -> Self {
        let short = |mut text: String| {
            text.truncate(text.floor_char_boundary(Self::TEXT_BYTES_MAX));
            text
        };
        Self {
            code: error.code().to_owned(),
            message: short(error.to_string()),
            remedy: short(error.remedy()),
            reason: error.reason(),
        }
    }
}

/// What one node asks of another. The list grows only at its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// To fork.
    Fork(PeerForkOrder),
}

/// What it is told. The list grows only at its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing was done.
    Refused(PeerRefusal),
    /// Some or all children run.
    Forked(PeerForkReport),
}

impl Answer {
    /// As a line of a log: a status as of HTTP, and what was done.
    #[must_use]
    pub fn in_short(&self) -> (u16, String) {
        match self {
            Self::Refused(refusal) => (409, format!("refused: {}", refusal.code)),
            Self::Forked(report) => (200, format!("{} children, {} failures", report.children.len(), report.failures.len())),
        }
    }
}

impl Order {
    /// The bytes of it, at most [`ORDER_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self, ORDER_BYTES_MAX)
    }

    /// Reads what another node sent.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes, ORDER_BYTES_MAX)
    }
}

impl Answer {
    /// The bytes of it, at most [`ANSWER_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self, ANSWER_BYTES_MAX)
    }

    /// Reads what another node sent.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes, ANSWER_BYTES_MAX)
    }

    /// What it is to the node that asked the one at `address` to fork.
    ///
    /// # Errors
    /// [`PeerError::Refused`].
    pub fn report(self, address: SocketAddr) -> Result<PeerForkReport, PeerError> {
        match self {
            Self::Forked(report) => Ok(report),
            Self::Refused(refusal) => Err(PeerError::Refused { address, refusal }),
        }
    }
}

/// Why another node did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PeerError {
    #[error("node {address} cannot be reached: {detail}")]
    Unreachable { address: SocketAddr, detail: String },
    #[error("node {address} and this one do not trust each other: {detail}")]
    NotTrusted { address: SocketAddr, detail: String },
    #[error("node {address} refused: {}", refusal.message)]
    Refused { address: SocketAddr, refusal: PeerRefusal },
    #[error("node {address} was asked and gave no answer ({detail}): children may run there")]
    NoAnswer { address: SocketAddr, detail: String },
}

impl PeerError {
    /// The code that programs match on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "UNREACHABLE",
            Self::NotTrusted { .. } => "NOT_TRUSTED",
            Self::Refused { .. } => "REFUSED",
            Self::NoAnswer { .. } => "NO_ANSWER",
        }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Unreachable { .. } => "check that it runs with --listen and that UDP gets through to its port".to_owned(),
            Self::NotTrusted { .. } => {
                "exchange certificates: `farfork trust show` on each, `farfork trust add` on the other".to_owned()
            }
            Self::Refused { refusal, .. } => format!("on that node: {}", refusal.remedy),
            Self::NoAnswer { .. } => "look there with `farfork ls` before asking again".to_owned(),
        }
    }
}

/// Why bytes of another node are no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum MessageError {
    #[error("a message of {bytes} bytes where {max} are the most")]
    TooLong { bytes: usize, max: usize },
    #[error("a message that cannot be read: {detail}")]
    Malformed { detail: String },
    #[error("a message with {bytes} bytes after its end")]
    Trailing { bytes: usize },
}

impl MessageError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "use the same version of farfork on both nodes"
    }
}

fn encode(message: &impl Serialize, bytes_max: usize) -> Vec<u8> {
    let bytes = postcard::to_stdvec(message).expect("messages are plain data");
    assert!(bytes.len() <= bytes_max, "a message of {} bytes: counts are checked before", bytes.len());
    bytes
}

fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8], max: usize) -> Result<T, MessageError> {
    if bytes.len() > max {
        return Err(MessageError::TooLong { bytes: bytes.len(), max });
    }
    // Lists grow with what was really read, not with the length that the bytes announce: serde caps what it reserves.
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(MessageError::Trailing { bytes: rest.len() }),
        Err(error) => Err(MessageError::Malformed { detail: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use uuid::Uuid;

    use super::*;

    fn order() -> Order {
        Order::Fork(PeerForkOrder {
            image: Digest::of(b"of a test"),
            tenant: Tenant::default_tenant(),
            count: 10_000,
            limit_bytes: Some(1 << 20),
            verify: true,
            network: false,
            holders: vec![(Ipv6Addr::LOCALHOST, 7117).into(); HOLDERS_MAX],
            deadline: Duration::from_secs(60),
        })
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let order = order();
        assert_eq!(Order::decode(&order.encode()), Ok(order));
        let refusal =
            PeerRefusal { code: "X".repeat(32), message: "m".repeat(160), remedy: "r".repeat(160), reason: Some(Reason::Oom) };
        let id = MachineId::from_uuid(Uuid::max());
        let failures = vec![PeerFailure { id, refusal: refusal.clone() }; 10_000];
        let node = NodeId::from_uuid(Uuid::max());
        let largest = Answer::Forked(PeerForkReport { node, children: Vec::new(), failures });
        assert_eq!(Answer::decode(&largest.encode()), Ok(largest), "as large as an answer can be");
        let refused = Answer::Refused(refusal);
        assert_eq!(Answer::decode(&refused.encode()), Ok(refused));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let good = order().encode();
        for length in 0..good.len() {
            assert!(matches!(Order::decode(&good[..length]), Err(MessageError::Malformed { .. })), "{length} bytes");
        }
        assert_eq!(Order::decode(&[&good[..], b"x"].concat()), Err(MessageError::Trailing { bytes: 1 }));
        assert!(matches!(Order::decode(&vec![0; ORDER_BYTES_MAX + 1]), Err(MessageError::TooLong { .. })));
        assert!(matches!(Answer::decode(&vec![0; ANSWER_BYTES_MAX + 1]), Err(MessageError::TooLong { .. })));
        // A report that announces as many children as there are numbers, and has none.
        let boasting = [&[1, 16][..], &[0; 16], &[0xFF; 9], &[1]].concat();
        assert!(matches!(Answer::decode(&boasting), Err(MessageError::Malformed { .. })));
    }

    #[test]
    fn texts_for_other_nodes_have_an_end() {
        let error = NodeError::UnknownImage { id: "ä".repeat(10_000) };
        let refusal = PeerRefusal::of(&error);
        assert!(refusal.message.len() <= 160 && refusal.message.starts_with("no image ää"), "{refusal:?}");
    }
}
