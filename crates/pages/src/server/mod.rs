//! Serves images to other nodes, and takes their orders: one UDP port, the protocol chosen by ALPN.
//!
//! ```text
//! Incoming ── too many ──> dropped, or told to prove its address
//!    │ handshake: mutual TLS, certificates pinned
//! connection ── too many of that peer ──> closed
//!    │ one task; ends when the peer is trusted no longer
//! stream ── slow, malformed ──> reset or refused
//!    │ one task: read a request, ask the store, answer, wait for the acknowledgement
//! ```
//!
//! Whether a peer may have something is the store's to say, on every request: the server passes on who asks (proven by the
//! handshake) and the lease (opaque here). The server itself only knows which tenants a peer may name.

mod admission;
mod connection;
mod stream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quinn::VarInt;
pub use quinn::{RecvStream, SendStream};
use types::{Digest, Tenant};

use crate::endpoint::{self, Limits, StartError, Tuning};
use crate::identity::{Certificate, Identity, Peer};
use crate::trust::Trust;
use crate::wire::{self, ExtentId, HashPageBytes, Hints, LeaseToken, Opened, Refusal, RefusalCode, Renewed, Urgency};

pub(crate) use connection::shown_on;

/// What a node serves. Owned here, implemented by the node.
///
/// Each call is authorised by the implementation: it checks the lease against the peer, the image and what is asked of it.
/// Nothing here may block: what takes long belongs into the futures, and those end by themselves, since an answer keeps its
/// stream and its share of the connection's budget until it is done.
pub trait ImageStore: Send + Sync + 'static {
    /// Describes an image of a tenant that this peer may read, and grants a lease.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn open<'a>(&'a self, peer: &'a Peer, tenant: &'a Tenant, image: Digest) -> BoxFuture<'a, Result<Opened, Refusal>>;

    /// Lets a lease last longer.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn renew(&self, peer: &Peer, lease: &LeaseToken) -> Result<Renewed, Refusal>;

    /// Takes a lease back.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn release(&self, peer: &Peer, lease: &LeaseToken) -> Result<(), Refusal>;

    /// A hash page of an image.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn hash_page<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        region: u8,
        page: u32,
    ) -> BoxFuture<'a, Result<HashPageBytes, Refusal>>;

    /// An extent of an image. Called for each extent of a request, so that a lease that ends meanwhile ends the answer.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer and ends the answer.
    fn extent<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> BoxFuture<'a, Result<Extent, Refusal>>;

    /// Takes advice on what children touch first.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn hints(&self, peer: &Peer, lease: &LeaseToken, image: Digest, runs: Hints) -> Result<(), Refusal>;

    /// How the answer to a request with this extent is falsified on its way, for tests of readers.
    #[cfg(feature = "testing")]
    fn lie(&self, id: ExtentId) -> Option<crate::fakes::Lie> {
        let _ = id;
        None
    }
}

/// An extent as a store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Every byte is zero.
    Zero,
    /// Exactly 64 KiB; sent without a copy.
    Data(Bytes),
    /// Not here (yet).
    Absent,
}

/// What a node does for other nodes besides serving pages.
pub trait Orders: Send + Sync + 'static {
    /// Does what a peer orders (at most 64 KiB) and says what came of it (at most 4 MiB). Whether the peer may is for the
    /// implementation to say.
    ///
    /// # Errors
    /// A [`Refusal`]; it is sent to the peer.
    fn order(&self, peer: Peer, body: Bytes) -> BoxFuture<'_, Result<Bytes, Refusal>>;
}

/// Something else that a node does on the same port, under a name of its own.
pub struct Service {
    /// Its ALPN.
    pub alpn: &'static [u8],
    /// What does it.
    pub handler: Handler,
    /// Whether anybody may ask. Otherwise those alone who are trusted.
    pub admits_strangers: bool,
}

/// What a service does with a stream.
pub enum Handler {
    /// A message each way.
    Ask {
        /// Who answers.
        answers: Arc<dyn Answers>,
        /// The most bytes of a message to it.
        request_bytes_max: usize,
        /// How long one may take to arrive.
        request_time: Duration,
    },
    /// Whatever both sides agree on.
    Stream(Arc<dyn Streams>),
}

/// Answers messages.
pub trait Answers: Send + Sync + 'static {
    /// The answer; empty bytes are none. `shown`: the certificate whose key the other side has proven to have.
    fn answer(&self, shown: Certificate, request: Bytes) -> BoxFuture<'static, Bytes>;
}

/// Takes streams.
pub trait Streams: Send + Sync + 'static {
    /// Does what is asked on it, to its end.
    fn take(&self, peer: Peer, send: SendStream, receive: RecvStream) -> BoxFuture<'static, ()>;
}

/// Takes no orders.
#[derive(Clone, Copy, Debug)]
pub struct NoOrders;

impl Orders for NoOrders {
    fn order(&self, _peer: Peer, _body: Bytes) -> BoxFuture<'_, Result<Bytes, Refusal>> {
        Box::pin(async { Err(Refusal::new(RefusalCode::Failed, "this node takes no orders")) })
    }
}

/// What a server is made of.
pub struct Setup<'a> {
    /// Where to listen. Port 0 draws one.
    pub listen: SocketAddr,
    /// Who this node is.
    pub identity: &'a Identity,
    /// Whom it lets in.
    pub trust: Trust,
    /// What it serves.
    pub store: Arc<dyn ImageStore>,
    /// What it does.
    pub orders: Arc<dyn Orders>,
    /// What else it does.
    pub services: Vec<Service>,
    /// The transport's knobs.
    pub tuning: Tuning,
    /// What peers can make it hold.
    pub limits: Limits,
}

/// A running server. Dropping it closes every connection.
pub struct Server {
    endpoint: quinn::Endpoint,
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// What all tasks of a server know.
pub(crate) struct Shared {
    pub(crate) trust: Trust,
    pub(crate) store: Arc<dyn ImageStore>,
    pub(crate) orders: Arc<dyn Orders>,
    pub(crate) services: Vec<Service>,
    pub(crate) limits: Limits,
    pub(crate) admission: admission::Admission,
    pub(crate) counters: Counting,
}

impl Server {
    /// Listens, and serves in tasks of the tokio runtime that this is called in.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(setup: Setup<'_>) -> Result<Self, StartError> {
        let Setup { listen, identity, trust, store, orders, services, tuning, limits } = setup;
        let alpn = [wire::ALPN_PAGES, wire::ALPN_NODE].into_iter().chain(services.iter().map(|service| service.alpn));
        let alpn: Vec<&[u8]> = alpn.collect();
        let admits_strangers = services.iter().any(|service| service.admits_strangers);
        let config = endpoint::server_config(identity, &trust, &alpn, &tuning, &limits, admits_strangers)?;
        let endpoint = endpoint::endpoint(listen, &tuning, Some(config))?;
        let polling = |source| StartError::Socket { step: "naming", address: listen, source };
        let address = endpoint.local_addr().map_err(polling)?;
        let admission = admission::Admission::new(&limits);
        let shared = Arc::new(Shared { trust, store, orders, services, limits, admission, counters: Counting::default() });
        tokio::spawn(connection::accept(endpoint.clone(), Arc::clone(&shared)));
        Ok(Self { endpoint, address, shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has done and refused so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let held_bytes = self.shared.admission.held_bytes();
        let connections = self.shared.admission.connections();
        self.shared.counters.read(connections, held_bytes)
    }

    /// Closes every connection, tells the peers, and waits until they know, `patience` at most.
    pub async fn stop(self, patience: Duration) {
        self.endpoint.close(CLOSE_STOPPING, b"the node is stopping");
        // Peers that do not answer find out by their idle timeout.
        let _ = tokio::time::timeout(patience, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(CLOSE_STOPPING, b"the node is stopping");
    }
}

pub(crate) const CLOSE_STOPPING: VarInt = VarInt::from_u32(0);
pub(crate) const CLOSE_NOT_TRUSTED: VarInt = VarInt::from_u32(1);
pub(crate) const CLOSE_BUSY: VarInt = VarInt::from_u32(2);
pub(crate) const CLOSE_SLOW: VarInt = VarInt::from_u32(3);

/// What a server has done and refused since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections that stand now.
    pub connections: u64,
    /// Bytes of answers that stand in memory now, not acknowledged.
    pub held_bytes: u64,
    /// Moves when a handshake is done and the connection is kept.
    pub accepted: u64,
    /// Moves when a first packet is dropped, since too many handshakes are under way.
    pub handshakes_dropped: u64,
    /// Moves when a first packet is answered by the demand to prove its address.
    pub handshakes_retried: u64,
    /// Moves when a handshake fails: no trusted certificate, or too slow.
    pub handshakes_failed: u64,
    /// Moves when a connection is closed for being one too many.
    pub connections_refused: u64,
    /// Moves when a request was read.
    pub requests: u64,
    /// Moves when a request is no request, or took too long to come.
    pub requests_bad: u64,
    /// Moves when a request is answered by a refusal.
    pub refused: u64,
    /// Moves when a connection is closed, since an answer was not taken.
    pub answers_not_taken: u64,
    /// Moves with each extent of data that is handed to the transport.
    pub extents: u64,
    /// Moves with the payload bytes of those.
    pub extent_bytes: u64,
}

#[derive(Default)]
pub(crate) struct Counting {
    pub(crate) accepted: AtomicU64,
    pub(crate) handshakes_dropped: AtomicU64,
    pub(crate) handshakes_retried: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) requests_bad: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) answers_not_taken: AtomicU64,
    pub(crate) extents: AtomicU64,
    pub(crate) extent_bytes: AtomicU64,
}

impl Counting {
    fn read(&self, connections: u64, held_bytes: u64) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            connections,
            held_bytes,
            accepted: of(&self.accepted),
            handshakes_dropped: of(&self.handshakes_dropped),
            handshakes_retried: of(&self.handshakes_retried),
            handshakes_failed: of(&self.handshakes_failed),
            connections_refused: of(&self.connections_refused),
            requests: of(&self.requests),
            requests_bad: of(&self.requests_bad),
            refused: of(&self.refused),
            answers_not_taken: of(&self.answers_not_taken),
            extents: of(&self.extents),
            extent_bytes: of(&self.extent_bytes),
        }
    }
}

/// Counts one more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
