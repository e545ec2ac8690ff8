//! Images in and out of the store, as files. What comes in is verified before it has its name.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::PoisonError;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use types::FullName;
use uuid::Uuid;

use super::errors::{of_load, of_store, unknown_name};
use super::{KnownImage, KvmEngine, SUFFIX, file_name, open_stored};
use crate::node::engine::{EngineError, ErrorKind, ImageFacts};

/// What a file is called while it comes in; no name of an image's.
const COMING: &str = ".importing";
const PIECE: usize = 1 << 20;
const PAGE: usize = 4096;

/// Removes what a node that was killed had left of imports.
pub(super) fn remove_halves(store: &OwnedFd) -> Result<(), Errno> {
    for entry in Dir::read_from(store)? {
        let entry = entry?;
        if entry.file_name().to_bytes().ends_with(COMING.as_bytes()) {
            rustix::fs::unlinkat(store, entry.file_name(), AtFlags::empty())?;
        }
    }
    Ok(())
}

impl KvmEngine {
    pub(super) fn export_image(&self, name: &FullName) -> Result<File, EngineError> {
        match self.open_beneath(&file_name(name), OFlags::RDONLY, Mode::empty()) {
            Ok(file) => Ok(file),
            Err(Errno::NOENT | Errno::LOOP) => Err(unknown_name(name)),
            Err(error) => Err(of_store("opening the image", error)),
        }
    }

    pub(super) fn import_image(&self, name: &FullName, archive: &mut dyn Read) -> Result<ImageFacts, EngineError> {
        self.check_free(name)?;
        let coming = OsString::from(format!("{}{COMING}", Uuid::now_v7().simple()));
        let imported = self.receive(archive, &coming).and_then(|()| {
            let image = vm::image::load_in(self.pool.host(), self.store.as_fd(), &coming, |_, _| {});
            let image = image.map_err(|error| of_load(&error, name))?;
            // Nobody waits for a client that is slow to send.
            let _one_at_a_time = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
            self.check_free(name)?;
            rustix::fs::renameat(&self.store, &coming, &self.store, file_name(name))
                .and_then(|()| rustix::fs::fsync(&self.store))
                .map_err(|error| of_store("naming the image", error))?;
            Ok(image)
        });
        match imported {
            Ok(image) => self.keep(KnownImage { image, tenant: name.tenant.clone(), pattern_pages: None }),
            Err(error) => {
                // It may not even have been made.
                rustix::fs::unlinkat(&self.store, &coming, AtFlags::empty()).unwrap_or_default();
                Err(error)
            }
        }
    }

    /// Writes what comes, with holes where it is zero.
    fn receive(&self, archive: &mut dyn Read, into: &OsString) -> Result<(), EngineError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let file = self.open_beneath(into, flags, Mode::from(0o600)).map_err(|error| of_store("making a file", error))?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        loop {
            let count = fill(archive, &mut buffer).map_err(|error| EngineError {
                kind: ErrorKind::BadImage,
                message: format!("the archive broke off after {at} bytes: {error}"),
                remedy: "send it again".to_owned(),
            })?;
            for (page, bytes) in (0u64..).zip(buffer[..count].chunks(PAGE)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    file.write_all_at(bytes, at + page * PAGE as u64).map_err(|error| written(&error))?;
                }
            }
            at += count as u64;
            if count < buffer.len() {
                return file.set_len(at).and_then(|()| file.sync_all()).map_err(|error| written(&error));
            }
        }
    }

    /// Names in the store, with what each file takes on disk in bytes.
    pub(super) fn stored_images(&self) -> Result<Vec<(FullName, u64)>, EngineError> {
        let failed = |error| of_store("listing the store", error);
        let mut stored = Vec::new();
        for entry in Dir::read_from(&self.store).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_str().ok().and_then(|file| file.strip_suffix(SUFFIX));
            let Some(name) = name.and_then(FullName::of_file_stem) else { continue };
            match open_stored(&self.store, &name).map(File::from) {
                // What it takes on disk: the file has holes.
                Ok(file) => stored.push((name, file.metadata().map_or(0, |metadata| metadata.blocks() * 512))),
                // Deleted since, or no file that a save made.
                Err(Errno::NOENT | Errno::LOOP) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        stored.sort();
        Ok(stored)
    }

    fn open_beneath(&self, file: &OsString, flags: OFlags, mode: Mode) -> Result<File, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&self.store, file, flags | OFlags::CLOEXEC, mode, resolve).map(File::from)
    }
}

fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match from.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn written(error: &io::Error) -> EngineError {
    let kind = if error.kind() == io::ErrorKind::StorageFull { ErrorKind::StoreFull } else { ErrorKind::Store };
    let remedy = "make room on the disk that holds the node's data directory".to_owned();
    EngineError { kind, message: format!("writing the image failed: {error}"), remedy }
}
