//! The transport's knobs, and the limits on what a peer can make grow.
//!
//! QUIC's defaults are for 100 Mbit/s over 100 ms. Between hosts of one network a demand is 64 KiB and a round trip well below a
//! millisecond, so windows are large, and so is the first congestion window: a small one makes a single extent wait for several
//! acknowledgements. BBR was five times slower than CUBIC there. The MTU is left alone: a larger one without a larger first
//! window stalled for the 25 ms of a delayed acknowledgement.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{EndpointConfig, IdleTimeout, TransportConfig, VarInt};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use thiserror::Error;

use crate::identity::{Identity, provider};
use crate::trust::{Pinned, Trust};

/// What the transport is told. Both sides of a connection have their own.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Bytes that may be under way on a connection without an acknowledgement; 64 MiB. Less than rate times round trip leaves
    /// the link idle; more is memory that a peer which acknowledges nothing can hold, up to the budget of [`Limits`].
    pub send_window_bytes: u32,
    /// Bytes of one answer that may arrive before they are read; 16 MiB. Less makes a large answer wait for its reader.
    pub stream_receive_window_bytes: u32,
    /// Bytes of all answers of a connection that may arrive before they are read; 64 MiB. This much memory a lying holder can
    /// make a reader hold.
    pub receive_window_bytes: u32,
    /// Bytes sent before the first acknowledgement; 4 MiB. Less costs the first extents round trips; more can overrun a switch.
    pub initial_window_bytes: u32,
    /// How often a connection without traffic shows that it lives; 1 s. Longer than the idle timeout, idle connections die.
    pub keep_alive: Duration,
    /// How long a peer may be silent before its connection is given up; 5 s. Shorter than a pause of the peer's process or a
    /// switch of routes, connections die for nothing; until then a dead holder is only noticed by deadlines and hedging.
    pub idle_timeout: Duration,
    /// Whether what is read ahead goes over the connection for demands; no. With it demands wait for what was sent before them.
    pub has_one_connection: bool,
    /// Bytes of each of the socket's two kernel buffers; 8 MiB, of which the kernel gives at most `net.core.rmem_max` and
    /// `wmem_max`. Too small, bursts are dropped here and look like losses of the network.
    pub socket_buffer_bytes: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            send_window_bytes: 64 << 20,
            stream_receive_window_bytes: 16 << 20,
            receive_window_bytes: 64 << 20,
            initial_window_bytes: 4 << 20,
            keep_alive: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(5),
            has_one_connection: false,
            socket_buffer_bytes: 8 << 20,
        }
    }
}

/// What peers can make a server hold or do, at most.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections of all peers; 1,024. Each costs some 50 KiB, and what is queued on it.
    pub connections: u32,
    /// Connections of one peer; 32: eight are used in a cluster, and those that have died may stand until their idle timeout.
    pub connections_per_peer: u32,
    /// Handshakes under way; 64. What comes beyond is not answered: who means it asks again.
    pub handshakes: u32,
    /// Handshakes under way from which on addresses must be proven first (a round trip more); 8.
    pub handshakes_unproven: u32,
    /// How long a handshake may take; 3 s.
    pub handshake_time: Duration,
    /// First packets of handshakes that wait to be looked at; 256. What comes beyond is dropped.
    pub incoming: u32,
    /// Bytes that a client may send ahead in its handshake; 16 KiB, and 1 MiB for all together.
    pub incoming_bytes: u32,
    /// Requests under way on a connection; 256. More are held back at the client by the transport.
    pub streams_per_connection: u32,
    /// Bytes of answers that were fetched for a peer and not yet acknowledged by it, for each connection; 16 MiB. Beyond it
    /// requests wait. Less than rate times round trip slows streaming down.
    pub answer_bytes_per_connection: u32,
    /// How long a request may take to arrive once its stream is open; 3 s. Then its stream is reset.
    pub request_time: Duration,
    /// How long a peer may take to acknowledge an answer in full; 30 s. Then its connection is closed: it is the only way to get
    /// the memory back from one that acknowledges nothing.
    pub answer_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_peer: 32,
            handshakes: 64,
            handshakes_unproven: 8,
            handshake_time: Duration::from_secs(3),
            incoming: 256,
            incoming_bytes: 16 << 10,
            streams_per_connection: 256,
            answer_bytes_per_connection: 16 << 20,
            request_time: Duration::from_secs(3),
            answer_time: Duration::from_secs(30),
        }
    }
}

/// A client's socket and endpoint. Must be called inside a tokio runtime.
pub(crate) fn client(tuning: &Tuning, is_v6: bool) -> Result<quinn::Endpoint, StartError> {
    let any: SocketAddr = if is_v6 { "[::]:0" } else { "0.0.0.0:0" }.parse().expect("an address");
    endpoint(any, tuning, None)
}

/// A server's socket and endpoint. Must be called inside a tokio runtime.
pub(crate) fn endpoint(
    listen: SocketAddr,
    tuning: &Tuning,
    server: Option<quinn::ServerConfig>,
) -> Result<quinn::Endpoint, StartError> {
    let failed = |step| move |source| StartError::Socket { step, address: listen, source };
    let socket = UdpSocket::bind(listen).map_err(failed("binding"))?;
    let bytes = tuning.socket_buffer_bytes as usize;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, bytes).map_err(|errno| failed("sizing")(errno.into()))?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, bytes).map_err(|errno| failed("sizing")(errno.into()))?;
    let runtime = Arc::new(quinn::TokioRuntime);
    quinn::Endpoint::new(EndpointConfig::default(), server, socket, runtime).map_err(failed("polling"))
}

/// A server's side of connections.
pub(crate) fn server_config(
    identity: &Identity,
    trust: &Trust,
    alpn: &[&[u8]],
    tuning: &Tuning,
    limits: &Limits,
    admits_strangers: bool,
) -> Result<quinn::ServerConfig, StartError> {
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Pinned::verifier(trust.clone(), admits_strangers))
        .with_cert_resolver(identity.shown());
    tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    // A resumed session would not be verified again, whoever is trusted by then.
    tls.send_tls13_tickets = 0;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let mut transport = transport(tuning)?;
    // Requests are small: a peer has nothing to send that needs a window.
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.streams_per_connection))
        .stream_receive_window(VarInt::from_u32(128 << 10))
        .receive_window(VarInt::from_u32(1 << 20));
    config
        .transport_config(Arc::new(transport))
        .migration(false)
        .max_incoming(limits.incoming as usize)
        .incoming_buffer_size(u64::from(limits.incoming_bytes))
        .incoming_buffer_size_total(1 << 20);
    Ok(config)
}

/// A client's side of connections.
pub(crate) fn client_config(
    identity: &Identity,
    trust: &Trust,
    alpn: &[u8],
    tuning: &Tuning,
) -> Result<quinn::ClientConfig, StartError> {
    client_config_with(identity, Pinned::verifier(trust.clone(), false), alpn, tuning)
}

/// The same, with something else that says which servers are good.
pub(crate) fn client_config_with(
    identity: &Identity,
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[u8],
    tuning: &Tuning,
) -> Result<quinn::ClientConfig, StartError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(identity.shown());
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = Resumption::disabled();
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let mut transport = transport(tuning)?;
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(tuning.stream_receive_window_bytes))
        .receive_window(VarInt::from_u32(tuning.receive_window_bytes));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// What both sides have in common.
fn transport(tuning: &Tuning) -> Result<TransportConfig, StartError> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(u64::from(tuning.initial_window_bytes));
    let idle = IdleTimeout::try_from(tuning.idle_timeout).map_err(|_| StartError::IdleTimeout(tuning.idle_timeout))?;
    let mut transport = TransportConfig::default();
    transport
        .send_window(u64::from(tuning.send_window_bytes))
        // An extent is of use only when it is whole: the stream that came first is sent first.
        .send_fairness(false)
        .congestion_controller_factory(Arc::new(cubic))
        // Before the first answer: the default, 333 ms, has a lost first packet repeated after a second.
        .initial_rtt(Duration::from_millis(50))
        .keep_alive_interval(Some(tuning.keep_alive))
        .max_idle_timeout(Some(idle))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    Ok(transport)
}

/// Why an endpoint does not start.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum StartError {
    #[error("{step} a UDP socket at {address} failed: {source}")]
    Socket { step: &'static str, address: SocketAddr, source: io::Error },
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error("TLS cannot be set up for QUIC: {0}")]
    Quic(#[from] NoInitialCipherSuite),
    #[error("an idle timeout of {0:?} is longer than QUIC has")]
    IdleTimeout(Duration),
}

impl StartError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Socket { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => "end what listens there, or choose another port",
                io::ErrorKind::AddrNotAvailable => "choose an address of this host",
                io::ErrorKind::PermissionDenied => "choose a port above 1023",
                _ => "raise the limit on open files (ulimit -n), and look whether the network is up",
            },
            Self::Tls(_) | Self::Quic(_) => "make the node's certificate anew",
            Self::IdleTimeout(_) => "choose some seconds",
        }
    }
}
