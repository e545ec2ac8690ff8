//! Loading an image: checked before anything is allocated, copied into memory, and verified **there**.
//!
//! The file is read with `pread`, not mapped: a file that shrinks under a mapping ends the process with SIGBUS, and bytes that
//! are verified in a mapping can change after they were (`docs/decisions/0003`). What is verified is the private copy.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use thiserror::Error;
use types::extents::ExtentMapError;
use types::manifest::{HashPageError, HeadError, ManifestError, decode_hash_page};
use types::profile::ForeignCpu;
use types::{Digest, EXTENT_SIZE, ExtentIndex, ExtentMap, Head, ImageId, Manifest, MemorySize, RegionHead, RegionKind};
use uuid::Uuid;

use super::file::{PREAMBLE_SIZE, Places, Preamble, PreambleError, VERSION};
use super::save::{self, each_extent};
use super::{Image, ImageRegion, Layer, memfd};
use crate::class::{Class, VcpuCountError};
use crate::host::{Host, HostError, available_memory};
use crate::machine::state::{MachineState, StateError};

/// Why an image was not loaded. Nothing of it is left in memory.
#[derive(Debug, Error)]
#[error("{path}: {kind}")]
pub struct LoadError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong.
    pub kind: Box<LoadErrorKind>,
}

/// See [`LoadError`].
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum LoadErrorKind {
    #[error("it cannot be opened: {0}")]
    Open(io::Error),
    #[error("it is no ordinary file")]
    NotAFile,
    #[error("it is no farfork image")]
    NotAnImage,
    #[error("it is an image of version {version}; this farfork reads version {VERSION}")]
    UnknownVersion { version: u16 },
    #[error("its preamble is damaged")]
    DamagedPreamble,
    #[error("it has {actual_bytes} bytes where an image with its head has {expected_bytes}")]
    Length { expected_bytes: u64, actual_bytes: u64 },
    #[error("its manifest is refused: {0}")]
    Head(#[from] HeadError),
    #[error("its machine state is refused: {0}")]
    State(#[from] StateError),
    #[error(transparent)]
    ForeignCpu(#[from] ForeignCpu),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Class(#[from] VcpuCountError),
    #[error("its regions are not those of a machine with {0}")]
    Layout(MemorySize),
    #[error("its machine state has {state} vCPUs, its manifest {head}")]
    VcpuCount { state: usize, head: u8 },
    #[error("hash page {page} of region {region} is refused: {source}")]
    HashPage { region: usize, page: usize, source: HashPageError },
    #[error("extent {extent} of region {region} is damaged: digest {actual} where {expected} is due")]
    Extent { region: usize, extent: ExtentIndex, expected: Digest, actual: Digest },
    #[error("its manifest does not agree with itself: {0}")]
    Manifest(#[from] ManifestError),
    #[error("it is a branch of image {needed}, and holds only what differs from it")]
    NeedsBase { needed: Digest },
    #[error("it is a branch of image {needed}, which is not the one that was given")]
    OtherBase { needed: Digest },
    #[error("its pieces do not fit its base: {0}")]
    Extents(ExtentMapError),
    #[error("extent {extent} of region {region} is neither in it nor in its base")]
    Missing { region: usize, extent: ExtentIndex },
    #[error("it ended while it was read")]
    Shrank,
    #[error("reading it failed: {0}")]
    Read(io::Error),
    #[error("there is no memory for it: {0}")]
    Memory(io::Error),
    #[error("it takes {needed_bytes} bytes of memory, and {available_bytes} are free")]
    NoRoom { needed_bytes: u64, available_bytes: u64 },
}

impl LoadError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self.kind.as_ref() {
            LoadErrorKind::Open(_) => "check the path and its permissions",
            LoadErrorKind::NotAFile | LoadErrorKind::NotAnImage => "give a file that was written by saving an image",
            LoadErrorKind::UnknownVersion { .. } => "use the farfork that wrote it, or a newer one",
            LoadErrorKind::NeedsBase { .. } | LoadErrorKind::OtherBase { .. } => {
                "load the image with that digest, and give it along with this one"
            }
            LoadErrorKind::State(error) => error.remedy(),
            LoadErrorKind::ForeignCpu(_) => "fork it on a host with the CPU that it was made on",
            LoadErrorKind::Host(error) => error.remedy(),
            LoadErrorKind::Class(error) => error.remedy(),
            LoadErrorKind::Shrank | LoadErrorKind::Read(_) => "load it again once nobody changes it and the disk is well",
            LoadErrorKind::Memory(_) | LoadErrorKind::NoRoom { .. } => "end other machines: the host's memory is full",
            LoadErrorKind::DamagedPreamble
            | LoadErrorKind::Length { .. }
            | LoadErrorKind::Head(_)
            | LoadErrorKind::Layout(_)
            | LoadErrorKind::VcpuCount { .. }
            | LoadErrorKind::HashPage { .. }
            | LoadErrorKind::Extent { .. }
            | LoadErrorKind::Manifest(_)
            | LoadErrorKind::Extents(_)
            | LoadErrorKind::Missing { .. } => "copy it again from where it was saved",
        }
    }
}

/// Loads the image that was saved whole under `path`. `progress` is told the extents done and the extents in all.
///
/// # Errors
/// [`LoadError`], before anything is allocated where the head is at fault.
pub fn load(host: &Host, path: &Path, mut progress: impl FnMut(u64, u64)) -> Result<Arc<Image>, LoadError> {
    let loaded = open(path).and_then(|file| read_image(host, None, &file, &mut progress));
    loaded.map_err(|kind| LoadError { path: path.to_owned(), kind: Box::new(kind) })
}

/// [`load()`] of a name in a directory that is open, without following a link or leaving it.
///
/// # Errors
/// As [`load()`].
pub fn load_in(
    host: &Host,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    mut progress: impl FnMut(u64, u64),
) -> Result<Arc<Image>, LoadError> {
    let loaded = open_beneath(directory, name).and_then(|file| read_image(host, None, &file, &mut progress));
    loaded.map_err(|kind| LoadError { path: PathBuf::from(name), kind: Box::new(kind) })
}

/// Loads the image that was saved under `path` without what it shares with `base`. Layers that they share in memory are shared
/// again.
///
/// # Errors
/// As [`load`].
pub fn load_branch(
    host: &Host,
    base: &Image,
    path: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<Arc<Image>, LoadError> {
    let loaded = open(path).and_then(|file| read_image(host, Some(base), &file, &mut progress));
    loaded.map_err(|kind| LoadError { path: path.to_owned(), kind: Box::new(kind) })
}

/// NONBLOCK: a FIFO in its place must not hang the caller.
fn open(path: &Path) -> Result<File, LoadErrorKind> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(LoadErrorKind::Open)
}

fn open_beneath(directory: BorrowedFd<'_>, name: &OsStr) -> Result<File, LoadErrorKind> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve);
    file.map(File::from).map_err(|error| LoadErrorKind::Open(error.into()))
}

fn read_image(
    host: &Host,
    base: Option<&Image>,
    file: &File,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arc<Image>, LoadErrorKind> {
    let metadata = file.metadata().map_err(LoadErrorKind::Open)?;
    if !metadata.is_file() {
        return Err(LoadErrorKind::NotAFile);
    }
    let (preamble, head) = read_head(file)?;
    let (class, state) = check_head(host, &head)?;
    let base = match (preamble.base, base) {
        (None, _) => None,
        (Some(needed), None) => return Err(LoadErrorKind::NeedsBase { needed }),
        (Some(needed), Some(base)) if base.digest() != Some(needed) || base.class != class => {
            return Err(LoadErrorKind::OtherBase { needed });
        }
        (Some(_), Some(base)) => Some(base),
    };
    let places = Places::of(&head, base.is_some());
    if metadata.len() != places.file_len {
        return Err(LoadErrorKind::Length { expected_bytes: places.file_len, actual_bytes: metadata.len() });
    }
    let digests: Result<Vec<_>, _> =
        head.regions.iter().enumerate().map(|(number, region)| read_digests(file, number, region, &places)).collect();
    let manifest = Manifest::new(head, digests?)?;
    let stored = Stored::read(file, &manifest, &places)?;
    // A small file may stand for a large memory: what is zero in a data run is stored.
    let (needed_bytes, available_bytes) = (stored.count * EXTENT_SIZE, available_memory().map_err(LoadErrorKind::Memory)?);
    if needed_bytes > available_bytes {
        return Err(LoadErrorKind::NoRoom { needed_bytes, available_bytes });
    }
    let mut done = 0;
    let mut regions = Vec::with_capacity(manifest.head().regions.len());
    for (number, region) in manifest.head().regions.iter().enumerate() {
        let source = Source {
            file,
            number,
            start: places.regions[number],
            digests: manifest.extent_digests(number),
            base: base.map(|base| &base.regions[number]),
        };
        regions.push(source.copy(region, &stored.regions[number], &mut || {
            done += 1;
            progress(done, stored.count);
        })?);
    }
    let head = manifest.into_head();
    Ok(Arc::new(Image {
        working_set: OnceLock::from(head.working_set),
        id: ImageId::from_uuid(Uuid::now_v7()),
        cpu: head.cpu,
        state,
        class,
        regions,
        identity_page: head.identity_page,
        depth: u32::try_from(head.parents.len()).unwrap_or(u32::MAX),
        parents: head.parents,
        digest: OnceLock::from(preamble.head_digest),
        wire: OnceLock::new(),
        manifest: Mutex::default(),
        host_image: None,
    }))
}

/// Which extents the file has, of those that are not in a zero run.
struct Stored {
    /// For each region, the runs of them.
    regions: Vec<Vec<Range<u32>>>,
    count: u64,
}

impl Stored {
    fn read(file: &File, manifest: &Manifest, places: &Places) -> Result<Self, LoadErrorKind> {
        let mut regions = Vec::with_capacity(manifest.head().regions.len());
        for (number, region) in manifest.head().regions.iter().enumerate() {
            let data = region.map.data_runs().map(types::Run::extents);
            let Some((at, bytes)) = places.bits.get(number) else {
                regions.push(data.collect());
                continue;
            };
            let mut bits = vec![0; *bytes];
            read_at(file, &mut bits, *at)?;
            let mut runs: Vec<Range<u32>> = Vec::new();
            for extent in data.flatten().filter(|extent| bits[*extent as usize / 8] >> (extent % 8) & 1 == 1) {
                match runs.last_mut() {
                    Some(last) if last.end == extent => last.end += 1,
                    _ => runs.push(extent..extent + 1),
                }
            }
            regions.push(runs);
        }
        let count = regions.iter().flatten().map(|run: &Range<u32>| run.len() as u64).sum();
        Ok(Self { regions, count })
    }
}

fn read_head(file: &File) -> Result<(Preamble, Head), LoadErrorKind> {
    let mut page = [0; PREAMBLE_SIZE];
    // A file too short for a preamble is no image rather than half of one: nothing in it says so.
    read_at(file, &mut page, 0)
        .map_err(|kind| if matches!(kind, LoadErrorKind::Shrank) { LoadErrorKind::NotAnImage } else { kind })?;
    let preamble = Preamble::decode(&page).map_err(|error| match error {
        PreambleError::NotAnImage => LoadErrorKind::NotAnImage,
        PreambleError::UnknownVersion(version) => LoadErrorKind::UnknownVersion { version },
        PreambleError::Damaged => LoadErrorKind::DamagedPreamble,
    })?;
    let mut frame = vec![0; preamble.head_len];
    read_at(file, &mut frame, Places::HEAD)?;
    let head = Head::decode(&frame, preamble.head_digest)?;
    Ok((preamble, head))
}

/// Everything about the head that depends on this host.
pub(crate) fn check_head(host: &Host, head: &Head) -> Result<(Class, MachineState), LoadErrorKind> {
    head.cpu.check_resumable_on(host.cpu())?;
    let state = MachineState::decode(&head.state)?;
    let is_disk = |region: &&RegionHead| matches!(region.kind, RegionKind::Disk(_));
    let size = |bytes: u64| MemorySize::from_bytes(bytes).map_err(|_| LoadErrorKind::NotAnImage);
    let memory = size(head.regions.iter().filter(|region| !is_disk(region)).map(RegionHead::size_bytes).sum())?;
    let disk = head.regions.iter().find(is_disk).map(|region| size(region.size_bytes())).transpose()?;
    let class = Class::with_devices(memory, head.vcpu_count, state.devices(disk))?;
    host.check_class(class)?;
    let regions: Vec<(RegionKind, u64)> = head.regions.iter().map(|region| (region.kind, region.size_bytes())).collect();
    if regions != class.regions() {
        return Err(LoadErrorKind::Layout(memory));
    }
    if state.vcpu_count() != usize::from(head.vcpu_count) {
        return Err(LoadErrorKind::VcpuCount { state: state.vcpu_count(), head: head.vcpu_count });
    }
    Ok((class, state))
}

fn read_digests(file: &File, number: usize, region: &RegionHead, places: &Places) -> Result<Vec<Digest>, LoadErrorKind> {
    let mut digests = Vec::with_capacity(region.map.extent_count() as usize);
    for (page, ((at, count), expected)) in places.hash_pages[number].iter().zip(&region.hash_pages).enumerate() {
        let mut bytes = vec![0; *count as usize * 32];
        read_at(file, &mut bytes, *at)?;
        let decoded = decode_hash_page(&bytes, *count, *expected);
        digests.extend(decoded.map_err(|source| LoadErrorKind::HashPage { region: number, page, source })?);
    }
    Ok(digests)
}

/// Where the extents of one region come from.
struct Source<'a> {
    file: &'a File,
    number: usize,
    start: u64,
    digests: &'a [Digest],
    base: Option<&'a ImageRegion>,
}

impl Source<'_> {
    /// The region, with every extent verified: those of the file after they were copied, those of the base where they are.
    fn copy(&self, region: &RegionHead, stored: &[Range<u32>], done: &mut dyn FnMut()) -> Result<ImageRegion, LoadErrorKind> {
        let memfd = memfd::create("farfork-image", region.size_bytes()).map_err(LoadErrorKind::Memory)?;
        let mut buffer = vec![0; usize::try_from(EXTENT_SIZE).expect("64-bit host")];
        for run in stored {
            for extent in run.clone().map(ExtentIndex) {
                self.copy_extent(extent, &mut buffer, &memfd)?;
                done();
            }
            // What is zero in a data run is stored, so that no child's access makes the image grow.
            let bytes = ExtentIndex(run.start).byte_offset()..ExtentIndex(run.end).byte_offset();
            memfd::fill_holes(&memfd, bytes).map_err(LoadErrorKind::Memory)?;
        }
        let layer = Arc::new(Layer::new(memfd));
        let loaded = match self.base {
            None => ImageRegion::new(region.kind, region.map.clone(), vec![layer]),
            Some(base) => self.over(base, region, stored, layer)?,
        };
        loaded.seal().map_err(LoadErrorKind::Memory)?;
        Ok(loaded)
    }

    /// The region with `stored` in a layer of its own, and all other data where the base has it.
    fn over(
        &self,
        base: &ImageRegion,
        region: &RegionHead,
        stored: &[Range<u32>],
        layer: Arc<Layer>,
    ) -> Result<ImageRegion, LoadErrorKind> {
        let mut sources: Vec<_> = (0..region.map.extent_count())
            .map(ExtentIndex)
            .map(|extent| {
                let is_zero = region.map.source_of(extent) == Some(types::Source::Zero);
                if is_zero { types::Source::Zero } else { base.map().source_of(extent).unwrap_or(types::Source::Zero) }
            })
            .collect();
        for run in stored {
            sources[run.start as usize..run.end as usize].fill(types::Source::Layer(base.next_layer()));
        }
        let lengths = sources.chunk_by(|a, b| a == b).map(|run| (u32::try_from(run.len()).expect("a region's"), run[0]));
        let map = ExtentMap::from_lengths(lengths).map_err(LoadErrorKind::Extents)?;
        let loaded = base.with_layer(map, layer);
        let is_stored = |extent: ExtentIndex| stored.iter().any(|run| run.contains(&extent.0));
        let mut wrong = None;
        let verified = each_extent(&loaded, |extent, bytes| {
            let actual = if save::is_zero(bytes) { Digest::ZERO_CONTENT } else { Digest::of(bytes) };
            let expected = self.digests[extent.0 as usize];
            if actual != expected && !is_stored(extent) {
                wrong = Some(LoadErrorKind::Extent { region: self.number, extent, expected, actual });
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        });
        match (wrong, verified) {
            (Some(wrong), _) => Err(wrong),
            (None, Err(error)) => Err(LoadErrorKind::Memory(error)),
            // An extent that is neither stored nor in the base reads as zero, and no digest says that it is.
            (None, Ok(())) => match sources
                .iter()
                .zip(self.digests)
                .position(|(source, digest)| *source == types::Source::Zero && *digest != Digest::ZERO_CONTENT)
            {
                Some(extent) => Err(LoadErrorKind::Missing {
                    region: self.number,
                    extent: ExtentIndex(u32::try_from(extent).expect("a region's")),
                }),
                None => Ok(loaded),
            },
        }
    }

    /// The buffer is this process's own, so what is verified is what is stored.
    fn copy_extent(&self, extent: ExtentIndex, buffer: &mut [u8], to: &File) -> Result<(), LoadErrorKind> {
        let expected = self.digests[extent.0 as usize];
        if expected == Digest::ZERO_CONTENT {
            return Ok(());
        }
        read_at(self.file, buffer, self.start + extent.byte_offset())?;
        let actual = Digest::of(buffer);
        if actual != expected {
            return Err(LoadErrorKind::Extent { region: self.number, extent, expected, actual });
        }
        to.write_all_at(buffer, extent.byte_offset()).map_err(LoadErrorKind::Memory)
    }
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> Result<(), LoadErrorKind> {
    failpoint!("load.read", |source| LoadErrorKind::Read(source));
    file.read_exact_at(buffer, at).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => LoadErrorKind::Shrank,
        _ => LoadErrorKind::Read(error),
    })
}
