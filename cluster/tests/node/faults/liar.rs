//! A holder that lies: what it is asked it asks a true node in turn, and falsifies some of the answers.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use pages::endpoint::{Limits, Tuning};
use pages::fakes::Lie;
use pages::server::{Extent, NoOrders, Setup};
use pages::wire::{
    Blob, Content, ExtentId, ExtentsRequest, HashPageBytes, Hints, LeaseToken, List, Opened, Refusal, RefusalCode, Renewed,
    Urgency, Wanted,
};
use pages::{Certificate, Client, Identity, ImageStore, Link, LinkError, Peer, Role, Server, Trust};
use tokio::runtime::Runtime;
use types::{Digest, ExtentIndex, NodeId, Tenant};
use uuid::Uuid;

use crate::support::Node;

/// For the true node to answer; a call that takes longer is answered by a refusal.
const PATIENCE: Duration = Duration::from_secs(10);

/// What it lies about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Falsehood {
    /// Nothing.
    None,
    /// Extents, in one of the ways that are known of old.
    Extents(Lie),
    /// It says that extents are zero which are not.
    Zeroed,
    /// It says that it does not have extents which it has.
    Absent,
    /// The head of the image.
    Head,
    /// The digests of its extents.
    HashPages,
}

/// A server in this process. It ends when it is dropped.
pub(super) struct Liar {
    server: Server,
    node: NodeId,
    forger: Arc<Forger>,
    _runtime: Runtime,
}

struct Forger {
    honest: Link,
    plan: Mutex<Plan>,
    told: AtomicU64,
}

/// Of each `one_in` extents one is lied about; which, is drawn from the seed.
#[derive(Clone, Copy)]
struct Plan {
    falsehood: Falsehood,
    one_in: u64,
    seed: u64,
}

impl Liar {
    /// A holder that has what the node at `honest` has. Nodes of `readers` trust it, and `of` lets it read.
    pub(super) fn start(of: &Node, honest: SocketAddr, readers: &[&Node]) -> Self {
        let identity = Identity::generate(NodeId::from_uuid(Uuid::now_v7()), Role::Learner).unwrap();
        let trust = Trust::new();
        let file = of.path().join("liar.pem");
        std::fs::write(&file, identity.certificate_pem()).unwrap();
        for node in readers.iter().chain([&of]) {
            let added = node.cli(&["trust", "add", file.to_str().unwrap()]);
            assert_eq!(added.code, Some(0), "{added:?}");
            let shown = Certificate::from_pem(node.cli(&["trust", "show"]).out.as_bytes()).unwrap();
            trust.add(&shown, [Tenant::default_tenant()]).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let within = runtime.enter();
        let client = Client::new(&identity, &trust, &Tuning::default()).unwrap();
        let plan = Mutex::new(Plan { falsehood: Falsehood::None, one_in: 1, seed: 0 });
        let forger = Arc::new(Forger { honest: client.link(honest, None), plan, told: AtomicU64::new(0) });
        let server = Server::start(Setup {
            listen: "127.0.0.1:0".parse().unwrap(),
            identity: &identity,
            trust,
            store: Arc::clone(&forger) as _,
            orders: Arc::new(NoOrders),
            services: Vec::new(),
            tuning: Tuning::default(),
            limits: Limits::default(),
        });
        let server = server.unwrap();
        drop(within);
        Self { server, node: identity.node(), forger, _runtime: runtime }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }

    /// From now on it lies like this, about one extent in so many. What it told before is forgotten.
    pub(super) fn tell(&self, falsehood: Falsehood, one_in: u64, seed: u64) {
        *self.forger.plan.lock().unwrap() = Plan { falsehood, one_in, seed };
        self.forger.told.store(0, Ordering::SeqCst);
    }

    /// How often it has lied since.
    pub(super) fn told(&self) -> u64 {
        self.forger.told.load(Ordering::SeqCst)
    }
}

impl Forger {
    fn falsehood(&self) -> Falsehood {
        self.plan.lock().unwrap().falsehood
    }

    fn lies_about(&self, id: ExtentId) -> bool {
        let Plan { one_in, seed, .. } = *self.plan.lock().unwrap();
        fastrand::Rng::with_seed(seed ^ u64::from(id.extent.0).wrapping_mul(0x9E37_79B9)).u64(..one_in) == 0
    }

    fn has_told(&self) {
        self.told.fetch_add(1, Ordering::SeqCst);
    }

    async fn fetch(&self, lease: &LeaseToken, image: Digest, id: ExtentId, urgency: Urgency) -> Result<Extent, Refusal> {
        let extents = Wanted::new(vec![id]).unwrap();
        let request = ExtentsRequest { lease: lease.clone(), image, urgency, extents, may_compress: false };
        let mut extent = Extent::Absent;
        let each = |answer: pages::client::ExtentAnswer| {
            extent = match answer.content {
                Content::Data(bytes) => Extent::Data(bytes),
                Content::Zero => Extent::Zero,
                Content::Absent => Extent::Absent,
            };
        };
        self.honest.extents(&request, PATIENCE, each).await.map_err(refused)?;
        Ok(extent)
    }
}

impl ImageStore for Forger {
    fn open<'a>(&'a self, _peer: &'a Peer, tenant: &'a Tenant, image: Digest) -> BoxFuture<'a, Result<Opened, Refusal>> {
        Box::pin(async move {
            let mut opened = self.honest.open(tenant, image, PATIENCE).await.map_err(refused)?;
            match self.falsehood() {
                Falsehood::Head => {
                    opened.head = flipped(&opened.head);
                    self.has_told();
                }
                Falsehood::HashPages => {
                    let pages = opened.hash_pages.into_vec().iter().map(flipped).collect();
                    opened.hash_pages = List::new(pages).unwrap();
                    self.has_told();
                }
                _ => {}
            }
            Ok(opened)
        })
    }

    /// The true node's lease outlives every test.
    fn renew(&self, _peer: &Peer, lease: &LeaseToken) -> Result<Renewed, Refusal> {
        Ok(Renewed { lease: lease.clone(), lease_for: Duration::from_secs(60) })
    }

    fn release(&self, _peer: &Peer, _lease: &LeaseToken) -> Result<(), Refusal> {
        Ok(())
    }

    fn hash_page<'a>(
        &'a self,
        _peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        region: u8,
        page: u32,
    ) -> BoxFuture<'a, Result<HashPageBytes, Refusal>> {
        Box::pin(async move {
            let bytes = self.honest.hash_page(lease, image, region, page, PATIENCE).await.map_err(refused)?;
            if self.falsehood() != Falsehood::HashPages {
                return Ok(bytes);
            }
            self.has_told();
            Ok(flipped(&bytes))
        })
    }

    fn extent<'a>(
        &'a self,
        _peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> BoxFuture<'a, Result<Extent, Refusal>> {
        Box::pin(async move {
            let extent = self.fetch(lease, image, id, urgency).await?;
            let Extent::Data(right) = &extent else { return Ok(extent) };
            if !self.lies_about(id) {
                return Ok(extent);
            }
            let told = match self.falsehood() {
                Falsehood::Extents(Lie::Flipped) => changed(right, |bytes| bytes[4097] ^= 1),
                Falsehood::Extents(Lie::Stale) => changed(right, |bytes| bytes[..4096].fill(0xEE)),
                Falsehood::Extents(Lie::Swapped) => {
                    let other = ExtentId { extent: ExtentIndex(id.extent.0 ^ 1), ..id };
                    self.fetch(lease, image, other, urgency).await?
                }
                Falsehood::Zeroed => Extent::Zero,
                Falsehood::Absent => Extent::Absent,
                Falsehood::None | Falsehood::Extents(_) | Falsehood::Head | Falsehood::HashPages => return Ok(extent),
            };
            self.has_told();
            Ok(told)
        })
    }

    fn hints(&self, _peer: &Peer, _lease: &LeaseToken, _image: Digest, _runs: Hints) -> Result<(), Refusal> {
        Ok(())
    }

    fn lie(&self, id: ExtentId) -> Option<Lie> {
        let Falsehood::Extents(lie) = self.falsehood() else { return None };
        let is_of_content = matches!(lie, Lie::Flipped | Lie::Swapped | Lie::Stale);
        let lie = (!is_of_content && self.lies_about(id)).then_some(lie);
        lie.inspect(|_| self.has_told())
    }
}

fn changed(bytes: &Bytes, change: impl FnOnce(&mut [u8])) -> Extent {
    let mut bytes = bytes.to_vec();
    change(&mut bytes);
    Extent::Data(bytes.into())
}

/// The same with one bit in its middle another.
fn flipped<const MAX: usize>(blob: &Blob<MAX>) -> Blob<MAX> {
    let mut bytes = blob.to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
    Blob::new(bytes).unwrap()
}

fn refused(error: LinkError) -> Refusal {
    match error {
        LinkError::Refused(refusal) => refusal,
        other => Refusal::new(RefusalCode::Failed, other),
    }
}
