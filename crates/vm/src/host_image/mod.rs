//! Host images: images whose memory is still on its way from another host.
//!
//! One for each image on a host, however many children it has there:
//!
//! ```text
//!                    memfd of a region          absent pages are holes
//!   pager ──place──▶ alias (shared) ─┐
//!                                    ├─ pages ─▶ presence: which pages the pager has placed
//!   child ──touch──▶ private mapping ┘             │
//!     ▲  waits: its userfaultfd reports it         ▼
//!     └────────────────────── wake ───── published for all children
//! ```
//!
//! # The life of an extent
//!
//! ```text
//!           publish: verified, placed page by page
//! absent ──────────────────────────────────────────▶ published ──▶ settled, with all others
//!    ▲                                                   │
//!    └───────────────── evict, before settling ──────────┘
//! ```
//!
//! What holds at any time:
//! - Every page in the memfd was verified against the image's digest before it was placed. A page that is there although the
//!   pager has not placed it is of unknown origin: the host image is **poisoned**, and its children end with `IMAGE_POISONED`.
//! - Nobody maps the memfd but children whose mapping is registered with their userfaultfd before they touch it, and the pager's
//!   alias, which is registered too. Others read it by `pread`, which makes no page, and look at the presence before and after.
//! - A settled host image is an ordinary image: complete, its root checked again, sealed.

mod error;
mod evict;
mod presence;
mod settle;
mod watched;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use types::manifest::{HASH_PAGE_DIGESTS, HashPageError, decode_hash_page};
use types::{Digest, EXTENT_PAGES, EXTENT_SIZE, ExtentIndex, Head, PAGE_SIZE, Reason, Run};

#[cfg(feature = "testing")]
use crate::harness::guards::{Guard, is_off};
use crate::host::Host;
use crate::image::load::check_head;
use crate::image::{Image, ImageRegion, Layer, memfd};
use crate::machine::Ended;
use crate::sys::uffd::{Alias, Stop};
pub use error::{AwaitError, OpenError, PublishError, SettleError};
pub(crate) use presence::Presence;
pub(crate) use watched::Keeper;
pub use watched::Watched;

/// How often an extent is asked for again that somebody waits for.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Bytes of an extent, in memory.
pub const EXTENT_LEN: usize = 64 << 10;

/// Who gives a host image its extents. Its calls return at once.
pub trait PageSource: Send + Sync {
    /// A child was born: its faults are to be read and answered until [`PageSource::forget`].
    fn watch(&self, child: Arc<Watched>);

    /// A child is gone.
    fn forget(&self, child: &Arc<Watched>);

    /// These extents are needed soon, though no child waits for them.
    fn want(&self, region: usize, extents: Range<u32>);
}

/// See the module.
pub struct HostImage {
    digest: Digest,
    head: Head,
    regions: Vec<Region>,
    /// Only the one who places pages holds it. `None` once there is nothing to place any more.
    aliases: Mutex<Option<Vec<Alias>>>,
    children: Mutex<Vec<Arc<Watched>>>,
    source: Arc<dyn PageSource>,
    /// Faults of children that are gone.
    past_faults: AtomicU64,
    failed: OnceLock<Ended>,
    /// Rung when something was published, settled or failed.
    progress: (Mutex<()>, Condvar),
}

struct Region {
    layer: Arc<Layer>,
    presence: Arc<Presence>,
    /// The digests of its extents, by hash page, as far as they are here.
    hash_pages: Vec<OnceLock<Box<[Digest]>>>,
    bytes: u64,
}

/// What of a host image is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Bytes that are not in zero runs.
    pub data_bytes: u64,
    /// Of those, bytes that are here.
    pub resident_bytes: u64,
    /// All of them are, and it is an ordinary image.
    pub is_settled: bool,
    /// How often children touched what was absent.
    pub faults: u64,
    /// Children that live.
    pub children: usize,
}

/// How long publishing an extent took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Published {
    /// Hashing it.
    pub verify: Duration,
    /// Placing its pages.
    pub place: Duration,
}

impl HostImage {
    /// A host image of which nothing is here but its head, and the image that can be forked at once.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left behind.
    pub fn open(
        host: &Host,
        digest: Digest,
        head: Head,
        source: Arc<dyn PageSource>,
    ) -> Result<(Arc<Self>, Arc<Image>), OpenError> {
        let device = host.faults().ok_or(OpenError::NoDevice)?;
        let (class, state) = check_head(host, &head).map_err(OpenError::Unfit)?;
        let step = |step| move |source| OpenError::Step { step, source };
        let mut regions = Vec::with_capacity(head.regions.len());
        let mut aliases = Vec::with_capacity(head.regions.len());
        for region in &head.regions {
            let bytes = region.size_bytes();
            let file = memfd::create("farfork-host-image", bytes).map_err(step("memfd_create"))?;
            aliases.push(Alias::of(&file, bytes, device).map_err(step("mapping the host image"))?);
            let presence = Arc::new(Presence::none(region.map.extent_count()));
            let layer = Arc::new(Layer::arriving(file, Arc::clone(&presence)));
            let hash_pages = region.hash_pages.iter().map(|_| OnceLock::new()).collect();
            regions.push(Region { layer, presence, hash_pages, bytes });
        }
        let ram = head.regions.iter().zip(&regions);
        let ram = ram.map(|(head, region)| ImageRegion::new(head.kind, head.map.clone(), vec![Arc::clone(&region.layer)]));
        let ram = ram.collect();
        let host_image = Arc::new(Self {
            digest,
            head,
            regions,
            aliases: Mutex::new(Some(aliases)),
            children: Mutex::default(),
            source,
            past_faults: AtomicU64::new(0),
            failed: OnceLock::new(),
            progress: Default::default(),
        });
        let image = Image::arriving(&host_image, state, class, ram);
        Ok((host_image, Arc::new(image)))
    }

    /// The name of the image everywhere.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Its head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The hash pages that are not here yet: region, page, and the digest that it must have.
    pub fn missing_hash_pages(&self) -> impl Iterator<Item = (usize, usize, Digest)> {
        self.regions.iter().enumerate().flat_map(move |(region, of)| {
            let missing = of.hash_pages.iter().enumerate().filter(|(_, page)| page.get().is_none());
            missing.map(move |(page, _)| (region, page, self.head.regions[region].hash_pages[page]))
        })
    }

    /// Takes a hash page, verified.
    ///
    /// # Errors
    /// [`HashPageError`] if it is not the one that the head names.
    ///
    /// # Panics
    /// If the head names no such page.
    pub fn add_hash_page(&self, region: usize, page: usize, bytes: &[u8]) -> Result<(), HashPageError> {
        let head = &self.head.regions[region];
        let first = u32::try_from(page).expect("at most 512") * HASH_PAGE_DIGESTS;
        let count = (head.map.extent_count() - first).min(HASH_PAGE_DIGESTS);
        let digests = decode_hash_page(bytes, count, head.hash_pages[page])?;
        self.regions[region].hash_pages[page].get_or_init(|| digests.into());
        Ok(())
    }

    /// The digest that an extent must have, if its hash page is here.
    #[must_use]
    pub fn digest_of(&self, region: usize, extent: ExtentIndex) -> Option<Digest> {
        let page = self.regions.get(region)?.hash_pages.get((extent.0 / HASH_PAGE_DIGESTS) as usize)?;
        page.get()?.get((extent.0 % HASH_PAGE_DIGESTS) as usize).copied()
    }

    /// The extents of a region that have to be here before it is settled.
    pub fn data_extents(&self, region: usize) -> impl Iterator<Item = Range<u32>> {
        self.head.regions[region].map.data_runs().map(Run::extents)
    }

    /// Whether all of an extent is here.
    #[must_use]
    pub fn has(&self, region: usize, extent: ExtentIndex) -> bool {
        self.regions[region].presence.has(extent)
    }

    /// Bytes that are here, in whole extents.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.regions.iter().map(|region| u64::from(region.presence.whole_count())).sum::<u64>() * EXTENT_SIZE
    }

    /// What is here.
    #[must_use]
    pub fn resident(&self) -> Resident {
        let children = self.children();
        Resident {
            data_bytes: self.data_bytes(),
            resident_bytes: self.resident_bytes(),
            is_settled: self.is_settled(),
            faults: self.past_faults.load(Ordering::Relaxed) + children.iter().map(|child| child.faults()).sum::<u64>(),
            children: children.len(),
        }
    }

    /// Its memory in bytes that is not zero, here and elsewhere: whole extents.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let extents: u64 = self.head.regions.iter().map(|region| u64::from(region.map.data_extent_count())).sum();
        extents * EXTENT_SIZE
    }

    /// Whether it has become an ordinary image.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.regions.iter().all(|region| region.presence.is_settled())
    }

    /// Why it can give nothing any more, if so.
    #[must_use]
    pub fn failed(&self) -> Option<&Ended> {
        self.failed.get()
    }

    /// The children that live.
    #[must_use]
    pub fn children(&self) -> Vec<Arc<Watched>> {
        self.lock_children().clone()
    }

    /// Verifies an extent and makes it appear for all children; those who wait for it are still to be woken. Publishing what is
    /// published changes nothing.
    ///
    /// # Errors
    /// [`PublishError`]; what was placed before it is right.
    pub fn publish(&self, region: usize, extent: ExtentIndex, bytes: &[u8]) -> Result<Published, PublishError> {
        let began = Instant::now();
        let of = self.regions.get(region).filter(|of| (extent.0 as usize) < of.extent_count());
        let of = of.ok_or(PublishError::Outside { region, extent })?;
        let expected = self.digest_of(region, extent).ok_or(PublishError::NoDigest { region, extent })?;
        if bytes.len() != EXTENT_LEN {
            return Err(PublishError::Wrong { region, extent, expected, actual: Digest::of(bytes) });
        }
        let actual = digest_of_extent(bytes, expected);
        let is_verified = actual == expected;
        #[cfg(feature = "testing")]
        let is_verified = is_verified || is_off(Guard::Verification);
        if !is_verified {
            return Err(PublishError::Wrong { region, extent, expected, actual });
        }
        let verify = began.elapsed();
        self.place(region, of, extent, bytes)?;
        Ok(Published { verify, place: began.elapsed() - verify })
    }

    /// [`HostImage::publish`] of an extent that is all zeros, by its digest.
    ///
    /// # Errors
    /// As there.
    pub fn publish_zeros(&self, region: usize, extent: ExtentIndex) -> Result<Published, PublishError> {
        static ZEROS: [u8; EXTENT_LEN] = [0; EXTENT_LEN];
        self.publish(region, extent, &ZEROS)
    }

    fn place(&self, number: usize, region: &Region, extent: ExtentIndex, bytes: &[u8]) -> Result<(), PublishError> {
        let aliases = self.lock_aliases();
        if let Some(ended) = self.failed.get() {
            return Err(PublishError::Poisoned(ended.detail.clone()));
        }
        // None: it has settled, and everything is there.
        let Some(alias) = aliases.as_ref().map(|aliases| &aliases[number]) else { return Ok(()) };
        let page_len = usize::try_from(PAGE_SIZE).expect("64-bit host");
        let mut page = 0;
        loop {
            // The next stretch of pages that were not placed.
            let there = region.presence.pages(extent);
            let is_there = |page: usize| there >> page & 1 == 1;
            page = (page..pages_len()).find(|page| !is_there(*page)).unwrap_or(pages_len());
            let end = (page..pages_len()).find(|page| is_there(*page)).unwrap_or(pages_len());
            if page == end {
                break;
            }
            let stretch = &bytes[page * page_len..end * page_len];
            let (placed, stop) = alias.place(extent.byte_offset() + (page * page_len) as u64, stretch);
            let placed = placed / page_len;
            region.presence.add(extent, mask(page, placed));
            page += placed;
            match stop {
                None => {}
                Some(Stop::NoMemory) => return Err(PublishError::NoMemory { region: number, extent }),
                Some(Stop::Error(errno)) => return Err(PublishError::Place(errno)),
                Some(Stop::Exists) => {
                    #[cfg(feature = "testing")]
                    if is_off(Guard::PresenceOnExists) {
                        region.presence.add(extent, mask(page, 1));
                        continue;
                    }
                    let right = &bytes[page * page_len..(page + 1) * page_len];
                    let what = what_is_there(region.layer.memfd(), extent.byte_offset() + (page * page_len) as u64, right);
                    let detail =
                        format!("page {page} of extent {extent} of region {number} was there before it was placed: {what}");
                    drop(aliases);
                    self.poison(detail.clone());
                    return Err(PublishError::Poisoned(detail));
                }
            }
        }
        drop(aliases);
        self.ring();
        Ok(())
    }

    /// Reads an extent for somebody else, if all of it is here.
    ///
    /// # Errors
    /// If the memfd cannot be read.
    pub fn read(&self, region: usize, extent: ExtentIndex, buffer: &mut [u8; EXTENT_LEN]) -> io::Result<bool> {
        self.regions[region].layer.read_extent(extent, buffer)
    }

    /// Waits until all of an extent is here, having asked for it, at most until then.
    ///
    /// # Errors
    /// [`AwaitError`].
    pub fn wait_for(&self, region: usize, extent: ExtentIndex, deadline: Instant) -> Result<(), AwaitError> {
        let began = Instant::now();
        let mut asked = None;
        let mut ringing = self.progress.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.has(region, extent) {
            if let Some(ended) = self.failed.get() {
                return Err(AwaitError::Failed(ended.clone()));
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Err(AwaitError::TimedOut { region, extent, patience: began.elapsed() });
            }
            // Whoever fetches gives up after a while, and has to be asked again.
            if asked.is_none_or(|asked| now - asked >= ASK_AGAIN) {
                asked = Some(now);
                self.source.want(region, extent.0..extent.0 + 1);
            }
            let patience = left.min(ASK_AGAIN);
            ringing = self.progress.1.wait_timeout(ringing, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// It can give nothing any more: its children end with this.
    pub fn fail(&self, ended: Ended) {
        let ended = self.failed.get_or_init(|| ended).clone();
        for child in self.children() {
            child.end(ended.clone());
        }
        self.ring();
    }

    fn poison(&self, detail: String) {
        self.fail(Ended { reason: Reason::ImagePoisoned, detail });
    }

    /// A child was born.
    pub(crate) fn adopt(&self, child: &Arc<Watched>) {
        self.lock_children().push(Arc::clone(child));
        match self.failed.get() {
            Some(ended) => child.end(ended.clone()),
            None => self.source.watch(Arc::clone(child)),
        }
        if self.is_settled() {
            child.let_go();
        }
    }

    /// A child is gone, its process too; or no page of it can be absent any more, and nobody in it waits for one.
    pub(crate) fn release(&self, child: &Arc<Watched>) {
        #[cfg(feature = "testing")]
        let refuses = !is_off(Guard::RefusalOfTheDead);
        #[cfg(not(feature = "testing"))]
        let refuses = true;
        if refuses
            && !self.is_settled()
            && let Err(error) = child.refuse_absent()
        {
            self.poison(format!("a child that has ended may have left a page of zeros: {error}"));
        }
        self.lock_children().retain(|other| !Arc::ptr_eq(other, child));
        self.past_faults.fetch_add(child.faults(), Ordering::Relaxed);
        self.source.forget(child);
    }

    fn ring(&self) {
        let _ringing = self.progress.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.progress.1.notify_all();
    }

    fn lock_children(&self) -> MutexGuard<'_, Vec<Arc<Watched>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_aliases(&self) -> MutexGuard<'_, Option<Vec<Alias>>> {
        self.aliases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Region {
    fn extent_count(&self) -> usize {
        usize::try_from(self.bytes / EXTENT_SIZE).expect("64-bit host")
    }
}

impl std::fmt::Debug for HostImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostImage").field("digest", &self.digest).field("resident", &self.resident()).finish_non_exhaustive()
    }
}

fn pages_len() -> usize {
    usize::try_from(EXTENT_PAGES).expect("64-bit host")
}

/// `count` pages from `first` on, a bit each.
fn mask(first: usize, count: usize) -> u16 {
    let bits = (1u32 << count) - 1;
    u16::try_from(bits << first).expect("at most 16 pages")
}

/// What these bytes are as an extent: zeros have no digest of their own.
fn digest_of_extent(bytes: &[u8], expected: Digest) -> Digest {
    if expected == Digest::ZERO_CONTENT && crate::image::save::is_zero(bytes) {
        Digest::ZERO_CONTENT
    } else {
        Digest::of(bytes)
    }
}

fn what_is_there(memfd: &File, at: u64, right: &[u8]) -> &'static str {
    let mut page = vec![0; right.len()];
    match memfd.read_exact_at(&mut page, at) {
        Err(_) => "it cannot be read",
        Ok(()) if page == right => "it is as it should be, but nobody knows why",
        Ok(()) if crate::image::save::is_zero(&page) => "it is all zeros, and should not be",
        Ok(()) => "it is other than it should be",
    }
}
