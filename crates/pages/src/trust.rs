//! Whom this node talks to: certificates accepted by exact match, each with the tenants that its node may read; and, in a
//! cluster, those that its authority has signed, less the nodes that it has revoked.
//!
//! Any other certificate is refused. A good one is not enough either: the peer must prove that it has the key, and the dates must
//! hold. Sessions are never resumed, since that would skip all of this.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::sync::watch;
use types::{NodeId, Tenant};

use crate::authority::Root;
use crate::clock;
use crate::identity::{Certificate, CertificateError, Fingerprint, Peer};
use crate::verify::{Check, Verifier};

/// The most peers that a node trusts.
pub const PEERS_MAX: usize = 4096;

/// Which certificates are accepted. Clones share one list; changes take effect at once, and a peer that is removed loses its
/// connections soon after.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    peers: RwLock<BTreeMap<NodeId, Trusted>>,
    cluster: RwLock<Option<Cluster>>,
    changes: watch::Sender<()>,
}

/// A cluster that this node is of.
#[derive(Debug)]
struct Cluster {
    root: Root,
    revoked: BTreeSet<NodeId>,
    /// Certificates that were seen to be its authority's.
    vouched: BTreeSet<Fingerprint>,
}

/// A peer in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trusted {
    /// Who.
    pub peer: Peer,
    /// Whose images it may read.
    pub tenants: BTreeSet<Tenant>,
}

impl Trust {
    /// Trusts nobody.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Accepts a certificate from now on. One that is in the list already gets these tenants instead of those it had.
    ///
    /// # Errors
    /// [`TrustError`] if another certificate of that node is in the list, or the list is full.
    pub fn add(&self, certificate: &Certificate, tenants: impl IntoIterator<Item = Tenant>) -> Result<(), TrustError> {
        let trusted = Trusted { peer: certificate.peer().clone(), tenants: tenants.into_iter().collect() };
        let node = trusted.peer.node;
        {
            let mut peers = self.inner.peers.write().unwrap_or_else(PoisonError::into_inner);
            match peers.get(&node) {
                Some(known) if known.peer.fingerprint != trusted.peer.fingerprint => {
                    return Err(TrustError::NodeHasAnother { node, known: known.peer.fingerprint });
                }
                None if peers.len() >= PEERS_MAX => return Err(TrustError::Full),
                _ => peers.insert(node, trusted),
            };
        }
        self.inner.changes.send_replace(());
        Ok(())
    }

    /// Takes a node out of the list, and says whether it was in it. Its connections are closed.
    pub fn remove(&self, node: NodeId) -> bool {
        let removed = self.inner.peers.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
        self.inner.changes.send_replace(());
        removed.is_some()
    }

    /// The list, by node.
    #[must_use]
    pub fn peers(&self) -> Vec<Trusted> {
        self.inner.peers.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Trusts the nodes of a cluster, from now on.
    pub fn join(&self, root: Root) {
        let cluster = Cluster { root, revoked: BTreeSet::new(), vouched: BTreeSet::new() };
        *self.inner.cluster.write().unwrap_or_else(PoisonError::into_inner) = Some(cluster);
    }

    /// Nodes of the cluster that are trusted no longer. Their connections are closed.
    pub fn set_revoked(&self, revoked: BTreeSet<NodeId>) {
        if let Some(cluster) = &mut *self.inner.cluster.write().unwrap_or_else(PoisonError::into_inner) {
            cluster.revoked = revoked;
        }
        self.inner.changes.send_replace(());
    }

    /// Whether the cluster's authority has vouched for this peer, on a connection to this node.
    #[must_use]
    pub fn is_of_cluster(&self, peer: &Peer) -> bool {
        let cluster = self.inner.cluster.read().unwrap_or_else(PoisonError::into_inner);
        let has_vouched =
            |cluster: &Cluster| cluster.vouched.contains(&peer.fingerprint) && !cluster.revoked.contains(&peer.node);
        cluster.as_ref().is_some_and(has_vouched)
    }

    fn is_revoked(&self, node: NodeId) -> bool {
        let cluster = self.inner.cluster.read().unwrap_or_else(PoisonError::into_inner);
        cluster.as_ref().is_some_and(|cluster| cluster.revoked.contains(&node))
    }

    /// Looks at a certificate that was shown.
    fn look_at(&self, certificate: &Certificate, now: SystemTime) -> Result<(), NotTrusted> {
        let peer = certificate.peer();
        if let Some(cluster) = &mut *self.inner.cluster.write().unwrap_or_else(PoisonError::into_inner) {
            if cluster.revoked.contains(&peer.node) {
                return Err(NotTrusted::Revoked { node: peer.node });
            }
            if cluster.root.vouches_for(certificate, now).is_ok() {
                if cluster.vouched.len() >= PEERS_MAX {
                    // Who is connected shows its own again.
                    cluster.vouched.clear();
                }
                cluster.vouched.insert(peer.fingerprint);
            }
        }
        self.check(peer, now)
    }

    /// Whether this peer's certificate is in the list or its cluster's, and its dates hold.
    ///
    /// # Errors
    /// [`NotTrusted`] says why not.
    pub fn check(&self, peer: &Peer, now: SystemTime) -> Result<(), NotTrusted> {
        if self.is_revoked(peer.node) {
            return Err(NotTrusted::Revoked { node: peer.node });
        }
        let peers = self.inner.peers.read().unwrap_or_else(PoisonError::into_inner);
        let is_listed = peers.get(&peer.node).is_some_and(|known| known.peer.fingerprint == peer.fingerprint);
        if !is_listed && !self.is_of_cluster(peer) {
            return Err(NotTrusted::Unknown { node: peer.node, fingerprint: peer.fingerprint });
        }
        peer.check_dates(now)
    }

    /// Whether this peer may read a tenant's images. Nodes of the cluster may be told to read any.
    #[must_use]
    pub fn may_read(&self, peer: &Peer, tenant: &Tenant) -> bool {
        let peers = self.inner.peers.read().unwrap_or_else(PoisonError::into_inner);
        let known = peers.get(&peer.node).filter(|known| known.peer.fingerprint == peer.fingerprint);
        known.is_some_and(|known| known.tenants.contains(tenant)) || self.is_of_cluster(peer)
    }

    /// Returns when this peer is trusted no longer.
    pub(crate) async fn until_withdrawn(&self, peer: &Peer) -> NotTrusted {
        let mut changes = self.inner.changes.subscribe();
        loop {
            let now = clock::wall();
            if let Err(refusal) = self.check(peer, now) {
                return refusal;
            }
            let left = peer.not_after.duration_since(now).unwrap_or_default();
            // The sender lives in `self`, so `changed` returns only for a change. Timers have a longest time.
            let left = left.min(Duration::from_hours(24));
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }
}

impl Peer {
    /// Whether the dates of its certificate hold.
    ///
    /// # Errors
    /// [`NotTrusted`] says why not.
    pub fn check_dates(&self, now: SystemTime) -> Result<(), NotTrusted> {
        if now < self.not_before {
            return Err(NotTrusted::NotYetValid { node: self.node });
        }
        if now >= self.not_after {
            return Err(NotTrusted::Expired { node: self.node });
        }
        Ok(())
    }
}

/// Lets those pass that are trusted, whichever side they are.
#[derive(Debug)]
pub(crate) struct Pinned {
    trust: Trust,
    /// Whether clients that nobody trusts get as far as asking to be let in. What they may do is looked at again when it is known
    /// what they want.
    admits_strangers: bool,
}

impl Pinned {
    pub(crate) fn verifier(trust: Trust, admits_strangers: bool) -> Arc<Verifier<Self>> {
        Verifier::new(Self { trust, admits_strangers })
    }
}

impl Check for Pinned {
    fn check(&self, shown: &CertificateDer<'_>, _beside: &[CertificateDer<'_>], now: SystemTime) -> Result<(), rustls::Error> {
        let certificate = Certificate::from_der(shown).map_err(NotTrusted::from)?;
        match self.trust.look_at(&certificate, now) {
            Err(NotTrusted::Unknown { .. } | NotTrusted::Revoked { .. }) if self.admits_strangers => Ok(()),
            looked => Ok(looked?),
        }
    }
}

/// Why a peer is not talked to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum NotTrusted {
    #[error("node {node} with certificate {fingerprint} is not trusted here")]
    Unknown { node: NodeId, fingerprint: Fingerprint },
    #[error("node {node} was revoked")]
    Revoked { node: NodeId },
    #[error("the certificate of node {node} is not valid yet")]
    NotYetValid { node: NodeId },
    #[error("the certificate of node {node} has expired")]
    Expired { node: NodeId },
    #[error("a certificate's dates do not hold by the clock of {by}")]
    Dates { by: &'static str },
    #[error("node {node} has no vote, and lets nobody in")]
    NoVoter { node: NodeId },
    #[error("node {node} is not of the cluster whose authority is {expected}")]
    OtherCluster { node: NodeId, expected: Fingerprint },
    #[error("node {expected} was expected there, and node {actual} answered")]
    OtherNode { expected: NodeId, actual: NodeId },
    #[error("its certificate cannot be read")]
    Unreadable(#[from] CertificateError),
    #[error("the handshake was refused: {why}")]
    Handshake { why: String },
}

impl NotTrusted {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unknown { .. } | Self::Unreadable(_) | Self::Handshake { .. } => {
                "trust must be mutual: give each node what `farfork trust show` prints on the other, by `farfork trust add`"
            }
            Self::Revoked { .. } => "let it join anew, with an empty data directory and a new token",
            Self::NoVoter { .. } => "make another token on a voter, and look who is at the address of the last one",
            Self::OtherCluster { .. } => "take a token of the cluster that this address belongs to, or correct the address",
            Self::NotYetValid { .. } => "set the clocks of both nodes",
            Self::Dates { .. } => "set the clocks of both hosts; where they are right, a certificate has run out",
            Self::Expired { .. } => "make a new certificate on that node, and trust it here",
            Self::OtherNode { .. } => "correct the address, or trust the node that is there now",
        }
    }
}

impl From<NotTrusted> for rustls::Error {
    fn from(refusal: NotTrusted) -> Self {
        use rustls::CertificateError as Tls;
        // The kinds that have an alert of their own keep it: it is all that the other side gets to see.
        let error = match refusal {
            NotTrusted::Expired { .. } => Tls::Expired,
            NotTrusted::NotYetValid { .. } => Tls::NotValidYet,
            NotTrusted::Unreadable(_) => Tls::BadEncoding,
            other => Tls::Other(rustls::OtherError(Arc::new(other))),
        };
        Self::InvalidCertificate(error)
    }
}

/// Why a certificate was not added.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum TrustError {
    #[error("node {node} is trusted with another certificate, {known}")]
    NodeHasAnother { node: NodeId, known: Fingerprint },
    #[error("{PEERS_MAX} peers are trusted, which is the most")]
    Full,
}

impl TrustError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NodeHasAnother { .. } => "find out why it has a new one; then `farfork trust rm` the node and add it again",
            Self::Full => "remove peers that are gone with `farfork trust rm`",
        }
    }
}
