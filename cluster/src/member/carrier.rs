//! Messages between members over QUIC, by a name of their own on the one port: one connection for what must not wait, one for the
//! log, one for whole states.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use pages::client::{Unasked, Way};
use pages::server::Answers;
use pages::trust::NotTrusted;
use pages::{Certificate, Client, Identity, LinkError, Role};
use types::NodeId;

use crate::raft::consensus::Peer;
use crate::raft::wire::MESSAGE_BYTES_MAX;
use crate::raft::{Carrier, CarryError, Consensus, Lane, Member};

/// ALPN of messages between members.
pub const ALPN_RAFT: &[u8] = b"farfork-raft/1";
/// Ways that are kept: some to each member.
const WAYS_MAX: usize = 4096;

/// See the module.
pub(super) struct Quic {
    client: Client,
    identity: Arc<Identity>,
    ways: Mutex<HashMap<To, Way>>,
    refused: Arc<Refused>,
}

/// Whom a wrong clock or another version keeps from speaking with this node; the log says so once until they have spoken again.
#[derive(Default)]
struct Refused(Mutex<HashSet<SocketAddr>>);

impl Refused {
    fn note<T>(&self, address: SocketAddr, asked: &Result<T, Unasked>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok(_) => drop(known.remove(&address)),
            Err(Unasked::NotSent(error) | Unasked::NoAnswer(error)) => {
                let why: &dyn std::fmt::Display = match error {
                    LinkError::NotTrusted { source: source @ NotTrusted::Dates { .. }, .. } => source,
                    LinkError::OtherProtocol { .. } => error,
                    _ => return,
                };
                if known.insert(address) {
                    tracing::error!(%address, error = %why, remedy = error.remedy(), "another member cannot be spoken with");
                }
            }
        }
    }
}

/// Where a way leads, who is expected there, and what it is for.
type To = (SocketAddr, Option<NodeId>, Lane);

impl Quic {
    pub(super) fn new(client: Client, identity: Arc<Identity>) -> Self {
        Self { client, identity, ways: Mutex::default(), refused: Arc::default() }
    }

    fn way(&self, address: SocketAddr, to: Option<NodeId>, lane: Lane) -> Result<Way, String> {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if ways.len() >= WAYS_MAX {
            ways.clear();
        }
        if let Some(way) = ways.get(&(address, to, lane)) {
            return Ok(way.clone());
        }
        let way = self.client.way(&self.identity, ALPN_RAFT, address, to, true).map_err(|error| error.to_string())?;
        ways.insert((address, to, lane), way.clone());
        Ok(way)
    }
}

impl Carrier for Quic {
    fn ask(
        &self,
        to: Option<Member>,
        address: &str,
        lane: Lane,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'static, Result<Vec<u8>, CarryError>> {
        let (text, refused) = (address.to_owned(), Arc::clone(&self.refused));
        let way = address.parse::<SocketAddr>().map_err(|error| error.to_string());
        let way = way.and_then(|address| Ok((address, self.way(address, to.map(|member| member.0), lane)?)));
        Box::pin(async move {
            let (socket, way) = way.map_err(|detail| CarryError::Unreachable { address: text.clone(), detail })?;
            let asked = way.ask(Bytes::from(request), MESSAGE_BYTES_MAX, within).await;
            refused.note(socket, &asked);
            asked.map(Vec::from).map_err(|error| {
                let (address, detail) = (text, error.to_string());
                match error {
                    Unasked::NotSent(_) => CarryError::Unreachable { address, detail },
                    Unasked::NoAnswer(_) => CarryError::NoAnswer { address, detail },
                }
            })
        })
    }
}

/// Answers other members.
pub(super) struct ToMember(pub(super) Consensus);

impl Answers for ToMember {
    fn answer(&self, shown: Certificate, request: Bytes) -> BoxFuture<'static, Bytes> {
        let consensus = self.0.clone();
        let peer = shown.peer();
        let peer = Peer { node: peer.node, is_voter: peer.role == Role::Voter, name: Some(peer.name.clone()) };
        Box::pin(async move { consensus.answer(peer, &request).await.into() })
    }
}
