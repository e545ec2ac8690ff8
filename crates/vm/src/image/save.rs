//! Saving an image: written beside its place under a temporary name, made durable, and only then given its name. A crash
//! leaves the old file or the new one, never a part of one.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags};
use thiserror::Error;
use types::manifest::{HeadError, ManifestError, encode_hash_page};
use types::{Digest, EXTENT_SIZE, ExtentIndex, Manifest, PAGE_SIZE, Source};
use uuid::Uuid;

use super::file::{Places, Preamble};
use super::{Image, ImageRegion};
use crate::sys::file_map::SealedMap;

/// What was saved.
#[derive(Clone, Copy, Debug)]
pub struct SaveReport {
    /// The image's name everywhere.
    pub digest: Digest,
    /// Bytes of non-zero pages that were written.
    pub written_bytes: u64,
}

/// Why an image was not saved. There is no new file, and an old one of that name is as it was; but for a failed fsync of the
/// directory, which says so.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SaveError {
    #[error("{path} has no room for the image: {step} failed: {source}")]
    Full { path: PathBuf, step: &'static str, source: io::Error },
    #[error("the image cannot be written to {path}: {step} failed: {source}")]
    Io { path: PathBuf, step: &'static str, source: io::Error },
    #[error("{path} names no file")]
    NoName { path: PathBuf },
    #[error("the image's memory cannot be read: {source}")]
    Memory { source: io::Error },
    #[error("the image's manifest cannot be written: {0}")]
    Head(#[from] HeadError),
    #[error("the image's manifest does not agree with itself: {0}")]
    Manifest(#[from] ManifestError),
    #[error("some of the image is still on its way from another host")]
    Unsettled,
    #[error("the image that this one was branched from has no digest yet")]
    UnsavedBase,
    #[error("the image that this one is to be saved upon has other memory or vCPUs")]
    ForeignBase,
}

impl SaveError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Full { .. } => "free room on that file system, or save elsewhere; nothing of this image is left there",
            Self::Io { .. } => "check that the directory exists, may be written, and is on a disk without errors",
            Self::NoName { .. } => "give the path of a file",
            Self::Memory { .. } => "end other machines: the host's memory is full",
            Self::Unsettled => "wait until it has settled (farfork watch)",
            Self::UnsavedBase => "save that image first, or save this one whole",
            Self::ForeignBase => "name an image that this one was branched from, or save this one whole",
            Self::Head(_) | Self::Manifest(_) => "freeze again: the image has more parts than a manifest may name",
        }
    }
}

/// Saves `image` under `path`, whole, replacing what is there. `progress` is told the extents done and the extents in all.
///
/// # Errors
/// [`SaveError`]; nothing is left behind.
pub fn save(image: &Image, path: &Path, progress: impl FnMut(u64, u64)) -> Result<SaveReport, SaveError> {
    write(image, None, &Place::of(path)?, progress)
}

/// [`save()`] under a name in a directory that is open, without following a link or leaving it.
///
/// # Errors
/// [`SaveError`]; nothing is left behind.
pub fn save_in(
    image: &Image,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    progress: impl FnMut(u64, u64),
) -> Result<SaveReport, SaveError> {
    write(image, None, &Place::beneath(directory, name)?, progress)
}

/// Saves `image` under `path` without what it shares with `base`, an image that it was branched from and that has been saved
/// or loaded. [`load_branch`](super::load_branch) needs both.
///
/// # Errors
/// [`SaveError`]; nothing is left behind.
pub fn save_branch(image: &Image, base: &Image, path: &Path, progress: impl FnMut(u64, u64)) -> Result<SaveReport, SaveError> {
    write(image, Some(base), &Place::of(path)?, progress)
}

fn write(
    image: &Image,
    base: Option<&Image>,
    place: &Place,
    mut progress: impl FnMut(u64, u64),
) -> Result<SaveReport, SaveError> {
    let base = base.map(|base| Base::of(base, image)).transpose()?;
    let path = &place.shown;
    let temporary = Temporary::of(place);
    let io = |step| move |source| classify(path, step, source);

    if image.unsettled().is_some() {
        return Err(SaveError::Unsettled);
    }
    let manifest = image.manifest(&mut progress)?;
    let frame = manifest.head().encode()?;
    let digest = Digest::of(&frame);
    let file = temporary.create().map_err(io("creating a temporary file"))?;
    let written_bytes = write_all(&file, image, base.as_ref(), &manifest, &frame).map_err(|failed| match failed {
        WriteFailed::Memory(source) => SaveError::Memory { source },
        WriteFailed::File(step, source) => classify(path, step, source),
    })?;
    sync(&file).map_err(io("fsync"))?;
    temporary.rename().map_err(io("renaming"))?;
    sync(&place.directory).map_err(io(SYNC_DIRECTORY))?;
    Ok(SaveReport { digest, written_bytes })
}

/// The step after which the new file has its name, though a crash of the host may still take it away.
const SYNC_DIRECTORY: &str = "fsync of the directory (the image is there, but may not survive a crash of the host)";

/// What the file of a branch leaves out.
struct Base<'a> {
    digest: Digest,
    regions: &'a [ImageRegion],
}

impl<'a> Base<'a> {
    fn of(base: &'a Image, image: &Image) -> Result<Self, SaveError> {
        let digest = base.digest().ok_or(SaveError::UnsavedBase)?;
        if base.class != image.class {
            return Err(SaveError::ForeignBase);
        }
        Ok(Self { digest, regions: &base.regions })
    }

    /// Whether the base has an extent of the image in the very same place in memory.
    fn has(&self, number: usize, region: &ImageRegion, extent: ExtentIndex) -> bool {
        let base = &self.regions[number];
        match (region.map.source_of(extent), base.map.source_of(extent)) {
            (Some(Source::Layer(ours)), Some(Source::Layer(theirs))) => {
                Arc::ptr_eq(&region.layers[usize::from(ours.0)], &base.layers[usize::from(theirs.0)])
            }
            _ => false,
        }
    }
}

enum WriteFailed {
    Memory(io::Error),
    File(&'static str, io::Error),
}

fn write_all(
    file: &File,
    image: &Image,
    base: Option<&Base<'_>>,
    manifest: &Manifest,
    frame: &[u8],
) -> Result<u64, WriteFailed> {
    let failed = |step| move |source| WriteFailed::File(step, source);
    let places = Places::of(manifest.head(), base.is_some());
    file.set_len(places.file_len).map_err(failed("setting the file's length"))?;
    let preamble = Preamble { head_len: frame.len(), head_digest: Digest::of(frame), base: base.map(|base| base.digest) };
    write_at(file, &preamble.encode(), 0).map_err(failed("writing the preamble"))?;
    write_at(file, frame, Places::HEAD).map_err(failed("writing the manifest"))?;
    let mut written = 0;
    for (number, region) in image.regions.iter().enumerate() {
        let mut digests = manifest.extent_digests(number);
        for (at, count) in &places.hash_pages[number] {
            let (page, rest) = digests.split_at(*count as usize);
            write_at(file, &encode_hash_page(page), *at).map_err(failed("writing a hash page"))?;
            digests = rest;
        }
        let mut bits = places.bits.get(number).map(|(at, bytes)| (*at, vec![0u8; *bytes]));
        let mut wrong = None;
        let read = each_extent(region, |extent, bytes| {
            if let (Some(base), Some((_, bits))) = (base, &mut bits) {
                if base.has(number, region, extent) {
                    return Ok(());
                }
                bits[extent.0 as usize / 8] |= 1 << (extent.0 % 8);
            }
            write_pages(file, bytes, places.regions[number] + extent.byte_offset()).map(|bytes| written += bytes).map_err(
                |source| {
                    wrong = Some(source);
                    io::ErrorKind::Interrupted.into()
                },
            )
        });
        match (wrong, read) {
            (Some(source), _) => return Err(WriteFailed::File("writing memory", source)),
            (None, read) => read.map_err(WriteFailed::Memory)?,
        }
        if let Some((at, bits)) = bits {
            write_at(file, &bits, at).map_err(failed("writing which extents there are"))?;
        }
    }
    Ok(written)
}

/// Calls `each` with every extent that a layer holds which is all there.
pub(super) fn each_extent(region: &ImageRegion, mut each: impl FnMut(ExtentIndex, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let extent_len = usize::try_from(EXTENT_SIZE).expect("64-bit host");
    for run in region.map.data_runs() {
        let Source::Layer(layer) = run.source else {
            continue;
        };
        if !region.layers[usize::from(layer.0)].is_whole() {
            continue;
        }
        let bytes = run.bytes();
        let len = usize::try_from(bytes.end - bytes.start).expect("64-bit host");
        let map = SealedMap::of(region.layers[usize::from(layer.0)].memfd(), bytes.start, len)?;
        for (extent, content) in run.extents().zip(map.chunks_exact(extent_len)) {
            each(ExtentIndex(extent), content)?;
        }
    }
    Ok(())
}

/// Writes the stretches of non-zero pages of an extent; returns their bytes.
fn write_pages(file: &File, extent: &[u8], at: u64) -> io::Result<u64> {
    let page_len = usize::try_from(PAGE_SIZE).expect("64-bit host");
    let mut written = 0;
    let mut from = 0;
    while from < extent.len() {
        let len = extent[from..].chunks(page_len).take_while(|page| !is_zero(page)).count() * page_len;
        if len > 0 {
            write_at(file, &extent[from..from + len], at + from as u64)?;
            written += len as u64;
        }
        from += len + page_len;
    }
    Ok(written)
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    failpoint!("save.write", |source| source);
    file.write_all_at(bytes, at)
}

fn sync(file: &File) -> io::Result<()> {
    failpoint!("save.sync", |source| source);
    file.sync_all()
}

/// Where a file is to be: a name in a directory that is open.
struct Place {
    directory: File,
    name: OsString,
    /// For messages.
    shown: PathBuf,
}

impl Place {
    fn of(path: &Path) -> Result<Self, SaveError> {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let name = path.file_name().ok_or_else(|| SaveError::NoName { path: path.to_owned() })?.to_owned();
        let directory = File::open(parent).map_err(|source| classify(path, "opening its directory", source))?;
        Ok(Self { directory, name, shown: path.to_owned() })
    }

    fn beneath(directory: BorrowedFd<'_>, name: &OsStr) -> Result<Self, SaveError> {
        let shown = PathBuf::from(name);
        let mut components = shown.components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name) {
            return Err(SaveError::NoName { path: shown });
        }
        let directory = directory.try_clone_to_owned().map_err(|source| classify(&shown, "opening its directory", source))?;
        Ok(Self { directory: File::from(directory), name: name.to_owned(), shown })
    }
}

/// A file that is deleted unless it gets its name.
struct Temporary<'a> {
    place: &'a Place,
    name: Option<OsString>,
}

impl<'a> Temporary<'a> {
    fn of(place: &'a Place) -> Self {
        let mut name = OsString::from(".");
        name.push(&place.name);
        name.push(format!(".{}.tmp", Uuid::now_v7()));
        Self { place, name: Some(name) }
    }

    fn create(&self) -> io::Result<File> {
        let name = self.name.as_ref().expect("renamed only once");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.place.directory, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    fn rename(mut self) -> io::Result<()> {
        failpoint!("save.rename", |source| source);
        let name = self.name.as_ref().expect("renamed only once");
        rustix::fs::renameat(&self.place.directory, name, &self.place.directory, &self.place.name)?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // It may not exist yet; what cannot be deleted is found by its name and suffix.
            rustix::fs::unlinkat(&self.place.directory, name, AtFlags::empty()).unwrap_or_default();
        }
    }
}

fn classify(path: &Path, step: &'static str, source: io::Error) -> SaveError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => SaveError::Full { path, step, source },
        _ => SaveError::Io { path, step, source },
    }
}
