//! The files that tasks kept, into a directory each. What is in an archive was written by a guest, which is trusted with nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use uuid::Uuid;

use super::error::JobError;
use super::follow::{Following, Patience};
use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::output::printable;

/// Archives that are fetched at a time.
const AT_ONCE: usize = 4;
/// The most bytes of an archive, and of the files in it: above what a node keeps of a task, with what an archive adds.
const ARCHIVE_MAX: usize = 64 << 20;
/// More failures than this say nothing new.
const SHOWN_MAX: usize = 10;

/// Fetches beside whatever else goes on.
pub(super) struct Fetcher {
    tasks: mpsc::UnboundedSender<u32>,
    fetching: JoinHandle<usize>,
}

impl Fetcher {
    /// Into `directory`, which is made.
    pub(super) fn start(client: &Client, job: Uuid, directory: &Path, patience: Patience) -> Result<Self, CliError> {
        fs::create_dir_all(directory).map_err(|source| JobError::Write { path: directory.to_owned(), source })?;
        let (tasks, waiting) = mpsc::unbounded_channel();
        let fetching = tokio::spawn(fetch_all(client.clone(), job, directory.into(), patience, waiting));
        Ok(Self { tasks, fetching })
    }

    /// Those of this task too.
    pub(super) fn fetch(&self, task: u32) {
        // Whoever fetches goes on until this is dropped.
        self.tasks.send(task).unwrap_or_default();
    }

    /// Waits until all are there, says which are not, and returns how many those are.
    pub(super) async fn finish(self) -> usize {
        drop(self.tasks);
        self.fetching.await.unwrap_or(1)
    }
}

async fn fetch_all(
    client: Client,
    job: Uuid,
    directory: Arc<Path>,
    patience: Patience,
    mut tasks: mpsc::UnboundedReceiver<u32>,
) -> usize {
    let (mut going, mut failed) = (JoinSet::new(), 0);
    let mut note = |fetched: Option<Result<(u32, Result<(), CliError>), _>>| match fetched {
        Some(Ok((task, Err(error)))) => {
            failed += 1;
            if failed <= SHOWN_MAX {
                eprintln!("{}", printable(&format!("error: files of task {task}: {error}")));
            }
        }
        Some(Err(_)) => failed += 1,
        _ => {}
    };
    while let Some(task) = tasks.recv().await {
        if going.len() >= AT_ONCE {
            note(going.join_next().await);
        }
        let (client, directory) = (client.clone(), Arc::clone(&directory));
        going.spawn(async move { (task, fetch(&client, job, task, &directory, patience).await) });
    }
    while let Some(fetched) = going.join_next().await {
        note(Some(fetched));
    }
    if failed > SHOWN_MAX {
        eprintln!("error: and those of {} more", failed - SHOWN_MAX);
    }
    failed
}

async fn fetch(client: &Client, job: Uuid, task: u32, directory: &Path, patience: Patience) -> Result<(), CliError> {
    let path = format!("/v1/jobs/{job}/tasks/{task}/files");
    let archive = Following::new(client, job, patience).all_of(&path, ARCHIVE_MAX).await?;
    let into = directory.join(task.to_string());
    let unpacking = into.clone();
    let unpacked = tokio::task::spawn_blocking(move || unpack(&archive, &unpacking)).await;
    let unpacked = unpacked.map_err(io::Error::other).and_then(|unpacked| unpacked);
    Ok(unpacked.map_err(|source| JobError::Write { path: into, source })?)
}

/// Writes nothing outside of the directory, and no more than a node keeps.
fn unpack(archive: &[u8], into: &PathBuf) -> io::Result<()> {
    fs::create_dir_all(into)?;
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(false);
    let (mut bytes, mut directories) = (0_u64, Vec::new());
    for entry in archive.entries()? {
        let mut entry = entry?;
        // A sparse file has more than its archive.
        bytes = bytes.saturating_add(entry.size());
        if bytes > ARCHIVE_MAX as u64 {
            return Err(io::Error::other("the files are larger than what a node keeps"));
        }
        let kind = entry.header().entry_type();
        // Devices and the like are nothing that a guest could have us make.
        let is_plain = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link();
        // One that nobody may write to is so when what is in it is there.
        if kind.is_dir() {
            directories.push(entry);
        } else if is_plain && !entry.unpack_in(into)? {
            return Err(outside());
        }
    }
    for mut directory in directories.into_iter().rev() {
        if !directory.unpack_in(into)? {
            return Err(outside());
        }
    }
    Ok(())
}

fn outside() -> io::Error {
    io::Error::other("the archive names a file outside of the directory")
}

#[cfg(test)]
mod tests {
    use tar::{EntryType, Header};

    use super::*;

    fn archive(path: &[u8], kind: EntryType, size: u64, link: &str) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(size);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(512 + 1024 + 512, 0);
        bytes
    }

    #[test]
    fn files_land_where_they_belong_and_nowhere_else() {
        let at = tempfile::tempdir().unwrap();
        let into = at.path().join("7");
        unpack(&archive(b"out/x", EntryType::Regular, 3, ""), &into).unwrap();
        assert_eq!(fs::read(into.join("out/x")).unwrap(), [0; 3]);
        unpack(&archive(b"../y", EntryType::Regular, 0, ""), &into).unwrap_err();
        unpack(&archive(b"null", EntryType::Char, 0, ""), &into).unwrap();
        assert!(!into.join("null").exists() && !at.path().join("y").exists());
        unpack(&archive(b"large", EntryType::Regular, ARCHIVE_MAX as u64 + 1, ""), &into).unwrap_err();
        unpack(&archive(b"up", EntryType::Symlink, 0, ".."), &into).unwrap();
        unpack(&archive(b"up/z", EntryType::Regular, 0, ""), &into).unwrap_err();
        assert!(!at.path().join("z").exists());
    }
}
