//! TLS of the API for users, who come over TCP: the server shows its node's certificate or one that its administrator gives it,
//! and a user may show one of its own, of which nothing but its key counts.

use std::time::SystemTime;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use types::Digest;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{CertificateError, Fingerprint, Identity, PEM_SIZE_MAX, first_of, provider};
use crate::join::ByAuthority;
use crate::verify::{Check, Verifier};

const HTTP: &[u8] = b"http/1.1";

/// A chain of certificates and the key of the first, both PEM.
#[derive(Clone)]
pub struct Shown {
    /// The chain.
    pub certificates: Vec<u8>,
    /// The key.
    pub key: Vec<u8>,
}

/// Whom a client takes for the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Any node of the cluster whose authority has this digest, whatever its address is called.
    Authority(Fingerprint),
    /// Whoever has a certificate for the address's name that one of these (PEM) vouches for.
    Roots(Vec<u8>),
}

/// Why there is no TLS.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum TlsError {
    #[error("{what} cannot be read: {why}")]
    Pem { what: &'static str, why: String },
    #[error("certificate and key cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// The server's side: of the node's own certificate, unless another one is given.
///
/// # Errors
/// [`TlsError`].
pub fn server(identity: &Identity, shown: Option<&Shown>) -> Result<ServerConfig, TlsError> {
    let tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Verifier::new(AnyKey));
    let mut tls = match shown {
        None => tls.with_cert_resolver(identity.shown()),
        Some(shown) => {
            let (chain, key) = shown.parse()?;
            tls.with_single_cert(chain, key)?
        }
    };
    tls.alpn_protocols = vec![HTTP.to_vec()];
    // Who it is is looked at on each connection.
    tls.send_tls13_tickets = 0;
    Ok(tls)
}

/// The client's side.
///
/// # Errors
/// [`TlsError`].
pub fn client(expected: &Expected, shown: Option<&Shown>) -> Result<ClientConfig, TlsError> {
    let tls = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    let tls = match expected {
        Expected::Authority(authority) => {
            let verifier = Verifier::new(ByAuthority { authority: *authority, voters_alone: false, heeds_dates: true });
            tls.dangerous().with_custom_certificate_verifier(verifier)
        }
        Expected::Roots(pem) => {
            let mut roots = RootCertStore::empty();
            for der in CertificateDer::pem_slice_iter(pem) {
                let der = der.map_err(|error| TlsError::Pem { what: "the authorities", why: error.to_string() })?;
                roots.add(der)?;
            }
            tls.with_root_certificates(roots)
        }
    };
    let mut tls = match shown {
        None => tls.with_no_client_auth(),
        Some(shown) => {
            let (chain, key) = shown.parse()?;
            tls.with_client_auth_cert(chain, key)?
        }
    };
    tls.alpn_protocols = vec![HTTP.to_vec()];
    Ok(tls)
}

/// The digest of the key that a certificate of anybody names.
///
/// # Errors
/// [`CertificateError`].
pub fn key_digest(der: &CertificateDer<'_>) -> Result<Digest, CertificateError> {
    let malformed = |error: &dyn std::fmt::Display| CertificateError::Malformed { why: error.to_string() };
    if der.len() > PEM_SIZE_MAX {
        return Err(CertificateError::TooLarge { bytes: der.len(), most: PEM_SIZE_MAX });
    }
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
    Ok(Digest::of(parsed.public_key().raw))
}

/// The same, of the first certificate of a PEM file.
///
/// # Errors
/// [`CertificateError`].
pub fn key_digest_of_pem(pem: &[u8]) -> Result<Digest, CertificateError> {
    key_digest(&first_of(pem)?)
}

impl Shown {
    fn parse(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificates).collect();
        let chain = chain.map_err(|error| TlsError::Pem { what: "the certificate", why: error.to_string() })?;
        let key = PrivateKeyDer::from_pem_slice(&self.key);
        Ok((chain, key.map_err(|error| TlsError::Pem { what: "the key", why: error.to_string() })?))
    }
}

/// Lets every client pass, with or without a certificate: by its key it is known, or not, when it asks for something.
#[derive(Debug)]
struct AnyKey;

impl Check for AnyKey {
    fn check(&self, shown: &CertificateDer<'_>, _beside: &[CertificateDer<'_>], _now: SystemTime) -> Result<(), rustls::Error> {
        let known = key_digest(shown).map_err(|_| rustls::CertificateError::BadEncoding)?;
        tracing::trace!(key = %known, "a client shows a key");
        Ok(())
    }

    fn is_mandatory(&self) -> bool {
        false
    }
}
