//! The files that are sent along with a job, as one archive: the same bytes for the same files, whoever packs them and when, so
//! that a request that is sent again under its key is the same request.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tar::{EntryType, Header};

use super::error::JobError;
use super::limits::FILES_MAX;
use super::spec::SentFile;
use crate::cli::error::CliError;

/// What has a place in the archive.
enum Entry {
    Directory,
    File(PathBuf, Metadata),
    Link(PathBuf),
}

/// The archive in base64; none without files.
pub(super) fn pack(files: &[SentFile]) -> Result<Option<String>, CliError> {
    if files.is_empty() {
        return Ok(None);
    }
    Ok(Some(STANDARD.encode(archive(files)?)))
}

fn archive(files: &[SentFile]) -> Result<Vec<u8>, CliError> {
    // Sorted by their parts, a directory comes before what is in it.
    let mut entries = BTreeMap::new();
    for file in files {
        // What was named is meant, also by a symbolic link; links within a directory are kept.
        let metadata = fs::metadata(&file.source).map_err(|source| input(&file.source, source))?;
        collect(&file.source, metadata, place(file)?, &mut entries)?;
    }
    let sizes = entries.values().map(|entry| if let Entry::File(_, metadata) = entry { metadata.len() } else { 0 });
    bounded(sizes.fold(0, u64::saturating_add))?;
    let mut builder = tar::Builder::new(Vec::new());
    let mut packed = 0;
    for (place, entry) in entries {
        let failed = |source| input(&place, source);
        match entry {
            // The root is there.
            Entry::Directory if place.as_os_str().is_empty() => {}
            Entry::Directory => {
                builder.append_data(&mut header(EntryType::Directory, 0o755), &place, io::empty()).map_err(failed)?;
            }
            Entry::Link(to) => {
                builder.append_link(&mut header(EntryType::Symlink, 0o777), &place, to).map_err(failed)?;
            }
            Entry::File(path, metadata) => {
                let mut bytes = Vec::new();
                // It may have grown since it was measured.
                let opened = File::open(&path).and_then(|file| file.take(FILES_MAX + 1).read_to_end(&mut bytes));
                opened.map_err(|source| input(&path, source))?;
                packed += bytes.len() as u64;
                bounded(packed)?;
                let mode = if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 };
                let mut header = header(EntryType::Regular, mode);
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, &place, &bytes[..]).map_err(failed)?;
            }
        }
    }
    builder.into_inner().map_err(|source| input(Path::new("the archive"), source))
}

/// Where it goes, from the root on.
fn place(file: &SentFile) -> Result<PathBuf, CliError> {
    // Without parts that say nothing: two names of one place are one place.
    let mut place: PathBuf = file.target.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if file.target.ends_with('/') {
        let source = fs::canonicalize(&file.source).map_err(|source| input(&file.source, source))?;
        // The root itself has no name.
        place.extend(source.file_name());
    }
    Ok(place)
}

fn collect(path: &Path, metadata: Metadata, place: PathBuf, entries: &mut BTreeMap<PathBuf, Entry>) -> Result<(), CliError> {
    let failed = |source| input(path, source);
    let kind = metadata.file_type();
    let entry = if kind.is_symlink() {
        Entry::Link(fs::read_link(path).map_err(failed)?)
    } else if kind.is_dir() {
        for within in fs::read_dir(path).map_err(failed)? {
            let within = within.map_err(failed)?;
            let metadata = fs::symlink_metadata(within.path()).map_err(failed)?;
            collect(&within.path(), metadata, place.join(within.file_name()), entries)?;
        }
        Entry::Directory
    } else if kind.is_file() {
        Entry::File(path.to_owned(), metadata)
    } else {
        return Err(JobError::NoFile { path: path.to_owned() }.into());
    };
    let is_directory = matches!(entry, Entry::Directory);
    match entries.insert(place.clone(), entry) {
        None => Ok(()),
        // Two trees may meet in a directory.
        Some(Entry::Directory) if is_directory => Ok(()),
        Some(_) => Err(JobError::SameTarget { path: format!("/{}", place.display()) }.into()),
    }
}

fn bounded(bytes: u64) -> Result<(), JobError> {
    if bytes > FILES_MAX { Err(JobError::FilesTooLarge { bytes }) } else { Ok(()) }
}

/// Owner, time and all but one bit of the mode are not those of whoever packs.
fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

fn input(file: &Path, source: io::Error) -> CliError {
    CliError::Input { file: file.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn sent(source: &Path, target: &str) -> SentFile {
        SentFile { source: source.to_owned(), target: target.to_owned() }
    }

    fn tree(at: &Path) {
        fs::create_dir_all(at.join("tree/sub")).unwrap();
        fs::write(at.join("tree/b"), "b").unwrap();
        fs::write(at.join("tree/sub/run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(at.join("tree/sub/run"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("../b", at.join("tree/sub/link")).unwrap();
    }

    fn listed(archive: &[u8]) -> Vec<(String, u32, String)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let header = entry.header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, 0));
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            let link = entry.link_name().unwrap().map(|to| to.display().to_string());
            (entry.path().unwrap().display().to_string(), header.mode().unwrap(), link.unwrap_or(content))
        });
        entries.collect()
    }

    #[test]
    fn the_same_files_are_the_same_bytes() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tree(one.path());
        tree(other.path());
        let file = File::options().write(true).open(other.path().join("tree/b")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        fs::set_permissions(other.path().join("tree/b"), fs::Permissions::from_mode(0o600)).unwrap();
        let packed = archive(&[sent(&one.path().join("tree"), "/srv/in")]).unwrap();
        assert_eq!(packed, archive(&[sent(&other.path().join("tree"), "/srv//./in")]).unwrap());
        let entry = |path: &str, mode, content: &str| (path.to_owned(), mode, content.to_owned());
        let expected = [
            entry("srv/in", 0o755, ""),
            entry("srv/in/b", 0o644, "b"),
            entry("srv/in/sub", 0o755, ""),
            entry("srv/in/sub/link", 0o777, "../b"),
            entry("srv/in/sub/run", 0o755, "#!/bin/sh\n"),
        ];
        assert_eq!(listed(&packed), expected);
    }

    #[test]
    fn what_ends_with_a_slash_is_a_directory_to_put_it_into() {
        let at = tempfile::tempdir().unwrap();
        tree(at.path());
        let file = at.path().join("tree/b");
        let names =
            |files: &[SentFile]| listed(&archive(files).unwrap()).into_iter().map(|(path, ..)| path).collect::<Vec<_>>();
        assert_eq!(names(&[sent(&file, "/srv/")]), ["srv/b"]);
        assert_eq!(names(&[sent(&file, "/srv/c")]), ["srv/c"]);
        assert_eq!(names(&[sent(&file, "/")]), ["b"]);
        assert_eq!(names(&[sent(&at.path().join("tree/sub"), "/")]), ["sub", "sub/link", "sub/run"]);
        let long = format!("/{}/x", "d".repeat(200));
        assert_eq!(names(&[sent(&file, &long)]), [long[1..].to_owned()]);
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let at = tempfile::tempdir().unwrap();
        tree(at.path());
        let file = at.path().join("tree/b");
        let twice = archive(&[sent(&file, "/x"), sent(&file, "//x")]).unwrap_err();
        assert_eq!(twice.to_string(), "two files for the children are called /x");
        let device = archive(&[sent(Path::new("/dev/null"), "/x")]).unwrap_err();
        assert!(matches!(device, CliError::Job(JobError::NoFile { .. })), "{device}");
        assert!(matches!(archive(&[sent(Path::new("/nowhere"), "/x")]), Err(CliError::Input { .. })));
        File::create(&file).unwrap().set_len(FILES_MAX + 1).unwrap();
        let large = archive(&[sent(&file, "/x")]).unwrap_err();
        assert!(matches!(large, CliError::Job(JobError::FilesTooLarge { .. })), "{large}");
        assert_eq!(large.code(), types::ExitCode::Usage);
    }
}
