//! How openraft reaches other members: over a [`Carrier`], a seam. The real one is QUIC, the one of simulations has virtual time.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::raft::{TransferLeaderRequest, TransferLeaderResponse};
use openraft::type_config::alias::{SnapshotOf, VoteOf};
use openraft::{BasicNode, OptionalSend};
use thiserror::Error;

use super::wire::{self, Request, Response, Snapshot};
use super::{Member, Types};

/// How long entries may take to be on another member's disk. openraft's own limit is a heartbeat's interval: a slow disk would have
/// the same entries sent again and again.
const APPEND_WITHIN: Duration = Duration::from_secs(3);
/// How long a state may take.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(60);
/// How long a member is left alone that was not reached.
const BACKOFF: Duration = Duration::from_millis(250);

/// Takes messages to other members.
pub trait Carrier: Send + Sync + 'static {
    /// Asks a member, and waits for its answer. `to`: nobody else is asked; `None`: whoever is there.
    fn ask(
        &self,
        to: Option<Member>,
        address: &str,
        lane: Lane,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, CarryError>>;
}

/// What must not wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Heartbeats and votes: small, and before everything else.
    Heartbeat,
    /// Entries, and what is asked of a leader.
    Log,
    /// Whole states.
    Snapshot,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum CarryError {
    #[error("{address} cannot be reached: {detail}")]
    Unreachable { address: String, detail: String },
    /// It may have been asked.
    #[error("no answer of {address}: {detail}")]
    NoAnswer { address: String, detail: String },
}

/// Makes a [`Way`] to each member.
pub(super) struct Network {
    pub(super) carrier: Arc<dyn Carrier>,
}

/// The way to a member.
pub(super) struct Way {
    carrier: Arc<dyn Carrier>,
    to: Member,
    address: String,
    lane: Lane,
}

impl Network {
    fn way(&self, to: Member, node: &BasicNode, lane: Lane) -> Way {
        Way { carrier: Arc::clone(&self.carrier), to, address: node.addr.clone(), lane }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Way;

    async fn new_client(&mut self, to: Member, node: &BasicNode) -> Way {
        self.way(to, node, Lane::Log)
    }

    async fn new_heartbeat_client(&mut self, to: Member, node: &BasicNode) -> Way {
        self.way(to, node, Lane::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, to: Member, node: &BasicNode) -> Way {
        self.way(to, node, Lane::Snapshot)
    }
}

impl Way {
    async fn ask(&self, lane: Lane, request: &Request, within: Duration) -> Result<Response, RPCError<Types>> {
        let answer = self.carrier.ask(Some(self.to), &self.address, lane, wire::encode(request), within).await;
        let bytes = answer.map_err(|error| match &error {
            CarryError::Unreachable { .. } => RPCError::Unreachable(Unreachable::new(&error)),
            CarryError::NoAnswer { .. } => RPCError::Network(NetworkError::new(&error)),
        })?;
        wire::decode(&bytes).map_err(|error| RPCError::Network(NetworkError::new(&error)))
    }
}

/// An answer to another question, or none.
fn other(response: &Response) -> NetworkError<Types> {
    NetworkError::from_string(match response {
        Response::Stopped(why) => format!("it does not take part: {why}"),
        Response::Forbidden => "it does not let this member ask that".to_owned(),
        _ => "it answered another question".to_owned(),
    })
}

impl RaftNetworkV2<Types> for Way {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        match self.ask(self.lane, &Request::Append(rpc), APPEND_WITHIN).await? {
            Response::Append(response) => Ok(response),
            response => Err(other(&response).into()),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.ask(Lane::Heartbeat, &Request::Vote(rpc), option.hard_ttl()).await? {
            Response::Vote(response) => Ok(response),
            response => Err(other(&response).into()),
        }
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.ask(Lane::Heartbeat, &Request::PreVote(rpc), option.hard_ttl()).await? {
            Response::Vote(response) => Ok(response),
            response => Err(other(&response).into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<Types>,
        snapshot: SnapshotOf<Types, Vec<u8>>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let (last, membership) = (snapshot.meta.last_log_id, snapshot.meta.last_membership);
        let request = Request::Snapshot(Snapshot { vote, last, membership, state: snapshot.snapshot });
        let response = tokio::select! {
            closed = cancel => return Err(closed.into()),
            response = self.ask(Lane::Snapshot, &request, SNAPSHOT_WITHIN) => response?,
        };
        match response {
            Response::Snapshot(response) => Ok(response),
            response => Err(other(&response).into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        match self.ask(Lane::Heartbeat, &Request::TransferLeader(request), option.hard_ttl()).await? {
            Response::TransferLeader(response) => Ok(response),
            response => Err(other(&response).into()),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}
