//! From a first packet to streams: handshakes and connections.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming};
use rustls::pki_types::CertificateDer;
use tokio::sync::OwnedSemaphorePermit;
use tracing::{debug, info};
use types::NodeId;
use uuid::Uuid;

use super::admission::Handshake;
use super::{CLOSE_BUSY, CLOSE_NOT_TRUSTED, CLOSE_SLOW, Shared, count, stream};
use crate::clock;
use crate::identity::Certificate;
use crate::trust::NotTrusted;
use crate::wire::{ALPN_NODE, ALPN_PAGES};

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Pages,
    Node,
    /// One of the other services.
    Service(usize),
}

/// How long a stranger's connection may stand.
const STRANGER_TIME: Duration = Duration::from_secs(30);

/// Takes what comes in, until the endpoint is closed.
pub(crate) async fn accept(endpoint: Endpoint, shared: Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        match shared.admission.handshake(incoming.remote_address_validated()) {
            Handshake::Go(permit) => {
                tokio::spawn(serve(incoming, permit, Arc::clone(&shared)));
            }
            Handshake::Prove => {
                count(&shared.counters.handshakes_retried);
                // It cannot fail: only a proven address may not be asked again.
                let _ = incoming.retry();
            }
            Handshake::Drop => {
                count(&shared.counters.handshakes_dropped);
                incoming.ignore();
            }
        }
    }
}

/// One connection, from its handshake to its end.
async fn serve(incoming: Incoming, permit: OwnedSemaphorePermit, shared: Arc<Shared>) {
    let address = incoming.remote_address();
    let handshake = async { incoming.accept()?.await };
    let connection = match tokio::time::timeout(shared.limits.handshake_time, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            count(&shared.counters.handshakes_failed);
            debug!(%address, %error, "a handshake failed");
            return;
        }
        Err(_) => {
            count(&shared.counters.handshakes_failed);
            debug!(%address, "a handshake took too long");
            return;
        }
    };
    drop(permit);
    let (Some(shown), Some(protocol)) = (shown_on(&connection), protocol_of(&connection, &shared)) else {
        // rustls has verified a certificate and chosen a protocol, or there would be no connection.
        connection.close(CLOSE_NOT_TRUSTED, b"no certificate or no protocol");
        return;
    };
    let peer = shown.peer().clone();
    let is_trusted = shared.trust.check(&peer, clock::wall());
    let (is_open, is_of_service) = match protocol {
        Protocol::Service(index) => (shared.services[index].admits_strangers, true),
        Protocol::Pages | Protocol::Node => (false, false),
    };
    // What nodes of a cluster do for one another is not for those that a node trusts beside it.
    let is_good = match is_trusted {
        Ok(()) if is_of_service && !is_open && !shared.trust.is_of_cluster(&peer) => {
            Err(NotTrusted::Unknown { node: peer.node, fingerprint: peer.fingerprint })
        }
        looked_at => looked_at,
    };
    let is_stranger = is_open && is_good.is_err();
    if !is_stranger && let Err(refusal) = is_good {
        count(&shared.counters.handshakes_failed);
        debug!(%address, %refusal, "not trusted");
        connection.close(CLOSE_NOT_TRUSTED, b"not trusted");
        return;
    }
    // Strangers can claim to be anybody: they all count as one.
    let counted = if is_stranger { NodeId::from_uuid(Uuid::nil()) } else { peer.node };
    let Some(_place) = shared.admission.connection(counted) else {
        count(&shared.counters.connections_refused);
        connection.close(CLOSE_BUSY, b"too many connections");
        return;
    };
    count(&shared.counters.accepted);
    debug!(%address, node = %peer.node, ?protocol, "connected");
    if is_stranger {
        let served = tokio::time::timeout(STRANGER_TIME, streams(&connection, shown, protocol, &shared)).await;
        if served.is_err() {
            connection.close(CLOSE_SLOW, b"too long for a stranger");
        }
        return;
    }
    tokio::select! {
        refusal = shared.trust.until_withdrawn(&peer) => {
            info!(%address, node = %peer.node, %refusal, "a connection is closed");
            connection.close(CLOSE_NOT_TRUSTED, b"no longer trusted");
        }
        () = streams(&connection, shown, protocol, &shared) => {}
    }
}

/// Takes requests until the connection ends. How many there are at a time is the transport's limit on streams.
async fn streams(connection: &Connection, shown: Certificate, protocol: Protocol, shared: &Arc<Shared>) {
    let (peer, shown) = (Arc::new(shown.peer().clone()), Arc::new(shown));
    let budget = shared.admission.budget(&shared.limits);
    while let Ok((send, receive)) = connection.accept_bi().await {
        let exchange = stream::Exchange {
            connection: connection.clone(),
            send,
            receive,
            peer: Arc::clone(&peer),
            shown: Arc::clone(&shown),
            budget: budget.clone(),
            shared: Arc::clone(shared),
        };
        tokio::spawn(exchange.run(protocol));
    }
}

/// The certificate of the other side, which the handshake has verified.
pub(crate) fn shown_on(connection: &Connection) -> Option<Certificate> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Certificate::from_der(certificates.first()?).ok()
}

fn protocol_of(connection: &Connection, shared: &Shared) -> Option<Protocol> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    match data.protocol?.as_slice() {
        ALPN_PAGES => Some(Protocol::Pages),
        ALPN_NODE => Some(Protocol::Node),
        other => shared.services.iter().position(|service| service.alpn == other).map(Protocol::Service),
    }
}
