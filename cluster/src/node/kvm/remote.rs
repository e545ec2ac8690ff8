//! The engine's part in remote forks: which of its images others find, and those that it opens from others.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use control::lease::LeaseKey;
use types::{Digest, ImageId, Tenant};
use vm::Pool;
use vm::image::{Image, SaveError};

use super::super::engine::{EngineError, ErrorKind, ImageFacts, OpenOrder, Residency};
use super::super::network::NetworkSettings;
use super::super::offer::{About, Catalogue, Offered, Store};
use super::super::pager::{Library, Pager, Settings};
use super::super::quic::Credentials;
use super::errors::{of_ended, unknown_image};
use super::{KnownImage, KvmEngine, Machine, State, facts};

/// How long the digests of what is absent may take to arrive.
const DIGESTS_PATIENCE: Duration = Duration::from_secs(10);
const DIGESTS_ROUND: Duration = Duration::from_millis(5);

/// The images of an engine, as the network finds them.
pub(super) struct Shelf(Arc<Mutex<State>>);

impl Shelf {
    fn find_all<T>(&self, mut found: impl FnMut(&KnownImage) -> Option<T>) -> Vec<T> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.images.values().filter_map(&mut found).collect()
    }
}

impl Catalogue for Shelf {
    fn find(&self, tenant: &Tenant, image: Digest) -> Option<Offered> {
        let offer = |known: &KnownImage| {
            let is_it = known.image.digest() == Some(image) && known.tenant == *tenant && is_good(&known.image);
            let about = About { pattern_pages: known.pattern_pages };
            is_it.then(|| Offered { tenant: tenant.clone(), image: Arc::clone(&known.image), about })
        };
        self.find_all(offer).pop()
    }
}

impl Library for Shelf {
    fn images(&self, tenant: &Tenant) -> Vec<Arc<Image>> {
        self.find_all(|known| {
            let is_hashed = known.image.digest().is_some() && known.tenant == *tenant;
            is_hashed.then(|| Arc::clone(&known.image))
        })
    }
}

/// Starts what fetches, and what gives.
pub(super) fn start(
    network: &NetworkSettings,
    credentials: &Credentials,
    pool: &Arc<Pool>,
    state: &Arc<Mutex<State>>,
) -> Result<(Pager, Arc<Store>), EngineError> {
    let settings = Settings {
        host_image_bytes: network.host_image_bytes,
        streams: network.streams,
        replays: network.replays,
        has_one_connection: network.has_one_connection,
        ..Settings::new(network.page_deadline)
    };
    let Credentials { identity, trust } = credentials;
    let library = Arc::new(Shelf(Arc::clone(state)));
    let pager = Pager::start(settings, identity, trust, Arc::clone(pool), library)?;
    let mut key = [0; 32];
    rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()).map_err(|error| EngineError {
        kind: ErrorKind::Host,
        message: format!("the kernel gives no randomness: {error}"),
        remedy: "look for its cause in the kernel log".to_owned(),
    })?;
    let store = Store::new(Arc::new(Shelf(Arc::clone(state))), trust.clone(), LeaseKey::new(key));
    store.fetch_by(pager.handle());
    Ok((pager, store))
}

impl KvmEngine {
    pub(super) fn open_remote(&self, order: &OpenOrder) -> Result<ImageFacts, EngineError> {
        let is_it = |known: &&KnownImage| known.image.digest() == Some(order.image) && known.tenant == order.tenant;
        let known = self.lock().images.values().filter(|known| is_good(&known.image)).find(is_it).cloned();
        if let Some(known) = known.filter(|known| known.image.unsettled().is_none()) {
            return facts(&known);
        }
        let opened = self.pager.handle().open(order.clone())?;
        let pattern_pages = opened.about.pattern_pages;
        self.keep(KnownImage { image: opened.image, tenant: order.tenant.clone(), pattern_pages })
    }

    pub(super) fn data_bytes_of(&self, image: ImageId) -> Result<u64, EngineError> {
        let known = self.known(image)?;
        known.image.host_image().map_or_else(|| Ok(facts(&known)?.stored_bytes), |host_image| Ok(host_image.data_bytes()))
    }

    pub(super) fn residency_of(&self, image: ImageId) -> Result<Residency, EngineError> {
        let (known, children) = {
            let state = self.lock();
            let of_it = state.machines.values().filter_map(|machine| match machine {
                Machine::Running(running) if running.image == image => Some(running),
                _ => None,
            });
            (state.images.get(&image).cloned(), of_it.cloned().collect::<Vec<_>>())
        };
        // Not under the engine's lock: a child that is being branched keeps whoever asks for its image waiting.
        let forgotten = || {
            let first = children.first()?;
            Some(KnownImage { image: first.jailed.image()?, tenant: first.tenant.clone(), pattern_pages: None })
        };
        let known = known.or_else(forgotten).ok_or_else(|| unknown_image(image))?;
        let children = u32::try_from(children.len()).unwrap_or(u32::MAX);
        let Some(host_image) = known.image.host_image() else {
            let data_bytes = facts(&known)?.stored_bytes;
            return Ok(Residency {
                data_bytes,
                resident_bytes: data_bytes,
                is_settled: true,
                children,
                ..Residency::default()
            });
        };
        let resident = host_image.resident();
        let progress = self.pager.handle().progress((known.tenant, host_image.digest())).unwrap_or_default();
        Ok(Residency {
            data_bytes: resident.data_bytes,
            resident_bytes: resident.resident_bytes,
            is_settled: resident.is_settled,
            settled_after: progress.settled_after,
            faults: resident.faults,
            wire_bytes: progress.wire_bytes,
            children,
            sources: progress.sources,
            failed: host_image.failed().cloned().map(of_ended),
        })
    }
}

/// Whether children of an image can be given what they lack.
fn is_good(image: &Image) -> bool {
    image.host_image().is_none_or(|host_image| host_image.is_settled() || host_image.failed().is_none())
}

/// Hashes an image. The digests of what is absent may take a moment to arrive, right after it was opened.
pub(super) fn hash(image: &Image) -> Result<(), SaveError> {
    let deadline = Instant::now() + DIGESTS_PATIENCE;
    loop {
        match image.manifest(|_, _| {}) {
            Err(SaveError::Unsettled) if Instant::now() < deadline => std::thread::sleep(DIGESTS_ROUND),
            hashed => return hashed.map(drop),
        }
    }
}

/// Hashes images in the background, one after the other, so that others can ask for them.
pub(super) struct Hasher(Sender<Weak<Image>>);

impl Hasher {
    pub(super) fn start() -> Result<Self, EngineError> {
        let (sender, images) = channel::<Weak<Image>>();
        let live = move || {
            for image in images.iter().filter_map(|image| image.upgrade()) {
                // Whoever asks for one that is not known yet has it hashed.
                if let Err(error) = image.manifest(|_, _| {}) {
                    tracing::debug!(image = %image.id(), %error, "not hashed yet");
                }
            }
        };
        let thread = std::thread::Builder::new().name("hasher".into()).spawn(live);
        thread.map(|_| Self(sender)).map_err(|error| EngineError {
            kind: ErrorKind::Host,
            message: format!("a thread cannot be started: {error}"),
            remedy: "raise the limits on threads (ulimit -u)".to_owned(),
        })
    }

    pub(super) fn hash(&self, image: &Arc<Image>) {
        self.0.send(Arc::downgrade(image)).unwrap_or_default();
    }
}
