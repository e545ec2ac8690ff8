//! Every path, with what each route shares: who asks is checked, each answer is counted, a panic becomes a 500.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router};
use control::State;
use control::command::{Command, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use types::{Digest, FullName, NodeId};
use uuid::Uuid;

use super::audit::Strangers;
use super::caller::{self, Caller, Who};
use super::error::ApiError;
use super::{archive, audit, between, cluster, facts, images, job_tasks, jobs, kill, machines, node, templates, trust, users};
use crate::cli::client::segment;
use crate::jobs::Jobs;
use crate::member::agent::facts_of;
use crate::member::{ClusterError, Membership};
use crate::node::audit::{Asked, Audit};
use crate::node::calls::Calls;
use crate::node::peers::{Answer, PeerRefusal};
use crate::node::{NodeError, Service, metrics};
use crate::raft::ConsensusError;

/// What handlers share.
#[derive(Clone)]
pub struct App {
    shared: Arc<Shared>,
}

struct Shared {
    service: Arc<Service>,
    /// Calls that change something.
    verbs: Calls,
    /// Calls that only look, which a crowd of forks must not hold up.
    looks: Calls,
    /// Calls of other nodes. None of them waits for another node's line, as verbs do: two nodes that ask one another do not wait
    /// in a circle.
    orders: Calls,
    /// Calls for tasks of jobs: as many as come, for placement counts them.
    work: Calls,
    /// Connections that were handed over to guests' agents.
    handed_over: Arc<Semaphore>,
    limits: Limits,
    node: Uuid,
    started: Instant,
    /// This node's part in a cluster, if it has one.
    member: OnceLock<Arc<Membership>>,
    /// What it has for jobs of that cluster.
    jobs: OnceLock<Jobs>,
    /// Where it is written down who asked for what.
    audit: OnceLock<Audit>,
    /// Where it answers users of its cluster.
    https: OnceLock<SocketAddr>,
    /// Turns to send a large body.
    large_bodies: Arc<Semaphore>,
    /// Locked while it is looked for a user that this node does not know.
    unknown_users: tokio::sync::Mutex<()>,
    /// Turned away of late.
    strangers: Arc<Strangers>,
}

/// How long a template that was built waits for the cluster to hear of it.
const PUBLISH_WITHIN: Duration = Duration::from_secs(30);

/// Between two tries of that.
const PUBLISH_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How long somebody who is not known here may wait until the others are asked.
const UNKNOWN_USER_WITHIN: Duration = Duration::from_secs(1);

/// How long other nodes may take to remove their file of a template.
const REMOVE_WITHIN: Duration = Duration::from_secs(3);

/// Large bodies that are dealt with at once: each is in memory some times over.
pub(super) const LARGE_BODIES_MAX: usize = 4;

/// How much a node takes on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections served at once; others wait to be accepted.
    pub connections_max: usize,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// For the head of a request, and again for its body.
    pub read_deadline: Duration,
    /// For a client to read some of its answer.
    pub write_deadline: Duration,
    /// For requests to end when the node stops.
    pub stop_deadline: Duration,
    /// Calls of the engine at once.
    pub calls_max: u32,
    /// Calls that wait for their turn; those beyond are refused.
    pub queued_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            body_bytes_max: 1 << 20,
            read_deadline: Duration::from_secs(10),
            write_deadline: Duration::from_secs(10),
            stop_deadline: Duration::from_secs(10),
            calls_max: 64,
            queued_max: 4096,
        }
    }
}

impl App {
    /// The API of `service`, as the node of this id.
    #[must_use]
    pub fn new(service: Arc<Service>, node: Uuid, limits: Limits) -> Self {
        metrics::install();
        let line = || Calls::new(limits.calls_max, limits.queued_max);
        let handed_over = Arc::new(Semaphore::new(limits.connections_max));
        let (verbs, looks, orders) = (line(), line(), line());
        let work = Calls::new(limits.calls_max, usize::MAX);
        let shared = Shared {
            service,
            verbs,
            looks,
            orders,
            work,
            handed_over,
            limits,
            node,
            started: Instant::now(),
            member: OnceLock::new(),
            jobs: OnceLock::new(),
            audit: OnceLock::new(),
            https: OnceLock::new(),
            large_bodies: Arc::new(Semaphore::new(LARGE_BODIES_MAX)),
            unknown_users: tokio::sync::Mutex::default(),
            strangers: Arc::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// From now on this node is of a cluster.
    pub fn join(&self, member: Arc<Membership>) {
        self.shared.member.get_or_init(|| member);
    }

    /// From now on it runs tasks of jobs.
    pub fn runs(&self, jobs: Jobs) {
        self.shared.jobs.get_or_init(|| jobs);
    }

    /// What this node has for jobs.
    ///
    /// # Errors
    /// [`ClusterError::Alone`].
    pub fn jobs(&self) -> Result<&Jobs, ClusterError> {
        self.shared.jobs.get().ok_or(ClusterError::Alone)
    }

    /// From now on it is written down there who asks for what.
    pub fn write_down(&self, audit: Audit) {
        self.shared.audit.get_or_init(|| audit);
    }

    /// Users of the cluster are answered there.
    pub fn answers_users_at(&self, address: SocketAddr) {
        self.shared.https.get_or_init(|| address);
    }

    pub(crate) fn https(&self) -> Option<SocketAddr> {
        self.shared.https.get().copied()
    }

    pub(crate) fn audit(&self) -> Option<&Audit> {
        self.shared.audit.get()
    }

    /// The user of the cluster that this is the credential of. One that this node does not know may have been added a moment ago:
    /// then the others are asked, for one caller at a time.
    ///
    /// # Errors
    /// [`ApiError`] if too many of those ask, or nobody can tell.
    pub async fn user(&self, credential: Digest) -> Result<Caller, ApiError> {
        let Ok(member) = self.member() else { return Ok(Caller::stranger()) };
        let look = |state: &State| {
            let known = state.users.iter().find(|(_, user)| user.credential == credential);
            known.map(|(name, user)| Caller::of_user(name, &user.rights))
        };
        if let Some(known) = look(&member.consensus.stale()) {
            return Ok(known);
        }
        let turn = tokio::time::timeout(UNKNOWN_USER_WITHIN, self.shared.unknown_users.lock());
        let _one_at_a_time = turn.await.map_err(|_| NodeError::Busy { queued: 1 })?;
        Ok(look(&*member.read().await?).unwrap_or_else(Caller::stranger))
    }

    pub(super) fn strangers(&self) -> Arc<Strangers> {
        Arc::clone(&self.shared.strangers)
    }

    /// This node's part in a cluster.
    ///
    /// # Errors
    /// [`ClusterError::Alone`].
    pub fn member(&self) -> Result<&Arc<Membership>, ClusterError> {
        self.shared.member.get().ok_or(ClusterError::Alone)
    }

    /// Whether a name points at something in a cluster.
    pub(crate) async fn is_named(&self, name: &FullName) -> Result<bool, ApiError> {
        let Ok(member) = self.member() else { return Ok(false) };
        Ok(Membership::template(&*member.read().await?, name).is_some())
    }

    /// In a cluster: refuses a name that points at something already.
    pub(crate) async fn check_name(&self, name: &FullName) -> Result<(), ApiError> {
        if self.is_named(name).await? { Err(ClusterError::NameTaken(name.clone()).into()) } else { Ok(()) }
    }

    /// In a cluster: lets it know that a template is here. For a while also where no majority can be reached.
    pub(crate) async fn publish(&self, name: &FullName) -> Result<(), ApiError> {
        let Ok(member) = self.member() else { return Ok(()) };
        let named = name.clone();
        let (image, profile) = self.act(move |service| Ok((service.template_held(&named)?, service.cpu()))).await?;
        let facts = facts_of(&image, &profile);
        let (deadline, once) = (Instant::now() + PUBLISH_WITHIN, Uuid::now_v7());
        let mut unknown = None;
        loop {
            match member.publish(name, image.key.digest, facts.clone(), once).await {
                Err(ClusterError::Consensus(error @ (ConsensusError::NoQuorum { .. } | ConsensusError::Unknown { .. })))
                    if Instant::now() < deadline =>
                {
                    tracing::warn!(%name, %error, "the cluster does not know of this template yet");
                    unknown = unknown.or(matches!(error, ConsensusError::Unknown { .. }).then_some(error));
                    tokio::time::sleep(PUBLISH_AGAIN_AFTER).await;
                }
                Ok(()) => return Ok(()),
                // What a try before this one asked for may be done all the same.
                Err(error) => return Err(unknown.map_or(error, ClusterError::from).into()),
            }
        }
    }

    /// In a cluster: takes a name away. Whether it had one.
    pub(crate) async fn unpublish(&self, name: &FullName, caller: &Caller) -> Result<bool, ApiError> {
        let Ok(member) = self.member() else { return Ok(false) };
        let command = Command::RemoveTemplate { tenant: name.tenant.clone(), name: name.name.clone() };
        match member.propose(None, command).await {
            Ok(_) => {
                // Files of it on other nodes; what does not answer keeps its own, which nothing refers to.
                let path = format!("/v1/templates/{}", segment(&name.to_string()));
                let asked =
                    member.others().into_iter().map(|node| member.ask_node(node, Some(caller), Method::DELETE, &path, None));
                let asked = tokio::time::timeout(REMOVE_WITHIN, futures_util::future::join_all(asked)).await;
                tracing::info!(%name, all_answered = asked.is_ok(), "a template of the cluster is removed");
                Ok(true)
            }
            Err(ClusterError::Refused(Refusal::UnknownTemplate(_))) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// What this node takes on.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// Does something that changes something, when it is its turn, to its end.
    pub(crate) async fn act<T: Send + 'static>(
        &self,
        verb: impl FnOnce(&Service) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let service = Arc::clone(&self.shared.service);
        Ok(self.shared.verbs.run(move || verb(&service)).await?)
    }

    /// Notes something that neither waits nor fails.
    pub(crate) fn note(&self, note: impl FnOnce(&Service)) {
        note(&self.shared.service);
    }

    /// How many machines run here, and what they are counted as together, in bytes.
    pub(crate) fn taken(&self) -> (u64, u64) {
        self.shared.service.taken()
    }

    /// Asks something that changes nothing.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Service) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let service = Arc::clone(&self.shared.service);
        Ok(self.shared.looks.run(move || question(&service)).await?)
    }

    /// Does something for a task of a job, when it is its turn, to its end.
    pub(crate) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Service) -> Result<T, NodeError> + Send + 'static,
    ) -> Result<T, NodeError> {
        let service = Arc::clone(&self.shared.service);
        self.shared.work.run(move || work(&service)).await
    }

    /// A turn to send a large body.
    pub(super) async fn large_body(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.shared.large_bodies).acquire_owned().await.expect("never closed")
    }

    /// Does what another node asks, when it is its turn, to its end.
    pub async fn order(&self, peer: NodeId, bytes: Vec<u8>) -> Answer {
        let service = Arc::clone(&self.shared.service);
        let outcome = self.shared.orders.run(move || Ok(service.order(peer, &bytes))).await;
        let answer = outcome.unwrap_or_else(|error| Answer::Refused(PeerRefusal::of(&error)));
        if let Some(audit) = self.audit() {
            let (status, about) = answer.in_short();
            let (who, method, path) = (Who::Node(peer).to_string(), "ORDER".to_owned(), "fork".to_owned());
            let asked = Asked { who, tenant: None, method, path, about: Some(about), status };
            audit.write(asked).unwrap_or_else(|error| {
                tracing::error!(%error, remedy = error.remedy(), "it is not written down who asked for what");
            });
        }
        answer
    }

    /// Refuses calls from now on and waits for those that have begun, at most so long. Whether all have ended.
    pub(crate) async fn stop(&self, deadline: Duration) -> bool {
        let Shared { verbs, looks, orders, work, .. } = &*self.shared;
        let ended = tokio::join!(verbs.stop(deadline), looks.stop(deadline), orders.stop(deadline), work.stop(deadline));
        ended == (true, true, true, true)
    }

    /// The right to one more connection with a guest's agent.
    pub(crate) fn hand_over(&self) -> Result<OwnedSemaphorePermit, NodeError> {
        let permit = Arc::clone(&self.shared.handed_over).try_acquire_owned();
        permit.map_err(|_| NodeError::Busy { queued: self.shared.limits.connections_max })
    }

    pub(crate) fn node(&self) -> Uuid {
        self.shared.node
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.shared.started.elapsed()
    }
}

/// The routes. Each connection adds the [`Caller`] to its requests.
pub fn router(app: App) -> Router {
    let router = Router::new();
    #[cfg(feature = "bench")]
    let router = router.route("/v1/machines/{id}/probe", post(machines::probe));
    router
        .route("/v1/forks", post(machines::fork))
        .route("/v1/machines", get(machines::list))
        .route("/v1/machines/kill", post(kill::kill))
        .route("/v1/machines/{id}", get(machines::show).delete(kill::kill_one))
        .route("/v1/machines/{id}/branch", post(machines::branch))
        .route("/v1/machines/{id}/agent", post(templates::connect))
        .route("/v1/templates", get(templates::list).post(templates::build))
        .route("/v1/templates/{name}/archive", get(archive::export).put(archive::import))
        .route("/v1/templates/{name}", get(templates::show).delete(templates::remove))
        .route("/v1/images", get(images::list))
        .route("/v1/images/load", post(images::load))
        .route("/v1/images/{id}", get(images::show))
        .route("/v1/images/{id}", delete(images::remove))
        .route("/v1/images/{id}/save", post(images::save))
        .route("/v1/images/{id}/digest", post(images::digest))
        .route("/v1/trust", get(trust::list).post(trust::add))
        .route("/v1/trust/own", get(trust::own))
        .route("/v1/trust/{id}", delete(trust::remove))
        .route("/v1/cluster", get(cluster::show))
        .route("/v1/cluster/tokens", post(cluster::token))
        .route("/v1/jobs", get(jobs::list).post(jobs::submit))
        .route("/v1/jobs/{id}", get(jobs::show).delete(jobs::remove))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/events", get(jobs::events))
        .route("/v1/jobs/{id}/results", get(job_tasks::results))
        .route("/v1/jobs/{id}/tasks/{task}", get(job_tasks::task))
        .route("/v1/jobs/{id}/tasks/{task}/log", get(job_tasks::log))
        .route("/v1/jobs/{id}/tasks/{task}/files", get(job_tasks::files))
        .route("/v1/between/outputs", put(between::keep_outputs))
        .route("/v1/between/outputs/read", post(between::read_outputs))
        .route("/v1/between/payloads/{digest}", get(between::read_payload).put(between::keep_payload))
        .route("/v1/between/jobs/{job}", get(between::here))
        .route("/v1/between/jobs/{job}/tasks/{task}", get(between::printed))
        .route("/v1/users", get(users::list).post(users::add))
        .route("/v1/users/{name}", delete(users::remove))
        .route("/v1/whoami", get(users::whoami))
        .route("/v1/audit", get(audit::list))
        .route("/v1/nodes/{id}/{verb}", post(cluster::change))
        .route("/v1/nodes/{id}", get(facts::node).delete(cluster::remove))
        .route("/v1/explain/{name}", get(cluster::explain))
        .route("/v1/node", get(node::show))
        .route("/v1/openapi.json", get(node::openapi))
        .route("/metrics", get(node::metrics))
        .fallback(|| async { ApiError::unknown_route() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(middleware::from_fn_with_state(app.clone(), caller::elsewhere))
        .layer(middleware::from_fn(caller::admit))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), audit::note))
        .layer(middleware::from_fn(enter))
        .with_state(app)
}

/// Gives the request its span, and counts its answer.
async fn enter(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    // Never what the client wrote: that would be a label per client.
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let span = tracing::info_span!("request", method = %request.method(), route, caller = %caller.who);
    async move {
        let began = Instant::now();
        let response = next.run(request).await;
        let status = response.status().as_u16();
        metrics::request(route, status);
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(status, us, "answered");
        response
    }
    .instrument(span)
    .await
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!(message, "a handler panicked");
    ApiError::internal().into_response()
}
