//! Forks that the cluster places: where the image is, or will be; and why.

use axum::http::Method;
use control::command::Command;
use control::place::{Plan, Verdict, Wanted, plan};
use control::state::{Holder, ImageKey, Spread, State};
use types::{Digest, FullName, NodeId};

use std::collections::BTreeMap;
use std::time::Instant;

use super::capacity::each;
use super::{ClusterError, Membership};
use crate::api::caller::Caller;
use crate::api::wire::{ErrorAnswer, ErrorBody, Failure, ForkAnswer, ForkRequest, ForkSource, RemoteSource};
use crate::api::{ApiError, App, machines};
use crate::node::service::elsewhere_deadline;

/// What a fork of the cluster's has done on one node.
type Part = Result<ForkAnswer, ErrorBody>;

impl Membership {
    /// The image that a template of the cluster points at.
    #[must_use]
    pub fn template(state: &State, name: &FullName) -> Option<Digest> {
        state.templates.get(&(name.tenant.clone(), name.name.clone())).copied()
    }

    /// Where so many machines of an image would run, and why.
    #[must_use]
    pub fn place(state: &State, image: &ImageKey, count: u64, limit_bytes: Option<u64>) -> Plan {
        let dirty = state.images.get(image).map_or(0, |image| image.facts.dirty_bytes);
        let each = each(limit_bytes.unwrap_or(dirty));
        let labels = BTreeMap::new();
        plan(state, &Wanted { image, count, each, spread: Spread::Spread, labels: &labels, not_on: None })
    }

    /// Whether all of an image is on this node, which may start something new, as far as this node knows.
    #[must_use]
    pub(crate) fn holds(&self, image: &ImageKey) -> bool {
        let state = self.consensus.stale();
        let is_open = state.nodes.get(&self.node).is_some_and(control::state::Node::is_open);
        let holder = state.images.get(image).and_then(|image| image.holders.get(&self.node));
        is_open && holder.is_some_and(|holder| holder.is_settled() && holder.is_kept())
    }

    /// Forks children of an image wherever they find a place.
    ///
    /// # Errors
    /// [`ApiError`] if none runs.
    pub async fn fork(
        &self,
        app: &App,
        caller: &Caller,
        image: ImageKey,
        request: ForkRequest,
    ) -> Result<ForkAnswer, ApiError> {
        let (began, caller) = (Instant::now(), caller.placed());
        let state = self.read().await?;
        let plan = Self::place(&state, &image, request.count, request.limit_bytes);
        if plan.on.is_empty() {
            return Err(no_place(&state, &plan, request.count).into());
        }
        for (node, sources) in &plan.opens {
            let command = Command::Open { key: image.clone(), node: *node, sources: sources.clone() };
            self.propose(None, command).await?;
        }
        let parts = plan.on.iter().map(|(node, count)| {
            let request = self.part(&state, &plan, &image, *node, ForkRequest { count: *count, ..request.clone() });
            let caller = &caller;
            async move { (*node, *count, self.fork_on(app, caller, *node, request).await) }
        });
        let parts = futures_util::future::join_all(parts).await;
        merged(parts, &no_place(&state, &plan, request.count), plan.left, began)
    }

    /// What one node is asked.
    fn part(&self, state: &State, plan: &Plan, image: &ImageKey, node: NodeId, request: ForkRequest) -> ForkRequest {
        let holder = state.images.get(image).and_then(|image| image.holders.get(&node));
        let digest = image.digest.to_string();
        let from = if holder.is_some_and(Holder::is_settled) {
            ForkSource::Image(digest)
        } else {
            let planned = plan.opens.iter().find(|(id, _)| *id == node).map(|(_, sources)| sources.clone());
            let sources = planned.or_else(|| holder.map(|holder| holder.sources.clone())).unwrap_or_default();
            let addresses = sources.iter().filter_map(|source| Some(state.nodes.get(source)?.facts.address.to_string()));
            ForkSource::Remote(RemoteSource { image: digest, holders: addresses.collect() })
        };
        ForkRequest { from, tenant: Some(image.tenant.to_string()), on: None, ..request }
    }

    async fn fork_on(&self, app: &App, caller: &Caller, node: NodeId, request: ForkRequest) -> Part {
        if node == self.node() {
            return machines::fork_here(app, request).await.map_err(|error| error.body());
        }
        let within = elsewhere_deadline(request.count);
        let asking = self.ask_json::<ForkAnswer>(node, Some(caller), Method::POST, "/v1/forks", Some(&request));
        let late = || ClusterError::NoAnswer { node, detail: format!("not within {within:?}") };
        match tokio::time::timeout(within, asking).await.unwrap_or_else(|_| Err(late())) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err((status, bytes))) => {
                let said = serde_json::from_slice::<ErrorAnswer>(&bytes).map(|answer| answer.error);
                let unread = ClusterError::NodeAway { node, detail: format!("it answered {status}") };
                Err(said.unwrap_or_else(|_| ApiError::from(unread).body()))
            }
            Err(error) => Err(ApiError::from(error).body()),
        }
    }
}

/// All parts as one.
fn merged(parts: Vec<(NodeId, u64, Part)>, no_place: &ClusterError, left: u64, began: Instant) -> Result<ForkAnswer, ApiError> {
    let (mut whole, mut failures): (Option<ForkAnswer>, Vec<Failure>) = (None, Vec::new());
    for (node, count, part) in parts {
        match part {
            Ok(mut answer) => {
                answer.children.iter_mut().for_each(|child| child.node = Some(node));
                failures.append(&mut answer.failures);
                match &mut whole {
                    Some(whole) => whole.children.append(&mut answer.children),
                    None => whole = Some(answer),
                }
            }
            Err(error) => {
                failures.push(error.of(format!("{count} on node {node}")));
            }
        }
    }
    if left > 0 {
        failures.push(ApiError::from(no_place.clone()).body().of(format!("{left} nowhere")));
    }
    let Some(mut whole) = whole else {
        let first = failures.into_iter().next().expect("as many answers as parts");
        return Err(ApiError::of_another(&first));
    };
    whole.failures = failures;
    whole.wall_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    Ok(whole)
}

fn no_place(state: &State, plan: &Plan, count: u64) -> ClusterError {
    let full = plan.verdicts.iter().filter(|(_, verdict)| !matches!(verdict, Verdict::Takes { .. }));
    let why: Vec<String> = full.take(3).map(|(id, verdict)| format!("{} {verdict}", name_of(state, *id))).collect();
    let why = if why.is_empty() { "no node can have its image".to_owned() } else { why.join("; ") };
    ClusterError::NoPlace { count, left: plan.left, why }
}

/// A node's name for people.
pub(crate) fn name_of(state: &State, id: NodeId) -> String {
    state.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.facts.name.to_string())
}
