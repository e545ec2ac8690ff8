//! A holder and readers in one process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control::lease::{Ask as LeaseAsk, Check, Granted, LeaseKey, LeaseRefusal, Leases, Limits as LeaseLimits};
use pages::client::ExtentAnswer;
use pages::endpoint::{Limits, Tuning};
use pages::fakes::{Ask, Gate, MemoryImage, MemoryStore};
use pages::identity::Peer;
use pages::server::{NoOrders, Orders, Setup};
use pages::wire::{ExtentId, ExtentsRequest, LeaseToken, Refusal, RefusalCode, Renewed, Urgency, Wanted};
use pages::{Client, Identity, Link, LinkError, Role, Server, Trust};
use types::{Digest, ExtentIndex, NodeId, Tenant};
use uuid::Uuid;

/// Far more than any call here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A gate of real leases, on a clock that only the test moves.
#[derive(Clone)]
pub(crate) struct LeaseGate {
    pub(crate) leases: Arc<Mutex<Leases>>,
    now_ms: Arc<AtomicU64>,
}

impl LeaseGate {
    pub(crate) fn new() -> Self {
        Self::of(Leases::new(LeaseKey::new([9; 32]), LeaseLimits::default()))
    }

    pub(crate) fn without(check: Check) -> Self {
        Self::of(Leases::new(LeaseKey::new([9; 32]), LeaseLimits::default()).without(check))
    }

    fn of(leases: Leases) -> Self {
        Self { leases: Arc::new(Mutex::new(leases)), now_ms: Arc::new(AtomicU64::new(1_000_000)) }
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.now_ms.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Duration {
        Duration::from_millis(self.now_ms.load(Ordering::Relaxed))
    }
}

impl Gate for LeaseGate {
    fn grant(&self, peer: &Peer, tenant: &Tenant, image: Digest) -> Result<Renewed, Refusal> {
        let granted = self.leases.lock().unwrap().grant(self.now(), peer.node, tenant.clone(), image);
        granted.map(renewed).map_err(refusal)
    }

    fn renew(&self, peer: &Peer, lease: &[u8]) -> Result<Renewed, Refusal> {
        self.leases.lock().unwrap().renew(self.now(), lease, peer.node).map(renewed).map_err(refusal)
    }

    fn release(&self, peer: &Peer, lease: &[u8]) -> Result<(), Refusal> {
        self.leases.lock().unwrap().release(self.now(), lease, peer.node).map_err(refusal)
    }

    fn check(&self, peer: &Peer, lease: &[u8], ask: &Ask) -> Result<(), Refusal> {
        let ask = LeaseAsk {
            reader: peer.node,
            image: ask.image,
            tenants: std::slice::from_ref(&ask.tenant),
            regions: &ask.regions,
            extents: ask.extents.clone(),
        };
        self.leases.lock().unwrap().check(self.now(), lease, &ask).map(drop).map_err(refusal)
    }
}

fn renewed(granted: Granted) -> Renewed {
    Renewed { lease: LeaseToken::new(granted.token).unwrap(), lease_for: granted.lasts }
}

fn refusal(refusal: LeaseRefusal) -> Refusal {
    let code = match refusal {
        LeaseRefusal::NoLease => RefusalCode::NoLease,
        LeaseRefusal::Forged => RefusalCode::Forged,
        LeaseRefusal::Expired => RefusalCode::Expired,
        LeaseRefusal::OtherNode => RefusalCode::OtherNode,
        LeaseRefusal::OtherTenant => RefusalCode::OtherTenant,
        LeaseRefusal::OtherImage => RefusalCode::OtherImage,
        LeaseRefusal::Replayed => RefusalCode::Replayed,
        LeaseRefusal::Revoked => RefusalCode::Revoked,
        LeaseRefusal::OutOfRange => RefusalCode::OutOfRange,
        LeaseRefusal::TooMany { .. } => RefusalCode::Busy,
    };
    Refusal::new(code, refusal)
}

/// A node that serves.
pub(crate) struct Holder {
    pub(crate) identity: Identity,
    pub(crate) trust: Trust,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) server: Server,
}

/// A node that reads.
pub(crate) struct Reader {
    pub(crate) identity: Identity,
    pub(crate) trust: Trust,
    pub(crate) client: Client,
}

pub(crate) fn identity() -> Identity {
    Identity::generate(NodeId::from_uuid(Uuid::now_v7()), Role::Learner).unwrap()
}

impl Holder {
    pub(crate) fn of(gate: impl Gate, images: impl IntoIterator<Item = MemoryImage>) -> Self {
        Self::with(gate, images, Arc::new(NoOrders), (Tuning::default(), Limits::default()))
    }

    pub(crate) fn with(
        gate: impl Gate,
        images: impl IntoIterator<Item = MemoryImage>,
        orders: Arc<dyn Orders>,
        (tuning, limits): (Tuning, Limits),
    ) -> Self {
        let identity = identity();
        let trust = Trust::new();
        let store = Arc::new(MemoryStore::new(gate, images));
        let setup = Setup {
            listen: "127.0.0.1:0".parse().unwrap(),
            identity: &identity,
            trust: trust.clone(),
            store: Arc::clone(&store) as _,
            orders,
            services: Vec::new(),
            tuning,
            limits,
        };
        let server = Server::start(setup).unwrap();
        Self { identity, trust, store, server }
    }

    /// Stops, and starts anew where it was.
    pub(crate) async fn restart(self, tuning: &Tuning) -> Self {
        let Self { identity, trust, store, server } = self;
        let listen = server.address();
        server.stop(PATIENCE).await;
        let setup = || Setup {
            listen,
            identity: &identity,
            trust: trust.clone(),
            store: Arc::clone(&store) as _,
            orders: Arc::new(NoOrders),
            services: Vec::new(),
            tuning: tuning.clone(),
            limits: Limits::default(),
        };
        // The port is free when the last task of the old server has ended.
        let deadline = std::time::Instant::now() + PATIENCE;
        let server = loop {
            match Server::start(setup()) {
                Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Ok(server) => break server,
            }
        };
        Self { identity, trust, store, server }
    }

    /// A reader that this holder trusts for these tenants, and its link.
    pub(crate) fn reader(&self, tenants: &[&str]) -> (Reader, Link) {
        let reader = Reader::of(identity());
        self.meet(&reader, tenants);
        let link = reader.link(self);
        (reader, link)
    }

    pub(crate) fn meet(&self, reader: &Reader, tenants: &[&str]) {
        let tenants = tenants.iter().map(|name| name.parse().unwrap());
        self.trust.add(reader.identity.certificate(), tenants).unwrap();
        reader.trust.add(self.identity.certificate(), []).unwrap();
    }
}

impl Reader {
    pub(crate) fn of(identity: Identity) -> Self {
        Self::tuned(identity, &Tuning::default())
    }

    pub(crate) fn tuned(identity: Identity, tuning: &Tuning) -> Self {
        let trust = Trust::new();
        let client = Client::new(&identity, &trust, tuning).unwrap();
        Self { identity, trust, client }
    }

    pub(crate) fn link(&self, holder: &Holder) -> Link {
        self.client.link(holder.server.address(), Some(holder.identity.node()))
    }
}

/// An extent of the one region.
pub(crate) fn id(extent: u32) -> ExtentId {
    ExtentId { region: 0, extent: ExtentIndex(extent) }
}

pub(crate) fn request(lease: &LeaseToken, image: Digest, extents: impl IntoIterator<Item = u32>) -> ExtentsRequest {
    let extents = Wanted::new(extents.into_iter().map(id).collect()).unwrap();
    ExtentsRequest { lease: lease.clone(), image, urgency: Urgency::Demand, extents, may_compress: false }
}

/// What comes for a request, and how it ends.
pub(crate) async fn fetch(link: &Link, request: &ExtentsRequest) -> (Vec<ExtentAnswer>, Result<(), LinkError>) {
    let mut answers = Vec::new();
    let end = link.extents(request, PATIENCE, |answer| answers.push(answer)).await;
    (answers, end)
}

/// The code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(outcome: Result<T, LinkError>) -> RefusalCode {
    match outcome {
        Err(LinkError::Refused(refusal)) => refusal.code,
        other => panic!("no refusal: {other:?}"),
    }
}

/// The number of rounds: `quick` in `make test`, `full` in `make soak`.
pub(crate) fn count(quick: u64, full: u64) -> u64 {
    match std::env::var("FARFORK_COUNT").as_deref() {
        Err(_) | Ok("quick") => quick,
        Ok("full") => full,
        Ok(other) => panic!("FARFORK_COUNT is {other:?}; it is quick or full"),
    }
}

/// The test's seed, printed so that a failure can be run again.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("FARFORK_SEED") {
        Ok(seed) => seed.parse().expect("FARFORK_SEED is a number"),
        Err(_) => u64::from(fastrand::u32(..)),
    };
    println!("FARFORK_SEED={seed}");
    seed
}
