//! Loading an image: checked before anything is allocated, copied into memory, and verified **there**.
//!
//! The file is read with `pread`, not mapped: a file that shrinks under a mapping ends the process with SIGBUS, and bytes that
//! are verified in a mapping can change after they were (`docs/decisions/0003`). What is verified is the private copy.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use thiserror::Error;
use types::manifest::{HashPageError, HeadError, decode_hash_page};
use types::profile::ForeignCpu;
use types::{Digest, EXTENT_SIZE, ExtentIndex, Head, ImageId, MemorySize, RegionHead, RegionKind};
use uuid::Uuid;

use super::file::{PREAMBLE_SIZE, Places, Preamble, PreambleError, VERSION};
use super::{Image, Layer, RamRegion, memfd};
use crate::host::{Host, HostError, available_memory};
use crate::machine::state::{MachineState, StateError};
use crate::shell::{BuildError, Class, ram_regions};

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
    Class(#[from] BuildError),
    #[error("its regions are not those of a machine with {0}")]
    Layout(MemorySize),
    #[error("its machine state has {state} vCPUs, its manifest {head}")]
    VcpuCount { state: usize, head: u8 },
    #[error("hash page {page} of region {region} is refused: {source}")]
    HashPage { region: usize, page: usize, source: HashPageError },
    #[error("extent {extent} of region {region} is damaged: digest {actual} where {expected} is due")]
    Extent { region: usize, extent: ExtentIndex, expected: Digest, actual: Digest },
    #[error("extent {extent} of region {region} has content where the manifest says that it is zero")]
    NotZero { region: usize, extent: ExtentIndex },
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
            | LoadErrorKind::NotZero { .. } => "copy it again from where it was saved",
        }
    }
}

/// Loads the image that was saved under `path`. `progress` is told the extents done and the extents in all.
///
/// # Errors
/// [`LoadError`], before anything is allocated where the head is at fault.
pub fn load(host: &Host, path: &Path, mut progress: impl FnMut(u64, u64)) -> Result<Arc<Image>, LoadError> {
    read_image(host, path, &mut progress).map_err(|kind| LoadError { path: path.to_owned(), kind: Box::new(kind) })
}

fn read_image(host: &Host, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<Image>, LoadErrorKind> {
    // NONBLOCK: a FIFO in its place must not hang the caller.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(LoadErrorKind::Open)?;
    let metadata = file.metadata().map_err(LoadErrorKind::Open)?;
    if !metadata.is_file() {
        return Err(LoadErrorKind::NotAFile);
    }
    let (digest, head) = read_head(&file)?;
    let (class, state) = check_head(host, &head)?;
    let places = Places::of(&head);
    if metadata.len() != places.file_len {
        return Err(LoadErrorKind::Length { expected_bytes: places.file_len, actual_bytes: metadata.len() });
    }
    let total: u64 = head.regions.iter().map(|region| u64::from(region.map.data_extent_count())).sum();
    // A small file may stand for a large memory: what is zero in a data run is stored.
    let (needed_bytes, available_bytes) = (total * EXTENT_SIZE, available_memory().map_err(LoadErrorKind::Memory)?);
    if needed_bytes > available_bytes {
        return Err(LoadErrorKind::NoRoom { needed_bytes, available_bytes });
    }
    let mut done = 0;
    let mut ram = Vec::with_capacity(head.regions.len());
    for (number, region) in head.regions.iter().enumerate() {
        let digests = read_digests(&file, number, region, &places)?;
        let source = Source { file: &file, region: number, start: places.regions[number] };
        let memfd = source.copy(region, &digests, &mut || {
            done += 1;
            progress(done, total);
        })?;
        memfd::seal(&memfd).map_err(LoadErrorKind::Memory)?;
        ram.push(RamRegion::new(region.kind, region.map.clone(), vec![Arc::new(Layer::new(memfd))]));
    }
    Ok(Arc::new(Image {
        id: ImageId::from_uuid(Uuid::now_v7()),
        cpu: head.cpu,
        state,
        class,
        ram,
        identity_page: head.identity_page,
        depth: u32::try_from(head.parents.len()).unwrap_or(u32::MAX),
        parents: head.parents,
        digest: OnceLock::from(digest),
    }))
}

fn read_head(file: &File) -> Result<(Digest, Head), LoadErrorKind> {
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
    Ok((preamble.head_digest, Head::decode(&frame, preamble.head_digest)?))
}

/// Everything about the head that depends on this host.
fn check_head(host: &Host, head: &Head) -> Result<(Class, MachineState), LoadErrorKind> {
    head.cpu.check_resumable_on(host.cpu())?;
    let bytes = head.regions.iter().map(RegionHead::size_bytes).sum();
    let memory = MemorySize::from_bytes(bytes).map_err(|_| LoadErrorKind::NotAnImage)?;
    host.check_memory(memory)?;
    let class = Class::new(memory, head.vcpu_count)?;
    let regions: Vec<(RegionKind, u64)> = head.regions.iter().map(|region| (region.kind, region.size_bytes())).collect();
    if regions != ram_regions(memory) {
        return Err(LoadErrorKind::Layout(memory));
    }
    let state = MachineState::decode(&head.state)?;
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
    region: usize,
    start: u64,
}

impl Source<'_> {
    /// A memfd with every extent of the region, each verified after it was copied.
    fn copy(&self, region: &RegionHead, digests: &[Digest], done: &mut dyn FnMut()) -> Result<File, LoadErrorKind> {
        let memfd = memfd::create("farfork-image", region.size_bytes()).map_err(LoadErrorKind::Memory)?;
        let mut buffer = vec![0; usize::try_from(EXTENT_SIZE).expect("64-bit host")];
        for run in region.map.data_runs() {
            for extent in run.extents().map(ExtentIndex) {
                self.copy_extent(extent, digests[extent.0 as usize], &mut buffer, &memfd)?;
                done();
            }
            // What is zero in a data run is stored, so that no child's access makes the image grow.
            memfd::fill_holes(&memfd, run.bytes()).map_err(LoadErrorKind::Memory)?;
        }
        let zero_runs = region.map.runs().iter().filter(|run| run.source == types::Source::Zero);
        for extent in zero_runs.flat_map(types::Run::extents) {
            if digests[extent as usize] != Digest::ZERO_CONTENT {
                return Err(LoadErrorKind::NotZero { region: self.region, extent: ExtentIndex(extent) });
            }
        }
        Ok(memfd)
    }

    /// The buffer is this process's own, so what is verified is what is stored.
    fn copy_extent(&self, extent: ExtentIndex, expected: Digest, buffer: &mut [u8], to: &File) -> Result<(), LoadErrorKind> {
        if expected == Digest::ZERO_CONTENT {
            return Ok(());
        }
        read_at(self.file, buffer, self.start + extent.byte_offset())?;
        let actual = Digest::of(buffer);
        if actual != expected {
            return Err(LoadErrorKind::Extent { region: self.region, extent, expected, actual });
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
