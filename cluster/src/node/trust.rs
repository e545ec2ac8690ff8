//! Whom this node trusts: certificates of other nodes, each with the tenants whose images that node may read here and have
//! forked here. A file per node beneath the data directory, so that they are there again after a restart:
//!
//! ```text
//! trust/<node id>.pem     farfork-tenants: default,team-7
//!                         -----BEGIN CERTIFICATE-----
//!                         ...
//! ```
//!
//! What a certificate says, and that connections keep to this list, is the business of [`Certificates`], a seam.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::Dir;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::id::TenantError;
use types::{Digest, NodeId, Tenant};

use super::files;
use super::short_id::{ShortId, ShortIdError};

const SUFFIX: &str = ".pem";
/// What the first line of a file begins with. Readers of PEM skip lines before the certificate.
const TENANTS: &str = "farfork-tenants: ";
const BEGIN: &str = "-----BEGIN CERTIFICATE-----\n";
const END: &str = "\n-----END CERTIFICATE-----\n";
/// A certificate, and its tenants in front.
const FILE_BYTES_MAX: usize = TrustStore::PEM_BYTES_MAX + TrustStore::TENANTS_MAX * 64 + TENANTS.len() + 1;

/// What the network half of a node knows about certificates.
pub trait Certificates: Send + Sync + 'static {
    /// This node's own.
    fn own(&self) -> Certificate;

    /// Reads the certificate of another node from one block of PEM, which becomes its [`Certificate::pem`].
    ///
    /// # Errors
    /// [`CertificateError`] if it is none, or not a node's.
    fn parse(&self, pem: &str) -> Result<Certificate, CertificateError>;

    /// From now on a node with this very certificate is let in, for these tenants instead of those before, if there were any.
    /// No node has two certificates.
    fn accept(&self, trusted: &Trusted);

    /// From now on this certificate is turned away, and connections that showed it are closed.
    fn withdraw(&self, certificate: &Certificate);
}

/// A node's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whose.
    pub node: NodeId,
    /// What that node is in a cluster.
    pub role: Role,
    /// BLAKE3 of its DER encoding. Two certificates with one fingerprint are one.
    pub fingerprint: Digest,
    /// Until when it is valid.
    pub not_after: SystemTime,
    /// As people exchange it: the PEM block and nothing else, with a line feed at its end.
    pub pem: String,
}

/// What a node is in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It decides with the others.
    Voter,
    /// It is told.
    Learner,
}

/// A node that is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trusted {
    /// What it shows.
    pub certificate: Certificate,
    /// Whose images it may read here and have forked here. At least one.
    pub tenants: BTreeSet<Tenant>,
}

/// Why a text is no certificate of a node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct CertificateError {
    /// What is wrong with it, in one line.
    pub message: String,
    /// What to do about it, in one line.
    pub remedy: String,
}

/// Trusted nodes, in memory and on disk.
pub struct TrustStore {
    certificates: Arc<dyn Certificates>,
    directory: OwnedFd,
    /// Also the right to write files: they and the list change together.
    trusted: Mutex<BTreeMap<NodeId, Trusted>>,
}

impl TrustStore {
    /// The most bytes of a certificate in PEM.
    pub const PEM_BYTES_MAX: usize = 16 << 10;
    /// The most nodes that a node trusts.
    pub const NODES_MAX: usize = 4096;
    /// The most tenants of one of them.
    pub const TENANTS_MAX: usize = 64;

    /// Reads the files, and lets the nodes in that they name.
    ///
    /// # Errors
    /// [`TrustError::Damaged`], [`TrustError::Io`]: nobody is let in.
    pub fn open(directory: BorrowedFd<'_>, certificates: Arc<dyn Certificates>) -> Result<Self, TrustError> {
        let of_listing = |error: Errno| TrustError::Io { file: "trust".to_owned(), source: Arc::new(error.into()) };
        let directory = directory.try_clone_to_owned().map_err(TrustError::io("trust"))?;
        let mut trusted = BTreeMap::new();
        for entry in Dir::read_from(&directory).map_err(of_listing)? {
            let entry = entry.map_err(of_listing)?;
            // What is called otherwise is no file of ours, or one that was not written to its end.
            let Some(file) = entry.file_name().to_str().ok().filter(|file| file.ends_with(SUFFIX)) else { continue };
            let one = read(&directory, file, certificates.as_ref())?;
            trusted.insert(one.certificate.node, one);
        }
        trusted.values().for_each(|one| certificates.accept(one));
        Ok(Self { certificates, directory, trusted: Mutex::new(trusted) })
    }

    /// This node's own certificate, to be shown to others.
    #[must_use]
    pub fn own(&self) -> Certificate {
        self.certificates.own()
    }

    /// Trusts the node of a certificate from now on. The tenants replace those that were given with the same certificate before.
    ///
    /// # Errors
    /// [`TrustError`]; everything is as it was.
    pub fn add(&self, pem: &str, tenants: BTreeSet<Tenant>) -> Result<Trusted, TrustError> {
        if pem.len() > Self::PEM_BYTES_MAX {
            return Err(TrustError::TooLong { bytes: pem.len() });
        }
        if tenants.is_empty() || tenants.len() > Self::TENANTS_MAX {
            return Err(TrustError::Tenants { count: tenants.len() });
        }
        let certificate = self.certificates.parse(block(pem)?)?;
        let node = certificate.node;
        if node == self.own().node {
            return Err(TrustError::Own);
        }
        if certificate.not_after <= pages::clock::wall() {
            return Err(TrustError::Expired { node });
        }
        let new = Trusted { certificate, tenants };
        let mut trusted = self.lock();
        match trusted.get(&node).map(|known| known.certificate.fingerprint) {
            // Anybody can write a certificate that claims to be this node's.
            Some(known) if known != new.certificate.fingerprint => return Err(TrustError::HasAnother { node, known }),
            None if trusted.len() >= Self::NODES_MAX => return Err(TrustError::TooMany),
            _ => {}
        }
        let file = file_name(node);
        files::replace(&self.directory, &file, text(&new).as_bytes()).map_err(TrustError::io(&file))?;
        trusted.insert(node, new.clone());
        self.certificates.accept(&new);
        tracing::info!(%node, fingerprint = %new.certificate.fingerprint, "trusted");
        Ok(new)
    }

    /// All nodes that are trusted, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Trusted> {
        self.lock().values().cloned().collect()
    }

    /// Whether this node may read this tenant's images here, and have them forked here.
    #[must_use]
    pub fn allows(&self, node: NodeId, tenant: &Tenant) -> bool {
        self.lock().get(&node).is_some_and(|trusted| trusted.tenants.contains(tenant))
    }

    /// Trusts a node no longer, given by its id or the end of it.
    ///
    /// # Errors
    /// [`TrustError`]; it is still trusted.
    pub fn remove(&self, given: &str) -> Result<Trusted, TrustError> {
        let short = ShortId::parse(given)?;
        let mut trusted = self.lock();
        let named: Vec<NodeId> = trusted.keys().filter(|node| short.matches(node.as_uuid())).copied().collect();
        let node = match named.as_slice() {
            [node] => *node,
            [] => return Err(TrustError::Unknown { given: given.to_owned() }),
            several => return Err(TrustError::Ambiguous { given: given.to_owned(), count: several.len() }),
        };
        // On disk first: what a restart would bring back is not gone.
        let file = file_name(node);
        files::remove(&self.directory, &file).map_err(TrustError::io(&file))?;
        let removed = trusted.remove(&node).ok_or_else(|| TrustError::Unknown { given: given.to_owned() })?;
        self.certificates.withdraw(&removed.certificate);
        tracing::info!(%node, fingerprint = %removed.certificate.fingerprint, "trusted no longer");
        Ok(removed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Trusted>> {
        self.trusted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the list of trusted nodes did not change, or cannot be had.
#[derive(Clone, Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum TrustError {
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    #[error("a certificate of {bytes} bytes where {} are the most", TrustStore::PEM_BYTES_MAX)]
    TooLong { bytes: usize },
    #[error("{count} tenants where 1 to {} are allowed", TrustStore::TENANTS_MAX)]
    Tenants { count: usize },
    #[error("this is the node's own certificate")]
    Own,
    #[error("the certificate of node {node} has expired")]
    Expired { node: NodeId },
    #[error("node {node} is trusted with another certificate, {known}")]
    HasAnother { node: NodeId, known: Digest },
    #[error("{} nodes are trusted already", TrustStore::NODES_MAX)]
    TooMany,
    #[error(transparent)]
    Id(#[from] ShortIdError),
    #[error("no node {given} is trusted")]
    Unknown { given: String },
    #[error("{given} is the end of {count} ids")]
    Ambiguous { given: String, count: usize },
    #[error("trust/{file} is damaged: {detail}")]
    Damaged { file: String, detail: String },
    #[error("trust/{file} cannot be used: {source}")]
    Io { file: String, source: Arc<io::Error> },
}

impl TrustError {
    /// The code that programs match on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Certificate(_) | Self::TooLong { .. } | Self::Own | Self::Expired { .. } => "BAD_CERTIFICATE",
            Self::Tenants { .. } => "BAD_TENANT",
            Self::Id(_) => "BAD_ID",
            Self::HasAnother { .. } => "OTHER_CERTIFICATE",
            Self::TooMany => "TOO_MANY_NODES",
            Self::Unknown { .. } => "UNKNOWN_NODE",
            Self::Ambiguous { .. } => "AMBIGUOUS_ID",
            Self::Io { source, .. } if is_full(source) => "STORE_FULL",
            Self::Damaged { .. } | Self::Io { .. } => "STORE",
        }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        let fixed = match self {
            Self::Certificate(error) => return error.remedy.clone(),
            Self::TooLong { .. } => "give one certificate in PEM, as `farfork trust show` prints it on the other node",
            Self::Tenants { .. } => "name at least one tenant, or leave it out for the tenant called default",
            Self::Own => "give what `farfork trust show` prints on the other node",
            Self::Expired { .. } => "have that node make a new one, and check the clocks of both",
            Self::HasAnother { .. } => "find out why it has a new one; then `farfork trust rm` it, and add it again",
            Self::TooMany => "remove those that are gone: `farfork trust rm`",
            Self::Id(error) => error.remedy(),
            Self::Unknown { .. } => "`farfork trust ls` lists them",
            Self::Ambiguous { .. } => "give more digits from the end of the id",
            Self::Damaged { .. } => "remove that file from the node's data directory, and add that node's certificate again",
            Self::Io { source, .. } if is_full(source) => "make room on the disk that holds the node's data directory",
            Self::Io { .. } => "check the disk that holds the node's data directory",
        };
        fixed.to_owned()
    }

    fn io(file: &str) -> impl Fn(io::Error) -> Self + use<'_> {
        move |source| Self::Io { file: file.to_owned(), source: Arc::new(source) }
    }
}

impl PartialEq for TrustError {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Eq for TrustError {}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn file_name(node: NodeId) -> String {
    format!("{node}{SUFFIX}")
}

/// The first certificate in a text, with the line feed after it. What is around it is left out.
fn block(text: &str) -> Result<&str, CertificateError> {
    let begin = text.find(BEGIN);
    let block = begin.and_then(|begin| {
        let end = begin + text[begin..].find(END)? + END.len();
        Some(&text[begin..end])
    });
    block.ok_or_else(|| CertificateError {
        message: "there is no certificate in it".to_owned(),
        remedy: "give what `farfork trust show` prints on the other node".to_owned(),
    })
}

fn text(trusted: &Trusted) -> String {
    let tenants: Vec<&str> = trusted.tenants.iter().map(Tenant::as_str).collect();
    format!("{TENANTS}{}\n{}", tenants.join(","), trusted.certificate.pem)
}

fn read(directory: &OwnedFd, file: &str, certificates: &dyn Certificates) -> Result<Trusted, TrustError> {
    let damaged = |detail: String| TrustError::Damaged { file: file.to_owned(), detail };
    let bytes = files::read(directory, file, FILE_BYTES_MAX).map_err(TrustError::io(file))?;
    let text = String::from_utf8(bytes).map_err(|_| damaged("it is no text".to_owned()))?;
    let parts = text.strip_prefix(TENANTS).and_then(|rest| rest.split_once('\n'));
    let (tenants, pem) = parts.ok_or_else(|| damaged(format!("its first line does not begin with {TENANTS:?}")))?;
    let tenants: Result<BTreeSet<Tenant>, TenantError> = tenants.split(',').map(str::parse).collect();
    let tenants = tenants.map_err(|error| damaged(error.to_string()))?;
    let certificate = block(pem).and_then(|block| certificates.parse(block)).map_err(|error| damaged(error.message))?;
    if file_name(certificate.node) != file {
        return Err(damaged(format!("it holds the certificate of node {}", certificate.node)));
    }
    Ok(Trusted { certificate, tenants })
}
