//! What `farfork up` has started, on disk, so that `farfork down` finds it whatever became of `up`.
//!
//! ```text
//! /var/lib/farfork-local   0700
//!   lock             held (flock) by `up` and `down` while they work
//!   up.json          nodes, their processes and their namespaces; written before each step and after it
//!   ca-passphrase    of the cluster's authority
//!   node-1/          data/, farfork.sock, log; and so on
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use types::Name;

use super::error::UpError;
use super::network::{self, Namespaces};
use super::process::Process;
use crate::node::{DataDirectory, DataError, files, kvm};

/// Of `up.json`. What a newer farfork has written is not touched.
const FORMAT: u32 = 1;
const LOCK: &str = "lock";
const STATE: &str = "up.json";
/// What there may be before there is a state.
const EARLY: [&str; 3] = [LOCK, STATE, "up.json.new"];
const PASSPHRASE: &str = "ca-passphrase";
/// More than any format of it needs.
const STATE_BYTES_MAX: usize = 64 << 10;
/// Of the path of a socket (unix(7)).
const SOCKET_BYTES_MAX: usize = 107;

/// The directory of a local cluster, taken by this process.
pub(super) struct Directory {
    path: PathBuf,
    handle: OwnedFd,
    /// Unlocked by the kernel when this process is gone, however it went.
    _lock: File,
}

/// Where a node has what it has.
pub(super) struct Places {
    /// All of it.
    pub(super) directory: PathBuf,
    pub(super) data: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) log: PathBuf,
}

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    format: u32,
    /// Whether each node has a network namespace of its own. Otherwise all are on the loopback.
    pub(super) is_isolated: bool,
    /// Those that were made, or were about to be.
    pub(super) namespaces: Option<Namespaces>,
    pub(super) nodes: Vec<Node>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub(super) name: Name,
    /// Where it listens for others.
    pub(super) address: SocketAddr,
    /// Whether it is a voter.
    pub(super) votes: bool,
    /// As it was started last.
    pub(super) process: Option<Process>,
}

impl State {
    /// So many nodes, of which none runs: all of them vote, up to three, of five and more five.
    pub(super) fn new(count: usize, is_isolated: bool) -> io::Result<Self> {
        let addresses = if is_isolated { network::addresses(count) } else { network::free_on_loopback(count)? };
        let voters = if count >= 5 { 5 } else { 3 };
        let nodes = addresses.into_iter().enumerate().map(|(index, address)| Node {
            name: Name::parse(&format!("node-{}", index + 1)).expect("a letter, digits and a dash"),
            address,
            votes: index < voters,
            process: None,
        });
        Ok(Self { format: FORMAT, is_isolated, namespaces: None, nodes: nodes.collect() })
    }

    /// The namespace of a node, if it has one.
    pub(super) fn namespace(&self, node: &Node) -> Option<String> {
        self.namespaces.as_ref().map(|namespaces| namespaces.node(&node.name))
    }
}

impl Directory {
    /// Makes it if need be.
    pub(super) fn make(path: &Path) -> Result<Self, UpError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| UpError::io(path, error))?;
        let entries: io::Result<Vec<_>> = fs::read_dir(path).and_then(Iterator::collect);
        let entries = entries.map_err(|error| UpError::io(path, error))?;
        let is_ours = |entry: &fs::DirEntry| EARLY.iter().any(|name| entry.file_name() == *name);
        // The state is written before anything else, so it is looked for after all else.
        if !entries.iter().all(is_ours) && !path.join(STATE).exists() {
            return Err(UpError::Foreign { directory: path.to_owned() });
        }
        Self::take(path)
    }

    /// Takes it, if there is one.
    pub(super) fn find(path: &Path) -> Result<Option<Self>, UpError> {
        if path.join(STATE).exists() { Self::take(path).map(Some) } else { Ok(None) }
    }

    fn take(path: &Path) -> Result<Self, UpError> {
        // Processes are known by it, also from elsewhere.
        let path = path.canonicalize().map_err(|error| UpError::io(path, error))?;
        let failed = |error: Errno| UpError::io(&path, error);
        let busy = || UpError::Busy { directory: path.clone() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed)?;
        let is = rustix::fs::fstat(&handle).map_err(failed)?;
        // Root must not signal what a file of somebody else names.
        if is.st_uid != rustix::process::geteuid().as_raw() {
            return Err(UpError::Owner { directory: path, owner: is.st_uid });
        }
        if is.st_mode & 0o077 != 0 {
            rustix::fs::fchmod(&handle, Mode::from(0o700)).map_err(failed)?;
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let lock = File::from(files::open_beneath(&handle, LOCK, flags, Mode::from(0o600)).map_err(failed)?);
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(busy()),
            Err(error) => return Err(failed(error)),
        }
        // What was locked may be what `down --purge` has just removed.
        let locked = rustix::fs::fstat(&lock).map_err(failed)?.st_ino;
        match rustix::fs::statat(&handle, LOCK, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if there.st_ino == locked => Ok(Self { path, handle, _lock: lock }),
            _ => Err(busy()),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn passphrase(&self) -> PathBuf {
        self.path.join(PASSPHRASE)
    }

    pub(super) fn places(&self, node: &Node) -> Places {
        let directory = self.path.join(node.name.as_str());
        let at = |name| directory.join(name);
        Places { data: at("data"), socket: at("farfork.sock"), log: at("log"), directory }
    }

    /// What was started, if anything ever was.
    pub(super) fn read(&self) -> Result<Option<State>, UpError> {
        let file = self.path.join(STATE);
        let bytes = match files::read(&self.handle, STATE, STATE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(UpError::io(file, error)),
        };
        let format = serde_json::from_slice::<serde_json::Value>(&bytes).ok().and_then(|value| value["format"].as_u64());
        if let Some(found) = format.filter(|found| *found > u64::from(FORMAT)) {
            return Err(UpError::Newer { file, found, known: FORMAT });
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|source| UpError::Damaged { file, source })
    }

    /// Writes it, for its owner alone, whole or not at all.
    pub(super) fn write(&self, state: &State) -> Result<(), UpError> {
        for node in &state.nodes {
            let path = self.places(node).socket;
            if path.as_os_str().len() > SOCKET_BYTES_MAX {
                return Err(UpError::TooLong { path });
            }
        }
        let bytes = serde_json::to_vec_pretty(state).expect("plain data");
        files::replace(&self.handle, STATE, &bytes).map_err(|error| UpError::io(self.path.join(STATE), error))
    }

    /// Removes all that `up` has made here, of nodes that do not run; and the directory, if there is nothing else in it.
    pub(super) fn purge(self, state: &State) -> Result<(), UpError> {
        // One that somebody else has started is not removed beneath it: nothing is, then.
        let places = state.nodes.iter().map(|node| self.places(node));
        let mut opened = Vec::new();
        for Places { directory, data, .. } in places {
            let locked = if data.exists() { Some(DataDirectory::open(&data)) } else { None };
            match locked.transpose() {
                Err(error @ DataError::Taken { .. }) => return Err(UpError::Data(error)),
                locked => opened.push((directory, locked.ok().flatten())),
            }
        }
        for (directory, data) in opened {
            data.iter().for_each(kvm::remove_groups);
            gone(&directory, fs::remove_dir_all(&directory))?;
        }
        // The state goes last: what is cut off is begun again.
        for name in [PASSPHRASE, STATE, LOCK] {
            let file = self.path.join(name);
            gone(&file, fs::remove_file(&file))?;
        }
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => gone(&self.path, removed),
        }
    }
}

/// What is not there has been removed.
fn gone(path: &Path, removed: io::Result<()>) -> Result<(), UpError> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(UpError::io(path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_state_is_its_owners_and_comes_back() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("local");
        let directory = Directory::make(&path).unwrap();
        assert!(directory.read().unwrap().is_none());
        let mut state = State::new(6, true).unwrap();
        state.namespaces = Some(Namespaces::of(&path));
        directory.write(&state).unwrap();
        assert_eq!(path.join(STATE).metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let read = directory.read().unwrap().unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::to_value(&state).unwrap());
        assert_eq!(read.nodes.iter().filter(|node| node.votes).count(), 5);
        directory.purge(&read).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_is_taken_by_one_at_a_time() {
        let path = tempfile::tempdir().unwrap();
        let first = Directory::make(path.path()).unwrap();
        assert!(matches!(Directory::make(path.path()), Err(UpError::Busy { .. })));
        drop(first);
        assert!(Directory::make(path.path()).is_ok());
    }

    #[test]
    fn what_is_not_of_a_local_cluster_is_left_alone() {
        let path = tempfile::tempdir().unwrap();
        assert!(Directory::find(&path.path().join("nowhere")).unwrap().is_none());
        fs::write(path.path().join("notes"), "mine").unwrap();
        assert!(matches!(Directory::make(path.path()), Err(UpError::Foreign { .. })));
        assert!(Directory::find(path.path()).unwrap().is_none());
        assert_eq!(fs::read_dir(path.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_damaged_or_newer_is_told() {
        let path = tempfile::tempdir().unwrap();
        let directory = Directory::make(path.path()).unwrap();
        fs::write(path.path().join(STATE), "{\"format\":2,\"more\":1}").unwrap();
        assert!(matches!(directory.read(), Err(UpError::Newer { found: 2, .. })));
        fs::write(path.path().join(STATE), "{\"format\":1,\"more\":1}").unwrap();
        assert!(matches!(directory.read(), Err(UpError::Damaged { .. })));
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_told_before_anything_starts() {
        let path = tempfile::tempdir().unwrap();
        let directory = Directory::make(&path.path().join("x".repeat(100))).unwrap();
        assert!(matches!(directory.write(&State::new(1, true).unwrap()), Err(UpError::TooLong { .. })));
    }

    #[test]
    fn three_vote_and_of_five_or_more_five() {
        let voters = |count| State::new(count, false).unwrap().nodes.iter().filter(|node| node.votes).count();
        assert_eq!([1, 2, 3, 4, 5, 9].map(voters), [1, 2, 3, 3, 5, 5]);
    }
}
