//! The real network: who this node is, whom it lets in, what it serves, and how it asks others. QUIC with certificates on both
//! sides; see the crate `pages`.
//!
//! ```text
//! data directory/node.pem, node.key    made at the first start, and again when they have expired
//! ```

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use pages::client::{Client, Link, LinkError};
use pages::endpoint::{Limits, Tuning};
use pages::server::{Answers, Orders, Server, Service, Setup};
use pages::wire::{Refusal, RefusalCode};
use pages::{Identity, Peer, Root, Trust};
use thiserror::Error;
use types::NodeId;

use super::data::DataDirectory;
use super::network::{Network, NetworkSettings};
use super::offer::Store;
use super::peers::{Answer, Order, PeerError, PeerForkOrder, PeerForkReport, Peers};
use super::trust::{Certificate, CertificateError, Certificates, Role, TrustError, TrustStore, Trusted};

pub(crate) const CERTIFICATE: &str = "node.pem";
pub(crate) const KEY: &str = "node.key";
/// The most bytes of either file.
pub(crate) const PEM_SIZE_MAX: usize = 16 << 10;
/// The most nodes whose links are kept.
const LINKS_MAX: usize = 256;
/// Before this much is left of a certificate's validity, the log says so.
const WARN_BEFORE: Duration = Duration::from_hours(30 * 24);
/// How often leases are looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// How long a node that stops waits until the others know.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Why a node cannot take part.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum JoinError {
    #[error("the node's certificate cannot be used: {0}")]
    Identity(#[from] pages::identity::IdentityError),
    #[error("{file} in the data directory cannot be used: {source}")]
    File { file: &'static str, source: std::io::Error },
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error(transparent)]
    Start(#[from] pages::endpoint::StartError),
    #[error("the server's thread cannot be started: {source}")]
    Thread { source: std::io::Error },
    #[error("this node's certificate has expired, so that the others of its cluster do not let it in")]
    Expired,
}

impl JoinError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Identity(error) => error.remedy().to_owned(),
            Self::File { .. } => "check the disk and the owner of the data directory".to_owned(),
            Self::Trust(error) => error.remedy(),
            Self::Start(error) => error.remedy().to_owned(),
            Self::Expired => {
                "look at this host's clock; otherwise remove the node (farfork node rm) and let it join anew".to_owned()
            }
            Self::Thread { .. } => "raise the limits on threads and open files (ulimit -u, ulimit -n)".to_owned(),
        }
    }
}

/// Who a node is, and whom it lets in. Opened before anything that speaks to others.
pub struct Credentials {
    /// Its key and certificate.
    pub(crate) identity: Arc<Identity>,
    /// What the transport looks at.
    pub(crate) trust: Trust,
}

impl Credentials {
    /// Reads them from the data directory, or makes them.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn open(data: &DataDirectory, cluster: Option<&Root>) -> Result<Self, JoinError> {
        let node = NodeId::from_uuid(data.node());
        let of = |file| move |source| JoinError::File { file, source };
        let certificate = data.read(CERTIFICATE, PEM_SIZE_MAX).map_err(of(CERTIFICATE))?;
        let key = data.read(KEY, PEM_SIZE_MAX).map_err(of(KEY))?;
        let (Some(certificate), Some(key)) = (certificate, key) else { return Self::make(data, node) };
        let identity = Arc::new(Identity::from_pem(&certificate, &key)?);
        let trust = Trust::new();
        if let Some(root) = cluster {
            trust.join(root.clone());
        }
        let peer = identity.certificate().peer();
        let left = peer.not_after.duration_since(pages::clock::wall());
        match left {
            Err(_) if cluster.is_some() => return Err(JoinError::Expired),
            Err(_) => {
                tracing::warn!("this node's certificate has expired: it gets a new one, which others have to trust anew");
                return Self::make(data, node);
            }
            Ok(left) if left < WARN_BEFORE && cluster.is_none() => {
                tracing::warn!(days = left.as_secs() / 86_400, "this node's certificate expires soon");
            }
            Ok(_) => {}
        }
        Ok(Self { identity, trust })
    }

    fn make(data: &DataDirectory, node: NodeId) -> Result<Self, JoinError> {
        let identity = Identity::generate(node, pages::Role::Learner)?;
        let of = |file| move |source| JoinError::File { file, source };
        data.replace(KEY, identity.key_pem().as_bytes()).map_err(of(KEY))?;
        data.replace(CERTIFICATE, identity.certificate_pem().as_bytes()).map_err(of(CERTIFICATE))?;
        Ok(Self { identity: Arc::new(identity), trust: Trust::new() })
    }
}

/// A node's place among others.
pub struct Joined {
    network: Network,
    client: Client,
    server: Option<ServerThread>,
    orders: Arc<LateOrders>,
}

/// Does what other nodes ask: the node's own service.
pub trait Serve: Send + Sync + 'static {
    /// Does what is ordered and says what came of it.
    fn order(&self, peer: NodeId, bytes: Vec<u8>) -> BoxFuture<'static, Answer>;
}

impl Joined {
    /// Takes a node's place among others, within a runtime. Orders are taken when [`JoinedServer::take_orders`] says by whom.
    ///
    /// # Errors
    /// [`JoinError`]; nobody was let in.
    pub fn open(
        settings: &NetworkSettings,
        data: &DataDirectory,
        credentials: &Credentials,
        store: &Arc<Store>,
        services: Vec<Service>,
    ) -> Result<Self, JoinError> {
        let Credentials { identity, trust } = credentials;
        let certificates = PinnedCertificates { own: of_identity(identity), trust: trust.clone(), store: Arc::clone(store) };
        let trust_store = TrustStore::open(data.trust(), Arc::new(certificates))?;
        let client = Client::new(identity, trust, &Tuning::default())?;
        let orders = Arc::new(LateOrders::default());
        let server = settings.listen.map(|listen| {
            let setup = Setup {
                listen,
                identity,
                trust: trust.clone(),
                store: Arc::clone(store) as _,
                orders: Arc::clone(&orders) as _,
                services,
                tuning: Tuning::default(),
                limits: Limits::default(),
            };
            ServerThread::start(setup, Arc::downgrade(store))
        });
        let server = server.transpose()?;
        let peers =
            Arc::new(QuicPeers { client: client.clone(), links: Mutex::default(), runtime: tokio::runtime::Handle::current() });
        let listening = server.as_ref().map(|server| server.address);
        let network = Network { listening, advertise: settings.advertise.clone(), trust: trust_store, peers };
        Ok(Self { network, client, server, orders })
    }

    /// Its network, what asks others, and the rest.
    #[must_use]
    pub fn split(self) -> (Network, Client, JoinedServer) {
        (self.network, self.client, JoinedServer { server: self.server, orders: self.orders })
    }
}

/// A server whose orders nobody takes yet.
pub struct JoinedServer {
    server: Option<ServerThread>,
    orders: Arc<LateOrders>,
}

impl JoinedServer {
    /// Orders of other nodes are done by this from now on. The server lives as long as what comes back.
    #[must_use]
    pub fn take_orders(self, serve: impl Serve) -> Listening {
        self.orders.serve.get_or_init(|| Box::new(serve));
        Listening(self.server)
    }
}

/// A server that other nodes reach.
pub struct Listening(Option<ServerThread>);

impl Listening {
    /// Nobody does.
    #[cfg(feature = "testing")]
    pub(crate) fn nowhere() -> Self {
        Self(None)
    }

    /// Tells the others, and lets nobody in any more.
    pub async fn stop(self) {
        if let Some(server) = self.0 {
            // Joining blocks; nobody else is served by this thread any more.
            tokio::task::spawn_blocking(move || server.stop()).await.unwrap_or_default();
        }
    }
}

/// The server, in a thread and a runtime of its own. With more threads each request would be handed from one to the other: waking
/// one takes longer than reading an extent.
struct ServerThread {
    address: SocketAddr,
    stop: tokio::sync::oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl ServerThread {
    fn start(setup: Setup<'_>, store: Weak<Store>) -> Result<Self, JoinError> {
        let failed = |source| JoinError::Thread { source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let server = {
            let _within = runtime.enter();
            Server::start(setup)?
        };
        let address = server.address();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let live = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = sweep(store) => {}
                    // An error: the node is gone.
                    _ = stopped => {}
                }
                server.stop(STOP_PATIENCE).await;
            });
        };
        let thread = std::thread::Builder::new().name("server".to_owned()).spawn(live).map_err(failed)?;
        Ok(Self { address, stop, thread })
    }

    fn stop(self) {
        // It has ended by itself otherwise.
        self.stop.send(()).unwrap_or_default();
        if self.thread.join().is_err() {
            tracing::error!("the server panicked");
        }
    }
}

/// Looks through the leases now and then, for as long as there is a store.
async fn sweep(store: Weak<Store>) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let Some(store) = store.upgrade() else { return };
        store.sweep();
    }
}

/// A service of which nobody answers yet.
#[derive(Default)]
pub struct Late {
    answers: OnceLock<(tokio::runtime::Handle, Arc<dyn Answers>)>,
}

impl Late {
    /// It is answered by this from now on. Within the runtime that is to do it.
    pub fn set(&self, answers: Arc<dyn Answers>) {
        self.answers.get_or_init(|| (tokio::runtime::Handle::current(), answers));
    }
}

impl Answers for Late {
    fn answer(&self, shown: pages::Certificate, request: Bytes) -> BoxFuture<'static, Bytes> {
        let answers = self.answers.get().cloned();
        Box::pin(async move {
            let Some((runtime, answers)) = answers else { return Bytes::new() };
            // Not on the thread that serves pages.
            runtime.spawn(async move { answers.answer(shown, request).await }).await.unwrap_or_default()
        })
    }
}

#[derive(Default)]
struct LateOrders {
    serve: OnceLock<Box<dyn Serve>>,
}

impl Orders for LateOrders {
    fn order(&self, peer: Peer, body: Bytes) -> BoxFuture<'_, Result<Bytes, Refusal>> {
        Box::pin(async move {
            let Some(serve) = self.serve.get() else {
                return Err(Refusal::new(RefusalCode::Busy, "the node is starting"));
            };
            Ok(Bytes::from(serve.order(peer.node, body.to_vec()).await.encode()))
        })
    }
}

/// Orders to others, over QUIC.
struct QuicPeers {
    client: Client,
    /// The way to each node, kept: a new one costs a handshake.
    links: Mutex<HashMap<SocketAddr, Link>>,
    runtime: tokio::runtime::Handle,
}

impl Peers for QuicPeers {
    fn fork_on(&self, address: SocketAddr, order: &PeerForkOrder) -> Result<PeerForkReport, PeerError> {
        let link = {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            if links.len() >= LINKS_MAX {
                links.clear();
            }
            links.entry(address).or_insert_with(|| self.client.link(address, None)).clone()
        };
        let bytes = Order::Fork(order.clone()).encode();
        let answer = self.runtime.block_on(link.order(&bytes, order.deadline)).map_err(|error| of_link(address, &error))?;
        let answer = Answer::decode(&answer);
        answer.map_err(|error| PeerError::NoAnswer { address, detail: error.to_string() })?.report(address)
    }
}

fn of_link(address: SocketAddr, error: &LinkError) -> PeerError {
    let detail = error.to_string();
    match error {
        LinkError::Unreachable { .. } | LinkError::OtherProtocol { .. } => PeerError::Unreachable { address, detail },
        LinkError::NotTrusted { .. } => PeerError::NotTrusted { address, detail },
        LinkError::Refused(refusal) => {
            let refusal = super::peers::PeerRefusal {
                code: refusal.code.to_string(),
                message: refusal.message(),
                remedy: refusal.remedy().to_owned(),
                reason: None,
            };
            PeerError::Refused { address, refusal }
        }
        _ => PeerError::NoAnswer { address, detail },
    }
}

/// Certificates that are accepted by exact match.
struct PinnedCertificates {
    own: Certificate,
    trust: Trust,
    store: Arc<Store>,
}

impl Certificates for PinnedCertificates {
    fn own(&self) -> Certificate {
        self.own.clone()
    }

    fn parse(&self, pem: &str) -> Result<Certificate, CertificateError> {
        let parsed = pages::Certificate::from_pem(pem.as_bytes());
        let parsed =
            parsed.map_err(|error| CertificateError { message: error.to_string(), remedy: error.remedy().to_owned() })?;
        Ok(of_certificate(parsed.peer(), block(pem)))
    }

    fn accept(&self, trusted: &Trusted) {
        match pages::Certificate::from_pem(trusted.certificate.pem.as_bytes()) {
            Ok(certificate) => {
                if let Err(error) = self.trust.add(&certificate, trusted.tenants.iter().cloned()) {
                    tracing::error!(node = %trusted.certificate.node, %error, "not let in");
                }
                // After that: it may have been trusted with more, and opens anew what it may still read.
                self.store.revoke(trusted.certificate.node);
            }
            Err(error) => tracing::error!(node = %trusted.certificate.node, %error, "not let in"),
        }
    }

    fn withdraw(&self, certificate: &Certificate) {
        self.trust.remove(certificate.node);
        self.store.revoke(certificate.node);
    }
}

fn of_identity(identity: &Identity) -> Certificate {
    of_certificate(identity.certificate().peer(), block(identity.certificate_pem()))
}

fn of_certificate(peer: &Peer, pem: String) -> Certificate {
    let role = match peer.role {
        pages::Role::Voter => Role::Voter,
        pages::Role::Learner => Role::Learner,
    };
    Certificate { node: peer.node, role, fingerprint: peer.fingerprint.0, not_after: peer.not_after, pem }
}

/// The first PEM block of a text, as people exchange it.
fn block(pem: &str) -> String {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let lines = pem.lines().map(str::trim).skip_while(|line| *line != BEGIN);
    let mut block = String::new();
    for line in lines {
        block.push_str(line);
        block.push('\n');
        if line == END {
            break;
        }
    }
    block
}
