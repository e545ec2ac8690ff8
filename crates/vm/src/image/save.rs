//! Saving an image: written beside its place under a temporary name, made durable, and only then given its name. A crash
//! leaves the old file or the new one, never a part of one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use types::manifest::{HeadError, encode_hash_page, hash_page_digests};
use types::{Digest, EXTENT_SIZE, ExtentIndex, Head, PAGE_SIZE, RegionHead, Source};
use uuid::Uuid;

use super::file::{Places, Preamble};
use super::{Image, RamRegion};
use crate::sys::file_map::SealedMap;

/// What was saved.
#[derive(Clone, Copy, Debug)]
pub struct SaveReport {
    /// The image's name everywhere.
    pub digest: Digest,
    /// Bytes of non-zero pages that were written.
    pub written_bytes: u64,
}

/// Why an image was not saved. There is no new file, and an old one of that name is as it was.
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
            Self::Head(_) => "freeze again: the image has more parts than a manifest may name",
        }
    }
}

/// Saves `image` under `path`, replacing what is there. `progress` is told the extents done and the extents in all.
///
/// # Errors
/// [`SaveError`]; nothing is left behind.
pub fn save(image: &Image, path: &Path, mut progress: impl FnMut(u64, u64)) -> Result<SaveReport, SaveError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or_else(|| SaveError::NoName { path: path.to_owned() })?;
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{}.tmp", Uuid::now_v7()));
    let temporary = Temporary { path: Some(directory.join(temporary_name)) };
    let io = |step| move |source| classify(path, step, source);

    let digests = Digests::of(image, &mut progress)?;
    let head = head_of(image, &digests);
    let frame = head.encode()?;
    let digest = Digest::of(&frame);
    let file = temporary.create().map_err(io("creating a temporary file"))?;
    let written_bytes = write_all(&file, image, &head, &frame, &digests).map_err(|failed| match failed {
        WriteFailed::Memory(source) => SaveError::Memory { source },
        WriteFailed::File(step, source) => classify(path, step, source),
    })?;
    sync(&file).map_err(io("fsync"))?;
    temporary.rename_to(path).map_err(io("renaming"))?;
    // The name is durable once the directory is. Should that fail, the file is whole all the same, under its name.
    File::open(directory).and_then(|directory| sync(&directory)).map_err(io("fsync of the directory"))?;
    let digest = *image.digest.get_or_init(|| digest);
    Ok(SaveReport { digest, written_bytes })
}

/// The digest of every extent.
struct Digests {
    regions: Vec<Vec<Digest>>,
}

impl Digests {
    fn of(image: &Image, progress: &mut impl FnMut(u64, u64)) -> Result<Self, SaveError> {
        let total: u64 = image.ram.iter().map(|region| u64::from(region.map.data_extent_count())).sum();
        let mut done = 0;
        let mut regions = Vec::with_capacity(image.ram.len());
        for region in &image.ram {
            let mut digests = vec![Digest::ZERO_CONTENT; region.map.extent_count() as usize];
            let hashed = each_extent(region, |extent, bytes| {
                if !is_zero(bytes) {
                    digests[extent.0 as usize] = Digest::of(bytes);
                }
                done += 1;
                progress(done, total);
                Ok(())
            });
            hashed.map_err(|source| SaveError::Memory { source })?;
            regions.push(digests);
        }
        Ok(Self { regions })
    }
}

fn head_of(image: &Image, digests: &Digests) -> Head {
    let regions = image.ram.iter().zip(&digests.regions).map(|(region, digests)| {
        // On disk the layers are one.
        let lengths = coalesce(region.map.runs().iter().map(|run| {
            let source = if run.source == Source::Zero { Source::Zero } else { Source::Layer(types::LayerIndex(0)) };
            (run.count, source)
        }));
        let map = types::ExtentMap::from_lengths(lengths).expect("fewer runs than a valid map had");
        RegionHead { kind: region.kind, map, hash_pages: hash_page_digests(digests) }
    });
    Head {
        cpu: image.cpu.clone(),
        vcpu_count: image.class.vcpu_count(),
        state: image.state.encode(),
        regions: regions.collect(),
        identity_page: image.identity_page,
        working_set: Vec::new(),
        parents: image.parents.clone(),
    }
}

fn coalesce(lengths: impl Iterator<Item = (u32, Source)>) -> Vec<(u32, Source)> {
    let mut joined: Vec<(u32, Source)> = Vec::new();
    for (count, source) in lengths {
        match joined.last_mut() {
            Some(last) if last.1 == source => last.0 += count,
            _ => joined.push((count, source)),
        }
    }
    joined
}

enum WriteFailed {
    Memory(io::Error),
    File(&'static str, io::Error),
}

fn write_all(file: &File, image: &Image, head: &Head, frame: &[u8], digests: &Digests) -> Result<u64, WriteFailed> {
    let failed = |step| move |source| WriteFailed::File(step, source);
    let places = Places::of(head);
    file.set_len(places.file_len).map_err(failed("setting the file's length"))?;
    let preamble = Preamble { head_len: frame.len(), head_digest: Digest::of(frame) };
    write_at(file, &preamble.encode(), 0).map_err(failed("writing the preamble"))?;
    write_at(file, frame, Places::HEAD).map_err(failed("writing the manifest"))?;
    let mut written = 0;
    for ((region, digests), (pages, start)) in
        image.ram.iter().zip(&digests.regions).zip(places.hash_pages.iter().zip(&places.regions))
    {
        let mut first = 0;
        for (at, count) in pages {
            let page = encode_hash_page(&digests[first..first + *count as usize]);
            write_at(file, &page, *at).map_err(failed("writing a hash page"))?;
            first += *count as usize;
        }
        let mut wrong = None;
        let read = each_extent(region, |extent, bytes| {
            match write_pages(file, bytes, start + extent.byte_offset()) {
                Ok(bytes) => written += bytes,
                Err(source) => {
                    wrong = Some(source);
                    return Err(io::ErrorKind::Interrupted.into());
                }
            }
            Ok(())
        });
        match (wrong, read) {
            (Some(source), _) => return Err(WriteFailed::File("writing memory", source)),
            (None, read) => read.map_err(WriteFailed::Memory)?,
        }
    }
    Ok(written)
}

/// Calls `each` with every extent that a layer holds.
fn each_extent(region: &RamRegion, mut each: impl FnMut(ExtentIndex, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let extent_len = usize::try_from(EXTENT_SIZE).expect("64-bit host");
    for run in region.map.data_runs() {
        let Source::Layer(layer) = run.source else {
            continue;
        };
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

fn is_zero(bytes: &[u8]) -> bool {
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

/// A file that is deleted unless it gets its name.
struct Temporary {
    path: Option<PathBuf>,
}

impl Temporary {
    fn create(&self) -> io::Result<File> {
        let path = self.path.as_ref().expect("renamed only once");
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)
    }

    fn rename_to(mut self, path: &Path) -> io::Result<()> {
        failpoint!("save.rename", |source| source);
        std::fs::rename(self.path.as_ref().expect("renamed only once"), path)?;
        self.path = None;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may not exist yet; what cannot be deleted is found by its name and suffix.
            std::fs::remove_file(path).unwrap_or_default();
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
