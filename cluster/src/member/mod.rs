//! A node's part in a cluster: how it gets in, what it has of it on disk, how it reaches the others, and what it does for them.
//!
//! | file | holds |
//! |---|---|
//! | [`files`] | what is on disk |
//! | [`token`], [`join`] | how a node is let in, and gets its certificates |
//! | [`repair`] | how one that has lost its log comes back |
//! | [`seal`] | the authority's key, encrypted |
//! | [`carrier`] | messages between members of the consensus |
//! | [`agent`] | has this node become what the state says |
//! | [`claims`] | images that the cluster is being told of |
//! | [`fork`] | forks that the cluster places |
//! | [`capacity`] | what this node may start without asking |
//! | [`forward`] | requests that another node answers |

pub mod agent;
mod capacity;
pub mod carrier;
mod claims;
pub mod files;
pub mod fork;
pub mod forward;
pub mod join;
pub mod repair;
pub mod seal;
pub mod token;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use control::State;
use control::command::{Answer, Command, Key, Refusal};
use control::state::{ImageFacts, ImageKey, NodeFacts, Resources, Role};
use pages::server::{Handler, Service as Served};
use pages::{Authority, Client, Identity, Trust, join as door};
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use types::{Digest, FullName, Name, NodeId, Tenant};
use uuid::Uuid;

use crate::jobs::store::StoreError;
use crate::node::quic::Late;
use crate::node::short_id::ShortId;
use crate::node::{DataDirectory, NodeError};
use crate::raft::wire::MESSAGE_BYTES_MAX;
use crate::raft::{Consensus, ConsensusError, Disk};
use claims::Claims;
use files::{Member, PlaceError};
use seal::{Passphrase, Sealed};
use token::JoinToken;

/// How long a request may take until it is said that no majority can be reached.
pub const REQUEST_WITHIN: Duration = Duration::from_secs(3);
/// How long a message between members may take to arrive: a whole state may be some of it.
const MESSAGE_TIME: Duration = Duration::from_secs(60);
/// Of a machine that is no task: what it is counted as.
pub const EACH_CPU_MILLIS: u64 = 10;

/// See the module.
pub struct Membership {
    /// What the cluster agrees on.
    pub consensus: Consensus,
    node: NodeId,
    name: Name,
    /// How others reach this node.
    address: SocketAddr,
    trust: Trust,
    identity: Arc<Identity>,
    client: Client,
    authority: Option<Authority>,
    sealed: Option<Sealed>,
    root: pages::Root,
    disk: Disk,
    labels: BTreeMap<String, String>,
    ways: forward::Ways,
    purse: capacity::Purse,
    claims: Claims,
}

/// Why the cluster does not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ClusterError {
    #[error("this node stands alone")]
    Alone,
    #[error(transparent)]
    Consensus(#[from] ConsensusError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("no node {0}")]
    UnknownNode(String),
    #[error("{given} names {count} nodes")]
    AmbiguousNode { given: String, count: usize },
    #[error("this voter does not have the authority's key open")]
    Sealed,
    #[error("the system gives no randomness")]
    NoRandomness,
    #[error("{left} of {count} machines find no place: {why}")]
    NoPlace { count: u64, left: u64, why: String },
    #[error("node {node} cannot be asked: {detail}")]
    NodeAway { node: NodeId, detail: String },
    #[error("node {node} was asked, and did not answer: {detail}")]
    NoAnswer { node: NodeId, detail: String },
    #[error("machines on {count} nodes have an id that ends in {given}")]
    AmbiguousMachine { given: String, count: usize },
    #[error("node {0} has the only vote")]
    LastVote(NodeId),
    #[error("the cluster has a template called {0}")]
    NameTaken(FullName),
    #[error("the job is not kept: {0}")]
    NotKept(String),
    #[error("no job {0}")]
    UnknownJob(String),
    #[error("{given} names {count} jobs")]
    AmbiguousJob { given: String, count: usize },
    #[error("no node that answers has the output of task {task} of job {job}")]
    OutputLost { job: String, task: u32 },
    #[error(transparent)]
    Outputs(#[from] StoreError),
    #[error("task {task} of job {job} has not ended")]
    TaskRuns { job: String, task: u32 },
    #[error("job {job} has no task {task}")]
    UnknownTask { job: String, task: u32 },
    #[error("machine {machine} is of an image that only {node} knows: its forks run there")]
    NotTheClusters { machine: String, node: String },
}

impl ClusterError {
    /// The code that programs match on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Alone => "NO_CLUSTER",
            Self::Consensus(ConsensusError::NoQuorum { .. }) => "NO_QUORUM",
            Self::Consensus(ConsensusError::Unknown { .. }) => "OUTCOME_UNKNOWN",
            Self::Consensus(ConsensusError::Forbidden { .. }) => "NOT_A_VOTER",
            Self::Consensus(ConsensusError::Stopped { .. }) => "LOG_FAILED",
            Self::Refused(_) => "REFUSED",
            Self::UnknownNode(_) => "UNKNOWN_NODE",
            Self::AmbiguousNode { .. } => "AMBIGUOUS_ID",
            Self::Sealed => "AUTHORITY_SEALED",
            Self::NoRandomness => "HOST",
            Self::NoPlace { .. } => "NO_PLACE",
            Self::NodeAway { .. } => "UNREACHABLE",
            Self::NoAnswer { .. } => "NO_ANSWER",
            Self::AmbiguousMachine { .. } => "AMBIGUOUS_ID",
            Self::NotKept(_) => "NO_QUORUM",
            Self::UnknownJob(_) | Self::UnknownTask { .. } => "UNKNOWN_JOB",
            Self::AmbiguousJob { .. } => "AMBIGUOUS_ID",
            Self::OutputLost { .. } => "OUTPUT_LOST",
            Self::TaskRuns { .. } => "NOT_READY",
            Self::Outputs(StoreError::Full { .. }) => "STORE_FULL",
            Self::Outputs(StoreError::Io { .. }) => "STORE",
            Self::LastVote(_) => "REFUSED",
            Self::NameTaken(_) => "NAME_TAKEN",
            Self::NotTheClusters { .. } => "UNKNOWN_IMAGE",
        }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        let fixed = match self {
            Self::Alone => "begin a cluster with `farfork cluster init`, or join one with `farfork cluster join`",
            Self::Consensus(error) => error.remedy(),
            Self::Refused(refusal) => refusal.remedy(),
            Self::UnknownNode(_) => "`farfork node ls` lists them",
            Self::AmbiguousNode { .. } => "give more of its id, or its name",
            Self::Sealed => "start it with --ca-passphrase-file, or ask another voter",
            Self::NoRandomness => "look whether the system gives randomness (getrandom)",
            Self::NoPlace { .. } => "`farfork explain` says what each node lacks; ask for fewer, or add nodes",
            Self::NoAnswer { .. } => "`farfork ls` says what it did; ask again once it is heard",
            Self::NotKept(_) => "submit it again with the same key; look which voters run and have room on their disks",
            Self::UnknownJob(_) => "`farfork job ls` lists jobs; they are forgotten a day after they ended",
            Self::AmbiguousJob { .. } => "give more digits from the end of the id",
            Self::TaskRuns { .. } => "wait for it: farfork job wait",
            Self::OutputLost { .. } => "start the nodes again that ran it (`farfork explain` names them), or submit it anew",
            Self::Outputs(error) => error.remedy(),
            Self::UnknownTask { .. } => "tasks are numbered from 0: `farfork job show` says how many there are",
            Self::AmbiguousMachine { .. } => "give more digits from the end of the id",
            Self::LastVote(_) => "give another node a vote first: nobody could ever decide anything again",
            Self::NotTheClusters { .. } => "make it known with `farfork image save` or `template build`, and fork that name",
            Self::NameTaken(_) => "take another name, or remove that one (farfork template rm)",
            Self::NodeAway { .. } => "look at that node; `farfork node ls` says whether it is heard",
        };
        fixed.to_owned()
    }
}

/// How a node takes part, as its command line says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How others reach it.
    pub address: SocketAddr,
    /// For placement.
    pub labels: BTreeMap<String, String>,
    /// What opens the authority's key.
    pub passphrase_file: std::path::PathBuf,
}

/// Services of a member, of which nobody answers yet.
#[derive(Default)]
pub struct Doors {
    raft: Arc<Late>,
    join: Arc<Late>,
    api: Arc<forward::LateApi>,
}

impl Doors {
    /// For a server: strangers may ask voters to be let in.
    #[must_use]
    pub fn services(&self, is_voter: bool) -> Vec<Served> {
        let ask = |answers: &Arc<Late>, request_bytes_max| Handler::Ask {
            answers: Arc::clone(answers) as _,
            request_bytes_max,
            request_time: MESSAGE_TIME,
        };
        let raft = Served { alpn: carrier::ALPN_RAFT, handler: ask(&self.raft, MESSAGE_BYTES_MAX), admits_strangers: false };
        let api =
            Served { alpn: forward::ALPN_API, handler: Handler::Stream(Arc::clone(&self.api) as _), admits_strangers: false };
        let join = Served { alpn: door::ALPN_JOIN, handler: ask(&self.join, door::MESSAGE_BYTES_MAX), admits_strangers: true };
        [raft, api].into_iter().chain(is_voter.then_some(join)).collect()
    }
}

impl Membership {
    /// Takes part, with what is on disk. Within a runtime.
    ///
    /// # Errors
    /// [`PlaceError`]; nothing was changed.
    pub async fn start(
        data: &DataDirectory,
        member: Member,
        settings: Settings,
        (identity, trust, client): (Arc<Identity>, Trust, Client),
        doors: &Doors,
    ) -> Result<Arc<Self>, PlaceError> {
        let authority = member.sealed.as_ref().and_then(|_| {
            let opened = Passphrase::read(&settings.passphrase_file).map_err(PlaceError::from);
            let opened = opened.and_then(|passphrase| member.authority(data, &passphrase));
            opened
                .inspect_err(|error| {
                    tracing::warn!(%error, remedy = error.remedy(), "this voter lets no nodes in");
                })
                .ok()
        });
        let Member { place, root, sealed } = member;
        let disk = Member::log(data)?;
        let node = NodeId::from_uuid(data.node());
        let quic = Arc::new(carrier::Quic::new(client.clone(), Arc::clone(&identity)));
        let stopped = |error: ConsensusError| PlaceError::Damaged {
            directory: data.path().to_owned(),
            file: "raft.redb",
            detail: error.to_string(),
        };
        let consensus = Consensus::start(node, disk.clone(), quic).await.map_err(stopped)?;
        if let Some(address) = &place.begins {
            consensus.begin(address).await.map_err(stopped)?;
        }
        consensus.seed(place.seeds.clone());
        let Settings { address, labels, .. } = settings;
        let name = place.name;
        let membership = Arc::new(Self {
            consensus: consensus.clone(),
            node,
            name,
            address,
            trust,
            identity,
            client,
            authority,
            sealed,
            root,
            disk,
            labels,
            ways: forward::Ways::default(),
            purse: capacity::Purse::default(),
            claims: Claims::default(),
        });
        doors.raft.set(Arc::new(carrier::ToMember(consensus)));
        doors.join.set(Arc::new(join::Doorkeeper(Arc::clone(&membership))));
        Ok(membership)
    }

    /// Answers what other nodes pass on by this router from now on. Within a runtime.
    pub fn serve(doors: &Doors, router: axum::Router) {
        doors.api.set(router);
    }

    /// Whether the cluster has told a node to read an image, or to have it.
    #[must_use]
    pub fn may_read(&self, node: NodeId, tenant: &Tenant, image: Digest) -> bool {
        let key = ImageKey { tenant: tenant.clone(), digest: image };
        self.consensus.stale().images.get(&key).is_some_and(|image| image.holders.contains_key(&node))
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The digest of its cluster's authority.
    #[must_use]
    pub fn authority_digest(&self) -> Digest {
        self.root.fingerprint().0
    }

    /// The state, linearizable.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn read(&self) -> Result<Arc<State>, ClusterError> {
        Ok(self.consensus.read(REQUEST_WITHIN).await?)
    }

    /// Has something agreed on.
    ///
    /// # Errors
    /// [`ClusterError`], also if it was refused.
    pub async fn propose(&self, key: Option<Uuid>, command: Command) -> Result<Answer, ClusterError> {
        let key = Key(key.unwrap_or_else(Uuid::now_v7));
        match self.consensus.propose(Some(key), command, REQUEST_WITHIN).await? {
            Answer::Refused(refusal) => Err(refusal.into()),
            answer => Ok(answer),
        }
    }

    /// Makes a token that lets a node in under this name.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn token(&self, name: &Name, role: Role) -> Result<JoinToken, ClusterError> {
        if self.authority.is_none() {
            return Err(ClusterError::Sealed);
        }
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| ClusterError::NoRandomness)?;
        let token = JoinToken::digest(&secret);
        self.propose(None, Command::AddToken { token, name: name.clone(), role }).await?;
        let mut addresses: Vec<SocketAddr> = vec![self.address];
        let voters = self.voter_addresses();
        let others = voters.iter().filter_map(|text| text.parse::<SocketAddr>().ok());
        addresses.extend(others.filter(|address| *address != self.address));
        addresses.truncate(token::ADDRESSES_MAX);
        Ok(JoinToken { addresses, authority: self.root.fingerprint().0, name: name.clone(), secret })
    }

    /// Where the voters are.
    pub(crate) fn voter_addresses(&self) -> Vec<String> {
        let state = self.consensus.stale();
        let addresses =
            self.consensus.voters().into_iter().filter_map(|voter| Some(state.nodes.get(&voter)?.facts.address.to_string()));
        addresses.collect()
    }

    /// Finds a node by its name, its id, or the end of it.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn find(state: &State, given: &str) -> Result<NodeId, ClusterError> {
        let by_name = state.nodes.iter().find(|(_, node)| node.facts.name.as_str() == given).map(|(id, _)| *id);
        if let Some(id) = by_name {
            return Ok(id);
        }
        let unknown = || ClusterError::UnknownNode(given.to_owned());
        let short = ShortId::parse(given).map_err(|_| unknown())?;
        let named: Vec<NodeId> = state.nodes.keys().filter(|node| short.matches(node.as_uuid())).copied().collect();
        match named.as_slice() {
            [node] => Ok(*node),
            [] => Err(unknown()),
            several => Err(ClusterError::AmbiguousNode { given: given.to_owned(), count: several.len() }),
        }
    }

    /// Makes an image known, and points a name at it. `once`: of the name; with it this may be done again until it is answered.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub async fn publish(&self, name: &FullName, digest: Digest, facts: ImageFacts, once: Uuid) -> Result<(), ClusterError> {
        let FullName { tenant, name } = name;
        let key = ImageKey { tenant: tenant.clone(), digest };
        let incarnation = self.consensus.stale().nodes.get(&self.node).map_or(0, |node| node.incarnation);
        self.claim(key, facts, incarnation).await?;
        self.propose(Some(once), Command::PutTemplate { tenant: tenant.clone(), name: name.clone(), digest }).await?;
        Ok(())
    }

    /// Tells the cluster that this node has all of an image.
    async fn claim(&self, key: ImageKey, facts: ImageFacts, incarnation: u64) -> Result<(), ClusterError> {
        self.claims.add(key.clone(), self.consensus.stale().epoch);
        let told = self.propose(None, Command::AddImage { key: key.clone(), facts, node: self.node, incarnation }).await;
        if matches!(told, Err(ClusterError::Refused(_))) {
            self.claims.remove(&key);
        }
        told.map(drop)
    }

    fn facts(&self, profile: types::CpuProfile, capacity: Resources) -> NodeFacts {
        let (name, address, labels) = (self.name.clone(), self.address, self.labels.clone());
        NodeFacts { name, address, profile, labels, capacity }
    }
}

impl From<ClusterError> for NodeError {
    fn from(error: ClusterError) -> Self {
        Self::Cluster(error)
    }
}
