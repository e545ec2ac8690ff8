//! What the relay is for: QUIC gets through whatever it does, bytes unchanged, as long as something gets through.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use chaos::relay::{Config, Impairment, Probability, Relay};
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use vm::harness::{count, held, seed};

use crate::support::DEADLINE;

#[test]
fn quic_brings_every_byte_through_a_bad_link() {
    let seed = seed();
    let chance = |chance| Probability::new(chance).unwrap();
    let bad = Impairment {
        delay: Duration::from_millis(2),
        jitter: Duration::from_millis(1),
        loss: chance(0.02),
        duplicate: chance(0.02),
        reorder: chance(0.02),
        corrupt: chance(0.02),
        ..Impairment::default()
    };
    let mut dice = fastrand::Rng::with_seed(seed);
    let length = usize::try_from(count(1 << 20, 16 << 20)).unwrap();
    let sent: Vec<u8> = (0..length).map(|_| dice.u8(..)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (came, counters) = runtime.block_on(async {
        let (server, client) = endpoints();
        let config = Config { seed, to_upstream: bad, to_client: bad, ..Config::to(server.local_addr().unwrap()) };
        let relay = Relay::start(config).unwrap();
        let echo = tokio::spawn(async move {
            let connection = accepted(&server).await;
            let (mut answer, mut question) = connection.accept_bi().await.unwrap();
            let bytes = question.read_to_end(usize::MAX).await.unwrap();
            answer.write_all(&bytes).await.unwrap();
            answer.finish().unwrap();
            connection.closed().await;
        });
        let exchange = async {
            let connection = client.connect(relay.address(), "server").unwrap().await.unwrap();
            let (mut question, mut answer) = connection.open_bi().await.unwrap();
            question.write_all(&sent).await.unwrap();
            question.finish().unwrap();
            answer.read_to_end(usize::MAX).await.unwrap()
        };
        let came = tokio::time::timeout(4 * DEADLINE, exchange).await.expect("an answer within the deadline");
        echo.abort();
        (came, relay.counters())
    });
    assert!(came == sent, "the bytes that came back are others");
    for tally in [counters.to_upstream, counters.to_client] {
        assert!(tally.lost > 0 && tally.corrupted > 0 && tally.duplicated > 0 && tally.reordered > 0, "{tally:?}");
    }
    held("bytes there and back through a bad link", length as u64);
}

/// A first packet that arrives corrupted is refused; the client sends it again, and that is a new connection to the server.
async fn accepted(server: &Endpoint) -> Connection {
    loop {
        if let Ok(connection) = server.accept().await.unwrap().await {
            return connection;
        }
    }
}

fn endpoints() -> (Endpoint, Endpoint) {
    let identity = rcgen::generate_simple_self_signed(["server".to_owned()]).unwrap();
    let certificate = CertificateDer::from(identity.cert);
    let key = PrivateKeyDer::Pkcs8(identity.signing_key.serialize_der().into());
    let any = (Ipv4Addr::LOCALHOST, 0).into();
    let server = ServerConfig::with_single_cert(vec![certificate.clone()], key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client = Endpoint::client(any).unwrap();
    client.set_default_client_config(ClientConfig::with_root_certificates(Arc::new(roots)).unwrap());
    (Endpoint::server(server, any).unwrap(), client)
}
