//! What members say to one another. Who asks is proven by the transport; what each may say is checked here.

use control::command::{Answer, Command, Key};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::raft::{TransferLeaderRequest, TransferLeaderResponse};
use openraft::type_config::alias::{LogIdOf, StoredMembershipOf, VoteOf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Member, Types};

/// The most bytes of a message. The largest is a state: four million tasks of which no two neighbours are alike are 200 MiB.
pub const MESSAGE_BYTES_MAX: usize = 256 << 20;

/// What a member asks of another. The list grows only at its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// To have these entries, or to hear that the leader is there.
    Append(AppendEntriesRequest<Types>),
    /// To vote for the asker.
    Vote(VoteRequest<Types>),
    /// Whether it would.
    PreVote(VoteRequest<Types>),
    /// To take this state over.
    Snapshot(Snapshot),
    /// To lead.
    TransferLeader(TransferLeaderRequest<Types>),
    /// Of the leader: to have this agreed on.
    Propose {
        /// Under which it is done once.
        key: Option<Key>,
        /// What.
        command: Command,
    },
    /// Of the leader: how much has been agreed on by now.
    Read,
    /// Of the leader: to know that the asker's node does what it should.
    Alive {
        /// Its start.
        incarnation: u64,
    },
}

/// A state, and which entry made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The leader's.
    pub vote: VoteOf<Types>,
    /// The last entry in it.
    pub last: Option<LogIdOf<Types>>,
    /// The members as of then.
    pub membership: StoredMembershipOf<Types>,
    /// The state.
    pub state: Vec<u8>,
}

/// What it is told. The list grows only at its end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Response {
    /// To entries.
    Append(AppendEntriesResponse<Types>),
    /// To either question for a vote.
    Vote(VoteResponse<Types>),
    /// To a state.
    Snapshot(SnapshotResponse<Types>),
    /// To being asked to lead.
    TransferLeader(TransferLeaderResponse<Types>),
    /// What was agreed on was answered this.
    Answered(Answer),
    /// What was asked for is to be read when this entry has been applied.
    ReadAt(Option<u64>),
    /// What the asker's node is to the cluster.
    Heard(Standing),
    /// Another one leads, if anybody does; this was not done.
    NotLeader(Option<(Member, String)>),
    /// It could not be agreed on in time; it may be later.
    NoQuorum,
    /// The asker may not ask that.
    Forbidden,
    /// This member does not take part any more, until it is started again.
    Stopped(String),
}

/// What a start of a node is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// One of its nodes.
    Known,
    /// It has to register, with a number above this.
    Unknown {
        /// Of its last start.
        above: u64,
    },
    /// It was removed or revoked.
    Out,
}

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum MessageError {
    #[error("{bytes} bytes where {max} are allowed")]
    TooLong { bytes: usize, max: usize },
    #[error("it does not decode: {0}")]
    Malformed(String),
    #[error("{0} bytes after its end")]
    Trailing(usize),
}

impl Request {
    /// Whether only who has a vote may ask this, and in whose name it asks.
    #[must_use]
    pub fn voter(&self) -> Option<Member> {
        let vote = match self {
            Self::Append(request) => &request.vote,
            Self::Vote(request) | Self::PreVote(request) => &request.vote,
            Self::Snapshot(snapshot) => &snapshot.vote,
            Self::TransferLeader(request) => request.from_leader(),
            Self::Propose { .. } | Self::Read | Self::Alive { .. } => return None,
        };
        Some(vote.leader_id.node_id)
    }
}

/// The bytes of a message.
///
/// # Panics
/// Never: messages are plain data.
#[must_use]
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).expect("messages are plain data")
}

/// Reads a message of anybody.
///
/// # Errors
/// [`MessageError`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong { bytes: bytes.len(), max: MESSAGE_BYTES_MAX });
    }
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(MessageError::Trailing(rest.len())),
        Err(error) => Err(MessageError::Malformed(error.to_string())),
    }
}
