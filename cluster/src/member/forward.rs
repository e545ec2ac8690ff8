//! Requests that another node answers: the same HTTP as on a node's socket, on streams between nodes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use pages::client::Way;
use pages::server::{RecvStream, SendStream, Streams};
use pages::{Peer, Role};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Handle;
use tower::ServiceExt;
use types::NodeId;

use super::{ClusterError, Membership};
use crate::api::caller::{CALLER, Caller};
use control::state::Life;

/// ALPN of requests between nodes.
pub const ALPN_API: &[u8] = b"farfork-api/1";
/// How long it may take to get a stream to another node.
const STREAM_WITHIN: Duration = Duration::from_secs(5);
/// How long another node may take to say whether it has a machine.
const LOCATE_WITHIN: Duration = Duration::from_secs(3);
/// The most bytes of an answer that is read whole.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A request that came from another node: it is answered here, or not at all.
#[derive(Clone, Copy, Debug)]
pub struct Forwarded {
    /// Who passed it on.
    pub node: NodeId,
    /// Whether that node has a vote.
    pub is_voter: bool,
}

/// Ways to the APIs of other nodes, kept.
pub(super) type Ways = Mutex<HashMap<(SocketAddr, NodeId), Way>>;

/// Serves what others pass on, once there is something to serve it.
#[derive(Default)]
pub struct LateApi {
    api: OnceLock<(Handle, Router)>,
}

impl LateApi {
    /// From now on. Within the runtime that is to do it.
    pub fn set(&self, router: Router) {
        self.api.get_or_init(|| (Handle::current(), router));
    }
}

impl Streams for LateApi {
    fn take(&self, peer: Peer, send: SendStream, receive: RecvStream) -> BoxFuture<'static, ()> {
        let api = self.api.get().cloned();
        Box::pin(async move {
            let Some((runtime, router)) = api else { return };
            let forwarded = Forwarded { node: peer.node, is_voter: peer.role == Role::Voter };
            let handler = service_fn(move |mut request: Request<Incoming>| {
                let caller = Caller::of_node(forwarded.node, request.headers().get(CALLER));
                request.extensions_mut().insert(forwarded);
                request.extensions_mut().insert(caller);
                router.clone().oneshot(request)
            });
            // Not on the thread that serves pages.
            let serving = runtime.spawn(async move {
                let stream = TokioIo::new(tokio::io::join(receive, send));
                let served = hyper::server::conn::http1::Builder::new().serve_connection(stream, handler).with_upgrades();
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a request of another node broke off");
                }
            });
            serving.await.unwrap_or_else(|error| tracing::error!(%error, "serving another node"));
        })
    }
}

impl Membership {
    /// Passes a caller's request on to a node. An upgrade that it asks for goes through.
    ///
    /// # Errors
    /// [`ClusterError`] if that node cannot be asked.
    pub async fn pass_on(
        &self,
        node: NodeId,
        caller: &Caller,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, ClusterError> {
        request.headers_mut().insert(CALLER, caller.header());
        // What shows who it is is for this node alone.
        request.headers_mut().remove(header::AUTHORIZATION);
        self.send(node, request).await
    }

    async fn send(&self, node: NodeId, mut request: Request<Body>) -> Result<Response<Body>, ClusterError> {
        let away = |detail: String| ClusterError::NodeAway { node, detail };
        let upgrade = request.extensions_mut().remove::<OnUpgrade>();
        request.headers_mut().insert(header::HOST, header::HeaderValue::from_static("farfork"));
        let way = self.api_of(node)?;
        let (send, receive) = way.stream(STREAM_WITHIN).await.map_err(|error| away(error.to_string()))?;
        let stream = TokioIo::new(tokio::io::join(receive, send));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(|error| away(error.to_string()))?;
        tokio::spawn(connection.with_upgrades());
        let sent = sender.send_request(request).await;
        let mut response = sent.map_err(|error| ClusterError::NoAnswer { node, detail: error.to_string() })?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(upgrade) = upgrade
        {
            let there = hyper::upgrade::on(&mut response);
            tokio::spawn(async move {
                let (Ok(here), Ok(there)) = tokio::join!(upgrade, there) else { return };
                crate::api::templates::relay(here, TokioIo::new(there)).await;
            });
        }
        Ok(response.map(Body::new))
    }

    /// Asks a node, for a caller or for this node itself, and reads its answer.
    ///
    /// # Errors
    /// [`ClusterError`] if there is none.
    pub async fn ask_node(
        &self,
        node: NodeId,
        caller: Option<&Caller>,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<(StatusCode, Bytes), ClusterError> {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(caller) = caller {
            request = request.header(CALLER, caller.header());
        }
        let request = request.body(Body::from(body.unwrap_or_default())).expect("paths are encoded");
        let response = self.send(node, request).await?;
        let status = response.status();
        let body = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let body = body.collect().await.map_err(|error| ClusterError::NoAnswer { node, detail: error.to_string() })?;
        Ok((status, body.to_bytes()))
    }

    /// The same, of JSON. `Err` inside: what that node said instead.
    ///
    /// # Errors
    /// [`ClusterError`] if there is no answer, or it is not understood.
    pub async fn ask_json<T: DeserializeOwned>(
        &self,
        node: NodeId,
        caller: Option<&Caller>,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Result<T, (StatusCode, Bytes)>, ClusterError> {
        let body = body.map(|body| serde_json::to_vec(body).expect("requests are maps with text keys").into());
        let (status, bytes) = self.ask_node(node, caller, method, path, body).await?;
        if !status.is_success() {
            return Ok(Err((status, bytes)));
        }
        let value = serde_json::from_slice(&bytes);
        value.map(Ok).map_err(|error| ClusterError::NoAnswer { node, detail: format!("its answer is not understood: {error}") })
    }

    /// Other nodes that are thought to run.
    #[must_use]
    pub fn others(&self) -> Vec<NodeId> {
        let state = self.consensus.stale();
        let others = state.nodes.iter().filter(|(id, node)| **id != self.node && node.life != Life::Lost);
        others.map(|(id, _)| *id).collect()
    }

    /// Which other node has this machine of a caller's; `None`: none that answers.
    ///
    /// # Errors
    /// [`ClusterError::AmbiguousMachine`] if several do.
    pub async fn locate(&self, machine: &str, caller: &Caller) -> Result<Option<NodeId>, ClusterError> {
        let path = format!("/v1/machines/{}", crate::cli::client::segment(machine));
        let looks = self.others().into_iter().map(|node| {
            let path = path.clone();
            async move {
                let asked =
                    tokio::time::timeout(LOCATE_WITHIN, self.ask_node(node, Some(caller), Method::GET, &path, None)).await;
                let has_it = matches!(asked, Ok(Ok((status, _))) if status.is_success() || status == StatusCode::CONFLICT);
                has_it.then_some(node)
            }
        });
        let found: Vec<NodeId> = futures_util::future::join_all(looks).await.into_iter().flatten().collect();
        match found.as_slice() {
            [] => Ok(None),
            [node] => Ok(Some(*node)),
            several => Err(ClusterError::AmbiguousMachine { given: machine.to_owned(), count: several.len() }),
        }
    }

    fn api_of(&self, node: NodeId) -> Result<Way, ClusterError> {
        let state = self.consensus.stale();
        let known = state.nodes.get(&node).ok_or_else(|| ClusterError::UnknownNode(node.to_string()))?;
        let address = known.facts.address;
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(way) = ways.get(&(address, node)) {
            return Ok(way.clone());
        }
        let way = self.client.way(&self.identity, ALPN_API, address, Some(node), false);
        let way = way.map_err(|error| ClusterError::NodeAway { node, detail: error.to_string() })?;
        ways.retain(|(_, other), _| *other != node);
        ways.insert((address, node), way.clone());
        Ok(way)
    }
}
