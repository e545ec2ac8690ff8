//! Asking to be let into a cluster: before a node has a certificate that anybody trusts, and knows of the cluster only the digest
//! of its authority. It shows the certificate that it signed itself, which proves its key.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustls::pki_types::CertificateDer;

use crate::authority::Root;
use crate::client::{self, LinkError};
use crate::endpoint::{self, StartError, Tuning};
use crate::identity::{Certificate, Fingerprint, Identity, Role};
use crate::trust::NotTrusted;
use crate::verify::{Check, Verifier};

/// ALPN of requests to be let in.
pub const ALPN_JOIN: &[u8] = b"farfork-join/1";
/// The most bytes of a request or its answer.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Asks the node at an address, if its cluster is the one whose authority has this digest.
///
/// # Errors
/// [`LinkError`]: nothing was said to anybody else. [`LinkError::Unreachable`] and [`LinkError::NotTrusted`]: nor to that node.
pub async fn ask(
    identity: &Identity,
    address: SocketAddr,
    authority: Fingerprint,
    request: Bytes,
    within: Duration,
) -> Result<Bytes, LinkError> {
    // What it is told lets a node in: no node but a voter may hear it.
    ask_by(ByAuthority { authority, voters_alone: true, heeds_dates: true }, identity, address, request, within).await
}

/// The same, also of a node whose certificate's dates do not hold by this host's clock: for what anybody may hear.
///
/// # Errors
/// [`LinkError`].
pub async fn ask_openly(
    identity: &Identity,
    address: SocketAddr,
    authority: Fingerprint,
    request: Bytes,
    within: Duration,
) -> Result<Bytes, LinkError> {
    ask_by(ByAuthority { authority, voters_alone: true, heeds_dates: false }, identity, address, request, within).await
}

async fn ask_by(
    verifier: ByAuthority,
    identity: &Identity,
    address: SocketAddr,
    request: Bytes,
    within: Duration,
) -> Result<Bytes, LinkError> {
    let unreachable = |error: StartError| LinkError::Unreachable { address, why: error.to_string() };
    let tuning = Tuning::default();
    let endpoint = endpoint::client(&tuning, address.is_ipv6()).map_err(unreachable)?;
    let config = endpoint::client_config_with(identity, Verifier::new(verifier), ALPN_JOIN, &tuning).map_err(unreachable)?;
    let deadline = tokio::time::Instant::now() + within;
    let connecting = endpoint.connect_with(config, address, "farfork");
    let connecting = connecting.map_err(|error| LinkError::Unreachable { address, why: error.to_string() })?;
    let connection = match tokio::time::timeout_at(deadline, connecting).await {
        Ok(connected) => connected.map_err(|error| client::lost(address, &error))?,
        Err(_) => return Err(LinkError::Unreachable { address, why: format!("nobody answers within {within:?}") }),
    };
    let answered = tokio::time::timeout_at(deadline, client::message(&connection, request, MESSAGE_BYTES_MAX)).await;
    connection.close(client::CLOSE_DONE, b"done");
    match answered {
        // It may have heard the question.
        Err(_) | Ok(Err(LinkError::Unreachable { .. })) => Err(LinkError::TimedOut { within }),
        Ok(answer) => answer,
    }
}

/// Lets a server pass that shows its authority's certificate, of this digest, and one that it has signed.
#[derive(Debug)]
pub(crate) struct ByAuthority {
    pub(crate) authority: Fingerprint,
    /// Whether only voters pass.
    pub(crate) voters_alone: bool,
    /// Whether the dates of its certificate have to hold.
    pub(crate) heeds_dates: bool,
}

impl Check for ByAuthority {
    fn check(&self, shown: &CertificateDer<'_>, beside: &[CertificateDer<'_>], now: SystemTime) -> Result<(), rustls::Error> {
        let certificate = Certificate::from_der(shown).map_err(NotTrusted::from)?;
        let roots = beside.iter().filter_map(|der| Root::from_der(der).ok());
        let mut roots = roots.filter(|root| root.fingerprint() == self.authority);
        let root = roots.next().ok_or(NotTrusted::OtherCluster { node: certificate.peer().node, expected: self.authority })?;
        root.vouches_for(&certificate, now)?;
        if self.voters_alone && certificate.peer().role != Role::Voter {
            return Err(NotTrusted::NoVoter { node: certificate.peer().node }.into());
        }
        if self.heeds_dates {
            certificate.peer().check_dates(now)?;
        }
        Ok(())
    }
}
