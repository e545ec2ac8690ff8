//! What this node gives to others: its images, under read leases, extent by extent.
//!
//! ```text
//! open ──▶ may this peer read this tenant? ──▶ image, hashed ──▶ lease
//! any other request ──▶ lease: of this peer, image, tenant, term, range ──▶ bytes
//! ```
//!
//! An image stays as long as a lease on it lives, whatever becomes of it here. Of an image that is still arriving here, what is
//! asked for with a demand or a replay is fetched in turn; so a chain of hosts works as one that has everything.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use control::lease::{Ask, Granted, LeaseKey, LeaseRefusal, Leases, Limits};
use futures_util::future::BoxFuture;
use pages::server::{Extent, ImageStore};
use pages::wire::{Blob, ExtentId, HashPageBytes, Hints, LeaseToken, Opened, Refusal, RefusalCode, Renewed, Urgency};
use pages::{Peer, Trust};
use serde::{Deserialize, Serialize};
use types::manifest::{HASH_PAGE_DIGESTS, WorkingSetRun, encode_hash_page};
use types::{Digest, ExtentIndex, Manifest, NodeId, Tenant};
use vm::host_image::EXTENT_LEN;
use vm::image::manifest::Content;
use vm::image::{Image, SaveError};

use super::metrics::{self, PageBytes};
use super::pager::Handle;

/// How long an image that has just been opened here may take to learn its digests, before a reader is told to come again.
const DIGESTS_PATIENCE: Duration = Duration::from_secs(2);
const DIGESTS_ROUND: Duration = Duration::from_millis(5);
/// How long a reader waits for what has to be fetched in turn, before it is told that it is absent. It asks again.
const PULL_PATIENCE: Duration = Duration::from_secs(2);

/// How long this node may be behind what the cluster has agreed on, before a reader is refused.
const GRANT_PATIENCE: Duration = Duration::from_secs(2);

/// Of how many images is remembered what children touched first.
const HINTS_MAX: usize = 1024;

/// What a holder says of an image besides its head. Advice: nothing of it is proven.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    /// How many pages from the first page of work hold the probe's pattern, if a guest of ours wrote it.
    pub(crate) pattern_pages: Option<u64>,
}

impl About {
    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain data")
    }

    /// What a holder said, or nothing.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        let said: Self = postcard::from_bytes(bytes).unwrap_or_default();
        // Nothing proves nothing.
        Self { pattern_pages: said.pattern_pages.filter(|pages| *pages > 0) }
    }
}

/// An image that may be given away.
#[derive(Clone)]
pub(crate) struct Offered {
    pub(crate) tenant: Tenant,
    pub(crate) image: Arc<Image>,
    pub(crate) about: About,
}

/// Where images are found by their digest.
pub(crate) trait Catalogue: Send + Sync {
    /// The image of a tenant, if it is here and was hashed.
    fn find(&self, tenant: &Tenant, image: Digest) -> Option<Offered>;
}

/// See the module.
pub struct Store {
    catalogue: Arc<dyn Catalogue>,
    trust: Trust,
    /// Fetches in turn; set when there is one.
    pager: OnceLock<Handle>,
    /// Whom the cluster has told to read what; set where there is one.
    grants: OnceLock<Box<Grants>>,
    began: Instant,
    state: Mutex<State>,
}

/// Whether a node of the cluster may read a tenant's image.
type Grants = dyn Fn(NodeId, &Tenant, Digest) -> bool + Send + Sync;

struct State {
    leases: Leases,
    /// What leases are on.
    held: HashMap<Digest, Vec<Held>>,
    hints: HashMap<(Tenant, Digest), Vec<WorkingSetRun>>,
}

#[derive(Clone)]
struct Held {
    offered: Offered,
    manifest: Arc<Manifest>,
}

impl Store {
    /// A store whose leases are signed with a key that is used nowhere else.
    pub(crate) fn new(catalogue: Arc<dyn Catalogue>, trust: Trust, key: LeaseKey) -> Arc<Self> {
        let leases = Leases::new(key, Limits::default());
        let state = State { leases, held: HashMap::new(), hints: HashMap::new() };
        let (pager, grants, began) = (OnceLock::new(), OnceLock::new(), Instant::now());
        Arc::new(Self { catalogue, trust, pager, grants, began, state: Mutex::new(state) })
    }

    /// What is absent here is fetched by this pager, when somebody else needs it.
    pub(crate) fn fetch_by(&self, pager: Handle) {
        self.pager.get_or_init(|| pager);
    }

    /// Nodes of the cluster read what this says.
    pub(crate) fn grant_by(&self, grants: impl Fn(NodeId, &Tenant, Digest) -> bool + Send + Sync + 'static) {
        self.grants.get_or_init(|| Box::new(grants));
    }

    /// A node of the cluster reads what the cluster has told it to: what this node knows of that may be a moment behind.
    async fn wait_for_grant(&self, peer: &Peer, tenant: &Tenant, image: Digest) -> Result<(), Refusal> {
        let Some(grants) = self.grants.get().filter(|_| self.trust.is_of_cluster(peer)) else { return Ok(()) };
        let deadline = Instant::now() + GRANT_PATIENCE;
        while !grants(peer.node, tenant, image) {
            if Instant::now() >= deadline {
                return Err(Refusal::new(RefusalCode::NoLease, "the cluster has not told that node to read it"));
            }
            tokio::time::sleep(DIGESTS_ROUND).await;
        }
        Ok(())
    }

    /// Takes every lease of a node back: it is trusted no longer, or otherwise.
    pub(crate) fn revoke(&self, node: NodeId) {
        self.lock().leases.revoke_node(node);
    }

    /// Lets go of images on which no lease is left.
    pub(crate) fn sweep(&self) {
        let mut state = self.lock();
        state.leases.expire(self.began.elapsed());
        let State { leases, held, hints } = &mut *state;
        held.retain(|digest, _| leases.holds_on(*digest));
        if hints.len() > HINTS_MAX {
            // Of images that may be long gone.
            hints.retain(|(_, digest), _| held.contains_key(digest));
        }
        metrics::read_leases_granted(leases.len());
    }

    /// Whether a lease gives these extents of an image; what is held for it.
    fn allowed(
        &self,
        peer: &Peer,
        lease: &LeaseToken,
        image: Digest,
        extents: Option<(u8, Range<u32>)>,
    ) -> Result<Held, Refusal> {
        let state = self.lock();
        let held = state.held.get(&image).map_or(&[][..], Vec::as_slice);
        let tenants: Vec<Tenant> = held.iter().map(|held| held.offered.tenant.clone()).collect();
        let regions: Vec<u32> = held.first().map_or_else(Vec::new, |held| {
            held.manifest.head().regions.iter().map(|region| region.map.extent_count()).collect()
        });
        let ask = Ask { reader: peer.node, image, tenants: &tenants, regions: &regions, extents };
        let tenant = state.leases.check(self.began.elapsed(), lease, &ask).map_err(refusal)?;
        let of_tenant = held.iter().find(|held| Some(&held.offered.tenant) == tenant.as_ref());
        let Held { offered, manifest } = of_tenant.cloned().ok_or_else(|| unknown(image))?;
        drop(state);
        let has_failed = offered.image.unsettled().is_some_and(|host_image| host_image.failed().is_some());
        // It may have been opened anew since, under the same name.
        let anew = if has_failed { self.catalogue.find(&offered.tenant, image) } else { None };
        Ok(Held { offered: anew.unwrap_or(offered), manifest })
    }

    async fn open(&self, peer: &Peer, tenant: &Tenant, image: Digest) -> Result<Opened, Refusal> {
        if !self.trust.may_read(peer, tenant) {
            return Err(not_this_tenant(peer, tenant));
        }
        let offered = self.catalogue.find(tenant, image).ok_or_else(|| unknown(image))?;
        self.wait_for_grant(peer, tenant, image).await?;
        let manifest = manifest(&offered.image).await?;
        let head = manifest.head().encode().map_err(|error| Refusal::new(RefusalCode::Failed, error))?;
        let about = Blob::new(offered.about.encode()).expect("short");
        let is_complete = offered.image.unsettled().is_none();
        let first = offered.image.first_touches();
        let hash_pages = Opened::pages_ahead(first_hash_pages(&manifest, &first));
        let mut state = self.lock();
        // Looked at again, since hashing may have taken long, and under the lock that revoking takes.
        if !self.trust.may_read(peer, tenant) {
            return Err(not_this_tenant(peer, tenant));
        }
        let now = self.began.elapsed();
        let Granted { token, lasts } = state.leases.grant(now, peer.node, tenant.clone(), image).map_err(refusal)?;
        let held = state.held.entry(image).or_default();
        // What was held may have failed here since, and have been opened anew.
        held.retain(|held| held.offered.tenant != *tenant);
        held.push(Held { offered, manifest });
        let first = first
            .into_iter()
            .filter_map(|(region, start)| Some(WorkingSetRun { region: u8::try_from(region).ok()?, start, count: 1 }));
        // What is named twice is fetched once.
        let recorded = state.hints.get(&(tenant.clone(), image)).cloned().unwrap_or_default();
        let hints: Vec<WorkingSetRun> = first.chain(recorded).collect();
        Ok(Opened {
            lease: Blob::new(token).expect("as long as a token may be"),
            lease_for: lasts,
            head: Blob::new(head).expect("as long as a head may be"),
            hints: Hints::first_of(hints),
            is_complete,
            hash_pages,
            about,
        })
    }

    async fn extent(
        &self,
        peer: &Peer,
        lease: &LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> Result<Extent, Refusal> {
        let ask = || self.allowed(peer, lease, image, Some((id.region, id.extent.0..id.extent.0.saturating_add(1))));
        let Held { offered, manifest } = ask()?;
        let region = usize::from(id.region);
        if manifest.extent_digests(region)[id.extent.0 as usize] == Digest::ZERO_CONTENT {
            return Ok(Extent::Zero);
        }
        let read = || -> Result<Extent, Refusal> {
            let mut bytes = Box::new([0; EXTENT_LEN]);
            let read = offered.image.read_extent(region, id.extent, &mut bytes);
            Ok(match read.map_err(|error| Refusal::new(RefusalCode::Failed, error))? {
                Content::Zero => Extent::Zero,
                Content::Data => Extent::Data(Bytes::from(Vec::from(bytes as Box<[u8]>))),
                Content::Absent => Extent::Absent,
            })
        };
        let mut extent = read()?;
        if let (Extent::Absent, Urgency::Demand | Urgency::Replay, Some(pager), Some(host_image)) =
            (&extent, urgency, self.pager.get(), offered.image.unsettled())
        {
            let key = (offered.tenant.clone(), host_image.digest());
            let pull = pager.pull(key, id.region, id.extent);
            // An error: it takes longer. The reader is told that it is absent, and asks again.
            tokio::time::timeout(PULL_PATIENCE, pull).await.unwrap_or_default();
            // The lease may have ended meanwhile.
            ask()?;
            extent = read()?;
        }
        if matches!(extent, Extent::Data(_)) {
            metrics::page_bytes(PageBytes::Served, EXTENT_LEN as u64);
        }
        Ok(extent)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ImageStore for Store {
    fn open<'a>(&'a self, peer: &'a Peer, tenant: &'a Tenant, image: Digest) -> BoxFuture<'a, Result<Opened, Refusal>> {
        Box::pin(self.open(peer, tenant, image))
    }

    fn renew(&self, peer: &Peer, lease: &LeaseToken) -> Result<Renewed, Refusal> {
        let Granted { token, lasts } = self.lock().leases.renew(self.began.elapsed(), lease, peer.node).map_err(refusal)?;
        Ok(Renewed { lease: Blob::new(token).expect("as long as a token may be"), lease_for: lasts })
    }

    fn release(&self, peer: &Peer, lease: &LeaseToken) -> Result<(), Refusal> {
        self.lock().leases.release(self.began.elapsed(), lease, peer.node).map_err(refusal)
    }

    fn hash_page<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        region: u8,
        page: u32,
    ) -> BoxFuture<'a, Result<HashPageBytes, Refusal>> {
        let first = page.saturating_mul(HASH_PAGE_DIGESTS);
        let answer = self.allowed(peer, lease, image, Some((region, first..first.saturating_add(1)))).and_then(|held| {
            let digests = held.manifest.extent_digests(usize::from(region)).chunks(HASH_PAGE_DIGESTS as usize);
            let bytes = digests.into_iter().nth(page as usize).map(encode_hash_page);
            let bytes = bytes.ok_or_else(|| Refusal::new(RefusalCode::OutOfRange, format!("no hash page {page}")))?;
            Ok(Blob::new(bytes).expect("a page has at most 1,024 digests"))
        });
        Box::pin(std::future::ready(answer))
    }

    fn extent<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> BoxFuture<'a, Result<Extent, Refusal>> {
        Box::pin(self.extent(peer, lease, image, id, urgency))
    }

    /// The longest record is kept: a host on which children did more, or did it before the rest had been streamed, knows more.
    fn hints(&self, peer: &Peer, lease: &LeaseToken, image: Digest, runs: Hints) -> Result<(), Refusal> {
        let held = self.allowed(peer, lease, image, None)?;
        let regions = &held.manifest.head().regions;
        let is_within = |run: &WorkingSetRun| {
            let extents = regions.get(usize::from(run.region)).map_or(0, |region| region.map.extent_count());
            run.start.0.checked_add(run.count).is_some_and(|end| end <= extents)
        };
        let runs = runs.into_vec();
        if !runs.iter().all(is_within) {
            return Err(Refusal::new(RefusalCode::OutOfRange, "hints beyond the image"));
        }
        // Readers repeat what they were told before they add to it.
        let runs = distinct(&runs);
        let count = |runs: &[WorkingSetRun]| runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
        let mut state = self.lock();
        let known = state.hints.entry((held.offered.tenant, image)).or_default();
        if count(&runs) > count(known) {
            *known = runs;
        }
        Ok(())
    }
}

/// The runs without what an earlier one has, so that nobody gains by naming an extent twice.
fn distinct(runs: &[WorkingSetRun]) -> Vec<WorkingSetRun> {
    let mut seen: BTreeSet<(u8, u32)> = BTreeSet::new();
    let mut distinct: Vec<WorkingSetRun> = Vec::new();
    for run in runs {
        for extent in (run.start.0..run.start.0 + run.count).filter(|extent| seen.insert((run.region, *extent))) {
            match distinct.last_mut() {
                Some(last) if last.region == run.region && last.start.0 + last.count == extent => last.count += 1,
                _ => distinct.push(WorkingSetRun { region: run.region, start: ExtentIndex(extent), count: 1 }),
            }
        }
    }
    distinct
}

/// The digests that a reader needs for these extents, each page once, in the same order. The others can wait until its first child
/// runs.
fn first_hash_pages(manifest: &Manifest, first: &[(usize, ExtentIndex)]) -> impl Iterator<Item = HashPageBytes> {
    let mut seen = BTreeSet::new();
    let pages = first.iter().map(|(region, extent)| (*region, extent.0 / HASH_PAGE_DIGESTS));
    let digests = pages
        .filter(move |page| seen.insert(*page))
        .filter_map(|(region, page)| manifest.extent_digests(region).chunks(HASH_PAGE_DIGESTS as usize).nth(page as usize));
    digests.map(|page| Blob::new(encode_hash_page(page)).expect("a page has at most 1,024 digests"))
}

/// The manifest of an image, which takes time for one that was not hashed yet.
async fn manifest(image: &Arc<Image>) -> Result<Arc<Manifest>, Refusal> {
    // Another thread is only woken for what takes long.
    if let Some(made) = image.made_manifest() {
        return Ok(made);
    }
    let deadline = tokio::time::Instant::now() + DIGESTS_PATIENCE;
    loop {
        let image = Arc::clone(image);
        let made = tokio::task::spawn_blocking(move || image.manifest(|_, _| {})).await;
        match made {
            Ok(Ok(manifest)) => return Ok(manifest),
            Ok(Err(SaveError::Unsettled)) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(DIGESTS_ROUND).await;
            }
            Ok(Err(SaveError::Unsettled)) => {
                return Err(Refusal::new(RefusalCode::Busy, "the image has just been opened here, and is not known yet"));
            }
            Ok(Err(error)) => return Err(Refusal::new(RefusalCode::Failed, error)),
            Err(error) => return Err(Refusal::new(RefusalCode::Failed, error)),
        }
    }
}

fn not_this_tenant(peer: &Peer, tenant: &Tenant) -> Refusal {
    Refusal::new(RefusalCode::OtherTenant, format!("node {} may not read images of {tenant}", peer.node))
}

fn unknown(image: Digest) -> Refusal {
    Refusal::new(RefusalCode::UnknownImage, format!("image {image}"))
}

fn refusal(refused: LeaseRefusal) -> Refusal {
    let code = match refused {
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
    Refusal::new(code, refused)
}

#[cfg(test)]
mod tests {
    use types::manifest::hash_page_digests;
    use types::{CpuProfile, ExtentMap, GuestAddress, Head, LayerIndex, RegionHead, RegionKind, Source};

    use super::*;

    #[test]
    fn what_is_touched_first_is_known_first() {
        let count = 3 * HASH_PAGE_DIGESTS;
        let digests: Vec<Digest> = (0..count).map(|extent| Digest::of(&extent.to_le_bytes())).collect();
        let map = ExtentMap::from_lengths([(count, Source::Layer(LayerIndex(0)))]).unwrap();
        let ram = RegionHead { kind: RegionKind::Ram(GuestAddress(0)), map, hash_pages: hash_page_digests(&digests) };
        let cpu = CpuProfile { vendor: "fake".to_owned(), family: 0, model: 0, cpuid: Digest::of(b"cpuid"), tsc_khz: 1 };
        let (state, regions) = (vec![1], vec![ram]);
        let head =
            Head { cpu, vcpu_count: 1, state, regions, identity_page: None, working_set: Vec::new(), parents: Vec::new() };
        let manifest = Manifest::new(head, vec![digests.clone()]).unwrap();
        let pages: Vec<_> = digests.chunks(HASH_PAGE_DIGESTS as usize).map(encode_hash_page).collect();
        let of = |first: &[u32]| -> Vec<Vec<u8>> {
            let first: Vec<_> = first.iter().map(|extent| (0, ExtentIndex(*extent))).collect();
            Opened::pages_ahead(first_hash_pages(&manifest, &first)).into_vec().iter().map(|page| page.to_vec()).collect()
        };
        assert_eq!(of(&[2500, 3, 2047, 2048, 0]), [pages[2].clone(), pages[0].clone()], "as many as may come with a head");
        assert_eq!(of(&[1024]), [pages[1].clone()]);
        assert!(of(&[]).is_empty());
    }
}
