//! A member of the consensus. Its node asks it to have things agreed on, and to read what was; who leads does it, wherever that is.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use control::command::{Answer, Command, Entry, Key};
use control::state::NodeFacts;
use control::{State, Tick};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::raft::ReadPolicy;
use openraft::type_config::alias::SnapshotOf;
use openraft::{BasicNode, Config, Raft, SnapshotPolicy};
use thiserror::Error;
use tokio::time::{Instant, timeout_at};
use types::NodeId;

use super::leading::Leading;
use super::network::{Carrier, CarryError, Lane, Network};
use super::wire::{self, Request, Response, Snapshot, Standing};
use super::{Disk, Log, Machine, Member, Types};

/// How long who leads tries to have something agreed on that another member asked for.
pub const ASKED_WITHIN: Duration = Duration::from_secs(3);
/// How long one member is waited for before another is asked: who led may be gone, and another lead by now.
const ASK_EACH: Duration = Duration::from_secs(1);
/// Between two tries to find who leads.
const TRY_EVERY: Duration = Duration::from_millis(50);
const HEARTBEAT_MS: u64 = 250;
/// A member that hears no leader waits for the longer of these (the leader's lease), and then for some time between the two: it
/// stands for election after 1.8 to 2.4 s.
const ELECTION_MS: std::ops::Range<u64> = 600..1200;
/// Entries between two snapshots, and how many of those before one are kept for members that lag.
const SNAPSHOT_EVERY: u64 = 5000;
const KEPT_BEFORE_SNAPSHOT: u64 = 1000;
const SNAPSHOT_WITHIN_MS: u64 = 60_000;

/// See the module. Clones are the same member.
#[derive(Clone)]
pub struct Consensus {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) me: Member,
    pub(super) raft: Raft<Types, Machine>,
    pub(super) machine: Machine,
    carrier: Arc<dyn Carrier>,
    clock: Clock,
    pub(super) leading: Mutex<Option<Leading>>,
    /// Members to ask while this one has heard of none.
    seeds: Mutex<Vec<String>>,
}

/// Who asks, as the transport has proven it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Which node.
    pub node: NodeId,
    /// Whether its certificate says that it may vote.
    pub is_voter: bool,
    /// The name in its certificate; it can register under no other. `None`: this very node.
    pub name: Option<String>,
}

impl Peer {
    fn may_propose(&self, command: &Command) -> bool {
        let is_own_name = |facts: &NodeFacts| self.name.as_ref().is_none_or(|name| name == facts.name.as_str());
        command.may_be_proposed_by(self.node, self.is_voter)
            && !matches!(command, Command::Register { facts, .. } if !is_own_name(facts))
    }
}

/// Why something is not known to be agreed on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ConsensusError {
    #[error("no majority of the voters was reached within {within:?}; nothing was done")]
    NoQuorum { within: Duration },
    #[error("no answer came within {within:?}: it may be done, or be done yet")]
    Unknown { within: Duration },
    #[error("this node may not have that done: {what}")]
    Forbidden { what: String },
    #[error("this node's consensus has stopped: {why}")]
    Stopped { why: String },
}

impl ConsensusError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoQuorum { .. } => {
                "ask again; if it stays so, look which voters run and reach one another (farfork node ls --stale)"
            }
            Self::Unknown { .. } => "ask again with the same key: what was done is not done twice",
            Self::Forbidden { .. } => "ask a node that is a voter",
            Self::Stopped { .. } => "look at the node's log, make room on its disk, and start it again",
        }
    }
}

/// The cluster's time, as this member has it: what the log says, and what has passed here since.
#[derive(Default)]
struct Clock(Mutex<Option<(Tick, Instant)>>);

impl Clock {
    fn now(&self, said: Tick) -> Tick {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let here = last.map_or(said, |(tick, at)| tick + at.elapsed());
        // It is never set back: a millisecond begun is carried on.
        if last.is_none() || said > here {
            *last = Some((said, Instant::now()));
        }
        here.max(said)
    }
}

impl Consensus {
    /// Takes part with what is on this disk. Within a runtime.
    ///
    /// # Errors
    /// [`ConsensusError::Stopped`] if the disk's contents cannot be gone on from.
    ///
    /// # Panics
    /// Never: the configuration is a constant.
    pub async fn start(node: NodeId, disk: Disk, carrier: Arc<dyn Carrier>) -> Result<Self, ConsensusError> {
        let config = Config {
            cluster_name: "farfork".to_owned(),
            heartbeat_interval: HEARTBEAT_MS,
            election_timeout_min: ELECTION_MS.start,
            election_timeout_max: ELECTION_MS.end,
            install_snapshot_timeout: SNAPSHOT_WITHIN_MS,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: KEPT_BEFORE_SNAPSHOT,
            enable_pre_vote: Some(true),
            ..Config::default()
        };
        let config = Arc::new(config.validate().expect("a constant"));
        let stopped = |error: &dyn std::fmt::Display| ConsensusError::Stopped { why: error.to_string() };
        let machine = Machine::open(disk.clone()).map_err(|error| stopped(&error))?;
        let (me, network) = (Member(node), Network { carrier: Arc::clone(&carrier) });
        let raft = Raft::new(me, config, network, Log::on(disk), machine.clone()).await.map_err(|error| stopped(&error))?;
        let (clock, leading, seeds) = (Clock::default(), Mutex::default(), Mutex::default());
        let inner = Arc::new(Inner { me, raft, machine, carrier, clock, leading, seeds });
        tokio::spawn(super::leading::run(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// Begins a cluster of which this is the only member, reached there. Does nothing to a member of one.
    ///
    /// # Errors
    /// [`ConsensusError::Stopped`].
    pub async fn begin(&self, address: &str) -> Result<(), ConsensusError> {
        let members = [(self.inner.me, BasicNode::new(address))];
        match self.inner.raft.initialize(std::collections::BTreeMap::from(members)).await {
            // It takes part in one already.
            Ok(()) | Err(RaftError::APIError(_)) => Ok(()),
            Err(RaftError::Fatal(error)) => Err(ConsensusError::Stopped { why: error.to_string() }),
        }
    }

    /// Members to ask while this one has heard of none: where it joined.
    pub fn seed(&self, addresses: Vec<String>) {
        *self.inner.seeds.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// Has something agreed on, and says what it was answered. It is sent again until it is answered: without a key only what may
    /// be done more than once.
    ///
    /// # Errors
    /// [`ConsensusError`]; a refusal is an answer.
    pub async fn propose(&self, key: Option<Key>, command: Command, within: Duration) -> Result<Answer, ConsensusError> {
        match self.inner.ask_leader(&Request::Propose { key, command }, within).await? {
            Response::Answered(answer) => Ok(answer),
            _ => Err(ConsensusError::Unknown { within }),
        }
    }

    /// The state, in which everything is that was agreed on before this was called.
    ///
    /// # Errors
    /// [`ConsensusError`].
    pub async fn read(&self, within: Duration) -> Result<Arc<State>, ConsensusError> {
        let deadline = Instant::now() + within;
        let no_quorum = ConsensusError::NoQuorum { within };
        let Response::ReadAt(index) = self.inner.ask_leader(&Request::Read, within).await.map_err(|error| match error {
            // Nothing is done by reading.
            ConsensusError::Unknown { .. } => no_quorum.clone(),
            other => other,
        })?
        else {
            return Err(no_quorum);
        };
        let wait = self.inner.raft.wait(Some(deadline - Instant::now()));
        wait.applied_index_at_least(index, "a read").await.map_err(|_| no_quorum)?;
        Ok(self.stale())
    }

    /// The state as far as this member has it.
    #[must_use]
    pub fn stale(&self) -> Arc<State> {
        self.inner.machine.state()
    }

    /// Tells who leads that this node does what it should, and hears what it is to the cluster.
    ///
    /// # Errors
    /// [`ConsensusError`].
    pub async fn alive(&self, incarnation: u64, within: Duration) -> Result<Standing, ConsensusError> {
        match self.inner.ask_leader(&Request::Alive { incarnation }, within).await? {
            Response::Heard(standing) => Ok(standing),
            _ => Err(ConsensusError::NoQuorum { within }),
        }
    }

    /// Who leads, as far as this member knows.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.inner.leader().map(|(member, _)| member.0)
    }

    /// Those whose votes count, as is agreed on: while members change, those that count before and after it.
    #[must_use]
    pub fn voters(&self) -> Vec<NodeId> {
        let metrics = self.inner.raft.metrics();
        let agreed = std::sync::Arc::clone(&metrics.borrow_watched().committed_membership_config);
        let configs = agreed.membership().get_joint_config();
        let counts_in_all = |member: &Member| configs.iter().all(|config| config.contains(member));
        agreed.membership().voter_ids().filter(counts_in_all).map(|member| member.0).collect()
    }

    /// Those that are told the log, or vote.
    #[must_use]
    pub fn members(&self) -> Vec<NodeId> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(member, _)| member.0).collect()
    }

    /// Why this member does not take part any more, if that is so.
    #[must_use]
    pub fn stopped(&self) -> Option<String> {
        self.inner.stopped()
    }

    /// The state as far as this member has it, and the index of the entry that made it.
    #[must_use]
    pub fn stale_and_index(&self) -> (Arc<State>, Option<u64>) {
        self.inner.machine.state_and_index()
    }

    /// Waits for the next change of the state, or of who leads.
    pub async fn changed(&self) {
        let mut metrics = self.inner.raft.metrics();
        let seen = |now: &openraft::RaftMetrics<Types>| (now.last_applied, now.current_leader);
        let before = seen(&metrics.borrow_watched());
        while seen(&metrics.borrow_watched()) == before {
            if metrics.changed().await.is_err() {
                // It has stopped: nothing changes any more.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Answers another member.
    pub async fn answer(&self, peer: Peer, request: &[u8]) -> Vec<u8> {
        let response = match wire::decode::<Request>(request) {
            Ok(request) => self.inner.answer(peer, request).await,
            Err(error) => {
                tracing::warn!(node = %peer.node, %error, "a message that cannot be read");
                Response::Forbidden
            }
        };
        wire::encode(&response)
    }

    /// Takes no part any more.
    pub async fn stop(&self) {
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::error!(%error, "the consensus did not end by itself");
        }
    }
}

impl Inner {
    /// The cluster's time.
    pub(super) fn now(&self) -> Tick {
        self.clock.now(self.machine.state().time)
    }

    pub(super) fn leader(&self) -> Option<(Member, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        let node = metrics.membership_config.membership().get_node(&leader)?;
        Some((leader, node.addr.clone()))
    }

    /// Asks who leads, whoever that is by now, until it answers.
    async fn ask_leader(&self, request: &Request, within: Duration) -> Result<Response, ConsensusError> {
        if let Some(why) = self.stopped() {
            return Err(ConsensusError::Stopped { why });
        }
        let deadline = Instant::now() + within;
        let own = Peer { node: self.me.0, is_voter: self.raft.voter_ids().any(|voter| voter == self.me), name: None };
        let (mut told, mut turn, mut may_be_done) = (None, 0, false);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let response = match told.take().or_else(|| self.leader()) {
                Some((leader, _)) if leader == self.me => Ok(self.answer_as_leader(own.clone(), request.clone(), left).await),
                Some((leader, address)) => self.ask(Some(leader), &address, request, left).await,
                None => match self.seed(turn) {
                    Some(address) => self.ask(None, &address, request, left).await,
                    None => Ok(Response::NotLeader(None)),
                },
            };
            turn += 1;
            match response {
                Ok(Response::NotLeader(leader)) => told = leader,
                Ok(Response::NoQuorum) | Err(CarryError::NoAnswer { .. }) => may_be_done = true,
                Err(CarryError::Unreachable { .. }) => {}
                Ok(Response::Forbidden) => return Err(ConsensusError::Forbidden { what: what(request) }),
                // This one's own; another's is passed over.
                Ok(Response::Stopped(why)) if self.stopped().is_some() => return Err(ConsensusError::Stopped { why }),
                Ok(Response::Stopped(_)) => {}
                Ok(response) => return Ok(response),
            }
            let next = Instant::now() + TRY_EVERY;
            if next >= deadline {
                return Err(if may_be_done { ConsensusError::Unknown { within } } else { ConsensusError::NoQuorum { within } });
            }
            tokio::time::sleep_until(next).await;
        }
    }

    fn stopped(&self) -> Option<String> {
        self.raft.metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string)
    }

    fn seed(&self, turn: usize) -> Option<String> {
        let seeds = self.seeds.lock().unwrap_or_else(PoisonError::into_inner);
        (!seeds.is_empty()).then(|| seeds[turn % seeds.len()].clone())
    }

    async fn ask(
        &self,
        to: Option<Member>,
        address: &str,
        request: &Request,
        within: Duration,
    ) -> Result<Response, CarryError> {
        let within = within.min(ASK_EACH);
        let bytes = self.carrier.ask(to, address, Lane::Log, wire::encode(request), within).await?;
        let detail =
            |error: wire::MessageError| CarryError::NoAnswer { address: address.to_owned(), detail: error.to_string() };
        wire::decode(&bytes).map_err(detail)
    }

    async fn answer(&self, peer: Peer, request: Request) -> Response {
        // Votes and entries come from voters, and in nobody else's name.
        if let Some(voter) = request.voter()
            && (!peer.is_voter || voter.0 != peer.node)
        {
            tracing::warn!(node = %peer.node, "asks what only voters may, or in another's name");
            return Response::Forbidden;
        }
        let stopped = |error: &dyn std::fmt::Display| Response::Stopped(error.to_string());
        match request {
            Request::Append(request) => {
                self.raft.append_entries(request).await.map_or_else(|error| stopped(&error), Response::Append)
            }
            Request::Vote(request) => self.raft.vote(request).await.map_or_else(|error| stopped(&error), Response::Vote),
            Request::PreVote(request) => self.raft.pre_vote(request).await.map_or_else(|error| stopped(&error), Response::Vote),
            Request::Snapshot(Snapshot { vote, last, membership, state }) => {
                let meta =
                    openraft::type_config::alias::SnapshotMetaOf::<Types> { last_log_id: last, last_membership: membership };
                let snapshot = SnapshotOf::<Types, Vec<u8>> { meta, snapshot: state };
                let installed = self.raft.install_full_snapshot(vote, snapshot).await;
                installed.map_or_else(|error| stopped(&error), Response::Snapshot)
            }
            Request::TransferLeader(request) => {
                let answer = self.raft.handle_transfer_leader(request).await;
                answer.map_or_else(|error| stopped(&error), Response::TransferLeader)
            }
            request => self.answer_as_leader(peer, request, ASKED_WITHIN).await,
        }
    }

    /// What only who leads can answer.
    /// What is for voters alone is for those that have registered: one that nobody sees in the list could not be put out either.
    fn is_heard(&self, peer: &Peer, command: &Command) -> bool {
        let is_anybodys = command.may_be_proposed_by(peer.node, false);
        is_anybodys || peer.node == self.me.0 || self.machine.state().nodes.contains_key(&peer.node)
    }

    async fn answer_as_leader(&self, peer: Peer, request: Request, within: Duration) -> Response {
        let deadline = Instant::now() + within;
        match request {
            Request::Propose { command, .. } if !(peer.may_propose(&command) && self.is_heard(&peer, &command)) => {
                tracing::warn!(node = %peer.node, %command, "may not propose this");
                Response::Forbidden
            }
            Request::Propose { key, command } => self.write(key, command, deadline).await,
            Request::Read => {
                let policy = ReadPolicy::ReadIndex;
                match timeout_at(deadline, self.raft.get_read_log_id(policy)).await {
                    Ok(Ok((read, _))) => Response::ReadAt(Some(read.index())),
                    Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)))) => {
                        Response::NotLeader(self.leader())
                    }
                    Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => Response::NoQuorum,
                    Ok(Err(RaftError::Fatal(error))) => Response::Stopped(error.to_string()),
                }
            }
            Request::Alive { incarnation } => {
                let now = self.now();
                match &mut *self.leading.lock().unwrap_or_else(PoisonError::into_inner) {
                    Some(leading) => Response::Heard(leading.hear(&peer, incarnation, &self.machine.state(), now)),
                    None => Response::NotLeader(self.leader().filter(|(leader, _)| *leader != self.me)),
                }
            }
            _ => Response::Forbidden,
        }
    }

    /// Has an entry agreed on, as who leads.
    pub(super) async fn write(&self, key: Option<Key>, command: Command, deadline: Instant) -> Response {
        let entry = Entry { at: self.now(), key, command };
        match timeout_at(deadline, self.raft.client_write(entry)).await {
            Ok(Ok(written)) => written.data.0.map_or(Response::NoQuorum, Response::Answered),
            // Whether it was done is not known.
            Ok(Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)))) | Err(_) => Response::NoQuorum,
            Ok(Err(RaftError::APIError(_))) => Response::NotLeader(self.leader().filter(|(leader, _)| *leader != self.me)),
            Ok(Err(RaftError::Fatal(error))) => Response::Stopped(error.to_string()),
        }
    }
}

fn what(request: &Request) -> String {
    match request {
        Request::Propose { command, .. } => command.to_string(),
        Request::Read => "a read".to_owned(),
        _ => "a message between members".to_owned(),
    }
}
