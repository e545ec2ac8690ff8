//! The log that a cluster agrees on: openraft, where it keeps what it must not forget, and how members reach one another. Nothing
//! else here imports openraft.
//!
//! ```text
//!  propose, read ──▶ Consensus ──▶ openraft ──append, vote, truncate──▶ Log ──┐
//!  (any node)          │   ▲         │      ──apply──▶ Machine ──snapshots────┴──▶ Disk: one redb file
//!                      │   │         │                   └── control::State, in memory
//!             Leading ─┘   └─────────┴──▶ Carrier: to other members, and from them
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`consensus`] | a member: what is asked of it by its node, and by others |
//! | [`leading`] | what it does while it leads: tends the state, and has the members follow it |
//! | [`disk`] | the file: transactions that are on disk when they return, and damage that is told and not passed on |
//! | [`log`] | entries, the vote, what is known to be committed |
//! | [`machine`] | the state that entries make, and its snapshots |
//! | [`wire`], [`network`] | what members say to one another, and the seam that carries it |

pub mod consensus;
pub mod disk;
mod leading;
pub mod log;
pub mod machine;
pub mod network;
pub mod wire;

use std::fmt;

use control::Answer;
use serde::{Deserialize, Serialize};
use types::NodeId;
use uuid::Uuid;

pub use consensus::{Consensus, ConsensusError, Peer};
pub use disk::{Disk, DiskError, Executor};
pub use log::Log;
pub use machine::Machine;
pub use network::{Carrier, CarryError, Lane};
pub use wire::Standing;

openraft::declare_raft_types!(
    /// What openraft is told of our types.
    pub Types:
        D = control::Entry,
        R = Answered,
        NodeId = Member,
        Node = openraft::BasicNode,
);

/// A member of the consensus: a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member(pub NodeId);

/// What an entry was answered. Entries of openraft's own get none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered(pub Option<Answer>);

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// For openraft's own tests of a store, which number members.
impl From<u64> for Member {
    fn from(number: u64) -> Self {
        Self(NodeId::from_uuid(Uuid::from_u128(u128::from(number))))
    }
}
