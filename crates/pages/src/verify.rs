//! What every verifier of certificates does alike: it speaks TLS 1.3 alone, and has the key proven.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, PeerIncompatible, SignatureScheme};

use crate::clock;
use crate::identity::provider;

/// Whose certificates pass.
pub(crate) trait Check: Debug + Send + Sync {
    /// Whether this one does, with what was shown beside it.
    fn check(&self, shown: &CertificateDer<'_>, beside: &[CertificateDer<'_>], now: SystemTime) -> Result<(), rustls::Error>;

    /// Whether a client has to show one.
    fn is_mandatory(&self) -> bool {
        true
    }
}

/// A verifier, for whichever side.
#[derive(Debug)]
pub(crate) struct Verifier<C> {
    check: C,
    provider: Arc<CryptoProvider>,
}

impl<C: Check> Verifier<C> {
    pub(crate) fn new(check: C) -> Arc<Self> {
        Arc::new(Self { check, provider: provider() })
    }

    fn look(&self, shown: &CertificateDer<'_>, beside: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        self.check.check(shown, beside, clock::wall())
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.2 is not spoken: QUIC has none, and the configurations name 1.3 alone.
fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic)
}

/// What both traits ask of a verifier in the same words.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(no_tls12())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.signature(message, certificate, signed)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.schemes()
        }
    };
}

impl<C: Check> ServerCertVerifier for Verifier<C> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.look(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl<C: Check> ClientCertVerifier for Verifier<C> {
    fn client_auth_mandatory(&self) -> bool {
        self.check.is_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.look(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}
