//! Images in memory, behind a gate that the test brings.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use types::manifest::hash_page_digests;
use types::{
    CpuProfile, Digest, ExtentIndex, ExtentMap, GuestAddress, Head, LayerIndex, RegionHead, RegionKind, Source, Tenant,
};

use super::Lie;
use crate::identity::Peer;
use crate::server::{Extent, ImageStore};
use crate::wire::{
    Blob, EXTENT_BYTES, ExtentId, HashPageBytes, Hints, LeaseToken, Opened, Refusal, RefusalCode, Renewed, Urgency,
};

/// What a peer asks for, as far as its right is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Of which image.
    pub image: Digest,
    /// Whose that is.
    pub tenant: Tenant,
    /// The number of extents of each region of that image.
    pub regions: Vec<u32>,
    /// Which extents, if any.
    pub extents: Option<(u8, Range<u32>)>,
}

/// Who may have what.
pub trait Gate: Send + Sync + 'static {
    /// Grants a lease.
    ///
    /// # Errors
    /// A refusal.
    fn grant(&self, peer: &Peer, tenant: &Tenant, image: Digest) -> Result<Renewed, Refusal>;

    /// Lets a lease last longer.
    ///
    /// # Errors
    /// A refusal.
    fn renew(&self, peer: &Peer, lease: &[u8]) -> Result<Renewed, Refusal>;

    /// Takes a lease back.
    ///
    /// # Errors
    /// A refusal.
    fn release(&self, peer: &Peer, lease: &[u8]) -> Result<(), Refusal>;

    /// Whether the lease gives what is asked for.
    ///
    /// # Errors
    /// A refusal.
    fn check(&self, peer: &Peer, lease: &[u8], ask: &Ask) -> Result<(), Refusal>;
}

/// Lets everybody do everything.
#[derive(Clone, Copy, Debug)]
pub struct OpenGate;

impl Gate for OpenGate {
    fn grant(&self, _peer: &Peer, _tenant: &Tenant, _image: Digest) -> Result<Renewed, Refusal> {
        Ok(Renewed { lease: LeaseToken::new(&b"open"[..]).expect("short"), lease_for: Duration::from_secs(60) })
    }

    fn renew(&self, peer: &Peer, _lease: &[u8]) -> Result<Renewed, Refusal> {
        self.grant(peer, &Tenant::default_tenant(), Digest::ZERO_CONTENT)
    }

    fn release(&self, _peer: &Peer, _lease: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn check(&self, _peer: &Peer, _lease: &[u8], _ask: &Ask) -> Result<(), Refusal> {
        Ok(())
    }
}

/// An image with one region.
#[derive(Clone, Debug)]
pub struct MemoryImage {
    tenant: Tenant,
    head: Bytes,
    digest: Digest,
    extents: Vec<Option<Bytes>>,
    hash_pages: Vec<HashPageBytes>,
}

impl MemoryImage {
    /// An image of these extents; `None` is zero.
    ///
    /// # Panics
    /// If an extent has not 64 KiB, or they make no region (a multiple of 2 MiB is one).
    #[must_use]
    pub fn new(tenant: Tenant, extents: Vec<Option<Bytes>>) -> Self {
        assert!(extents.iter().flatten().all(|extent| extent.len() == EXTENT_BYTES), "extents of 64 KiB");
        let digest = |extent: &Option<Bytes>| extent.as_ref().map_or(Digest::ZERO_CONTENT, |extent| Digest::of(extent));
        let digests: Vec<_> = extents.iter().map(digest).collect();
        let count = u32::try_from(extents.len()).expect("few extents");
        let map = ExtentMap::from_lengths([(count, Source::Layer(LayerIndex(0)))]).expect("one run");
        let ram = RegionHead { kind: RegionKind::Ram(GuestAddress(0)), map, hash_pages: hash_page_digests(&digests) };
        let head = Head {
            cpu: CpuProfile { vendor: "fake".to_owned(), family: 0, model: 0, cpuid: Digest::of(b"cpuid"), tsc_khz: 1 },
            vcpu_count: 1,
            state: vec![1, 2, 3],
            regions: vec![ram],
            identity_page: None,
            working_set: Vec::new(),
            parents: Vec::new(),
        };
        let head = Bytes::from(head.encode().expect("a valid head"));
        let pages = digests.chunks(types::manifest::HASH_PAGE_DIGESTS as usize).map(types::manifest::encode_hash_page);
        let hash_pages = pages.map(|page| HashPageBytes::new(page).expect("a page")).collect();
        Self { tenant, digest: Digest::of(&head), head, extents, hash_pages }
    }

    /// An image of so many extents (a multiple of 32) of noise, each of its own, every fourth zero, every fourth of one byte.
    ///
    /// # Panics
    /// If they make no region.
    #[must_use]
    pub fn patterned(tenant: Tenant, extents: u32) -> Self {
        let content = |number: u32| match number % 4 {
            0 => None,
            1 => Some(Bytes::from(vec![0xA5; EXTENT_BYTES])),
            _ => {
                let mut dice = fastrand::Rng::with_seed(u64::from(number));
                let mut bytes = vec![0; EXTENT_BYTES];
                dice.fill(&mut bytes);
                Some(bytes.into())
            }
        };
        Self::new(tenant, (0..extents).map(content).collect())
    }

    /// Its name.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The content of an extent; `None` is zero.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn extent(&self, extent: ExtentIndex) -> Option<&Bytes> {
        self.extents[extent.0 as usize].as_ref()
    }

    fn regions(&self) -> Vec<u32> {
        vec![u32::try_from(self.extents.len()).expect("few extents")]
    }
}

/// A holder of images in memory that can be told to lie.
pub struct MemoryStore {
    gate: Box<dyn Gate>,
    images: BTreeMap<Digest, MemoryImage>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lies: BTreeMap<ExtentId, Lie>,
    absent: Vec<ExtentId>,
    hints: Vec<(Digest, Hints)>,
    served: Vec<(ExtentId, Urgency)>,
}

impl MemoryStore {
    /// Serves images to whom the gate lets.
    #[must_use]
    pub fn new(gate: impl Gate, images: impl IntoIterator<Item = MemoryImage>) -> Self {
        let images = images.into_iter().map(|image| (image.digest, image)).collect();
        Self { gate: Box::new(gate), images, state: Mutex::default() }
    }

    /// From now on this extent (of any image) is lied about.
    pub fn lie_about(&self, id: ExtentId, lie: Option<Lie>) {
        match lie {
            Some(lie) => self.state().lies.insert(id, lie),
            None => self.state().lies.remove(&id),
        };
    }

    /// From now on this extent (of any image) is not here.
    pub fn lose(&self, id: ExtentId) {
        self.state().absent.push(id);
    }

    /// The advice that came.
    #[must_use]
    pub fn hints_received(&self) -> Vec<(Digest, Hints)> {
        self.state().hints.clone()
    }

    /// The extents that were asked for and allowed, in that order.
    #[must_use]
    pub fn served(&self) -> Vec<(ExtentId, Urgency)> {
        self.state().served.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image(&self, image: Digest) -> Result<&MemoryImage, Refusal> {
        self.images.get(&image).ok_or_else(|| Refusal::new(RefusalCode::UnknownImage, image))
    }

    /// The image, if the lease gives these extents of it.
    fn allowed(
        &self,
        peer: &Peer,
        lease: &LeaseToken,
        image: Digest,
        extents: Option<(u8, Range<u32>)>,
    ) -> Result<&MemoryImage, Refusal> {
        let image = self.image(image)?;
        let ask = Ask { image: image.digest, tenant: image.tenant.clone(), regions: image.regions(), extents };
        self.gate.check(peer, lease, &ask).map(|()| image)
    }

    fn extent_now(
        &self,
        peer: &Peer,
        lease: &LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> Result<Extent, Refusal> {
        let extents = id.extent.0..id.extent.0.saturating_add(1);
        let image = self.allowed(peer, lease, image, Some((id.region, extents)))?;
        let mut state = self.state();
        state.served.push((id, urgency));
        if state.absent.contains(&id) {
            return Ok(Extent::Absent);
        }
        // A test that takes the check of the range away gets what there is.
        let Some(Some(data)) = image.extents.get(id.extent.0 as usize) else { return Ok(Extent::Zero) };
        Ok(Extent::Data(match state.lies.get(&id) {
            Some(Lie::Flipped) => changed(data, |bytes| bytes[1000] ^= 4),
            Some(Lie::Stale) => changed(data, |bytes| bytes[..4096].fill(0xEE)),
            Some(Lie::Swapped) => image.extents.iter().flatten().find(|other| *other != data).unwrap_or(data).clone(),
            // As a store does that reads a file: each answer has bytes of its own.
            _ => Bytes::copy_from_slice(data),
        }))
    }
}

impl ImageStore for MemoryStore {
    fn open<'a>(&'a self, peer: &'a Peer, tenant: &'a Tenant, image: Digest) -> BoxFuture<'a, Result<Opened, Refusal>> {
        let opened = self.image(image).and_then(|image| {
            if image.tenant != *tenant {
                return Err(Refusal::new(RefusalCode::OtherTenant, tenant));
            }
            let Renewed { lease, lease_for } = self.gate.grant(peer, tenant, image.digest)?;
            Ok(Opened {
                lease,
                lease_for,
                head: Blob::new(image.head.clone()).expect("a head"),
                hints: Hints::default(),
                is_complete: self.state().absent.is_empty(),
                hash_pages: Opened::pages_ahead(image.hash_pages.iter().cloned()),
                about: Blob::new(Vec::new()).expect("short"),
            })
        });
        Box::pin(std::future::ready(opened))
    }

    fn renew(&self, peer: &Peer, lease: &LeaseToken) -> Result<Renewed, Refusal> {
        self.gate.renew(peer, lease)
    }

    fn release(&self, peer: &Peer, lease: &LeaseToken) -> Result<(), Refusal> {
        self.gate.release(peer, lease)
    }

    fn hash_page<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        region: u8,
        page: u32,
    ) -> BoxFuture<'a, Result<HashPageBytes, Refusal>> {
        let first = page.saturating_mul(types::manifest::HASH_PAGE_DIGESTS);
        let found = self.allowed(peer, lease, image, Some((region, first..first.saturating_add(1)))).map(|image| {
            let page = image.hash_pages.get(page as usize);
            page.cloned().unwrap_or_default()
        });
        Box::pin(std::future::ready(found))
    }

    fn extent<'a>(
        &'a self,
        peer: &'a Peer,
        lease: &'a LeaseToken,
        image: Digest,
        id: ExtentId,
        urgency: Urgency,
    ) -> BoxFuture<'a, Result<Extent, Refusal>> {
        Box::pin(std::future::ready(self.extent_now(peer, lease, image, id, urgency)))
    }

    fn hints(&self, peer: &Peer, lease: &LeaseToken, image: Digest, runs: Hints) -> Result<(), Refusal> {
        for run in runs.iter() {
            let extents = run.start.0..run.start.0.saturating_add(run.count);
            self.allowed(peer, lease, image, Some((run.region, extents)))?;
        }
        self.allowed(peer, lease, image, None)?;
        let mut state = self.state();
        // The newest sixteen: advice must not fill a holder's memory.
        if state.hints.len() == 16 {
            state.hints.remove(0);
        }
        state.hints.push((image, runs));
        Ok(())
    }

    fn lie(&self, id: ExtentId) -> Option<Lie> {
        self.state().lies.get(&id).copied()
    }
}

fn changed(data: &Bytes, change: impl FnOnce(&mut [u8])) -> Bytes {
    let mut bytes = data.to_vec();
    change(&mut bytes);
    bytes.into()
}
