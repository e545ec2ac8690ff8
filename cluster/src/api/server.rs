//! Connections: who is let in, how many at once, for how long; and how serving ends.
//!
//! ```text
//!  slot free? ──▶ accept ──┬▶ socket: peer's uid ──────────────┬▶ requests, one after the other ──▶ closed
//!                          └▶ HTTPS: handshake, token or key ──┘   │ head or body later than the deadline: 408 or cut
//!                                                                  │ answer not read within the deadline: cut
//!  stop ──▶ no more accepted ──▶ requests in flight end (or the deadline passes) ──▶ Service::stop
//! ```

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::{TlsAcceptor, rustls};
use tower::ServiceExt;
use types::Digest;

use super::caller::Caller;
use super::error::ApiError;
use super::routes::{App, Limits, router};
use super::socket::Socket;
use super::write_deadline::WriteDeadline;
use crate::node::{Service, metrics};

/// The longest head of a request. Paths are short, and few headers are read.
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

/// A connection of whichever kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection as hyper has it: what an upgraded one is given back as.
pub(super) type Served = TokioIo<WriteDeadline<Box<dyn Stream>>>;

/// Where users of the cluster come in.
pub struct Https {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Https {
    /// Listens. Within a runtime.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub fn bind(address: SocketAddr, tls: rustls::ServerConfig) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)?, acceptor: TlsAcceptor::from(Arc::new(tls)) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Where connections come from.
enum Entrance {
    Host(UnixListener, Access),
    Users(Https),
}

enum Came {
    Host(UnixStream),
    User(TcpStream, SocketAddr),
}

impl Entrance {
    async fn accept(&self) -> io::Result<Came> {
        match self {
            Self::Host(listener, _) => Ok(Came::Host(listener.accept().await?.0)),
            Self::Users(https) => https.listener.accept().await.map(|(stream, from)| Came::User(stream, from)),
        }
    }

    /// The stream, with who is at its other end. `None`: it is not talked to.
    async fn admit(&self, came: Came, app: &App) -> Option<(Box<dyn Stream>, Asker)> {
        match (self, came) {
            (Self::Host(_, access), Came::Host(stream)) => {
                let peer = stream.peer_cred().inspect_err(|error| tracing::warn!(%error, "a peer without credentials")).ok()?;
                let (uid, gid, pid) = (peer.uid(), peer.gid(), peer.pid());
                let is_allowed = access.allows(uid);
                if is_allowed {
                    tracing::debug!(uid, gid, pid, "peer");
                } else {
                    metrics::refused_peer();
                    tracing::warn!(uid, gid, pid, "a peer is turned away");
                }
                Some((Box::new(stream), Asker::Known(Caller::of_host(uid, is_allowed, access.is_owner(uid)))))
            }
            (Self::Users(https), Came::User(stream, from)) => {
                // Answers are small, and somebody waits for them.
                stream.set_nodelay(true).unwrap_or_default();
                let within = app.limits().read_deadline;
                let stream = match tokio::time::timeout(within, https.acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => {
                        tracing::debug!(%from, %error, "no TLS");
                        return None;
                    }
                    Err(_) => {
                        tracing::debug!(%from, "its handshake takes too long");
                        return None;
                    }
                };
                let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                let key = shown.and_then(|certificate| pages::https::key_digest(certificate).ok());
                Some((Box::new(stream), Asker::User { key }))
            }
            _ => unreachable!("each entrance accepts its own kind"),
        }
    }
}

/// Who asks on a connection.
#[derive(Clone)]
enum Asker {
    /// It is known from the beginning.
    Known(Caller),
    /// Each request is looked at.
    User { key: Option<Digest> },
}

impl Asker {
    async fn of(&self, app: &App, headers: &HeaderMap) -> Result<Caller, ApiError> {
        match self {
            Self::Known(caller) => Ok(caller.clone()),
            Self::User { key } => match bearer(headers).map(super::users::digest_of).or(*key) {
                Some(credential) => app.user(credential).await,
                None => Ok(Caller::stranger()),
            },
        }
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Serves the API until `stop` is ready, then ends what is in flight, every machine, and the engine.
///
/// # Errors
/// If the runtime cannot listen.
pub async fn serve(
    socket: Socket,
    https: Option<Https>,
    service: Arc<Service>,
    app: App,
    access: Access,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let limits = *app.limits();
    let upkeep = tokio::spawn(upkeep());
    let host = Entrance::Host(socket.listener()?, access);
    // A crowd at one entrance does not keep the other shut.
    let entrances: Vec<Entrance> = std::iter::once(host).chain(https.map(Entrance::Users)).collect();
    let (closing, _) = watch::channel(());
    let accepting: Vec<_> = entrances
        .into_iter()
        .map(|entrance| {
            let slots = Arc::new(Semaphore::new(limits.connections_max));
            let (app, closed) = (app.clone(), closing.subscribe());
            let task = tokio::spawn(accept(Arc::new(entrance), app, Arc::clone(&slots), closed));
            (task, slots)
        })
        .collect();
    stop.await;
    // From here on a client is told at once that nobody is there.
    let entrances: Vec<_> = accepting.into_iter().map(|(task, slots)| (task.abort(), slots)).collect();
    drop((socket, closing));
    let deadline = Instant::now() + limits.stop_deadline;
    let all = u32::try_from(limits.connections_max).unwrap_or(u32::MAX);
    for (_, slots) in entrances {
        let left = deadline.saturating_duration_since(Instant::now());
        if tokio::time::timeout(left, slots.acquire_many(all)).await.is_err() {
            tracing::warn!("connections are cut: their requests did not end in time");
        }
    }
    if !app.stop(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100))).await {
        tracing::warn!("calls of the engine have not ended in time");
    }
    let stopped = tokio::task::spawn_blocking(move || service.stop()).await;
    upkeep.abort();
    stopped.map_err(io::Error::other)
}

/// Accepts connections until it is dropped. `slots` is whole again when the last of them is closed.
async fn accept(entrance: Arc<Entrance>, app: App, slots: Arc<Semaphore>, closing: watch::Receiver<()>) {
    let limits = *app.limits();
    let router = router(app.clone());
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let came = match entrance.accept().await {
            Ok(came) => came,
            Err(error) => {
                // Out of descriptors, most likely. Those that are served will give some back.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (entrance, app, router, closing) = (Arc::clone(&entrance), app.clone(), router.clone(), closing.clone());
        let slots = Arc::clone(&slots);
        tokio::spawn(async move {
            let is_hosts = matches!(*entrance, Entrance::Host(..));
            let in_use = || limits.connections_max.saturating_sub(slots.available_permits());
            let count = || if is_hosts { metrics::connections(in_use()) } else { metrics::user_connections(in_use()) };
            count();
            if let Some((stream, asker)) = entrance.admit(came, &app).await {
                connection(stream, asker, app, router, limits, closing).await;
            }
            drop(slot);
            count();
        });
    }
}

async fn connection(
    stream: Box<dyn Stream>,
    asker: Asker,
    app: App,
    router: Router,
    limits: Limits,
    mut closing: watch::Receiver<()>,
) {
    let handler = service_fn(move |mut request: hyper::Request<Incoming>| {
        let (asker, app, router) = (asker.clone(), app.clone(), router.clone());
        async move {
            match asker.of(&app, request.headers()).await {
                Ok(caller) => request.extensions_mut().insert(caller),
                Err(error) => return Ok(error.into_response()),
            };
            router.oneshot(request).await
        }
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
        tracing::debug!(%error, "connection");
    }
}

async fn upkeep() {
    let mut timer = tokio::time::interval(metrics::UPKEEP_EVERY);
    loop {
        timer.tick().await;
        metrics::upkeep();
    }
}
