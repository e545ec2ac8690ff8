//! What is written into the log, and what is answered.

mod display;
mod refusal;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use types::{Digest, Epoch, Name, NodeId, Tenant};
use uuid::Uuid;

pub use refusal::Refusal;

use crate::clock::Tick;
use crate::state::{ImageFacts, ImageKey, JobId, JobSpec, NodeFacts, Outcome, Resources, Rights, Role};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The time, as the leader has it who wrote this.
    pub at: Tick,
    /// Under which an answer is remembered: a request that is sent again is carried out once.
    pub key: Option<Key>,
    /// What to do.
    pub command: Command,
}

/// A number that a client draws for each request, and uses again when it does not know what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key(pub Uuid);

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Time has passed.
    Note,
    /// A node joins, has started, or comes back after it was given up.
    Register {
        /// Who.
        node: NodeId,
        /// Higher than at its last start.
        incarnation: u64,
        /// What it says of itself.
        facts: NodeFacts,
        /// Images of which it has all.
        images: Vec<(ImageKey, ImageFacts)>,
    },
    /// A node that was suspected is heard.
    Heard {
        /// Which.
        node: NodeId,
        /// Its start.
        incarnation: u64,
    },
    /// A node has not been heard for some seconds.
    Suspect {
        /// Which.
        node: NodeId,
        /// Its start.
        incarnation: u64,
    },
    /// It is given up.
    GiveUp {
        /// Which.
        node: NodeId,
        /// Its start.
        incarnation: u64,
    },
    /// Its part in the consensus has changed.
    SetRole {
        /// Whose.
        node: NodeId,
        /// To what.
        role: Role,
    },
    /// Whether anything new is placed on a node.
    Cordon {
        /// Which.
        node: NodeId,
        /// Whether it is kept free.
        is_cordoned: bool,
    },
    /// Whether what is on a node is to go elsewhere.
    Drain {
        /// Which.
        node: NodeId,
        /// Whether it is.
        is_draining: bool,
    },
    /// Whoever shows what this is the digest of is let in, once, within [`TOKEN_TERM`](crate::apply::TOKEN_TERM).
    AddToken {
        /// Of the secret.
        token: Digest,
        /// The name of the node that it is for.
        name: Name,
        /// What that node is to be.
        role: Role,
    },
    /// A node has shown a token.
    UseToken {
        /// Of the secret.
        token: Digest,
        /// Which node.
        node: NodeId,
        /// The digest of the key that it has proven to have.
        proven: Digest,
        /// Its name.
        name: Name,
    },
    /// A node may never take part again.
    Revoke {
        /// Which.
        node: NodeId,
    },
    /// A node that is gone, or has nothing left on it, is forgotten.
    Remove {
        /// Which.
        node: NodeId,
    },
    /// A node has made an image, or loaded one.
    AddImage {
        /// Which.
        key: ImageKey,
        /// What is known of it.
        facts: ImageFacts,
        /// Who has it.
        node: NodeId,
        /// Its start.
        incarnation: u64,
    },
    /// A name is to point at an image.
    PutTemplate {
        /// Whose.
        tenant: Tenant,
        /// The name.
        name: Name,
        /// The image.
        digest: Digest,
    },
    /// A name is to be gone.
    RemoveTemplate {
        /// Whose.
        tenant: Tenant,
        /// The name.
        name: Name,
    },
    /// A node is to have an image, or to read it from others than before.
    Open {
        /// Which.
        key: ImageKey,
        /// Who.
        node: NodeId,
        /// From whom, the first one first.
        sources: Vec<NodeId>,
    },
    /// A node may let go of an image.
    LetGo {
        /// Which.
        key: ImageKey,
        /// Who.
        node: NodeId,
    },
    /// A node may start machines without asking.
    GrantCapacity {
        /// Which.
        node: NodeId,
        /// Its start.
        incarnation: u64,
        /// How much all of them may take that are no tasks, with those that run.
        resources: Resources,
        /// For how long, in milliseconds; an hour at most.
        lasts_ms: u64,
    },
    /// It gives back what is left.
    ReturnCapacity {
        /// Which.
        node: NodeId,
        /// Of the lease.
        epoch: Epoch,
    },
    /// A job.
    Submit {
        /// Its id.
        job: JobId,
        /// What is asked for.
        spec: JobSpec,
    },
    /// Where waiting tasks of a job run.
    Place {
        /// Which.
        job: JobId,
        /// Nodes that are to have its image for that, and from whom.
        opens: Vec<(NodeId, Vec<NodeId>)>,
        /// Which tasks run where.
        on: Vec<(NodeId, Range<u32>)>,
    },
    /// What has not ended of a job is ended.
    Cancel {
        /// Which.
        job: JobId,
    },
    /// A job that has ended is forgotten.
    Forget {
        /// Which.
        job: JobId,
    },
    /// What has happened on a node. Parts that are out of date are passed over.
    Report {
        /// Which.
        node: NodeId,
        /// Its start.
        incarnation: u64,
        /// How much of images is there.
        progress: Vec<(ImageKey, Epoch, u8)>,
        /// Images that are not there any more, or never came.
        gone: Vec<(ImageKey, Epoch)>,
        /// Tasks that ended.
        ended: Vec<Ended>,
        /// What machines take there that are no tasks, if that has changed.
        local: Option<Resources>,
    },
    /// A node that has lost its log comes back as another one: under the old id it could vote against what it has promised.
    Replace {
        /// The id that it had; it is revoked.
        old: NodeId,
        /// The id that it has drawn.
        new: NodeId,
        /// The digest of the key that it has proven to have.
        proven: Digest,
    },
    /// Somebody may ask over HTTPS.
    AddUser {
        /// Who.
        name: Name,
        /// Of what shows who it is.
        credential: Digest,
        /// What it may ask for.
        rights: Rights,
        /// For how long, in milliseconds; `None`: until it is removed.
        lasts_ms: Option<u64>,
    },
    /// Somebody may ask no more.
    RemoveUser {
        /// Who.
        name: Name,
    },
}

/// Tasks of a job that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Of which job.
    pub job: JobId,
    /// Where their outputs are.
    pub kept: Kept,
    /// Which, by the order that each ended of, and how.
    pub tasks: Vec<(u32, Epoch, Outcome)>,
}

/// Where the outputs of tasks are that a node has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kept {
    /// There are none: what was to print them never ran.
    Nowhere,
    /// On that node.
    Here,
    /// On that node, and on this other one.
    HereAnd(NodeId),
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It was done, or was so already.
    Done,
    /// A right, with its number.
    Granted(Epoch),
    /// A node is let in, as this.
    Admitted(Role),
    /// So many tasks were placed, and so many were not: what they need is gone meanwhile.
    Placed {
        /// Placed.
        placed: u32,
        /// Left waiting.
        left: u32,
    },
    /// Nothing was done.
    Refused(Refusal),
}

impl Command {
    /// Whether a node may ask for this. What nodes say of themselves, each says for itself; what a leader sees to is proposed by
    /// leaders alone; and members come and go by word of those that have a vote.
    #[must_use]
    pub fn may_be_proposed_by(&self, from: NodeId, is_voter: bool) -> bool {
        match self {
            Self::Note
            | Self::Heard { .. }
            | Self::Suspect { .. }
            | Self::GiveUp { .. }
            | Self::SetRole { .. }
            | Self::LetGo { .. }
            | Self::Place { .. } => false,
            Self::Register { node, .. }
            | Self::AddImage { node, .. }
            | Self::GrantCapacity { node, .. }
            | Self::ReturnCapacity { node, .. }
            | Self::Report { node, .. } => *node == from,
            Self::Cordon { .. }
            | Self::Drain { .. }
            | Self::Revoke { .. }
            | Self::Remove { .. }
            | Self::AddToken { .. }
            | Self::AddUser { .. }
            | Self::RemoveUser { .. }
            | Self::UseToken { .. }
            | Self::Replace { .. } => is_voter,
            Self::PutTemplate { .. }
            | Self::RemoveTemplate { .. }
            | Self::Open { .. }
            | Self::Submit { .. }
            | Self::Cancel { .. }
            | Self::Forget { .. } => true,
        }
    }
}
