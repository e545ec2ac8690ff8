//! Root file systems as people have them: an ext4 image is taken as it is; a directory, a tar archive, an OCI layout or what
//! `docker save` wrote is made one, without mounting anything.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use thiserror::Error;

/// Where ext4 has its magic number.
const EXT4_MAGIC_AT: u64 = 1024 + 0x38;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xEF];
const GZIP_MAGIC: [u8; 2] = [0x1F, 0x8B];
/// What a layer takes away of those below it (OCI image specification, layers).
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// Room that is left free: a quarter, and this.
const SPARE_BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
/// The longest JSON that an image describes itself with.
const JSON_MAX: u64 = 16 << 20;

/// Why no root file system could be made.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum RootfsError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is neither an ext4 image, a directory, nor a tar archive", path.display())]
    Unknown { path: PathBuf },
    #[error("{} is no image: {what}", path.display())]
    BadImage { path: PathBuf, what: String },
    #[error("mke2fs is missing")]
    NoTool,
    #[error("mke2fs failed: {said}")]
    Tool { said: String },
}

impl RootfsError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { .. } => "make room, or name a file that this user may read",
            Self::Unknown { .. } => "name one of those; docs/guests.md shows how each is made",
            Self::BadImage { .. } => "export it again (docker save, or skopeo copy docker://NAME oci:DIRECTORY)",
            Self::NoTool => "install e2fsprogs",
            Self::Tool { .. } => "ask for a larger --disk, or look at what it said",
        }
    }
}

/// An ext4 image, which lives as long as this.
pub(super) struct Rootfs {
    pub(super) path: PathBuf,
    _made_in: Option<TempDir>,
}

/// Makes a root file system of what was named, at least so many bytes large.
pub(super) fn prepare(named: &Path, disk_bytes: Option<u64>) -> Result<Rootfs, RootfsError> {
    let at = |source| RootfsError::Io { path: named.to_owned(), source };
    if named.is_file() && is_ext4(named).map_err(at)? {
        return Ok(Rootfs { path: named.to_owned(), _made_in: None });
    }
    let work = tempfile::Builder::new().prefix("farfork-rootfs-").tempdir().map_err(at)?;
    let tree = work.path().join("tree");
    fs::create_dir(&tree).map_err(at)?;
    let tree = if named.is_dir() && !named.join("index.json").exists() {
        named.to_owned()
    } else if named.is_dir() {
        unpack_image(named, &tree)?;
        tree
    } else {
        let archive = work.path().join("archive");
        fs::create_dir(&archive).map_err(at)?;
        unpack(named, &archive).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::PermissionDenied => at(source),
            _ => RootfsError::Unknown { path: named.to_owned() },
        })?;
        if archive.join("manifest.json").exists() || archive.join("index.json").exists() {
            unpack_image(&archive, &tree)?;
            tree
        } else {
            archive
        }
    };
    let image = work.path().join("root.ext4");
    make(&tree, &image, disk_bytes)?;
    Ok(Rootfs { path: image, _made_in: Some(work) })
}

fn is_ext4(path: &Path) -> io::Result<bool> {
    let mut magic = [0; 2];
    let file = File::open(path)?;
    Ok(file.read_exact_at(&mut magic, EXT4_MAGIC_AT).is_ok() && magic == EXT4_MAGIC)
}

fn make(tree: &Path, image: &Path, disk_bytes: Option<u64>) -> Result<(), RootfsError> {
    let used = size_of(tree).map_err(|source| RootfsError::Io { path: tree.to_owned(), source })?;
    let least = (used + used / 4 + SPARE_BYTES).div_ceil(2 * MIB) * 2;
    let mib = disk_bytes.map_or(least, |bytes| bytes / MIB);
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-L", "farfork", "-b", "4096", "-m", "0", "-O", "^has_journal", "-d"])
        .args([tree, image])
        .arg(format!("{mib}M"))
        .output();
    let made = made.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => RootfsError::NoTool,
        _ => RootfsError::Io { path: image.to_owned(), source: error },
    })?;
    if made.status.success() {
        return Ok(());
    }
    Err(RootfsError::Tool { said: String::from_utf8_lossy(&made.stderr).trim().to_owned() })
}

/// Bytes in blocks, and one block for each file.
fn size_of(tree: &Path) -> io::Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(tree)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        total += metadata.len().div_ceil(4096) * 4096 + 4096;
        if metadata.is_dir() {
            total += size_of(&entry.path())?;
        }
    }
    Ok(total)
}

/// A tar archive, packed or not.
fn open_archive(path: &Path) -> io::Result<tar::Archive<Box<dyn Read>>> {
    let file = File::open(path)?;
    let mut magic = [0; 2];
    let is_packed = file.read_exact_at(&mut magic, 0).is_ok() && magic == GZIP_MAGIC;
    let bytes: Box<dyn Read> = if is_packed {
        Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    let mut archive = tar::Archive::new(bytes);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    archive.set_overwrite(true);
    Ok(archive)
}

fn unpack(path: &Path, into: &Path) -> io::Result<()> {
    let mut archive = open_archive(path)?;
    archive.unpack(into)?;
    if fs::read_dir(into)?.next().is_none() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(())
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default, rename = "mediaType")]
    media_type: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// `manifest.json` of `docker save`.
#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    config: Settings,
}

#[derive(Default, Deserialize)]
struct Settings {
    #[serde(default, rename = "Env")]
    env: Option<Vec<String>>,
}

/// An OCI layout, or what `docker save` wrote: its layers, one over the other.
fn unpack_image(layout: &Path, into: &Path) -> Result<(), RootfsError> {
    let bad = |what: String| RootfsError::BadImage { path: layout.to_owned(), what };
    let (config, layers) = if layout.join("manifest.json").exists() {
        let saved: Vec<Saved> = json(layout, "manifest.json")?;
        let one = saved.into_iter().next().ok_or_else(|| bad("its manifest names no image".to_owned()))?;
        (one.config, one.layers)
    } else {
        let index: Index = json(layout, "index.json")?;
        let first = index.manifests.first().ok_or_else(|| bad("its index names no image".to_owned()))?;
        let manifest: Manifest = json(layout, &blob(first).map_err(bad)?)?;
        if let Some(other) = manifest.layers.iter().find(|layer| layer.media_type.ends_with("zstd")) {
            return Err(bad(format!("layer {} is packed with zstd; gzip and none are read", other.digest)));
        }
        let layers: Result<Vec<String>, String> = manifest.layers.iter().map(blob).collect();
        (blob(&manifest.config).map_err(bad)?, layers.map_err(bad)?)
    };
    for layer in &layers {
        let path = beneath(layout, layer).map_err(bad)?;
        apply_layer(&path, into).map_err(|source| RootfsError::Io { path, source })?;
    }
    let Config { config } = json(layout, &config)?;
    write_environment(into, &config.env.unwrap_or_default()).map_err(|source| RootfsError::Io { path: into.to_owned(), source })
}

/// Where a layout has what a digest names.
fn blob(descriptor: &Descriptor) -> Result<String, String> {
    let (kind, digits) = descriptor.digest.split_once(':').ok_or_else(|| format!("{:?} is no digest", descriptor.digest))?;
    let is_plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_plain(kind) && is_plain(digits) {
        Ok(format!("blobs/{kind}/{digits}"))
    } else {
        Err(format!("{:?} is no digest", descriptor.digest))
    }
}

/// A path that an image names, which stays within it.
fn beneath(layout: &Path, named: &str) -> Result<PathBuf, String> {
    let path = Path::new(named);
    let is_plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    // Links within it are followed, as `docker save` makes them.
    let real = layout.canonicalize().ok().zip(layout.join(path).canonicalize().ok());
    match real.filter(|(root, path)| is_plain && path.starts_with(root) && path.is_file()) {
        Some((_, path)) => Ok(path),
        None => Err(format!("it names {named:?}, which is no file of its own")),
    }
}

fn json<T: DeserializeOwned>(layout: &Path, file: &str) -> Result<T, RootfsError> {
    let bad = |what: String| RootfsError::BadImage { path: layout.to_owned(), what };
    let path = beneath(layout, file).map_err(bad)?;
    let opened = File::open(&path).map_err(|source| RootfsError::Io { path: path.clone(), source })?;
    serde_json::from_reader(BufReader::new(opened.take(JSON_MAX))).map_err(|error| bad(format!("{file}: {error}")))
}

/// Unpacks a layer over those below it, less what it takes away.
fn apply_layer(layer: &Path, into: &Path) -> io::Result<()> {
    // What is taken away is of lower layers: before anything of this one is there.
    for entry in open_archive(layer)?.entries()? {
        let path = entry?.path()?.into_owned();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with(WHITEOUT)) else {
            continue;
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let Some(directory) = real_directory(into, parent) else { continue };
        if name == OPAQUE {
            for below in fs::read_dir(&directory)? {
                remove(&below?.path())?;
            }
        } else if let Some(Component::Normal(file)) = Path::new(&name[WHITEOUT.len()..]).components().next() {
            // And not the directory itself, or the one above it.
            remove(&directory.join(file))?;
        }
    }
    let mut archive = open_archive(layer)?;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let is_whiteout = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(WHITEOUT));
        if is_whiteout {
            continue;
        }
        // What is there of a lower layer makes room, unless both are directories: hard links and the like replace nothing.
        let place = path.parent().and_then(|parent| real_directory(into, parent)).zip(path.file_name());
        if let Some(place) = place.map(|(directory, name)| directory.join(name)) {
            let is_directory = place.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
            if !(is_directory && entry.header().entry_type().is_dir()) {
                remove(&place)?;
            }
        }
        entry.unpack_in(into)?;
    }
    Ok(())
}

/// A directory of the tree that no link leads out of.
fn real_directory(tree: &Path, relative: &Path) -> Option<PathBuf> {
    let (root, path) = (tree.canonicalize().ok()?, tree.join(relative).canonicalize().ok()?);
    path.starts_with(root).then_some(path).filter(|path| path.is_dir())
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// What the image wants every program to have, where the agent looks for it.
fn write_environment(tree: &Path, environment: &[String]) -> io::Result<()> {
    let text: String =
        environment.iter().filter(|line| line.contains('=') && !line.contains('\n')).map(|line| format!("{line}\n")).collect();
    let directory = tree.join("etc/farfork");
    // Not through a link that the image brought along, on the way or at its end.
    let is_link = |path: &Path| path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
    let file = directory.join("environment");
    if text.is_empty() || is_link(&tree.join("etc")) || is_link(&directory) || file.symlink_metadata().is_ok() {
        return Ok(());
    }
    fs::create_dir_all(&directory)?;
    fs::write(file, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar archive of files with their content; those that end with a slash are directories.
    fn archive(path: &Path, files: &[(&str, &str)]) {
        let mut builder = tar::Builder::new(File::create(path).unwrap());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            let is_directory = name.ends_with('/');
            header.set_entry_type(if is_directory { tar::EntryType::Directory } else { tar::EntryType::Regular });
            header.set_mode(if is_directory { 0o755 } else { 0o644 });
            header.set_size(content.len() as u64);
            owned_by_root(&mut header);
            builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        builder.finish().unwrap();
    }

    fn owned_by_root(header: &mut tar::Header) {
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
    }

    fn read(tree: &Path, file: &str) -> Option<String> {
        fs::read_to_string(tree.join(file)).ok()
    }

    /// An OCI layout of these layers.
    fn layout(directory: &Path, layers: &[&[(&str, &str)]]) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let mut described = Vec::new();
        for (number, files) in layers.iter().enumerate() {
            archive(&blobs.join(format!("layer{number}")), files);
            described
                .push(format!(r#"{{"digest":"sha256:layer{number}","mediaType":"application/vnd.oci.image.layer.v1.tar"}}"#));
        }
        fs::write(blobs.join("config"), r#"{"config":{"Env":["PATH=/bin","A=b c"]}}"#).unwrap();
        let manifest = format!(r#"{{"config":{{"digest":"sha256:config"}},"layers":[{}]}}"#, described.join(","));
        fs::write(blobs.join("manifest"), manifest).unwrap();
        fs::write(directory.join("index.json"), r#"{"manifests":[{"digest":"sha256:manifest"}]}"#).unwrap();
    }

    #[test]
    fn layers_are_put_over_one_another_and_take_away_what_they_say() {
        let work = tempfile::tempdir().unwrap();
        let lower: &[(&str, &str)] =
            &[("etc/", ""), ("etc/a", "1"), ("etc/b", "1"), ("var/", ""), ("var/x", "1"), ("var/y", "1"), ("was-dir/", "")];
        let upper: &[(&str, &str)] =
            &[("etc/.wh.a", ""), ("etc/b", "2"), ("var/.wh..wh..opq", ""), ("var/z", "2"), ("was-dir", "2")];
        layout(work.path(), &[lower, upper]);
        let tree = tempfile::tempdir().unwrap();
        unpack_image(work.path(), tree.path()).unwrap();
        assert_eq!((read(tree.path(), "etc/a"), read(tree.path(), "etc/b").as_deref()), (None, Some("2")));
        assert_eq!((read(tree.path(), "var/x"), read(tree.path(), "var/z").as_deref()), (None, Some("2")));
        assert_eq!(read(tree.path(), "was-dir").as_deref(), Some("2"));
        assert_eq!(read(tree.path(), "etc/farfork/environment").as_deref(), Some("PATH=/bin\nA=b c\n"));
    }

    /// Unpacking is done by root.
    #[test]
    fn an_image_reaches_nothing_outside_of_itself() {
        let work = tempfile::tempdir().unwrap();
        let outside = work.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "1").unwrap();
        let (oci, tree) = (work.path().join("oci"), work.path().join("tree"));
        fs::create_dir(&tree).unwrap();
        layout(&oci, &[&[("etc/", ""), (".wh...", ""), (".wh..", ""), ("etc/.wh...", ""), ("link/.wh.kept", "")]]);
        std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();
        fs::create_dir(tree.join("etc")).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("etc/farfork")).unwrap();
        unpack_image(&oci, &tree).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "something was written or removed outside");
        assert!(tree.join("etc").is_dir() && oci.is_dir());
    }

    #[test]
    fn every_kind_becomes_an_ext4_image() {
        let work = tempfile::tempdir().unwrap();
        let tree = work.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/hostname"), "x").unwrap();
        let plain = work.path().join("plain.tar");
        archive(&plain, &[("etc/", ""), ("etc/hostname", "x")]);
        let oci = work.path().join("oci");
        layout(&oci, &[&[("etc/", ""), ("etc/hostname", "x")]]);
        let saved = work.path().join("saved.tar");
        let layer = work.path().join("layer.tar");
        archive(&layer, &[("etc/", ""), ("etc/hostname", "x")]);
        let layer = fs::read(&layer).unwrap();
        let mut builder = tar::Builder::new(File::create(&saved).unwrap());
        let manifest = br#"[{"Config":"c.json","Layers":["l/layer.tar"]}]"#;
        for (name, content) in [("manifest.json", &manifest[..]), ("c.json", b"{}"), ("l/layer.tar", &layer)] {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            owned_by_root(&mut header);
            builder.append_data(&mut header, name, content).unwrap();
        }
        builder.finish().unwrap();
        drop(builder);
        for kind in [&tree, &plain, &oci, &saved] {
            let made = prepare(kind, Some(16 << 20)).unwrap_or_else(|error| panic!("{}: {error}", kind.display()));
            assert!(is_ext4(&made.path).unwrap());
            assert_eq!(fs::metadata(&made.path).unwrap().len(), 16 << 20);
            let listed = Command::new("debugfs").args(["-R", "cat /etc/hostname"]).arg(&made.path).output().unwrap();
            assert_eq!(listed.stdout, b"x", "{}", kind.display());
            assert_eq!(prepare(&made.path, None).unwrap().path, made.path, "an ext4 image is taken as it is");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        let work = tempfile::tempdir().unwrap();
        let text = work.path().join("text");
        fs::write(&text, "no archive").unwrap();
        assert!(matches!(prepare(&text, None), Err(RootfsError::Unknown { .. })));
        let oci = work.path().join("oci");
        layout(&oci, &[]);
        for (file, content) in [
            ("index.json", r#"{"manifests":[]}"#),
            ("index.json", "{"),
            ("index.json", r#"{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}"#),
            ("index.json", r#"{"manifests":[{"digest":"none"}]}"#),
        ] {
            fs::write(oci.join(file), content).unwrap();
            assert!(matches!(prepare(&oci, None), Err(RootfsError::BadImage { .. })), "{content}");
        }
        fs::write(oci.join("manifest.json"), r#"[{"Config":"c","Layers":["../x.tar"]}]"#).unwrap();
        assert!(matches!(prepare(&oci, None), Err(RootfsError::BadImage { .. })));
    }
}
