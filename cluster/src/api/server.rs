//! Connections: who is let in, how many at once, for how long; and how serving ends.
//!
//! ```text
//!  slot free? ──▶ accept ──▶ peer's uid ──▶ requests, one after the other ──▶ closed
//!                                               │ head or body later than the deadline: 408 or cut
//!                                               │ answer not read within the deadline: cut
//!  stop ──▶ no more accepted ──▶ requests in flight end (or the deadline passes) ──▶ Service::stop
//! ```

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

use super::routes::{App, Limits, router};
use super::socket::Socket;
use super::write_deadline::WriteDeadline;
use crate::node::{Service, metrics};

/// The longest head of a request. Paths are short, and nothing reads headers.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Which users may use a node, besides its own and root.
#[derive(Clone, Debug)]
pub struct Access {
    own: u32,
    others: BTreeSet<u32>,
}

impl Access {
    /// This process's own user, root, and `others`.
    #[must_use]
    pub fn of_this_process(others: impl IntoIterator<Item = u32>) -> Self {
        Self { own: rustix::process::geteuid().as_raw(), others: others.into_iter().collect() }
    }

    /// Whether this user is let in.
    #[must_use]
    pub fn allows(&self, uid: u32) -> bool {
        self.is_owner(uid) || self.others.contains(&uid)
    }

    fn is_owner(&self, uid: u32) -> bool {
        uid == 0 || uid == self.own
    }
}

/// Who is at the other end, as the kernel says (SO_PEERCRED).
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process, if it is of our process namespace.
    pub pid: Option<i32>,
    /// Whether it is let in.
    pub allowed: bool,
    /// Whether it is the node's own user, or root: may have the node read files for it.
    pub is_owner: bool,
}

impl Peer {
    /// Another node of the cluster, which has let its own client in.
    pub(crate) fn of_node() -> Self {
        Self { uid: u32::MAX, gid: u32::MAX, pid: None, allowed: true, is_owner: false }
    }
}

/// A connection as hyper has it: what an upgraded one is given back as.
pub(super) type Served = TokioIo<WriteDeadline<UnixStream>>;

/// Serves the API on `socket` until `stop` is ready, then ends what is in flight, every machine, and the engine.
///
/// # Errors
/// If the runtime cannot listen.
pub async fn serve(
    socket: Socket,
    service: Arc<Service>,
    app: App,
    access: Access,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let limits = *app.limits();
    let upkeep = tokio::spawn(upkeep());
    let slots = accept_until(&socket, &app, &access, stop).await?;
    // From here on a client is told at once that nobody is there.
    drop(socket);
    let deadline = Instant::now() + limits.stop_deadline;
    let all = u32::try_from(limits.connections_max).unwrap_or(u32::MAX);
    if tokio::time::timeout(limits.stop_deadline, slots.acquire_many(all)).await.is_err() {
        tracing::warn!("connections are cut: their requests did not end in time");
    }
    if !app.stop(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100))).await {
        tracing::warn!("calls of the engine have not ended in time");
    }
    let stopped = tokio::task::spawn_blocking(move || service.stop()).await;
    upkeep.abort();
    stopped.map_err(io::Error::other)
}

/// Accepts connections. What comes back is whole when the last of them is closed.
async fn accept_until(
    socket: &Socket,
    app: &App,
    access: &Access,
    stop: impl Future<Output = ()>,
) -> io::Result<Arc<Semaphore>> {
    let limits = *app.limits();
    let listener = socket.listener()?;
    let router = router(app.clone());
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    // Dropped when accepting ends: that is what connections wait for.
    let (_open, closing) = watch::channel(());
    tokio::pin!(stop);
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            next = next => next,
            () = &mut stop => return Ok(slots),
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, access, closing) = (router.clone(), access.clone(), closing.clone());
                let slots = Arc::clone(&slots);
                tokio::spawn(async move {
                    let in_use = || limits.connections_max.saturating_sub(slots.available_permits());
                    metrics::connections(in_use());
                    connection(stream, router, &access, limits, closing).await;
                    drop(slot);
                    metrics::connections(in_use());
                });
            }
            Err(error) => {
                // Out of descriptors, most likely. Those that are served will give some back.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, router: Router, access: &Access, limits: Limits, mut closing: watch::Receiver<()>) {
    let peer = match stream.peer_cred() {
        Ok(peer) => Peer {
            uid: peer.uid(),
            gid: peer.gid(),
            pid: peer.pid(),
            allowed: access.allows(peer.uid()),
            is_owner: access.is_owner(peer.uid()),
        },
        Err(error) => {
            tracing::warn!(%error, "a peer without credentials");
            return;
        }
    };
    if peer.allowed {
        tracing::debug!(uid = peer.uid, gid = peer.gid, pid = peer.pid, "peer");
    } else {
        metrics::refused_peer();
        tracing::warn!(uid = peer.uid, gid = peer.gid, pid = peer.pid, "a peer is turned away");
    }
    let handler = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer);
        router.clone().oneshot(request)
    });
    let stream: Served = TokioIo::new(WriteDeadline::new(stream, limits.write_deadline));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.read_deadline)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(stream, handler)
        .with_upgrades();
    tokio::pin!(served);
    let outcome = tokio::select! {
        outcome = served.as_mut() => outcome,
        _ = closing.changed() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(uid = peer.uid, %error, "connection");
    }
}

async fn upkeep() {
    let mut timer = tokio::time::interval(metrics::UPKEEP_EVERY);
    loop {
        timer.tick().await;
        metrics::upkeep();
    }
}
