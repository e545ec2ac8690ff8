//! One connection to a node, made when it is needed and again after it was lost.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use quinn::ConnectionError;
use tokio::time::Instant;
use types::NodeId;

use super::silence::{LOOK, Silence};
use super::{CLOSE_DONE, LinkError, Shared};
use crate::clock;
use crate::identity::Peer;
use crate::server::{CLOSE_BUSY, CLOSE_NOT_TRUSTED, shown_on};
use crate::trust::NotTrusted;
use crate::wire::{Refusal, RefusalCode};

/// How long connecting may take: the transport itself would try for the idle timeout.
const CONNECT_TIME: Duration = Duration::from_secs(3);
/// How long it may take beside a connection that is silent: then the next attempt begins, whose probes are frequent again.
const BESIDE_TIME: Duration = Duration::from_secs(1);
/// The pause before connecting again after a failure; doubled by each further one, up to the longest.
const BACK_OFF: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
/// QUIC's error codes for TLS alerts.
const CRYPTO_ERRORS: std::ops::Range<u64> = 0x100..0x200;
/// The one of certificates whose dates do not hold.
const DATES: u64 = CRYPTO_ERRORS.start + 45;
/// The one of a protocol that is not spoken.
const NO_PROTOCOL: u64 = CRYPTO_ERRORS.start + 120;

/// See the module.
pub(crate) struct Lane {
    shared: Arc<Shared>,
    address: SocketAddr,
    expected: Option<NodeId>,
    config: quinn::ClientConfig,
    /// Whether what is asked over it may be asked a second time.
    may_repeat: bool,
    /// What stands, for those who only look.
    standing: std::sync::Mutex<Option<(quinn::Connection, Peer)>>,
    /// Held while connecting, so that all who wait get the one connection, or its failure.
    connecting: tokio::sync::Mutex<Failures>,
    attempts: AtomicU64,
    silence: std::sync::Mutex<Silence>,
}

#[derive(Default)]
struct Failures {
    in_a_row: u32,
    not_before: Option<Instant>,
    last: Option<LinkError>,
    /// Since when the last connection stood.
    connected: Option<Instant>,
}

impl Lane {
    pub(crate) fn new(
        shared: Arc<Shared>,
        address: SocketAddr,
        expected: Option<NodeId>,
        config: quinn::ClientConfig,
        may_repeat: bool,
    ) -> Self {
        Self {
            shared,
            address,
            expected,
            config,
            may_repeat,
            standing: std::sync::Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            attempts: AtomicU64::new(0),
            silence: std::sync::Mutex::default(),
        }
    }

    /// Who is there, if a connection stands.
    pub(crate) fn peer(&self) -> Option<Peer> {
        self.standing().map(|(_, peer)| peer)
    }

    /// The estimate of its round trip, if a connection stands.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.standing().map(|(connection, _)| connection.rtt())
    }

    /// The connection: the one that stands, or a new one.
    pub(crate) async fn connection(&self) -> Result<quinn::Connection, LinkError> {
        let attempts_seen = self.attempts.load(Ordering::Relaxed);
        if let Some(connection) = self.trusted()? {
            return Ok(connection);
        }
        let mut failures = self.connecting.lock().await;
        if let Some(connection) = self.trusted()? {
            return Ok(connection);
        }
        // What was tried while this call waited for its turn was tried for it too.
        if let Some(error) = failures.last.clone().filter(|_| self.attempts.load(Ordering::Relaxed) != attempts_seen) {
            return Err(error);
        }
        failures.look_back();
        if let Some(not_before) = failures.not_before {
            tokio::time::sleep_until(not_before).await;
        }
        self.attempts.fetch_add(1, Ordering::Relaxed);
        match self.connect().await {
            Ok((connection, peer)) => {
                failures.last = None;
                failures.connected = Some(Instant::now());
                *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection.clone(), peer));
                Ok(connection)
            }
            Err(error) => {
                failures.one_more(Instant::now());
                failures.last = Some(error.clone());
                Err(error)
            }
        }
    }

    /// What a call over this connection brings. If the node falls silent meanwhile, the lane gets another connection as soon as
    /// the way carries again: QUIC probes a silent way ever more rarely, and would notice it only after as long again.
    ///
    /// What reads from the old connection ends then, to be asked for anew. Orders are left to theirs: they may have been carried
    /// out.
    pub(crate) async fn watching<T>(
        &self,
        connection: &quinn::Connection,
        call: impl Future<Output = Result<T, LinkError>>,
    ) -> Result<T, LinkError> {
        let is_silent = || self.silence.lock().unwrap_or_else(PoisonError::into_inner).look(connection);
        // Before the call sends anything: what it sends is to count as more.
        is_silent();
        let watch = async {
            loop {
                tokio::time::sleep(LOOK).await;
                if is_silent() {
                    self.replace(connection).await;
                }
            }
        };
        tokio::select! { biased; result = call => result, () = watch => unreachable!("it has no end") }
    }

    /// One attempt to connect beside a connection that is silent. The first of many calls makes it for all.
    async fn replace(&self, silent: &quinn::Connection) {
        let Ok(mut failures) = self.connecting.try_lock() else { return };
        let is_it = |standing: &(quinn::Connection, Peer)| standing.0.stable_id() == silent.stable_id();
        if !self.standing().as_ref().is_some_and(is_it) {
            return;
        }
        let heard = silent.stats().udp_rx.datagrams;
        let Ok(Ok((connection, peer))) = tokio::time::timeout(BESIDE_TIME, self.connect()).await else { return };
        if silent.stats().udp_rx.datagrams != heard && silent.close_reason().is_none() {
            // It speaks again, and has what is under way.
            return connection.close(CLOSE_DONE, b"not needed");
        }
        failures.connected = Some(Instant::now());
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = Some((connection, peer));
        if self.may_repeat {
            silent.close(CLOSE_DONE, b"silent for too long");
        }
    }

    fn standing(&self) -> Option<(quinn::Connection, Peer)> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        standing.take_if(|(connection, _)| connection.close_reason().is_some());
        standing.clone()
    }

    /// The connection that stands, unless its node is trusted no longer.
    fn trusted(&self) -> Result<Option<quinn::Connection>, LinkError> {
        let Some((connection, peer)) = self.standing() else { return Ok(None) };
        match self.shared.trust.check(&peer, clock::wall()) {
            Ok(()) => Ok(Some(connection)),
            Err(source) => {
                connection.close(CLOSE_NOT_TRUSTED, b"no longer trusted");
                Err(LinkError::NotTrusted { address: self.address, source })
            }
        }
    }

    async fn connect(&self) -> Result<(quinn::Connection, Peer), LinkError> {
        let unreachable = |why: String| LinkError::Unreachable { address: self.address, why };
        let endpoint = if self.address.is_ipv6() { self.shared.v6.as_ref() } else { Some(&self.shared.v4) };
        let endpoint = endpoint.ok_or_else(|| unreachable("this host has no IPv6".to_owned()))?;
        // The name is not looked at: certificates name nodes, and are compared whole.
        let connecting = endpoint.connect_with(self.config.clone(), self.address, "farfork");
        let connecting = connecting.map_err(|error| unreachable(error.to_string()))?;
        let connection = match tokio::time::timeout(CONNECT_TIME, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(lost(self.address, &error)),
            Err(_) => return Err(unreachable(format!("no answer within {CONNECT_TIME:?}"))),
        };
        let not_trusted = |source| LinkError::NotTrusted { address: self.address, source };
        let peer = shown_on(&connection).map(|shown| shown.peer().clone());
        let peer = peer.ok_or_else(|| not_trusted(NotTrusted::Handshake { why: "no certificate".to_owned() }))?;
        if let Some(expected) = self.expected.filter(|expected| *expected != peer.node) {
            connection.close(CLOSE_NOT_TRUSTED, b"another node was expected");
            return Err(not_trusted(NotTrusted::OtherNode { expected, actual: peer.node }));
        }
        Ok((connection, peer))
    }
}

impl Failures {
    /// A connection that was lost as soon as it stood was a failure too: a server that does not trust this node closes it then.
    fn look_back(&mut self) {
        match self.connected.take() {
            Some(connected) if connected.elapsed() < BACK_OFF_MAX => self.one_more(connected),
            Some(_) => (self.in_a_row, self.not_before) = (0, None),
            None => {}
        }
    }

    fn one_more(&mut self, at: Instant) {
        let pause = BACK_OFF.saturating_mul(1 << self.in_a_row.min(16)).min(BACK_OFF_MAX);
        self.in_a_row += 1;
        self.not_before = Some(at + pause);
    }
}

/// What the loss of a connection means.
pub(crate) fn lost(address: SocketAddr, error: &ConnectionError) -> LinkError {
    let handshake = |why: String| LinkError::NotTrusted { address, source: NotTrusted::Handshake { why } };
    let dates = |by| LinkError::NotTrusted { address, source: NotTrusted::Dates { by } };
    match error {
        ConnectionError::TransportError(error) if u64::from(error.code) == NO_PROTOCOL => LinkError::OtherProtocol { address },
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) == NO_PROTOCOL => {
            LinkError::OtherProtocol { address }
        }
        ConnectionError::TransportError(error) if u64::from(error.code) == DATES => dates("this host"),
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) == DATES => dates("the other host"),
        ConnectionError::TransportError(error) if CRYPTO_ERRORS.contains(&u64::from(error.code)) => {
            handshake(error.to_string())
        }
        ConnectionError::ConnectionClosed(close) if CRYPTO_ERRORS.contains(&u64::from(close.error_code)) => {
            handshake(format!("by the other side ({})", close.error_code))
        }
        ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_NOT_TRUSTED => {
            handshake("by the other side".to_owned())
        }
        ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_BUSY => {
            LinkError::Refused(Refusal::new(RefusalCode::Busy, "too many connections"))
        }
        other => LinkError::Unreachable { address, why: other.to_string() },
    }
}
