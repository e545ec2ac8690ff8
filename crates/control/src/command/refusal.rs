//! Why nothing was done.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Name, NodeId};

use super::Key;
use crate::state::{ImageKey, JobId};

/// Why nothing was done.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum Refusal {
    #[error("no node {0}")]
    UnknownNode(NodeId),
    #[error("no image {0}")]
    UnknownImage(ImageKey),
    #[error("no template {0}")]
    UnknownTemplate(Name),
    #[error("no job {0}")]
    UnknownJob(JobId),
    #[error("node {0} was revoked")]
    Revoked(NodeId),
    #[error("node {node} has started again since: this is of start {given}, and {current} is the last that is known")]
    OldStart { node: NodeId, given: u64, current: u64 },
    #[error("node {0} was given up")]
    GivenUp(NodeId),
    #[error("node {0} takes nothing new")]
    Closed(NodeId),
    #[error("node {0} still has machines, tasks or images")]
    Busy(NodeId),
    #[error("node {node} does not have image {key}")]
    NotHeld { node: NodeId, key: ImageKey },
    #[error("{readers} nodes read image {key} from node {node}")]
    HasReaders { node: NodeId, key: ImageKey, readers: usize },
    #[error("node {node} is the last that has all of image {key}")]
    LastCopy { node: NodeId, key: ImageKey },
    #[error("image {key} cannot be read from the nodes that were named")]
    BadSources { key: ImageKey },
    #[error("what is known of image {0} is something else")]
    OtherFacts(ImageKey),
    #[error("machines of image {key} cannot run on node {node}: their CPUs differ")]
    ForeignCpu { node: NodeId, key: ImageKey },
    #[error("node {0} has not so much left")]
    Full(NodeId),
    #[error("{count} tasks where 1 to {max} are possible")]
    BadCount { count: u32, max: u32 },
    #[error("a task has to take some memory, some of a CPU, and one machine")]
    BadResources,
    #[error("job {0} was submitted with another request")]
    JobExists(JobId),
    #[error("there are {max} jobs already that go on, or {tasks} tasks with this one's")]
    TooManyJobs { max: usize, tasks: u64 },
    #[error("job {0} has not ended")]
    JobRuns(JobId),
    #[error("the token is none of this cluster's, was used, or is out of date")]
    BadToken,
    #[error("node {0} is of this cluster already")]
    NodeExists(NodeId),
    #[error("the token is for a node named {0}")]
    OtherName(Name),
    #[error("another node is named {0}")]
    NameTaken(Name),
    #[error("key {0} came with another request before")]
    KeyReused(Key),
    #[error("node {by} has taken the place of node {node}")]
    Replaced { node: NodeId, by: NodeId },
    #[error("node {0} is the only voter")]
    LastVoter(NodeId),
    #[error("there is a user {0} already, with this name or this credential")]
    UserExists(Name),
    #[error("no user {0}")]
    UnknownUser(Name),
    #[error("only an admin is of all tenants")]
    NoTenant,
}

impl Refusal {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::UnknownNode(_) => "`farfork node ls` lists nodes",
            Self::UnknownImage(_) => "`farfork image ls` lists images; build or load it on a node first",
            Self::UnknownTemplate(_) => "`farfork template ls` lists templates",
            Self::UnknownJob(_) => "jobs are forgotten a day after they ended",
            Self::Revoked(_) => "let it join anew, with an empty data directory and a new token",
            Self::OldStart { .. } => "none: the node's newer start answers",
            Self::GivenUp(_) => "none: the node comes back by itself when it reaches the others",
            Self::Closed(_) => "uncordon it, or name another node",
            Self::Busy(_) => "drain it first (farfork node drain), and end its machines; or revoke it if it is gone for good",
            Self::NotHeld { .. } => "`farfork image show` lists who has it",
            Self::HasReaders { .. } => "wait until they have all of it",
            Self::LastCopy { .. } => "remove its templates, or let another node have it first",
            Self::BadSources { .. } => "name nodes that have it and keep it",
            Self::OtherFacts(_) => "none: two nodes disagree about an image, report it",
            Self::ForeignCpu { .. } => "name nodes with a CPU as the image's",
            Self::Full(_) => "wait, or ask for less",
            Self::BadCount { .. } => "submit several jobs",
            Self::BadResources => "say what each task takes",
            Self::JobExists(_) => "draw a key for each request",
            Self::TooManyJobs { .. } => "wait until some have ended, or cancel some",
            Self::JobRuns(_) => "cancel it first",
            Self::BadToken => "make a new one on a voter: farfork cluster token NAME",
            Self::NodeExists(_) => "let it join with an empty data directory: that gives it an id of its own",
            Self::OtherName(_) => "join under that name, or make a token for this one",
            Self::NameTaken(_) => "choose another name, or remove the node that had it: farfork node rm",
            Self::UserExists(_) => "remove that one first: farfork user rm",
            Self::UnknownUser(_) => "`farfork user ls` lists them",
            Self::NoTenant => "name a tenant: farfork user add NAME --tenant default",
            Self::KeyReused(_) => "draw a key for each request",
            Self::Replaced { .. } => {
                "start the node in the directory that was repaired; this one joins with an empty data directory"
            }
            Self::LastVoter(_) => {
                "none: what was agreed on is lost with its log; begin a new cluster, templates are still in the stores"
            }
        }
    }
}
