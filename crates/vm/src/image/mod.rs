//! Images: a machine at one instant, immutable.
//!
//! In memory an image is a [`MachineState`] and, for each region, an [`ExtentMap`] over sealed memfds, its layers. Images share
//! layers with the images they were branched from; a layer lives as long as the last image that uses it. On disk an image is
//! one sparse file (see [`file`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock};

use thiserror::Error;
use types::manifest::WorkingSetRun;
use types::{
    CpuProfile, Digest, EXTENT_SIZE, ExtentIndex, ExtentMap, GuestAddress, ImageId, LayerIndex, Manifest, RegionKind, Source,
};
use uuid::Uuid;

use crate::class::{Class, VcpuCountError};
use crate::host_image::{EXTENT_LEN, HostImage, Presence};
use crate::machine::state::{MachineState, StateError};
use crate::sys::slot::{Content, Piece};
use crate::worker::protocol::WireImage;

pub(crate) mod complete;
pub mod file;
pub(crate) mod first;
pub mod load;
pub mod manifest;
pub(crate) mod memfd;
pub mod save;

pub use load::{LoadError, load, load_branch, load_in};
pub use save::{SaveError, SaveReport, save, save_branch, save_in};

/// See the module.
#[derive(Debug)]
pub struct Image {
    id: ImageId,
    cpu: CpuProfile,
    state: MachineState,
    class: Class,
    regions: Vec<ImageRegion>,
    identity_page: Option<GuestAddress>,
    depth: u32,
    /// Digests of the images that it was branched from, as far as they were known, nearest first.
    parents: Vec<Digest>,
    digest: OnceLock<Digest>,
    /// What children touch first, if that was recorded before it was hashed.
    working_set: OnceLock<Vec<WorkingSetRun>>,
    wire: OnceLock<Vec<u8>>,
    /// Once it was hashed; held by who hashes it.
    manifest: Mutex<Option<Arc<Manifest>>>,
    /// The host image on which it rests, if some of its memory came, or is still to come, from elsewhere.
    host_image: Option<Arc<HostImage>>,
}

/// One region of an image.
#[derive(Clone, Debug)]
pub struct ImageRegion {
    kind: RegionKind,
    map: ExtentMap,
    layers: Vec<Arc<Layer>>,
}

/// A memfd of the region's size, of which the map uses some extents.
#[derive(Debug)]
pub struct Layer {
    memfd: File,
    /// The same for others to read, opened when the first of them asks.
    read_only: OnceLock<File>,
    /// Which of it is there, if it arrives bit by bit.
    presence: Option<Arc<Presence>>,
}

/// The most parents that an image remembers.
const PARENTS_MAX: usize = 64;

impl Image {
    /// The image of a first parent: the memfds that it ran on, one for each region, and the maps over them.
    pub(crate) fn first(
        cpu: CpuProfile,
        state: MachineState,
        class: Class,
        maps: Vec<ExtentMap>,
        memfds: Vec<File>,
        identity_page: Option<GuestAddress>,
    ) -> Self {
        let region = |(((kind, _), map), memfd)| ImageRegion::new(kind, map, vec![Arc::new(Layer::new(memfd))]);
        let regions = class.regions().into_iter().zip(maps).zip(memfds).map(region).collect();
        Self::new(cpu, state, class, regions, identity_page, None)
    }

    /// The image of a machine that rests on `base`: a new layer for each region, and maps over all its layers.
    pub(crate) fn branched(
        base: &Self,
        cpu: CpuProfile,
        state: MachineState,
        maps: Vec<ExtentMap>,
        layers: Vec<File>,
        identity_page: Option<GuestAddress>,
    ) -> Self {
        let region = |((base, map), layer): ((&ImageRegion, _), _)| base.with_layer(map, Arc::new(Layer::new(layer)));
        let regions = base.regions.iter().zip(maps).zip(layers).map(region).collect();
        Self::new(cpu, state, base.class, regions, identity_page, Some(base))
    }

    pub(crate) fn new(
        cpu: CpuProfile,
        state: MachineState,
        class: Class,
        regions: Vec<ImageRegion>,
        identity_page: Option<GuestAddress>,
        parent: Option<&Self>,
    ) -> Self {
        let nearest = parent.and_then(|parent| parent.digest.get().copied());
        let further = parent.map_or(&[][..], |parent| &parent.parents);
        let parents = nearest.into_iter().chain(further.iter().copied()).take(PARENTS_MAX).collect();
        let depth = parent.map_or(0, |parent| parent.depth + 1);
        let host_image = parent.and_then(|parent| parent.host_image.clone());
        let id = ImageId::from_uuid(Uuid::now_v7());
        Self {
            id,
            cpu,
            state,
            class,
            regions,
            identity_page,
            depth,
            parents,
            digest: OnceLock::new(),
            working_set: OnceLock::new(),
            wire: OnceLock::new(),
            manifest: Mutex::default(),
            host_image,
        }
    }

    /// The image of a host image.
    pub(crate) fn arriving(host_image: &Arc<HostImage>, state: MachineState, class: Class, regions: Vec<ImageRegion>) -> Self {
        let head = host_image.head();
        Self {
            id: ImageId::from_uuid(Uuid::now_v7()),
            cpu: head.cpu.clone(),
            state,
            class,
            regions,
            identity_page: head.identity_page,
            depth: u32::try_from(head.parents.len()).unwrap_or(u32::MAX),
            parents: head.parents.clone(),
            digest: OnceLock::from(host_image.digest()),
            working_set: OnceLock::from(head.working_set.clone()),
            wire: OnceLock::new(),
            manifest: Mutex::default(),
            host_image: Some(Arc::clone(host_image)),
        }
    }

    /// The host image on which it rests, if its memory came from elsewhere.
    #[must_use]
    pub fn host_image(&self) -> Option<&Arc<HostImage>> {
        self.host_image.as_ref()
    }

    /// The host image on which it rests, while that is not settled.
    #[must_use]
    pub fn unsettled(&self) -> Option<&Arc<HostImage>> {
        self.host_image.as_ref().filter(|host_image| !host_image.is_settled())
    }

    /// The layers that are not all there: region and number.
    pub(crate) fn arriving_layers(&self) -> Vec<(u8, u16)> {
        let of_region = |(region, of): (u8, &ImageRegion)| {
            let arriving = (0..).zip(&of.layers).filter(|(_, layer)| !layer.is_whole());
            arriving.map(|(number, _)| (region, number)).collect::<Vec<_>>()
        };
        (0..).zip(&self.regions).flat_map(of_region).collect()
    }

    /// Records what children touch first, for hosts that will read it from here. Only the first record counts, and only if the
    /// image has not been hashed: what it consists of is in its digest.
    pub fn record_working_set(&self, runs: Vec<WorkingSetRun>) {
        self.working_set.set(runs).unwrap_or_default();
    }

    /// What children touch first, as far as it is known.
    #[must_use]
    pub fn working_set(&self) -> &[WorkingSetRun] {
        self.working_set.get().map_or(&[], Vec::as_slice)
    }

    /// Its name on this node.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Its name everywhere, once it has been saved or loaded.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest.get().copied()
    }

    /// What a shell must have been built for to become its child.
    #[must_use]
    pub fn class(&self) -> Class {
        self.class
    }

    /// The CPU that it was made on.
    #[must_use]
    pub fn cpu(&self) -> &CpuProfile {
        &self.cpu
    }

    /// How many branches lie between it and the first parent, as far as it knows: one that was loaded knows of those parents
    /// that had a digest when it was branched.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Its regions: RAM by guest address, then its disk.
    #[must_use]
    pub fn regions(&self) -> &[ImageRegion] {
        &self.regions
    }

    /// Where a child finds out who it is.
    #[must_use]
    pub fn identity_page(&self) -> Option<GuestAddress> {
        self.identity_page
    }

    /// An image as its worker knows it.
    pub(crate) fn received(cpu: CpuProfile, wire: WireImage, layers: Vec<OwnedFd>) -> Result<Self, BadWireImage> {
        let class = Class::try_from(wire.class)?;
        let state = MachineState::decode(&wire.state)?;
        let due = class.regions();
        if due.len() != wire.regions.len() {
            return Err(BadWireImage::Regions { due: due.len(), there: wire.regions.len() });
        }
        let mut layers = layers.into_iter();
        let mut regions = Vec::with_capacity(due.len());
        for ((kind, bytes), (map, count)) in due.into_iter().zip(wire.regions) {
            check_map(&map, bytes, usize::from(count))?;
            let own: Vec<_> = layers.by_ref().take(usize::from(count)).map(|fd| Arc::new(Layer::new(File::from(fd)))).collect();
            if own.len() != usize::from(count) {
                return Err(BadWireImage::Layers);
            }
            regions.push(ImageRegion::new(kind, map, own));
        }
        if layers.next().is_some() {
            return Err(BadWireImage::Layers);
        }
        Ok(Self::new(cpu, state, class, regions, wire.identity_page, None))
    }

    /// What a worker must know of it to become its child, encoded: a [`WireImage`].
    pub(crate) fn wire(&self) -> &[u8] {
        self.wire.get_or_init(|| {
            let regions = self.regions.iter().map(|region| (region.map.clone(), region.next_layer().0)).collect();
            let state = self.state.encode();
            let wire = WireImage { class: self.class.into(), state, identity_page: self.identity_page, regions };
            postcard::to_stdvec(&wire).expect("plain data")
        })
    }

    /// Descriptors to read its layers through, in the order of its regions.
    pub(crate) fn read_only_layers(&self) -> io::Result<Vec<&File>> {
        self.regions.iter().flat_map(|region| &region.layers).map(|layer| layer.read_only()).collect()
    }

    /// Makes the layers that were made for it final, and makes sure that nobody has one mapped to write.
    pub(crate) fn seal_for_mapping(&self) -> io::Result<()> {
        self.regions
            .iter()
            .filter_map(|region| region.layers.last())
            .try_for_each(|layer| memfd::seal_for_mapping(&layer.memfd))
    }

    /// Makes the layers that were made for it final.
    pub(crate) fn seal(&self) -> io::Result<()> {
        self.regions.iter().try_for_each(ImageRegion::seal)
    }

    pub(crate) fn state(&self) -> &MachineState {
        &self.state
    }

    /// Bytes of memory that the layers which were made for this image take; layers of its parents are theirs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn own_bytes(&self) -> io::Result<u64> {
        self.regions.iter().filter_map(|region| region.layers.last()).map(|layer| memfd::stored_bytes(&layer.memfd)).sum()
    }

    /// Bytes of memory that all its layers take.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn stored_bytes(&self) -> io::Result<u64> {
        self.regions.iter().flat_map(|region| &region.layers).map(|layer| memfd::stored_bytes(&layer.memfd)).sum()
    }
}

/// Why what came over a channel is no image.
#[derive(Debug, Error)]
pub(crate) enum BadWireImage {
    #[error(transparent)]
    Class(#[from] VcpuCountError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("it has {there} regions where its class has {due}")]
    Regions { due: usize, there: usize },
    #[error("the map of a region has {there} extents where the region has {due}")]
    Extents { due: u64, there: u64 },
    #[error("the map of a region names a layer that there is not")]
    Layers,
}

/// Whether a map that came over a channel fits its region and names none but existing layers.
pub(crate) fn check_map(map: &ExtentMap, region_bytes: u64, layer_count: usize) -> Result<(), BadWireImage> {
    let (due, there) = (region_bytes.div_ceil(EXTENT_SIZE), u64::from(map.extent_count()));
    if due != there {
        return Err(BadWireImage::Extents { due, there });
    }
    if map.used_layers().last().is_some_and(|last| usize::from(last.0) >= layer_count) {
        return Err(BadWireImage::Layers);
    }
    Ok(())
}

impl ImageRegion {
    /// A region with these layers. The map uses no others.
    pub(crate) fn new(kind: RegionKind, map: ExtentMap, layers: Vec<Arc<Layer>>) -> Self {
        assert!(map.used_layers().last().is_none_or(|last| usize::from(last.0) < layers.len()));
        Self { kind, map, layers }
    }

    /// RAM, and where.
    #[must_use]
    pub fn kind(&self) -> RegionKind {
        self.kind
    }

    /// Which layer holds which extent.
    #[must_use]
    pub fn map(&self) -> &ExtentMap {
        &self.map
    }

    /// Its layers, in the order in which the map numbers them.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The runs whose layer is not all there.
    pub(crate) fn arriving_runs(&self) -> impl Iterator<Item = std::ops::Range<u32>> {
        let is_arriving = |source| matches!(source, Source::Layer(layer) if !self.layers[usize::from(layer.0)].is_whole());
        self.map.runs().iter().filter(move |run| is_arriving(run.source)).map(types::Run::extents)
    }

    /// Reads some bytes of one extent, if they are here.
    #[must_use]
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let extent = ExtentIndex(u32::try_from(offset / EXTENT_SIZE).expect("at most 32 GiB"));
        match self.map.source_of(extent) {
            None => false,
            Some(Source::Zero) => {
                bytes.fill(0);
                true
            }
            Some(Source::Layer(layer)) => self.layers[usize::from(layer.0)].read_at(offset, bytes),
        }
    }

    /// The number that a layer on top gets.
    pub(crate) fn next_layer(&self) -> LayerIndex {
        LayerIndex(u16::try_from(self.layers.len()).expect("each layer has an open file, of which there are fewer"))
    }

    /// The region with `layer` on top and `map` over all. Layers that the map no longer uses are let go; the new one stays,
    /// used or not, since it is the image's own.
    pub(crate) fn with_layer(&self, map: ExtentMap, layer: Arc<Layer>) -> Self {
        let new = self.next_layer();
        let mut kept = map.used_layers();
        if kept.last() != Some(&new) {
            kept.push(new);
        }
        let renumber: BTreeMap<LayerIndex, LayerIndex> = kept.iter().copied().zip((0..).map(LayerIndex)).collect();
        let layers = kept.iter().map(|index| Arc::clone(self.layers.get(usize::from(index.0)).unwrap_or(&layer))).collect();
        Self { kind: self.kind, map: map.renumbered(|index| renumber[&index]), layers }
    }

    /// What a child maps.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        self.map.runs().iter().map(|run| Piece {
            bytes: run.bytes(),
            content: match run.source {
                Source::Zero => Content::Zero,
                Source::Layer(layer) => Content::Private(self.layers[usize::from(layer.0)].memfd.as_fd()),
            },
        })
    }

    /// Makes the layer on top final.
    pub(crate) fn seal(&self) -> io::Result<()> {
        self.layers.last().map_or(Ok(()), |layer| memfd::seal(&layer.memfd))
    }
}

impl Layer {
    pub(crate) fn new(memfd: File) -> Self {
        Self { memfd, read_only: OnceLock::new(), presence: None }
    }

    /// One whose extents arrive bit by bit.
    pub(crate) fn arriving(memfd: File, presence: Arc<Presence>) -> Self {
        Self { memfd, read_only: OnceLock::new(), presence: Some(presence) }
    }

    /// Whether nothing of it can be absent.
    pub(crate) fn is_whole(&self) -> bool {
        self.presence.as_ref().is_none_or(|presence| presence.is_settled())
    }

    /// Whether all of these extents are there now.
    pub(crate) fn has_all(&self, extents: std::ops::Range<u32>) -> bool {
        self.presence.as_ref().is_none_or(|presence| presence.has_all(extents))
    }

    /// Reads some bytes of an extent, if all of that is there.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let extent = ExtentIndex(u32::try_from(offset / EXTENT_SIZE).expect("at most 32 GiB"));
        self.while_there(extent, || self.memfd.read_exact_at(bytes, offset)).unwrap_or(false)
    }

    /// Reads, and says whether all of the extent was there all the while: it may have been evicted, and have come again.
    fn while_there(&self, extent: ExtentIndex, read: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        let look = || (self.presence.as_ref().map(|presence| presence.evictions()), self.has_all(extent.0..extent.0 + 1));
        let before = look();
        if !before.1 {
            return Ok(false);
        }
        read()?;
        Ok(look() == before)
    }

    /// Reads an extent, if all of it is there. Makes no page, whatever is.
    pub(crate) fn read_extent(&self, extent: ExtentIndex, buffer: &mut [u8; EXTENT_LEN]) -> io::Result<bool> {
        self.while_there(extent, || self.memfd.read_exact_at(buffer, extent.byte_offset()))
    }

    /// A descriptor through which nobody can write, for a worker.
    pub(crate) fn read_only(&self) -> io::Result<&File> {
        if let Some(file) = self.read_only.get() {
            return Ok(file);
        }
        // A memfd has no name; its descriptor is one.
        let file = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.memfd)))?;
        Ok(self.read_only.get_or_init(|| file))
    }

    pub(crate) fn memfd(&self) -> &File {
        &self.memfd
    }
}
