//! Images: a machine at one instant, immutable.
//!
//! In memory an image is a [`MachineState`] and, for each region, an [`ExtentMap`] over sealed memfds, its layers. Images share
//! layers with the images they were branched from; a layer lives as long as the last image that uses it. On disk an image is
//! one sparse file (see [`file`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use types::{CpuProfile, Digest, ExtentMap, GuestAddress, ImageId, LayerIndex, RegionKind, Source};
use uuid::Uuid;

use crate::class::Class;
use crate::machine::state::MachineState;
use crate::sys::slot::{Content, Piece};

pub mod file;
pub mod load;
pub(crate) mod memfd;
pub mod save;

pub use load::{LoadError, load, load_branch};
pub use save::{SaveError, SaveReport, save, save_branch};

/// See the module.
#[derive(Debug)]
pub struct Image {
    id: ImageId,
    cpu: CpuProfile,
    state: MachineState,
    class: Class,
    ram: Vec<RamRegion>,
    identity_page: Option<GuestAddress>,
    depth: u32,
    /// Digests of the images that it was branched from, as far as they were known, nearest first.
    parents: Vec<Digest>,
    digest: OnceLock<Digest>,
}

/// One region of an image.
#[derive(Clone, Debug)]
pub struct RamRegion {
    kind: RegionKind,
    map: ExtentMap,
    layers: Vec<Arc<Layer>>,
}

/// A memfd of the region's size, of which the map uses some extents.
#[derive(Debug)]
pub struct Layer {
    memfd: File,
}

/// The most parents that an image remembers.
const PARENTS_MAX: usize = 64;

impl Image {
    pub(crate) fn new(
        cpu: CpuProfile,
        state: MachineState,
        class: Class,
        ram: Vec<RamRegion>,
        identity_page: Option<GuestAddress>,
        parent: Option<&Self>,
    ) -> Self {
        let nearest = parent.and_then(|parent| parent.digest.get().copied());
        let further = parent.map_or(&[][..], |parent| &parent.parents);
        let parents = nearest.into_iter().chain(further.iter().copied()).take(PARENTS_MAX).collect();
        let depth = parent.map_or(0, |parent| parent.depth + 1);
        let id = ImageId::from_uuid(Uuid::now_v7());
        Self { id, cpu, state, class, ram, identity_page, depth, parents, digest: OnceLock::new() }
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

    /// Its regions of RAM, by guest address.
    #[must_use]
    pub fn ram(&self) -> &[RamRegion] {
        &self.ram
    }

    /// Where a child finds out who it is.
    #[must_use]
    pub fn identity_page(&self) -> Option<GuestAddress> {
        self.identity_page
    }

    pub(crate) fn state(&self) -> &MachineState {
        &self.state
    }

    /// Bytes of memory that the layers which were made for this image take; layers of its parents are theirs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn own_bytes(&self) -> io::Result<u64> {
        self.ram.iter().filter_map(|region| region.layers.last()).map(|layer| memfd::stored_bytes(&layer.memfd)).sum()
    }

    /// Bytes of memory that all its layers take.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn stored_bytes(&self) -> io::Result<u64> {
        self.ram.iter().flat_map(|region| &region.layers).map(|layer| memfd::stored_bytes(&layer.memfd)).sum()
    }
}

impl RamRegion {
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
        Self { memfd }
    }

    pub(crate) fn memfd(&self) -> &File {
        &self.memfd
    }
}
