//! Who a node is to other nodes: a key of its own, and a certificate that names the node and its role.
//!
//! Nodes that stand alone sign theirs themselves, and are accepted by exact match only; those of a cluster have theirs from its
//! [authority](crate::authority). See [`crate::trust`]. Who a node is stands in a subject alternative name,
//! `farfork://node/<uuid>?role=learner`, and its name for people in the common name; everything else is ignored.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use types::{Digest, NodeId};
use uuid::Uuid;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::clock;

/// The most bytes of a certificate, in DER. Ours have about 400.
pub const CERTIFICATE_SIZE_MAX: usize = 4 << 10;
/// The most bytes of a PEM file with a certificate or a key.
pub const PEM_SIZE_MAX: usize = 16 << 10;
/// How long a development certificate is good for.
pub const VALIDITY: Duration = Duration::from_hours(365 * 24);

/// A development certificate is good from this long before it was made: clocks differ.
pub(crate) const CLOCK_SLACK: Duration = Duration::from_hours(1);
/// The most certificates that are shown.
const CHAIN_MAX: usize = 2;
/// The most of a name that is looked at.
const NAME_MAX: usize = 64;
const SCHEME: &str = "farfork://node/";

/// What a node is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It votes: it is one of the few that decide.
    Voter,
    /// It follows what is decided.
    Learner,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Voter => "voter",
            Self::Learner => "learner",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The BLAKE3 digest of a certificate's DER: what is compared when a peer is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub Digest);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a certificate says of its node. On a connection it is proven; otherwise it is a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node.
    pub node: NodeId,
    /// Its role.
    pub role: Role,
    /// Its name for people; of a node that stands alone no name of its own.
    pub name: String,
    /// The certificate's digest.
    pub fingerprint: Fingerprint,
    /// Good from this time on.
    pub not_before: SystemTime,
    /// Good until this time.
    pub not_after: SystemTime,
}

/// A certificate that names a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    der: CertificateDer<'static>,
    peer: Peer,
}

impl Certificate {
    /// Reads a certificate from bytes of anybody.
    ///
    /// # Errors
    /// [`CertificateError`]; nothing of its signature or dates is checked here.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        let peer = parse(der)?;
        Ok(Self { der: CertificateDer::from(der.to_vec()), peer })
    }

    /// Reads the first certificate of a PEM file.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        Self::from_der(&first_of(pem)?)
    }

    /// What it says.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Its bytes.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The digest of its public key.
    ///
    /// # Panics
    /// Never: it was parsed before.
    #[must_use]
    pub fn key_digest(&self) -> Digest {
        let (_, parsed) = X509Certificate::from_der(&self.der).expect("it was parsed before");
        Digest::of(parsed.public_key().raw)
    }
}

/// A node's certificate and key.
pub struct Identity {
    certificate: Certificate,
    certificate_pem: String,
    key_pem: String,
    shown: Arc<Shown>,
}

/// What is shown on connections that are made from now on: it changes when a certificate is renewed.
#[derive(Debug)]
pub(crate) struct Shown(RwLock<Arc<CertifiedKey>>);

impl Shown {
    pub(crate) fn now(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl Identity {
    /// Draws a key and signs a development certificate with it, good for [`VALIDITY`] from now.
    ///
    /// # Errors
    /// [`IdentityError`] if the system gives no randomness.
    pub fn generate(node: NodeId, role: Role) -> Result<Self, IdentityError> {
        let now = clock::wall();
        Self::generate_valid(node, role, now - CLOCK_SLACK, now + VALIDITY)
    }

    /// As [`Identity::generate`], good between two times (whole seconds).
    ///
    /// # Errors
    /// [`IdentityError`] if the system gives no randomness.
    pub fn generate_valid(
        node: NodeId,
        role: Role,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Generate { source };
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(name_of(node, role).try_into().map_err(failed)?)];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "farfork node");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.self_signed(&key).map_err(failed)?;
        Self::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes())
    }

    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`IdentityError`] if one of them does not parse, or they do not belong together.
    pub fn from_pem(certificate_pem: &[u8], key_pem: &[u8]) -> Result<Self, IdentityError> {
        let (certificate, chain) = chain_of(certificate_pem)?;
        if key_pem.len() > PEM_SIZE_MAX {
            return Err(IdentityError::Key { why: format!("it has more than {PEM_SIZE_MAX} bytes") });
        }
        let bad_key = |error: &dyn fmt::Display| IdentityError::Key { why: error.to_string() };
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| bad_key(&error))?;
        let signer = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|error| bad_key(&error))?;
        let both = CertifiedKey::new(chain, signer);
        both.keys_match().map_err(|error| bad_key(&error))?;
        let shown = Arc::new(Shown(RwLock::new(Arc::new(both))));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Self { certificate, certificate_pem: text(certificate_pem), key_pem: text(key_pem), shown })
    }

    /// The certificate.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The certificate for others, as PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The key as PEM. Whoever has it is this node: write it with mode 600 and nowhere else.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Which node this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.certificate.peer.node
    }

    /// Shows another certificate of the same node and key on connections that are made from now on.
    ///
    /// # Errors
    /// [`IdentityError`] if it is another's; everything is as it was.
    pub fn renew(&self, certificate_pem: &[u8]) -> Result<(), IdentityError> {
        let (certificate, chain) = chain_of(certificate_pem)?;
        let bad = |why: String| IdentityError::Key { why };
        if certificate.peer.node != self.node() {
            return Err(bad(format!("it is of node {}", certificate.peer.node)));
        }
        let both = CertifiedKey::new(chain, Arc::clone(&self.shown.now().key));
        both.keys_match().map_err(|error| bad(error.to_string()))?;
        *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(both);
        Ok(())
    }

    pub(crate) fn shown(&self) -> Arc<Shown> {
        Arc::clone(&self.shown)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("peer", &self.certificate.peer).finish_non_exhaustive()
    }
}

/// The first certificate of a PEM file of anybody, as bytes.
pub(crate) fn first_of(pem: &[u8]) -> Result<CertificateDer<'static>, CertificateError> {
    if pem.len() > PEM_SIZE_MAX {
        return Err(CertificateError::TooLarge { bytes: pem.len(), most: PEM_SIZE_MAX });
    }
    CertificateDer::from_pem_slice(pem).map_err(|error| CertificateError::NoPem { why: error.to_string() })
}

/// The first certificate of a PEM file, and all that are shown.
fn chain_of(pem: &[u8]) -> Result<(Certificate, Vec<CertificateDer<'static>>), CertificateError> {
    let certificate = Certificate::from_pem(pem)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).take(CHAIN_MAX).collect();
    Ok((certificate, chain.map_err(|error| CertificateError::NoPem { why: error.to_string() })?))
}

fn parse(der: &[u8]) -> Result<Peer, CertificateError> {
    if der.len() > CERTIFICATE_SIZE_MAX {
        return Err(CertificateError::TooLarge { bytes: der.len(), most: CERTIFICATE_SIZE_MAX });
    }
    let malformed = |error: &dyn fmt::Display| CertificateError::Malformed { why: error.to_string() };
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
    if !rest.is_empty() {
        return Err(CertificateError::TrailingBytes { bytes: rest.len() });
    }
    let names = certificate.subject_alternative_name().map_err(|error| malformed(&error))?;
    let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    let [GeneralName::URI(name)] = names else { return Err(CertificateError::NoNode) };
    let (node, role) = name.strip_prefix(SCHEME).and_then(|rest| rest.split_once("?role=")).ok_or(CertificateError::NoNode)?;
    let node = Uuid::try_parse(node).map_err(|_| CertificateError::NoNode)?;
    let role = [Role::Voter, Role::Learner].into_iter().find(|known| known.name() == role);
    let role = role.ok_or(CertificateError::NoNode)?;
    let validity = certificate.validity();
    let named = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default();
    Ok(Peer {
        node: NodeId::from_uuid(node),
        role,
        name: named.chars().take(NAME_MAX).collect(),
        fingerprint: Fingerprint(Digest::of(der)),
        not_before: time(validity.not_before.timestamp())?,
        not_after: time(validity.not_after.timestamp())?,
    })
}

/// Who a node is, as its certificate says it.
pub(crate) fn name_of(node: NodeId, role: Role) -> String {
    format!("{SCHEME}{node}?role={role}")
}

/// Times before 1970 are of no certificate of ours.
fn time(unix_seconds: i64) -> Result<SystemTime, CertificateError> {
    let seconds = u64::try_from(unix_seconds).ok();
    seconds.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds))).ok_or(CertificateError::Dates)
}

/// The one crypto provider, named wherever rustls asks: with two compiled in, its default would panic.
pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Bytes that are no certificate of a node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum CertificateError {
    #[error("a certificate of {bytes} bytes; the most is {most}")]
    TooLarge { bytes: usize, most: usize },
    #[error("this is no PEM file with a certificate: {why}")]
    NoPem { why: String },
    #[error("this is no certificate: {why}")]
    Malformed { why: String },
    #[error("the certificate has {bytes} bytes after its end")]
    TrailingBytes { bytes: usize },
    #[error("the certificate names no farfork node and role, or other names beside them")]
    NoNode,
    #[error("the certificate's dates lie before 1970")]
    Dates,
}

impl CertificateError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        "give what `farfork trust show` prints on the other node"
    }
}

/// Why a node has no identity.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum IdentityError {
    #[error("the node's certificate could not be made: {source}")]
    Generate { source: rcgen::Error },
    #[error("the node's certificate cannot be used")]
    Certificate(#[from] CertificateError),
    #[error("the node's key cannot be used: {why}")]
    Key { why: String },
}

impl IdentityError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Generate { .. } => "look whether the system gives randomness (getrandom), then start the node again",
            Self::Certificate(_) | Self::Key { .. } => {
                "restore the node's certificate and key from a copy, or remove both: the node makes new ones, and peers must trust it anew"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> NodeId {
        NodeId::from_uuid(Uuid::now_v7())
    }

    #[test]
    fn a_certificate_names_its_node_and_comes_back_from_pem() {
        for role in [Role::Voter, Role::Learner] {
            let node = node();
            let made = Identity::generate(node, role).unwrap();
            let read = Identity::from_pem(made.certificate_pem().as_bytes(), made.key_pem().as_bytes()).unwrap();
            assert_eq!(read.certificate(), made.certificate());
            let peer = read.certificate().peer();
            assert_eq!((peer.node, peer.role), (node, role));
            let now = SystemTime::now();
            assert!(peer.not_before < now && now + VALIDITY - CLOCK_SLACK < peer.not_after);
            assert!(!format!("{made:?}").contains("PRIVATE"));
        }
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let [one, other] = [(); 2].map(|()| Identity::generate(node(), Role::Voter).unwrap());
        let mixed = Identity::from_pem(one.certificate_pem().as_bytes(), other.key_pem().as_bytes());
        assert!(matches!(mixed, Err(IdentityError::Key { .. })), "{mixed:?}");
    }

    #[test]
    fn certificates_that_name_no_node_are_refused() {
        let named = |names: &[&str]| {
            let mut params = CertificateParams::default();
            params.subject_alt_names = names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            Certificate::from_der(certificate.der()).map(|certificate| certificate.peer.role)
        };
        let good = format!("{SCHEME}{}?role=voter", node());
        let bad_role = good.replace("voter", "king");
        let good = good.as_str();
        assert_eq!(named(&[good]), Ok(Role::Voter));
        for names in [&[][..], &[good, good], &["https://example.org"], &["farfork://node/7?role=voter"], &[&bad_role]] {
            assert_eq!(named(names), Err(CertificateError::NoNode), "{names:?}");
        }
        let der = Identity::generate(node(), Role::Voter).unwrap().certificate.der;
        assert!(matches!(Certificate::from_der(&[&der[..], &[0]].concat()), Err(CertificateError::TrailingBytes { bytes: 1 })));
        assert!(matches!(Certificate::from_der(&der[..der.len() - 1]), Err(CertificateError::Malformed { .. })));
        assert!(matches!(Certificate::from_der(&[0; CERTIFICATE_SIZE_MAX + 1]), Err(CertificateError::TooLarge { .. })));
        assert!(matches!(Certificate::from_pem(b"none"), Err(CertificateError::NoPem { .. })));
    }
}
