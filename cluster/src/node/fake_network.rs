//! A network without QUIC, for tests of everything above the seams: orders travel over TCP, a certificate is a line of text, and
//! whoever asks is believed to be who it says. What is trusted is checked all the same.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use types::{Digest, NodeId};
use uuid::Uuid;

use super::data::DataDirectory;
use super::network::{Network, NetworkSettings};
use super::offer::{Catalogue, Offered, Store};
use super::peers::{ANSWER_BYTES_MAX, Answer, ORDER_BYTES_MAX, Order, PeerError, PeerForkOrder, PeerForkReport, Peers};
use super::trust::{Certificate, CertificateError, Certificates, Role, TrustError, TrustStore, Trusted};

const BEGIN: &str = "-----BEGIN CERTIFICATE-----\n";
const END: &str = "-----END CERTIFICATE-----\n";
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// From the start of the node.
const VALID_FOR: Duration = Duration::from_secs(365 * 86_400);

/// What a node listens with.
pub struct FakeListener(TcpListener);

/// Opens the trusted nodes of `data`, and listens if told so.
///
/// # Errors
/// [`TrustError`], also if the address cannot be listened on.
pub fn open(settings: &NetworkSettings, data: &DataDirectory) -> Result<(Network, Option<FakeListener>), TrustError> {
    let node = NodeId::from_uuid(data.node());
    let certificates = Arc::new(FakeCertificates::new(certificate(node, SystemTime::now() + VALID_FOR)));
    let trust = TrustStore::open(data.trust(), certificates)?;
    let of_io = |source: io::Error| TrustError::Io { file: "listener".to_owned(), source: Arc::new(source) };
    let listener = settings.listen.map(TcpListener::bind).transpose().map_err(of_io)?;
    let listening = listener.as_ref().map(TcpListener::local_addr).transpose().map_err(of_io)?;
    let peers = Arc::new(FakePeers { own: node });
    let network = Network { listening, advertise: settings.advertise.clone(), trust, peers };
    Ok((network, listener.map(FakeListener)))
}

impl FakeListener {
    /// Lets `order` answer what other nodes ask, until the runtime ends.
    ///
    /// # Errors
    /// If the runtime cannot listen.
    pub fn serve<F: Future<Output = Answer> + Send + 'static>(
        self,
        order: impl Fn(NodeId, Vec<u8>) -> F + Clone + Send + Sync + 'static,
    ) -> io::Result<()> {
        self.0.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(self.0)?;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let order = order.clone();
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    let read = (&mut stream).take(ORDER_BYTES_MAX as u64 + 16).read_to_end(&mut bytes).await;
                    // Who only looks whether anybody listens says nothing.
                    let Some((id, body)) = bytes.split_first_chunk::<16>().filter(|_| read.is_ok()) else { return };
                    let answer = order(NodeId::from_uuid(Uuid::from_bytes(*id)), body.to_vec()).await;
                    if let Err(error) = stream.write_all(&answer.encode()).await {
                        tracing::warn!(%error, "nobody takes the answer");
                    }
                });
            }
        });
        Ok(())
    }
}

struct FakePeers {
    own: NodeId,
}

impl Peers for FakePeers {
    fn fork_on(&self, address: SocketAddr, order: &PeerForkOrder) -> Result<PeerForkReport, PeerError> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE);
        let mut stream = stream.map_err(|error| PeerError::Unreachable { address, detail: error.to_string() })?;
        let mut ask = || {
            stream.set_read_timeout(Some(order.deadline))?;
            stream.write_all(self.own.as_uuid().as_bytes())?;
            stream.write_all(&Order::Fork(order.clone()).encode())?;
            stream.shutdown(Shutdown::Write)?;
            let mut bytes = Vec::new();
            (&mut stream).take(ANSWER_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map(|_| bytes)
        };
        let no_answer = |detail: String| PeerError::NoAnswer { address, detail };
        let bytes = ask().map_err(|error| no_answer(error.to_string()))?;
        Answer::decode(&bytes).map_err(|error| no_answer(error.to_string()))?.report(address)
    }
}

/// What a fake engine in a real cluster offers: no pages, for it has none.
#[must_use]
pub fn no_offers(trust: pages::Trust) -> Arc<Store> {
    struct Empty;
    impl Catalogue for Empty {
        fn find(&self, _tenant: &types::Tenant, _image: Digest) -> Option<Offered> {
            None
        }
    }
    Store::new(Arc::new(Empty), trust, control::lease::LeaseKey::new([7; 32]))
}

/// Certificates that say what they say.
pub struct FakeCertificates {
    own: Certificate,
}

impl FakeCertificates {
    /// Of the node that has this one.
    #[must_use]
    pub fn new(own: Certificate) -> Self {
        Self { own }
    }
}

impl Certificates for FakeCertificates {
    fn own(&self) -> Certificate {
        self.own.clone()
    }

    fn parse(&self, pem: &str) -> Result<Certificate, CertificateError> {
        let line = pem.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(END));
        let mut words = line.unwrap_or_default().split_whitespace();
        let node = words.next().and_then(|node| Uuid::try_parse(node).ok());
        let seconds = words.next().and_then(|seconds| seconds.parse().ok());
        match (node, seconds) {
            (Some(node), Some(seconds)) => Ok(certificate(NodeId::from_uuid(node), UNIX_EPOCH + Duration::from_secs(seconds))),
            _ => Err(CertificateError {
                message: "the certificate says nothing of a node".to_owned(),
                remedy: "give what `farfork trust show` prints on the other node".to_owned(),
            }),
        }
    }

    fn accept(&self, trusted: &Trusted) {
        tracing::debug!(node = %trusted.certificate.node, "accepted");
    }

    fn withdraw(&self, certificate: &Certificate) {
        tracing::debug!(node = %certificate.node, "withdrawn");
    }
}

/// The fake certificate of a node.
#[must_use]
pub fn certificate(node: NodeId, not_after: SystemTime) -> Certificate {
    let seconds = not_after.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let pem = format!("{BEGIN}{node} {seconds}\n{END}");
    let not_after = UNIX_EPOCH + Duration::from_secs(seconds);
    Certificate { node, role: Role::Voter, fingerprint: Digest::of(pem.as_bytes()), not_after, pem }
}
