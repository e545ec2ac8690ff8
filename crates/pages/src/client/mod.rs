//! Asks another node, over connections that are kept.
//!
//! A [`Link`] has up to three connections to its node: demand, which nothing large may delay; bulk, for replay and streaming;
//! and orders. Each is made when it is first needed, and made anew by the first call after it was lost, not sooner than a
//! back-off after the last failure. A deadline covers all of a call, connecting included. Where a way falls silent under a
//! call, another connection is tried beside it.
//!
//! What comes back is typed and within bounds, and was asked for; whether bytes are those of the image is for the caller to
//! verify. Everything here works in a current-thread runtime.

mod ask;
mod lane;
mod silence;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, VarInt};
use thiserror::Error;
use types::{Digest, NodeId, Tenant};

use crate::endpoint::{self, StartError, Tuning};
use crate::identity::{Identity, Peer};
use crate::trust::{NotTrusted, Trust};
use crate::wire::{
    self, Answer, BadFrame, Content, ExtentId, ExtentsRequest, HashPageBytes, Hints, Kind, LeaseToken, Opened, Refusal,
    Renewed, Request, Urgency,
};
pub(crate) use ask::message;
use lane::Lane;
pub(crate) use lane::lost;

/// Nothing is wanted of a connection any more.
pub(crate) const CLOSE_DONE: VarInt = VarInt::from_u32(0);

/// A socket of one's own, from which any number of nodes is asked. Clones share it.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// What all links of a client know.
pub(crate) struct Shared {
    pub(crate) v4: quinn::Endpoint,
    /// Missing where the host has no IPv6.
    pub(crate) v6: Option<quinn::Endpoint>,
    pages: quinn::ClientConfig,
    node: quinn::ClientConfig,
    pub(crate) trust: Trust,
    /// As in [`Tuning`].
    has_one_connection: bool,
}

impl Client {
    /// Binds sockets. Must be called inside the tokio runtime in which it is used.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn new(identity: &Identity, trust: &Trust, tuning: &Tuning) -> Result<Self, StartError> {
        let config = |alpn| endpoint::client_config(identity, trust, alpn, tuning);
        let shared = Shared {
            v4: endpoint::client(tuning, false)?,
            v6: endpoint::client(tuning, true).ok(),
            pages: config(wire::ALPN_PAGES)?,
            node: config(wire::ALPN_NODE)?,
            trust: trust.clone(),
            has_one_connection: tuning.has_one_connection,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A link to the node at an address; to be refused unless it is the one that is expected, if one is. Connects when it is
    /// used.
    #[must_use]
    pub fn link(&self, address: SocketAddr, expected: Option<NodeId>) -> Link {
        let lane = |config: &quinn::ClientConfig, may_repeat| {
            Arc::new(Lane::new(Arc::clone(&self.shared), address, expected, config.clone(), may_repeat))
        };
        let pages = || lane(&self.shared.pages, true);
        let demand = pages();
        let bulk = if self.shared.has_one_connection { Arc::clone(&demand) } else { pages() };
        Link { inner: Arc::new(Lanes { address, demand, bulk, orders: lane(&self.shared.node, false) }) }
    }

    /// A way to a service of the node at an address, over a connection of its own; to be refused unless the node is the one that
    /// is expected, if one is. `may_repeat`: what is asked may be asked a second time, where a connection falls silent.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn way(
        &self,
        identity: &Identity,
        alpn: &[u8],
        address: SocketAddr,
        expected: Option<NodeId>,
        may_repeat: bool,
    ) -> Result<Way, StartError> {
        let config = endpoint::client_config(identity, &self.shared.trust, alpn, &Tuning::default())?;
        let lane = Lane::new(Arc::clone(&self.shared), address, expected, config, may_repeat);
        Ok(Way { lane: Arc::new(lane) })
    }

    /// Closes every connection of every link.
    pub fn close(&self) {
        for endpoint in [Some(&self.shared.v4), self.shared.v6.as_ref()].into_iter().flatten() {
            endpoint.close(CLOSE_DONE, b"the reader is done");
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// The way to one service of a node. Clones share its connection.
#[derive(Clone)]
pub struct Way {
    lane: Arc<Lane>,
}

impl Way {
    /// Sends a message, and waits for the answer.
    ///
    /// # Errors
    /// [`Unasked`]: which side of sending it failed on.
    pub async fn ask(&self, request: Bytes, answer_bytes_max: usize, within: Duration) -> Result<Bytes, Unasked> {
        let deadline = tokio::time::Instant::now() + within;
        let connecting = tokio::time::timeout_at(deadline, self.lane.connection()).await;
        let connection = connecting.unwrap_or(Err(LinkError::TimedOut { within })).map_err(Unasked::NotSent)?;
        let asking = self.lane.watching(&connection, ask::message(&connection, request, answer_bytes_max));
        let asked = tokio::time::timeout_at(deadline, asking).await;
        asked.unwrap_or(Err(LinkError::TimedOut { within })).map_err(Unasked::NoAnswer)
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn stream(&self, within: Duration) -> Result<(quinn::SendStream, quinn::RecvStream), LinkError> {
        timed(within, async {
            let connection = self.lane.connection().await?;
            connection.open_bi().await.map_err(|error| lost(connection.remote_address(), &error))
        })
        .await
    }
}

/// Why a message has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unasked {
    /// It was not sent.
    #[error(transparent)]
    NotSent(LinkError),
    /// It was, and may have been heard.
    #[error(transparent)]
    NoAnswer(LinkError),
}

/// The way to one node. Clones share its connections.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Lanes>,
}

struct Lanes {
    address: SocketAddr,
    demand: Arc<Lane>,
    bulk: Arc<Lane>,
    orders: Arc<Lane>,
}

/// An extent as it came: asked for, not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentAnswer {
    /// Which.
    pub id: ExtentId,
    /// What it is.
    pub content: Content,
    /// Bytes that travelled for it.
    pub wire_bytes: usize,
}

impl Link {
    /// Where it leads.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.address
    }

    /// Who is there, if there is a connection for demands.
    #[must_use]
    pub fn peer(&self) -> Option<Peer> {
        self.inner.demand.peer()
    }

    /// The transport's estimate of the round trip, if there is a connection for demands.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.inner.demand.round_trip()
    }

    /// Makes the connections for demand and bulk, so that no first request has to.
    ///
    /// # Errors
    /// [`LinkError`] if one of them cannot be made.
    pub async fn connect(&self, within: Duration) -> Result<Peer, LinkError> {
        let both = async { tokio::try_join!(self.inner.demand.connection(), self.inner.bulk.connection()) };
        timed(within, both).await?;
        self.peer().ok_or_else(|| LinkError::Unreachable { address: self.address(), why: "it has gone again".to_owned() })
    }

    /// Asks for an image's description and a lease.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn open(&self, tenant: &Tenant, image: Digest, within: Duration) -> Result<Opened, LinkError> {
        match self.ask(&Request::Open { tenant: tenant.clone(), image }, within).await? {
            Answer::Opened(opened) => Ok(opened),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for a hash page. It comes unverified.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn hash_page(
        &self,
        lease: &LeaseToken,
        image: Digest,
        region: u8,
        page: u32,
        within: Duration,
    ) -> Result<HashPageBytes, LinkError> {
        match self.ask(&Request::HashPage { lease: lease.clone(), image, region, page }, within).await? {
            Answer::HashPage(page) => Ok(page),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for extents, and hands over each as it comes. All were asked for and none comes twice; when this returns `Ok`, all
    /// have come. After an error those that were handed over are as good as ever. Dropping the future cancels the request.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn extents(
        &self,
        request: &ExtentsRequest,
        within: Duration,
        each: impl FnMut(ExtentAnswer),
    ) -> Result<(), LinkError> {
        let lane = if request.urgency == Urgency::Demand { &self.inner.demand } else { &self.inner.bulk };
        timed(within, async {
            let connection = lane.connection().await?;
            lane.watching(&connection, ask::extents(&connection, request, each)).await
        })
        .await
    }

    /// Asks for a longer term of a lease.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn renew(&self, lease: &LeaseToken, within: Duration) -> Result<Renewed, LinkError> {
        match self.ask(&Request::Renew { lease: lease.clone() }, within).await? {
            Answer::Renewed(renewed) => Ok(renewed),
            other => Err(unexpected(&other)),
        }
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn release(&self, lease: &LeaseToken, within: Duration) -> Result<(), LinkError> {
        self.tell(&Request::Release { lease: lease.clone() }, within).await
    }

    /// Says what children touched first, in that order.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn hints(&self, lease: &LeaseToken, image: Digest, runs: Hints, within: Duration) -> Result<(), LinkError> {
        self.tell(&Request::Hints { lease: lease.clone(), image, runs }, within).await
    }

    /// Gives the node an order (at most 64 KiB).
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn order(&self, body: &[u8], within: Duration) -> Result<Bytes, LinkError> {
        let frame = wire::order_frame(Kind::Order, body).map_err(LinkError::Order)?;
        let lane = &self.inner.orders;
        timed(within, async {
            let connection = lane.connection().await?;
            lane.watching(&connection, ask::order(&connection, frame)).await
        })
        .await
    }

    async fn tell(&self, request: &Request, within: Duration) -> Result<(), LinkError> {
        match self.ask(request, within).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn ask(&self, request: &Request, within: Duration) -> Result<Answer, LinkError> {
        let lane = &self.inner.demand;
        timed(within, async {
            loop {
                let connection = lane.connection().await?;
                let answer = lane.watching(&connection, ask::answer(&connection, request)).await;
                // Each of these may be asked twice. Where another connection took the place of this one, it is.
                if answer.is_ok() || connection.close_reason() != Some(ConnectionError::LocallyClosed) {
                    return answer;
                }
            }
        })
        .await
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("address", &self.inner.address).finish_non_exhaustive()
    }
}

async fn timed<T>(within: Duration, call: impl Future<Output = Result<T, LinkError>>) -> Result<T, LinkError> {
    tokio::time::timeout(within, call).await.unwrap_or(Err(LinkError::TimedOut { within }))
}

fn unexpected(answer: &Answer) -> LinkError {
    let kind = match answer {
        Answer::Refused(_) => "a refusal",
        Answer::Opened(_) => "an image",
        Answer::HashPage(_) => "a hash page",
        Answer::Renewed(_) => "a lease",
        Answer::Done => "nothing",
    };
    LinkError::Broken(Misbehaviour::OtherAnswer { kind })
}

/// Why a call brought nothing, or not all.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum LinkError {
    #[error("{address} cannot be reached: {why}")]
    Unreachable { address: SocketAddr, why: String },
    #[error("there is no trust between this node and {address}")]
    NotTrusted { address: SocketAddr, source: NotTrusted },
    #[error("the node at {address} does not speak this protocol")]
    OtherProtocol { address: SocketAddr },
    #[error("the node refuses: {0}")]
    Refused(#[from] Refusal),
    #[error("the node broke the protocol")]
    Broken(#[from] Misbehaviour),
    #[error("no answer came within {within:?}")]
    TimedOut { within: Duration },
    #[error("the order cannot be sent")]
    Order(#[source] BadFrame),
}

impl LinkError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "look whether farfork runs there with --listen, and whether UDP gets through",
            Self::NotTrusted { source, .. } => source.remedy(),
            Self::OtherProtocol { .. } => {
                "use the same version of farfork on all nodes; and look whether that node is of the cluster, or a voter of it"
            }
            Self::Refused(refusal) => refusal.remedy(),
            Self::Broken(_) => "do not use that node as a holder; update farfork on both nodes to one version",
            Self::TimedOut { .. } => "ask again, or another holder",
            Self::Order(_) => "order less at once",
        }
    }
}

/// What a node sent that it may not send.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum Misbehaviour {
    #[error("it sent what is no frame: {0}")]
    Frame(#[from] BadFrame),
    #[error("it sent {kind} as an answer to another question")]
    OtherAnswer { kind: &'static str },
    #[error("it sent extent {} of region {}, which was not asked for, or a second time", .0.extent, .0.region)]
    Unsolicited(ExtentId),
    #[error("it ended its answer with {missing} extents missing")]
    Incomplete { missing: usize },
    #[error("it sent more after the end of its answer")]
    Trailing,
    #[error("it reset the stream with code {code}")]
    Reset { code: u64 },
}
