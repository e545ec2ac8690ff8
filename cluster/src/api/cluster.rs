//! Handlers of the cluster and its nodes.

use axum::extract::{Path, State as Shared};
use axum::http::Method;
use axum::{Extension, Json};
use control::Answer;
use control::apply::TOKEN_TERM;
use control::command::Command;
use control::place::Verdict;
use control::state::{self, ImageKey, Life, Resources, State};
use serde::Deserialize;
use types::{Name, Tenant};
use utoipa::IntoParams;

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{JsonBody, PathText, QueryOf};
use super::routes::App;
use super::wire::{
    ClusterAnswer, ErrorAnswer, ExplainAnswer, ExplainQuery, Explained, MachineAnswer, NodeRow, Room, TokenAnswer, TokenRequest,
};
use crate::cli::client::segment;
use crate::member::forward::Forwarded;
use crate::member::{ClusterError, Membership, fork};
use crate::node::trust::Role;
use crate::node::{NodeError, ShortId};
use crate::raft::ConsensusError;

/// How a cluster is asked about.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StaleQuery {
    /// Answer with what this node has, also where no majority can be reached.
    #[serde(default)]
    stale: bool,
}

/// Shows the cluster and its nodes
#[utoipa::path(
    get,
    path = "/v1/cluster",
    tag = "cluster",
    params(StaleQuery),
    responses(
        (status = 200, description = "The cluster", body = ClusterAnswer),
        (status = "4XX", description = "Refused; 409 NO_CLUSTER if the node stands alone", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM if no majority can be reached", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(
    Shared(app): Shared<App>,
    QueryOf(query): QueryOf<StaleQuery>,
) -> Result<Json<ClusterAnswer>, ApiError> {
    let member = app.member()?;
    if !query.stale {
        member.read().await?;
    }
    let (state, applied) = member.consensus.stale_and_index();
    let (usage, voters) = (state.usage(), member.consensus.voters());
    let row = |(id, node): (&types::NodeId, &state::Node)| NodeRow {
        id: *id,
        name: node.facts.name.to_string(),
        address: node.facts.address.to_string(),
        life: life(node.life).to_owned(),
        role: if node.role == state::Role::Voter { Role::Voter } else { Role::Learner },
        votes: voters.contains(id),
        is_cordoned: node.is_cordoned,
        is_draining: node.is_draining,
        capacity: room(node.facts.capacity),
        taken: room(usage.get(id).copied().unwrap_or_default()),
        images: state.images.values().filter(|image| image.holders.contains_key(id)).count() as u64,
    };
    Ok(Json(ClusterAnswer {
        node: member.node(),
        leader: member.consensus.leader(),
        nodes: state.nodes.iter().map(row).collect(),
        applied,
        time_ms: state.time.0,
        is_stale: query.stale,
    }))
}

/// Makes a token that lets a node in, once
#[utoipa::path(
    post,
    path = "/v1/cluster/tokens",
    tag = "cluster",
    request_body = TokenRequest,
    responses(
        (status = 200, description = "The token", body = TokenAnswer),
        (status = "4XX", description = "Refused; 403 NOT_A_VOTER on a node without a vote", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn token(
    Shared(app): Shared<App>,
    Extension(about): Extension<About>,
    forwarded: Option<Extension<Forwarded>>,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Result<Json<TokenAnswer>, ApiError> {
    about.say(|| format!("{}, {:?}", request.name, request.role));
    let member = app.member()?;
    only_from_voters(forwarded)?;
    let name = Name::parse(&request.name).map_err(NodeError::from)?;
    let role = match request.role {
        Role::Voter => state::Role::Voter,
        Role::Learner => state::Role::Learner,
    };
    let token = member.token(&name, role).await?.to_string();
    tracing::info!(%name, ?role, "a token was made");
    Ok(Json(TokenAnswer { token, expires_in_s: TOKEN_TERM.as_secs() }))
}

/// What becomes of a node, as the description has it.
#[derive(utoipa::ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "it is only described")]
enum NodeVerb {
    Cordon,
    Uncordon,
    Drain,
    Undrain,
    Revoke,
}

/// Changes what becomes of a node: cordon, uncordon, drain, undrain or revoke it
#[utoipa::path(
    post,
    path = "/v1/nodes/{id}/{verb}",
    tag = "cluster",
    params(
        ("id" = String, Path, description = "Its name, its id, or the last 4 and more hex digits of that"),
        ("verb" = inline(NodeVerb), Path, description = "What becomes of it")
    ),
    responses(
        (status = 200, description = "It is agreed on", body = ClusterAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn change(
    Shared(app): Shared<App>,
    forwarded: Option<Extension<Forwarded>>,
    Path((given, verb)): Path<(String, String)>,
) -> Result<Json<ClusterAnswer>, ApiError> {
    let member = app.member()?;
    only_from_voters(forwarded)?;
    let node = match Membership::find(&*member.read().await?, &given) {
        // It may have been let in, and not have registered: a certificate that was lost is taken back before it is used.
        Err(ClusterError::UnknownNode(_)) if verb == "revoke" => {
            let full = given.parse::<uuid::Uuid>().map_err(|_| ClusterError::UnknownNode(given))?;
            types::NodeId::from_uuid(full)
        }
        found => found?,
    };
    let command = match verb.as_str() {
        "cordon" => Command::Cordon { node, is_cordoned: true },
        "uncordon" => Command::Cordon { node, is_cordoned: false },
        "drain" => Command::Drain { node, is_draining: true },
        "undrain" => Command::Drain { node, is_draining: false },
        "revoke" => Command::Revoke { node },
        _ => return Err(ApiError::unknown_route()),
    };
    agreed(member, command).await?;
    show(Shared(app), QueryOf(StaleQuery { stale: true })).await
}

/// Forgets a node that is lost, or has nothing left on it
#[utoipa::path(
    delete,
    path = "/v1/nodes/{id}",
    tag = "cluster",
    params(("id" = String, Path, description = "Its name, its id, or the last 4 and more hex digits of that")),
    responses(
        (status = 200, description = "It is agreed on", body = ClusterAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(
    Shared(app): Shared<App>,
    forwarded: Option<Extension<Forwarded>>,
    PathText(given): PathText,
) -> Result<Json<ClusterAnswer>, ApiError> {
    let member = app.member()?;
    only_from_voters(forwarded)?;
    let node = Membership::find(&*member.read().await?, &given)?;
    agreed(member, Command::Remove { node }).await?;
    show(Shared(app), QueryOf(StaleQuery { stale: true })).await
}

/// Says where machines of a template, an image, or a machine's image would run now, and why
#[utoipa::path(
    get,
    path = "/v1/explain/{name}",
    tag = "cluster",
    params(("name" = String, Path, description = "A template of the cluster, the digest of an image of its, or the id of a machine or its last 4 and more hex digits"), ExplainQuery),
    responses(
        (status = 200, description = "What was thought of each node", body = ExplainAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn explain(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
    QueryOf(query): QueryOf<ExplainQuery>,
) -> Result<Json<ExplainAnswer>, ApiError> {
    let member = app.member()?;
    let state = member.read().await?;
    let (image, runs_on) = meant(&app, member, &state, &caller, &given).await?;
    let plan = Membership::place(&state, &image, query.count, query.limit_bytes);
    let named = |id: &types::NodeId| fork::name_of(&state, *id);
    let nodes = plan.verdicts.iter().map(|(id, verdict)| {
        let holder = state.images.get(&image).and_then(|image| image.holders.get(id));
        let planned = plan.opens.iter().find(|(node, _)| node == id).map(|(_, sources)| sources);
        let sources = planned.or_else(|| holder.map(|holder| &holder.sources));
        Explained {
            name: named(id),
            id: *id,
            count: if let Verdict::Takes { count, .. } = verdict { *count } else { 0 },
            why: verdict.to_string(),
            settled_percent: holder.map(|holder| holder.percent),
            sources: sources.into_iter().flatten().map(named).collect(),
        }
    });
    let runs_on = runs_on.map(|node| named(&node));
    Ok(Json(ExplainAnswer { image: image.digest.to_string(), runs_on, left: plan.left, nodes: nodes.collect() }))
}

/// The image that is asked about, and where the machine runs that was named, if one was.
async fn meant(
    app: &App,
    member: &Membership,
    state: &State,
    caller: &Caller,
    given: &str,
) -> Result<(ImageKey, Option<types::NodeId>), ApiError> {
    let own = caller.tenant().cloned().unwrap_or_default();
    let unknown = || NodeError::UnknownTemplate { name: given.to_owned() };
    if let Ok(digest) = given.parse() {
        let key = ImageKey { tenant: own, digest };
        let is_known = state.images.contains_key(&key);
        return if is_known { Ok((key, None)) } else { Err(NodeError::UnknownImage { id: given.to_owned() }.into()) };
    }
    let named = caller.name(given);
    if let Ok(name) = &named
        && let Some(digest) = Membership::template(state, name)
    {
        return Ok((ImageKey { tenant: name.tenant.clone(), digest }, None));
    }
    if ShortId::parse(given).is_err() {
        return Err(named.err().unwrap_or_else(unknown).into());
    }
    let (looked_for, tenant) = (given.to_owned(), caller.tenant().cloned());
    let here = app.look(move |service| {
        let id = service.machine_id(&looked_for, tenant.as_ref())?;
        let machine = service.machine(&id.to_string())?.machine;
        Ok((machine.tenant, service.digests().get(&machine.image).copied()))
    });
    let (tenant, digest, node) = match here.await {
        Ok((tenant, digest)) => (tenant, digest, member.node()),
        Err(error) if error.code() != "UNKNOWN_MACHINE" => return Err(error),
        Err(_) => {
            let node = member.locate(given, caller).await?.ok_or_else(unknown)?;
            let path = format!("/v1/machines/{}", segment(given));
            let asked = member.ask_json::<MachineAnswer>(node, Some(caller), Method::GET, &path, None::<&()>).await?;
            let machine = asked.map_err(|_| unknown())?.machine;
            let tenant = machine.tenant.parse().map_err(NodeError::from)?;
            (tenant, machine.image_digest.and_then(|digest| digest.parse().ok()), node)
        }
    };
    let key = digest.map(|digest| ImageKey { tenant, digest }).filter(|key| state.images.contains_key(key));
    // An image that the cluster does not know is nowhere but there.
    let key =
        key.ok_or_else(|| ClusterError::NotTheClusters { machine: given.to_owned(), node: fork::name_of(state, node) })?;
    Ok((key, Some(node)))
}

async fn agreed(member: &Membership, command: Command) -> Result<(), ClusterError> {
    if let Command::Revoke { node } | Command::Remove { node } = &command
        && member.consensus.voters() == [*node]
    {
        return Err(ClusterError::LastVote(*node));
    }
    tracing::info!(%command, "asked for");
    match member.propose(None, command).await? {
        Answer::Refused(refusal) => Err(refusal.into()),
        _ => Ok(()),
    }
}

/// Members come and go by word of those that have a vote: a node without one passes nobody's word on.
pub(super) fn only_from_voters(forwarded: Option<Extension<Forwarded>>) -> Result<(), ClusterError> {
    match forwarded {
        Some(Extension(Forwarded { is_voter: false, node })) => {
            Err(ConsensusError::Forbidden { what: format!("asked by node {node}") }.into())
        }
        _ => Ok(()),
    }
}

fn room(of: Resources) -> Room {
    let Resources { memory_bytes, cpu_millis, machines } = of;
    Room { memory_bytes, cpu_millis, machines }
}

fn life(life: Life) -> &'static str {
    match life {
        Life::Up => "up",
        Life::Suspect => "suspect",
        Life::Lost => "lost",
    }
}

/// The image of the cluster that a fork is of, if it is one of the cluster's.
pub(super) fn image_of(state: &State, request: &super::wire::ForkRequest, caller: &Caller) -> Option<ImageKey> {
    use super::wire::ForkSource;
    let key = match &request.from {
        ForkSource::Template(name) => {
            let name = caller.name(name).ok()?;
            let digest = Membership::template(state, &name)?;
            ImageKey { tenant: name.tenant, digest }
        }
        ForkSource::Image(given) => {
            let tenant = request.tenant.as_deref().map(str::parse::<Tenant>).transpose().ok()?;
            ImageKey { tenant: tenant.unwrap_or_default(), digest: given.parse().ok()? }
        }
        ForkSource::Guest(_) | ForkSource::Machine(_) | ForkSource::Remote(_) => return None,
    };
    state.images.contains_key(&key).then_some(key)
}
