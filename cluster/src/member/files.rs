//! What a member of a cluster keeps in its node's data directory:
//!
//! ```text
//! cluster.json    {"format":1,"name":"node-1","seeds":["192.0.2.7:7117"],"begins":"192.0.2.7:7117"}   written last: it makes it one
//! ca.pem          the cluster's authority
//! ca.sealed       its key, encrypted; on voters
//! node.pem        this node's certificate, and the authority's
//! raft.redb       the log, see crate::raft::disk
//! repair.json     what a repair goes on from that was cut off, see crate::member::repair
//! ```

use std::io;
use std::path::{Path, PathBuf};

use pages::{Authority, Identity, Root};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::Name;

use super::repair;
use super::seal::{Passphrase, SealError, Sealed};
use crate::node::DataDirectory;
use crate::node::quic::{CERTIFICATE, PEM_SIZE_MAX};
use crate::raft::{Disk, DiskError};

const FORMAT: u32 = 1;
const CLUSTER: &str = "cluster.json";
pub(super) const AUTHORITY: &str = "ca.pem";
pub(super) const SEALED: &str = "ca.sealed";
pub(super) const LOG: &str = "raft.redb";
const FILE_BYTES_MAX: usize = 64 << 10;

/// A node's place in a cluster, as it is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    format: u32,
    /// Its name.
    pub name: Name,
    /// Where others were when it joined.
    pub seeds: Vec<String>,
    /// It has begun the cluster, and others reach it there.
    pub begins: Option<String>,
}

impl Place {
    pub(super) fn of(name: &Name, seeds: Vec<String>) -> Self {
        Self { format: FORMAT, name: name.clone(), seeds, begins: None }
    }

    pub(super) fn write(&self, data: &DataDirectory) -> Result<(), PlaceError> {
        write(data, CLUSTER, &serde_json::to_vec_pretty(self).expect("plain data"))
    }

    /// Notes where the others are now: a node that has lost its log asks them.
    ///
    /// # Errors
    /// [`PlaceError`]; it is as it was.
    pub fn note_seeds(data: &DataDirectory, seeds: &[String]) -> Result<(), PlaceError> {
        match Member::open(data)? {
            Some(Member { place, .. }) if place.seeds != seeds => Self { seeds: seeds.to_vec(), ..place }.write(data),
            _ => Ok(()),
        }
    }
}

/// Why a directory is no member's.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PlaceError {
    #[error("{file} in {} cannot be used: {source}", directory.display())]
    File { directory: PathBuf, file: &'static str, source: io::Error },
    #[error("{file} in {} is missing", directory.display())]
    Missing { directory: PathBuf, file: &'static str },
    #[error("{file} in {} is damaged: {detail}", directory.display())]
    Damaged { directory: PathBuf, file: &'static str, detail: String },
    #[error("the cluster's files in {} are of format {found}; this farfork knows up to {FORMAT}", directory.display())]
    Newer { directory: PathBuf, found: u32 },
    #[error("{} is a member's already", directory.display())]
    Taken { directory: PathBuf },
    #[error("{} is no member's", directory.display())]
    Alone { directory: PathBuf },
    #[error("there is nothing to repair in {}: its log can be read", directory.display())]
    Whole { directory: PathBuf },
    #[error("a repair of {} was agreed on, and then cut off", directory.display())]
    Unfinished { directory: PathBuf },
    #[error("the node's certificate cannot be made or used: {0}")]
    Identity(#[from] pages::identity::IdentityError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error(transparent)]
    Log(#[from] DiskError),
}

impl PlaceError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Damaged { file: LOG, .. } | Self::Unfinished { .. } => {
                "let it in again under a new id: `farfork cluster repair --from-peers`, with the node stopped"
            }
            Self::Alone { .. } => "let it join a cluster: farfork cluster join",
            Self::Whole { .. } => "start the node: farfork node",
            Self::File { .. } => "check the disk and the owner of the data directory",
            Self::Missing { .. } | Self::Damaged { .. } => {
                "restore that file from a copy, and never raft.redb; or join anew with an empty directory, after `farfork node rm` of this node's name"
            }
            Self::Newer { .. } => "use the newer farfork",
            Self::Taken { .. } => "name another directory with --data, or start the node: it is of its cluster",
            Self::Identity(error) => error.remedy(),
            Self::Seal(error) => error.remedy(),
            Self::Log(error) => error.remedy(),
        }
    }
}

/// Whether a data directory is a member's, which may be running.
#[must_use]
pub fn is_member(directory: &Path) -> bool {
    directory.join(CLUSTER).exists()
}

/// What a member has on disk.
pub struct Member {
    /// Its place.
    pub place: Place,
    /// Who vouches for the nodes.
    pub root: Root,
    /// The authority's key, encrypted. `None`: it is no voter's.
    pub sealed: Option<Sealed>,
}

impl Member {
    /// Reads it. `None`: the node stands alone.
    ///
    /// # Errors
    /// [`PlaceError`]; nothing is changed.
    pub fn open(data: &DataDirectory) -> Result<Option<Self>, PlaceError> {
        // Some of it may be of the old node, and some of the new one.
        if repair::is_unfinished(data)? {
            return Err(PlaceError::Unfinished { directory: data.path().to_owned() });
        }
        Self::read(data)
    }

    /// The same, also of a repair that was cut off.
    pub(super) fn read(data: &DataDirectory) -> Result<Option<Self>, PlaceError> {
        let Some(bytes) = read(data, CLUSTER)? else { return Ok(None) };
        let damaged = |file, detail: String| PlaceError::Damaged { directory: data.path().to_owned(), file, detail };
        let place: Place = serde_json::from_slice(&bytes).map_err(|error| {
            let newer = serde_json::from_slice::<serde_json::Value>(&bytes).ok().and_then(|value| value["format"].as_u64());
            match newer.and_then(|found| u32::try_from(found).ok()).filter(|found| *found > FORMAT) {
                Some(found) => PlaceError::Newer { directory: data.path().to_owned(), found },
                None => damaged(CLUSTER, error.to_string()),
            }
        })?;
        let missing = |file| PlaceError::Missing { directory: data.path().to_owned(), file };
        let root = read(data, AUTHORITY)?.ok_or_else(|| missing(AUTHORITY))?;
        let root = Root::from_pem(&root).map_err(|error| damaged(AUTHORITY, error.to_string()))?;
        let sealed = read(data, SEALED)?.map(Sealed::from_bytes).transpose()?;
        Ok(Some(Self { place, root, sealed }))
    }

    /// Begins a cluster: draws its authority, and certifies this node as its first voter.
    ///
    /// # Errors
    /// [`PlaceError`]; the node stands alone as before.
    pub fn begin(
        data: &DataDirectory,
        identity: &Identity,
        name: &Name,
        address: &str,
        passphrase: &Passphrase,
    ) -> Result<Self, PlaceError> {
        let authority = Authority::generate()?;
        let certificate = authority.issue(identity.certificate(), name, pages::Role::Voter)?;
        let sealed = Sealed::seal(authority.key_pem().as_bytes(), passphrase)?;
        let place = Place { format: FORMAT, name: name.clone(), seeds: Vec::new(), begins: Some(address.to_owned()) };
        Self::keep(data, place, &certificate, authority.root_pem(), Some(sealed))
    }

    /// Keeps what a cluster gave that this node has joined.
    ///
    /// # Errors
    /// [`PlaceError`]; the node stands alone as before.
    pub fn join(
        data: &DataDirectory,
        name: &Name,
        seeds: Vec<String>,
        certificate: &str,
        root: &str,
        sealed: Option<Sealed>,
    ) -> Result<Self, PlaceError> {
        Self::keep(data, Place::of(name, seeds), certificate, root, sealed)
    }

    fn keep(
        data: &DataDirectory,
        place: Place,
        certificate: &str,
        root: &str,
        sealed: Option<Sealed>,
    ) -> Result<Self, PlaceError> {
        if read(data, CLUSTER)?.is_some() {
            return Err(PlaceError::Taken { directory: data.path().to_owned() });
        }
        let write = |file, bytes: &[u8]| write(data, file, bytes);
        drop(Disk::create(&data.path().join(LOG)).or_else(|error| {
            // A try before this one was cut off.
            let path = data.path().join(LOG);
            std::fs::remove_file(&path).map_err(|_| error)?;
            Disk::create(&path)
        })?);
        write(AUTHORITY, root.as_bytes())?;
        if let Some(sealed) = &sealed {
            write(SEALED, &sealed.to_bytes())?;
        }
        write(CERTIFICATE, certificate.as_bytes())?;
        place.write(data)?;
        let root = Root::from_pem(root.as_bytes()).map_err(pages::identity::IdentityError::from)?;
        Ok(Self { place, root, sealed })
    }

    /// The log.
    ///
    /// # Errors
    /// [`PlaceError`]: it is left as it was.
    pub fn log(data: &DataDirectory) -> Result<Disk, PlaceError> {
        Ok(Disk::open(&data.path().join(LOG))?)
    }

    /// The authority with its key.
    ///
    /// # Errors
    /// [`PlaceError`] if the key is not here, or is sealed with another passphrase.
    pub fn authority(&self, data: &DataDirectory, passphrase: &Passphrase) -> Result<Authority, PlaceError> {
        let missing = |file| PlaceError::Missing { directory: data.path().to_owned(), file };
        let key = self.sealed.as_ref().ok_or_else(|| missing(SEALED))?.open(passphrase)?;
        let root = read(data, AUTHORITY)?.ok_or_else(|| missing(AUTHORITY))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Authority::from_pem(&text(&root), &text(&key))?)
    }
}

pub(super) fn write(data: &DataDirectory, file: &'static str, bytes: &[u8]) -> Result<(), PlaceError> {
    data.replace(file, bytes).map_err(|source| PlaceError::File { directory: data.path().to_owned(), file, source })
}

pub(super) fn read(data: &DataDirectory, file: &'static str) -> Result<Option<Vec<u8>>, PlaceError> {
    let failed = |source| PlaceError::File { directory: data.path().to_owned(), file, source };
    data.read(file, FILE_BYTES_MAX.max(PEM_SIZE_MAX)).map_err(failed)
}
