//! Who vouches for nodes: a cluster's certificate authority. Its key signs certificates of nodes and nothing else.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SignatureAlgorithm,
};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use types::{Digest, Name};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::clock;
use crate::identity::{
    CLOCK_SLACK, Certificate, CertificateError, Fingerprint, IdentityError, Role, first_of, name_of, provider,
};
use crate::signature;
use crate::trust::NotTrusted;

/// How long an authority is good for.
pub const VALIDITY: Duration = Duration::from_hours(10 * 365 * 24);
/// How long the certificate of a node is good for.
pub const NODE_VALIDITY: Duration = Duration::from_hours(90 * 24);

/// The certificate of an authority: what nodes are trusted by.
#[derive(Clone)]
pub struct Root {
    der: CertificateDer<'static>,
    fingerprint: Fingerprint,
    anchors: Arc<RootCertStore>,
}

impl Root {
    /// Reads it from bytes of anybody.
    ///
    /// # Errors
    /// [`CertificateError`] if it can vouch for nobody.
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        let der = CertificateDer::from(der.to_vec());
        let mut anchors = RootCertStore::empty();
        anchors.add(der.clone()).map_err(|error| CertificateError::Malformed { why: error.to_string() })?;
        Ok(Self { fingerprint: Fingerprint(Digest::of(&der)), der, anchors: Arc::new(anchors) })
    }

    /// Reads the first certificate of a PEM file.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        Self::from_der(&first_of(pem)?)
    }

    /// Its bytes.
    #[must_use]
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Its digest: what a join token carries.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Whether it has signed this certificate. Whether its dates hold is for who asks to look at.
    ///
    /// # Errors
    /// [`NotTrusted`].
    pub fn vouches_for(&self, certificate: &Certificate, now: SystemTime) -> Result<(), NotTrusted> {
        let peer = certificate.peer();
        let unknown = NotTrusted::Unknown { node: peer.node, fingerprint: peer.fingerprint };
        let parsed = ParsedCertificate::try_from(certificate.der()).map_err(|_| unknown.clone())?;
        // Dates have errors of their own: here is asked for a time at which they hold. Strangers write dates as they like.
        let last = peer.not_after.checked_sub(Duration::from_secs(1)).filter(|last| *last >= peer.not_before);
        let within = now.clamp(peer.not_before, last.ok_or_else(|| unknown.clone())?);
        let since = within.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let algorithms = provider().signature_verification_algorithms.all;
        let now = UnixTime::since_unix_epoch(since);
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.anchors, &[], now, algorithms).map_err(|_| unknown)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

/// An authority with its key. Whoever has it can make nodes.
pub struct Authority {
    root: Root,
    root_pem: String,
    key: KeyPair,
}

impl Authority {
    /// Draws a key for a cluster that begins, good for [`VALIDITY`].
    ///
    /// # Errors
    /// [`IdentityError`] if the system gives no randomness.
    pub fn generate() -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Generate { source };
        let key = KeyPair::generate().map_err(failed)?;
        let now = clock::wall();
        let mut params = parameters();
        params.not_before = (now - CLOCK_SLACK).into();
        params.not_after = (now + VALIDITY).into();
        let certificate = params.self_signed(&key).map_err(failed)?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Reads a certificate and its key.
    ///
    /// # Errors
    /// [`IdentityError`] if one of them does not parse, or they do not belong together.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, IdentityError> {
        let root = Root::from_pem(certificate.as_bytes())?;
        let key = KeyPair::from_pem(key).map_err(|error| IdentityError::Key { why: error.to_string() })?;
        let (_, parsed) =
            X509Certificate::from_der(&root.der).map_err(|error| IdentityError::Key { why: error.to_string() })?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(IdentityError::Key { why: "it is another authority's".to_owned() });
        }
        Ok(Self { root, root_pem: certificate.to_owned(), key })
    }

    /// Its certificate.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The same as PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Its key as PEM. Keep it encrypted.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// Signs a certificate for the node and the key of one that it has shown, under this name and role: PEM, with the authority's
    /// own after it. Good for [`NODE_VALIDITY`].
    ///
    /// # Errors
    /// [`IdentityError`] if its key is of another kind than nodes have.
    pub fn issue(&self, shown: &Certificate, name: &Name, role: Role) -> Result<String, IdentityError> {
        let now = clock::wall();
        self.issue_valid(shown, name, role, now - CLOCK_SLACK, now + NODE_VALIDITY)
    }

    /// As [`Authority::issue`], good between two times.
    ///
    /// # Errors
    /// [`IdentityError`] if its key is of another kind than nodes have.
    pub fn issue_valid(
        &self,
        shown: &Certificate,
        name: &Name,
        role: Role,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<String, IdentityError> {
        let failed = |source| IdentityError::Generate { source };
        let mut params = CertificateParams::default();
        let uri = name_of(shown.peer().node, role);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        let ours = parameters();
        let issuer = Issuer::from_params(&ours, &self.key);
        let certificate = params.signed_by(&NodeKey::of(shown)?, &issuer).map_err(failed)?;
        Ok(format!("{}{}", certificate.pem(), self.root_pem))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("root", &self.root).finish_non_exhaustive()
    }
}

/// What every authority of ours says of itself.
fn parameters() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "farfork cluster");
    // It signs nodes, and no other authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

/// The public half of a node's key.
struct NodeKey(Vec<u8>);

impl NodeKey {
    fn of(certificate: &Certificate) -> Result<Self, IdentityError> {
        certificate.point().map(Self).ok_or_else(|| IdentityError::Key { why: signature::OTHER_KIND.to_owned() })
    }
}

impl PublicKeyData for NodeKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use types::NodeId;
    use uuid::Uuid;

    use super::*;
    use crate::identity::Identity;

    #[test]
    fn an_authority_vouches_for_what_it_has_signed_and_for_nothing_else() {
        let [ours, theirs] = [(); 2].map(|()| Authority::generate().unwrap());
        let node = NodeId::from_uuid(Uuid::now_v7());
        let shown = Identity::generate(node, Role::Learner).unwrap();
        let pem = ours.issue(shown.certificate(), &Name::parse("node-7").unwrap(), Role::Voter).unwrap();
        let identity = Identity::from_pem(pem.as_bytes(), shown.key_pem().as_bytes()).unwrap();
        let peer = identity.certificate().peer();
        assert_eq!((peer.node, peer.role, peer.name.as_str()), (node, Role::Voter, "node-7"));
        let now = SystemTime::now();
        assert_eq!(ours.root().vouches_for(identity.certificate(), now), Ok(()));
        assert!(theirs.root().vouches_for(identity.certificate(), now).is_err(), "another cluster's");
        assert!(ours.root().vouches_for(shown.certificate(), now).is_err(), "one that it signed itself");
        // Dates that end before they begin hold at no time, and panic nowhere: anybody can show them.
        let backwards = Identity::generate_valid(node, Role::Voter, now + VALIDITY, now - VALIDITY).unwrap();
        assert!(ours.root().vouches_for(backwards.certificate(), now).is_err());
        let renewed = ours.issue(identity.certificate(), &Name::parse("node-7").unwrap(), Role::Voter).unwrap();
        identity.renew(renewed.as_bytes()).unwrap();
        assert!(
            shown.renew(Identity::generate(node, Role::Voter).unwrap().certificate_pem().as_bytes()).is_err(),
            "of another key"
        );
        let again = Authority::from_pem(ours.root_pem(), &ours.key_pem()).unwrap();
        assert_eq!(again.root().fingerprint(), ours.root().fingerprint());
        assert!(matches!(Authority::from_pem(ours.root_pem(), &theirs.key_pem()), Err(IdentityError::Key { .. })));
        assert!(Identity::from_pem(ours.root_pem().as_bytes(), ours.key_pem().as_bytes()).is_err(), "an authority is no node");
    }
}
