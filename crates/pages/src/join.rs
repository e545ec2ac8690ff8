//! Asking to be let into a cluster: before a node has a certificate that anybody trusts, and knows of the cluster only the digest
//! of its authority. It shows the certificate that it signed itself, which proves its key.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

use crate::authority::Root;
use crate::client::{self, LinkError};
use crate::endpoint::{self, StartError, Tuning};
use crate::identity::{Certificate, Fingerprint, Identity, Role, provider};
use crate::trust::{NotTrusted, no_tls12};

/// ALPN of requests to be let in.
pub const ALPN_JOIN: &[u8] = b"farfork-join/1";
/// The most bytes of a request or its answer.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Asks the node at an address, if its cluster is the one whose authority has this digest.
///
/// # Errors
/// [`LinkError`]: nothing was said to anybody else.
pub async fn ask(
    identity: &Identity,
    address: SocketAddr,
    authority: Fingerprint,
    request: Bytes,
    within: Duration,
) -> Result<Bytes, LinkError> {
    let unreachable = |error: StartError| LinkError::Unreachable { address, why: error.to_string() };
    let tuning = Tuning::default();
    let endpoint = endpoint::client(&tuning, address.is_ipv6()).map_err(unreachable)?;
    let verifier = Arc::new(ByAuthority { authority, provider: provider() });
    let config = endpoint::client_config_with(identity, verifier, ALPN_JOIN, &tuning).map_err(unreachable)?;
    let exchange = async {
        let connecting = endpoint.connect_with(config, address, "farfork");
        let connecting = connecting.map_err(|error| LinkError::Unreachable { address, why: error.to_string() })?;
        let connection = connecting.await.map_err(|error| client::lost(address, &error))?;
        let answer = client::message(&connection, request, MESSAGE_BYTES_MAX).await;
        connection.close(client::CLOSE_DONE, b"done");
        answer
    };
    tokio::time::timeout(within, exchange).await.unwrap_or(Err(LinkError::TimedOut { within }))
}

/// Lets a server pass that shows its authority's certificate, of this digest, and one that it has signed.
#[derive(Debug)]
struct ByAuthority {
    authority: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now: SystemTime = UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let certificate = Certificate::from_der(end_entity).map_err(NotTrusted::from)?;
        let roots = intermediates.iter().filter_map(|der| Root::from_der(der).ok());
        let mut roots = roots.filter(|root| root.fingerprint() == self.authority);
        let root = roots.next().ok_or(NotTrusted::OtherCluster { node: certificate.peer().node, expected: self.authority })?;
        root.vouches_for(&certificate, now)?;
        // What it is told lets a node in: no other node may hear it.
        if certificate.peer().role != Role::Voter {
            return Err(NotTrusted::NoVoter { node: certificate.peer().node }.into());
        }
        certificate.peer().check_dates(now)?;
        Ok(ServerCertVerified::assertion())
    }

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
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
