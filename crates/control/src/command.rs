//! What is written into the log, and what is answered.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, Epoch, Name, NodeId, Tenant};
use uuid::Uuid;

use crate::clock::Tick;
use crate::state::{ImageFacts, ImageKey, JobId, JobSpec, NodeFacts, Outcome, Resources, Role};

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
        /// How much.
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
        /// Tasks that ended, by job.
        ended: Vec<(JobId, Results)>,
        /// What machines take there that are no tasks, if that has changed.
        local: Option<Resources>,
    },
}

/// How tasks of a job ended, each by the order that it ended of.
pub type Results = Vec<(u32, Epoch, Outcome)>;

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
    #[error("job {0} is there already")]
    JobExists(JobId),
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
            | Self::UseToken { .. } => is_voter,
            Self::PutTemplate { .. }
            | Self::RemoveTemplate { .. }
            | Self::Open { .. }
            | Self::Submit { .. }
            | Self::Cancel { .. }
            | Self::Forget { .. } => true,
        }
    }
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
            Self::JobExists(_) => "draw another id",
            Self::JobRuns(_) => "cancel it first",
            Self::BadToken => "make a new one on a voter: farfork cluster token NAME",
            Self::NodeExists(_) => "let it join with an empty data directory: that gives it an id of its own",
            Self::OtherName(_) => "join under that name, or make a token for this one",
            Self::NameTaken(_) => "choose another name, or remove the node that had it: farfork node rm",
            Self::KeyReused(_) => "draw a key for each request",
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.at, self.command)?;
        self.key.map_or(Ok(()), |key| write!(f, " key {key}"))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Note => write!(f, "time passes"),
            Self::Register { node, incarnation, images, .. } => {
                write!(f, "node {node} registers, start {incarnation}, with {} images", images.len())
            }
            Self::Heard { node, .. } => write!(f, "node {node} is heard"),
            Self::Suspect { node, .. } => write!(f, "node {node} is suspected"),
            Self::GiveUp { node, .. } => write!(f, "node {node} is given up"),
            Self::SetRole { node, role } => write!(f, "node {node} becomes {role:?}"),
            Self::Cordon { node, is_cordoned } => write!(f, "node {node} is {}cordoned", if *is_cordoned { "" } else { "un" }),
            Self::Drain { node, is_draining } => {
                write!(f, "node {node} {} drained", if *is_draining { "is" } else { "is no longer" })
            }
            Self::AddToken { name, role, .. } => write!(f, "a token lets node {name} in as {role:?}"),
            Self::UseToken { node, name, .. } => write!(f, "node {node} shows a token for {name}"),
            Self::Revoke { node } => write!(f, "node {node} is revoked"),
            Self::Remove { node } => write!(f, "node {node} is forgotten"),
            Self::AddImage { key, node, .. } => write!(f, "node {node} has made image {key}"),
            Self::PutTemplate { tenant, name, digest } => write!(f, "template {tenant}/{name} is {digest}"),
            Self::RemoveTemplate { tenant, name } => write!(f, "template {tenant}/{name} is removed"),
            Self::Open { key, node, sources } => write!(f, "node {node} opens image {key} from {}", list(sources)),
            Self::LetGo { key, node } => write!(f, "node {node} may let go of image {key}"),
            Self::GrantCapacity { node, resources, lasts_ms, .. } => {
                write!(f, "node {node} may start {} machines for {lasts_ms} ms", resources.machines)
            }
            Self::ReturnCapacity { node, epoch } => write!(f, "node {node} returns its lease {}", epoch.0),
            Self::Submit { job, spec } => write!(f, "job {job}: {} of image {}", spec.count, spec.image),
            Self::Place { job, opens, on } => {
                write!(f, "job {job} is placed:")?;
                on.iter().try_for_each(|(node, range)| write!(f, " {}..{} on {node}", range.start, range.end))?;
                opens.iter().try_for_each(|(node, sources)| write!(f, "; {node} opens from {}", list(sources)))
            }
            Self::Cancel { job } => write!(f, "job {job} is cancelled"),
            Self::Forget { job } => write!(f, "job {job} is forgotten"),
            Self::Report { node, progress, gone, ended, .. } => {
                write!(f, "node {node} reports:")?;
                progress.iter().try_for_each(|(key, _, percent)| write!(f, " image {key} at {percent} %"))?;
                gone.iter().try_for_each(|(key, _)| write!(f, " image {key} gone"))?;
                let tasks = ended.iter().flat_map(|(job, tasks)| tasks.iter().map(move |task| (job, task)));
                tasks.into_iter().try_for_each(|(job, (task, _, outcome))| write!(f, " task {job}/{task} {outcome:?}"))
            }
        }
    }
}

fn list(nodes: &[NodeId]) -> String {
    let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    nodes.join(", ")
}
