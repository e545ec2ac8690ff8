//! What the path between two hosts does with nothing of ours on it, or only the client of pages: the raw parts that rows are
//! compared with, and the proof that a row can be measured at all.

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chaos::network::Host;
use pages::client::Client;
use pages::endpoint::Tuning;
use pages::wire::{ExtentId, ExtentsRequest, Urgency, Wanted};
use pages::{Certificate, Identity, Role, Trust};
use quinn::congestion::CubicConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use types::{Digest, EXTENT_PAGES, EXTENT_SIZE, ExtentIndex, NodeId, Tenant};

use super::bed::{PATIENCE, Site};
use super::workload;

/// Requests under way at once when a path is filled; of 16 extents each.
const REQUESTS: usize = 6;
const BATCH: u64 = 16;

/// Round trips of a small datagram from one host to another.
pub(super) fn round_trips(from: &Host, to: &Host, n: usize) -> Result<Vec<Duration>> {
    let (address, bound) = channel();
    let here = to.address();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            to.run_in(|| -> Result<()> {
                let socket = UdpSocket::bind((here, 0))?;
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                address.send(socket.local_addr()?)?;
                let mut bytes = [0; 64];
                while let Ok((length @ 1.., from)) = socket.recv_from(&mut bytes) {
                    socket.send_to(&bytes[..length], from)?;
                }
                Ok(())
            })
        });
        let there = bound.recv()?;
        from.run_in(|| -> Result<Vec<Duration>> {
            let socket = UdpSocket::bind((from.address(), 0))?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut bytes = [0; 64];
            let mut trip = || -> Result<Duration> {
                let began = Instant::now();
                socket.send_to(&[1; 64], there)?;
                socket.recv(&mut bytes)?;
                Ok(began.elapsed())
            };
            let trips = (0..n).map(|_| trip()).collect();
            socket.send_to(&[], there)?;
            trips
        })
    })
}

/// Raw QUIC: so many bytes asked for by a small request on a stream of its own, one after the other with a pause before each, without
/// client certificates.
pub(super) fn quic_reads(from: &Host, to: &Host, bytes: u64, n: usize, pause: Duration) -> Result<Vec<Duration>> {
    let own = rcgen::generate_simple_self_signed(["server".to_owned()])?;
    let certificate = CertificateDer::from(own.cert);
    let key = PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
    let (address, bound) = channel();
    let (here, served) = (to.address(), certificate.clone());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            to.run_in(|| -> Result<()> {
                runtime()?.block_on(async {
                    let mut config = quinn::ServerConfig::with_single_cert(vec![served], key)?;
                    config.transport_config(transport());
                    let server = quinn::Endpoint::server(config, (here, 0).into())?;
                    address.send(server.local_addr()?)?;
                    let connection = server.accept().await.context("a client")?.await?;
                    let answered = vec![7; usize::try_from(bytes)?];
                    while let Ok((mut answer, mut question)) = connection.accept_bi().await {
                        question.read_to_end(256).await?;
                        answer.write_all(&answered).await?;
                        answer.finish()?;
                    }
                    Ok(())
                })
            })
        });
        let there = bound.recv()?;
        from.run_in(|| -> Result<Vec<Duration>> {
            runtime()?.block_on(async {
                let mut roots = rustls::RootCertStore::empty();
                roots.add(certificate)?;
                let mut config = quinn::ClientConfig::with_root_certificates(Arc::new(roots))?;
                config.transport_config(transport());
                let client = quinn::Endpoint::client((from.address(), 0).into())?;
                let connection = client.connect_with(config, there, "server")?.await?;
                let mut trips = Vec::with_capacity(n);
                for _ in 0..n {
                    // All of this side rests, as it does while a child computes.
                    std::thread::sleep(pause);
                    let began = Instant::now();
                    let (mut question, mut answer) = connection.open_bi().await?;
                    question.write_all(&[1; 96]).await?;
                    question.finish()?;
                    let read = answer.read_to_end(1 << 20).await?;
                    trips.push(began.elapsed());
                    ensure!(read.len() as u64 == bytes, "{} bytes", read.len());
                }
                connection.close(0_u32.into(), b"");
                client.wait_idle().await;
                Ok(trips)
            })
        })
    })
}

fn transport() -> Arc<quinn::TransportConfig> {
    let tuning = Tuning::default();
    let mut cubic = CubicConfig::default();
    cubic.initial_window(u64::from(tuning.initial_window_bytes));
    let mut transport = quinn::TransportConfig::default();
    transport.send_window(u64::from(tuning.send_window_bytes)).congestion_controller_factory(Arc::new(cubic));
    transport
        .stream_receive_window(tuning.stream_receive_window_bytes.into())
        .receive_window(tuning.receive_window_bytes.into());
    Arc::new(transport)
}

/// Reads all written extents of an image from a real node as fast as they come, with the client of pages: nothing is verified or
/// published. What a good full copy cannot be faster than.
pub(super) fn flat_out(from: &Host, site: &mut Site, through: SocketAddr, digest: &str, mib: u64) -> Result<FlatOut> {
    let identity = Identity::generate(NodeId::from_uuid(uuid::Uuid::now_v7()), Role::Learner)?;
    site.trust(identity.certificate_pem())?;
    let trust = Trust::new();
    trust.add(&Certificate::from_pem(site.certificate.as_bytes())?, [Tenant::default_tenant()])?;
    let digest: Digest = digest.parse()?;
    let (first, count) = workload::written(mib)?;
    let extents: Vec<u32> =
        (first.0 / EXTENT_PAGES..(first.0 + count) / EXTENT_PAGES).map(u32::try_from).collect::<Result<_, _>>()?;
    from.run_in(|| {
        runtime()?.block_on(async {
            let client = Client::new(&identity, &trust, &Tuning::default())?;
            let link = client.link(through, None);
            let opened = link.open(&Tenant::default_tenant(), digest, PATIENCE).await?;
            link.connect(PATIENCE).await?;
            let began = Instant::now();
            let queue = std::rc::Rc::new(Cell::new(0_usize));
            let batches: std::rc::Rc<Vec<Vec<u32>>> =
                std::rc::Rc::new(extents.chunks(usize::try_from(BATCH)?).map(<[u32]>::to_vec).collect());
            let local = tokio::task::LocalSet::new();
            let readers: Vec<_> = (0..REQUESTS)
                .map(|_| {
                    let (link, lease, queue, batches) = (link.clone(), opened.lease.clone(), queue.clone(), batches.clone());
                    local.spawn_local(async move {
                        let mut bytes = 0;
                        loop {
                            let number = queue.replace(queue.get() + 1);
                            let Some(batch) = batches.get(number) else { break };
                            let wanted = batch.iter().map(|extent| ExtentId { region: 0, extent: ExtentIndex(*extent) });
                            let order = ExtentsRequest {
                                lease: lease.clone(),
                                image: digest,
                                urgency: Urgency::Stream,
                                extents: Wanted::new(wanted.collect())?,
                                may_compress: false,
                            };
                            link.extents(&order, PATIENCE, |answer| bytes += answer.wire_bytes).await?;
                        }
                        anyhow::Ok(bytes as u64)
                    })
                })
                .collect();
            let bytes = local
                .run_until(async {
                    let mut bytes = 0;
                    for reader in readers {
                        bytes += reader.await??;
                    }
                    anyhow::Ok(bytes)
                })
                .await?;
            let took = began.elapsed();
            client.close();
            ensure!(bytes >= extents.len() as u64 * EXTENT_SIZE, "{bytes} bytes of {} extents", extents.len());
            Ok(FlatOut { bytes, took })
        })
    })
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlatOut {
    pub(super) bytes: u64,
    pub(super) took: Duration,
}

impl FlatOut {
    #[expect(clippy::cast_precision_loss, reason = "bytes of an image, far below 2^52")]
    pub(super) fn mbit(&self) -> f64 {
        self.bytes as f64 * 8e-6 / self.took.as_secs_f64()
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}
