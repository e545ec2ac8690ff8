//! Handlers of machines.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State as Shared;
use axum::http::Method;
use axum::{Extension, Json};
use control::state::{ImageKey, Resources};
use types::{Digest, FullName, ImageId, MemorySize, NodeId, Tenant};
use vm::Class;

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{JsonBody, PathText, QueryOf};
use super::routes::App;
use super::templates;
use super::wire::{
    BranchRequest, Child, Console, EndedBecause, ErrorAnswer, Failed, Failure, ForkAnswer, ForkRequest, ForkSource, Freeze,
    Listed, Machine, MachineAnswer, MachinesAnswer, MachinesQuery, OtherNode, RemoteSource, Residency, Source, Stages, State,
    TaskOf, Usage,
};
use super::{cluster, images};
use crate::member::forward::Forwarded;
use crate::member::{EACH_CPU_MILLIS, Membership};
use crate::node::engine::{self, ForkStages};
use crate::node::peers::ForkedChild;
use crate::node::registry::{self, MachineState};
use crate::node::service::{ForkFrom, ForkOrder, ForkReport, MachineView};
use crate::node::{NodeAddress, NodeError, Service};

const DEFAULT_MEMORY_BYTES: u64 = 64 << 20;
const DEFAULT_VCPUS: u64 = 1;
/// How long other nodes may take to list their machines.
const OTHERS_WITHIN: Duration = Duration::from_secs(3);

/// Forks children of a guest, an image or a running machine, here or on another node
///
/// If the client leaves midway the fork goes on, and its machines are listed.
#[utoipa::path(
    post,
    path = "/v1/forks",
    tag = "machines",
    request_body = ForkRequest,
    responses(
        (status = 200, description = "Some or all run", body = ForkAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn fork(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    forwarded: Option<Extension<Forwarded>>,
    JsonBody(mut request): JsonBody<ForkRequest>,
) -> Result<Json<ForkAnswer>, ApiError> {
    about.say(|| format!("{} of {:?}", request.count, request.from));
    request.tenant = caller.tenant_for(request.tenant.as_deref())?.map(String::from);
    if request.on.is_some() || matches!(request.from, ForkSource::Remote(_)) {
        caller.may_name_nodes()?;
    }
    if forwarded.is_none()
        && request.on.is_none()
        && let Ok(member) = app.member()
        && let Some(image) = cluster::image_of(&member.consensus.stale(), &request, &caller)
    {
        if let Some(answered) = fork_leased(&app, member, &image, &request).await {
            return Ok(Json(answered?));
        }
        match member.fork(&app, &caller, image, request.clone()).await {
            // What is here can be forked here, whoever leads.
            Err(error) if error.code() == "NO_QUORUM" => {
                tracing::info!("no majority can be reached: forked here, if it is here")
            }
            answered => return Ok(Json(answered?)),
        }
    }
    let of_caller = match request.from {
        ForkSource::Image(id) => ForkSource::Image(app.image_of(&caller, id).await?),
        ForkSource::Machine(id) => ForkSource::Machine(app.machine_of(&caller, id).await?),
        ForkSource::Template(name) => ForkSource::Template(caller.name(&name)?.to_string()),
        other => other,
    };
    Ok(Json(fork_here(&app, ForkRequest { from: of_caller, ..request }).await?))
}

/// Forks on this node, whatever a cluster thinks of it.
pub(crate) async fn fork_here(app: &App, request: ForkRequest) -> Result<ForkAnswer, ApiError> {
    forked(app, order(request)?).await
}

/// Forks one child of an image that is here in whole, of what this node has been leased: nobody is asked. `None`: it is for the cluster
/// to place, which also says what is wrong with a request that cannot be meant.
async fn fork_leased(
    app: &App,
    member: &Arc<Membership>,
    image: &ImageKey,
    request: &ForkRequest,
) -> Option<Result<ForkAnswer, ApiError>> {
    if request.count != 1 || !member.holds(image) {
        return None;
    }
    let (from, tenant) = (ForkSource::Image(image.digest.to_string()), Some(image.tenant.to_string()));
    let order = order(ForkRequest { from, tenant, ..request.clone() }).ok()?;
    match within_lease(app, member, &Arc::new(order)).await {
        Ok(Some(mut answer)) => {
            answer.children.iter_mut().for_each(|child| child.node = Some(member.node()));
            Some(Ok(answer))
        }
        Ok(None) => None,
        // It has just been let go of, or is found as another tenant's. Whatever else went wrong may have gone wrong after the child ran:
        // there is one try.
        Err(error) if matches!(error.code(), "UNKNOWN_IMAGE" | "OTHER_TENANT") => None,
        Err(error) => Some(Err(error)),
    }
}

/// Forks, where there is room for that: in a cluster others may have been promised it.
async fn forked(app: &App, order: ForkOrder) -> Result<ForkAnswer, ApiError> {
    let order = Arc::new(order);
    let _room = match app.member() {
        Ok(member) if order.on.is_none() => match within_lease(app, member, &order).await? {
            Some(answer) => return Ok(answer),
            None => {
                let asked = Arc::clone(&order);
                let each_bytes = app.look(move |service| Ok(service.claim_of(&asked))).await?;
                Some(member.room_here(order.count, each_bytes, || taken(app.taken())).await?)
            }
        },
        _ => None,
    };
    app.act(move |service| Ok(fork_answer(service, service.fork(&order)?))).await
}

/// Forks, if what this node has been leased has room for that. All in one turn of the engine's: each hand-over to another thread is
/// waited for.
async fn within_lease(app: &App, member: &Arc<Membership>, order: &Arc<ForkOrder>) -> Result<Option<ForkAnswer>, ApiError> {
    // Who is to be placed elsewhere does not wait in this node's line for its turn.
    if !member.may_have_room(order.count, || taken(app.taken())) {
        return Ok(None);
    }
    let (member, order) = (Arc::clone(member), Arc::clone(order));
    app.act(move |service| {
        let each_bytes = service.claim_of(&order);
        let Some(_room) = member.room_leased(order.count, each_bytes, || taken(service.taken())) else {
            return Ok(None);
        };
        Ok(Some(fork_answer(service, service.fork(&order)?)))
    })
    .await
}

/// What so many machines take that are counted as so much memory together.
fn taken((machines, memory_bytes): (u64, u64)) -> Resources {
    Resources { memory_bytes, cpu_millis: machines * EACH_CPU_MILLIS, machines }
}

/// Freezes a running machine, which goes on, and forks children of that instant
#[utoipa::path(
    post,
    path = "/v1/machines/{id}/branch",
    tag = "machines",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    request_body = BranchRequest,
    responses(
        (status = 200, description = "Some or all run", body = ForkAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn branch(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
    JsonBody(request): JsonBody<BranchRequest>,
) -> Result<Json<ForkAnswer>, ApiError> {
    let id = app.machine_of(&caller, id).await?;
    let BranchRequest { count, limit_bytes, network } = request;
    let order = ForkOrder {
        from: ForkFrom::Machine(id),
        count,
        limit_bytes,
        verify: false,
        network,
        tenant: None,
        on: None,
        is_task: false,
    };
    Ok(Json(forked(&app, order).await?))
}

/// Lists machines, oldest first
#[utoipa::path(
    get,
    path = "/v1/machines",
    tag = "machines",
    params(MachinesQuery),
    responses(
        (status = 200, description = "Machines", body = MachinesAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    forwarded: Option<Extension<Forwarded>>,
    QueryOf(query): QueryOf<MachinesQuery>,
) -> Result<Json<MachinesAnswer>, ApiError> {
    let wanted = move |machine: &Machine| match query.state {
        Listed::All => true,
        Listed::Running => machine.state == State::Running,
        Listed::Ended => machine.state == State::Ended,
    };
    let tenant = caller.tenant().cloned();
    let list = move |service: &Service| {
        // Thousands of machines have one image.
        let mut percents: HashMap<ImageId, Option<u8>> = HashMap::new();
        let mut percent = |image| *percents.entry(image).or_insert_with(|| Some(service.residency(image)?.settled_percent()));
        let listed = service.machines();
        let of_caller = listed.iter().filter(|facts| tenant.as_ref().is_none_or(|tenant| facts.tenant == *tenant));
        let digests = service.digests();
        let digest = |facts: &registry::Machine| digests.get(&facts.image).copied();
        let listed = of_caller.map(|facts| machine(facts, digest(facts), &mut percent)).filter(wanted);
        Ok(listed.collect())
    };
    let here: Vec<Machine> = app.look(list).await?;
    let Some(member) = app.member().ok().filter(|_| forwarded.is_none()) else {
        return Ok(Json(MachinesAnswer { machines: here, unheard: Vec::new() }));
    };
    let of =
        |node: NodeId, machines: Vec<Machine>| machines.into_iter().map(move |machine| Machine { node: Some(node), ..machine });
    let mut machines: Vec<Machine> = of(member.node(), here).collect();
    let mut unheard = Vec::new();
    let state = match query.state {
        Listed::All => "all",
        Listed::Running => "running",
        Listed::Ended => "ended",
    };
    let path = format!("/v1/machines?state={state}");
    let asked = member.others().into_iter().map(|node| {
        let (path, caller) = (path.clone(), &caller);
        async move {
            let asking = member.ask_json::<MachinesAnswer>(node, Some(caller), Method::GET, &path, None::<&()>);
            (node, tokio::time::timeout(OTHERS_WITHIN, asking).await)
        }
    });
    for (node, answer) in futures_util::future::join_all(asked).await {
        match answer {
            Ok(Ok(Ok(answer))) => machines.extend(of(node, answer.machines)),
            _ => unheard.push(node),
        }
    }
    machines.sort_by_key(|machine| machine.id);
    Ok(Json(MachinesAnswer { machines, unheard }))
}

/// Shows a machine with what it costs and prints
#[utoipa::path(
    get,
    path = "/v1/machines/{id}",
    tag = "machines",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "The machine", body = MachineAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
) -> Result<Json<MachineAnswer>, ApiError> {
    let id = app.machine_of(&caller, id).await?;
    let (view, digests) = app.look(move |service| Ok((service.machine(&id)?, service.digests()))).await?;
    let MachineView { machine: facts, usage, console, console_dropped_bytes, residency: here } = view;
    let usage = usage.map(|usage| Usage {
        pss_bytes: usage.pss_bytes,
        private_bytes: usage.private_bytes,
        page_table_bytes: usage.page_table_bytes,
        cpu_us: us(usage.cpu),
        faults: usage.faults,
    });
    let console = Console { tail: String::from_utf8_lossy(&console).into_owned(), dropped_bytes: console_dropped_bytes };
    let machine =
        machine(&facts, digests.get(&facts.image).copied(), |_| here.as_ref().map(engine::Residency::settled_percent));
    Ok(Json(MachineAnswer { machine, usage, residency: here.as_ref().map(residency), console }))
}

/// Has a machine's probe carry out commands. Only in builds for benchmarks, so not in the API's description.
#[cfg(feature = "bench")]
pub(crate) async fn probe(
    Shared(app): Shared<App>,
    PathText(id): PathText,
    JsonBody(commands): JsonBody<Vec<vm::probe::Command>>,
) -> Result<Json<Vec<Probed>>, ApiError> {
    let probed = app.act(move |service| service.probe(&id, &commands)).await?;
    Ok(Json(probed.iter().map(|probed| Probed { reply: probed.reply, took_us: probed.took.as_secs_f64() * 1e6 }).collect()))
}

/// What a probe answered.
#[cfg(feature = "bench")]
#[derive(serde::Serialize)]
pub(crate) struct Probed {
    reply: vm::probe::Reply,
    took_us: f64,
}

/// Milliseconds since 1970.
pub(super) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What of an image is here.
pub(super) fn residency(of: &engine::Residency) -> Residency {
    let sources = of.sources.iter().map(|source| Source {
        address: source.address.to_string(),
        node: source.node,
        state: source.state,
        extents: source.extents,
        bytes: source.bytes,
        failures: source.failures,
    });
    let failed = |failed: &engine::Ended| Failed { reason: failed.reason.code().to_owned(), detail: failed.detail.clone() };
    Residency {
        settled_percent: of.settled_percent(),
        is_settled: of.is_settled,
        settled_after_us: of.settled_after.map(us),
        data_bytes: of.data_bytes,
        resident_bytes: of.resident_bytes,
        remote_bytes: of.data_bytes.saturating_sub(of.resident_bytes),
        faults: of.faults,
        wire_bytes: of.wire_bytes,
        children: of.children,
        sources: sources.collect(),
        failed: of.failed.as_ref().map(failed),
    }
}

fn order(request: ForkRequest) -> Result<ForkOrder, NodeError> {
    let ForkRequest { from, count, memory_bytes, vcpus, limit_bytes, verify, network, tenant, on } = request;
    let class_is_given = memory_bytes.is_some() || vcpus.is_some();
    let from = match from {
        ForkSource::Guest(guest) => {
            let memory = MemorySize::from_bytes(memory_bytes.unwrap_or(DEFAULT_MEMORY_BYTES))?;
            let asked = vcpus.unwrap_or(DEFAULT_VCPUS);
            let class = u8::try_from(asked).ok().and_then(|vcpus| Class::new(memory, vcpus).ok());
            ForkFrom::Guest(guest, class.ok_or(NodeError::Vcpus { asked })?)
        }
        _ if class_is_given => return Err(NodeError::ClassIsGiven),
        ForkSource::Image(id) => ForkFrom::Image(id),
        ForkSource::Template(name) => ForkFrom::Template(FullName::parse(&name)?),
        ForkSource::Machine(id) => ForkFrom::Machine(id),
        ForkSource::Remote(RemoteSource { image, holders }) => {
            let holders = holders.iter().map(|holder| holder.parse::<NodeAddress>()).collect::<Result<_, _>>()?;
            ForkFrom::Remote { image: image.parse::<Digest>()?, holders }
        }
    };
    let tenant = tenant.map(|tenant| tenant.parse::<Tenant>()).transpose()?;
    let on = on.map(|on| on.parse::<NodeAddress>()).transpose()?;
    Ok(ForkOrder { from, count, limit_bytes, verify, network, tenant, on, is_task: false })
}

fn fork_answer(service: &Service, report: ForkReport) -> ForkAnswer {
    let image = images::image(&service.view(report.image));
    ForkAnswer {
        image,
        on: report.on.map(|on| OtherNode { node: on.node, address: on.address.to_string() }),
        freeze: report.freeze.map(|freeze| Freeze {
            stall_us: us(freeze.stall),
            copy_us: us(freeze.copy),
            dirty_pages: freeze.dirty_pages,
            copied_extents: freeze.copied_extents,
        }),
        children: report.children.iter().map(child).collect(),
        failures: report.failures.iter().map(|(id, error)| failure(id.to_string(), error)).collect(),
        wall_us: us(report.began.elapsed()),
    }
}

fn child(child: &ForkedChild) -> Child {
    let ForkedChild { forked, verified_pages, ready, link } = child;
    Child {
        id: forked.id,
        first_us: us(forked.first),
        stages_us: stages(&forked.stages),
        had_shell: forked.had_shell,
        verified_pages: *verified_pages,
        ready_us: ready.map(us),
        address: link.map(|link| link.guest.to_string()),
        node: None,
    }
}

fn machine(
    machine: &registry::Machine,
    digest: Option<Digest>,
    settled_percent: impl FnOnce(ImageId) -> Option<u8>,
) -> Machine {
    let ended = match &machine.state {
        MachineState::Ended { ended, at, .. } => {
            Some(EndedBecause { reason: ended.reason.code().to_owned(), detail: ended.detail.clone(), unix_ms: unix_ms(*at) })
        }
        MachineState::Running | MachineState::Ending => None,
    };
    Machine {
        id: machine.forked.id,
        image: machine.image,
        image_digest: digest.map(|digest| digest.to_string()),
        tenant: machine.tenant.to_string(),
        parent: machine.parent,
        state: if ended.is_some() { State::Ended } else { State::Running },
        settled_percent: if ended.is_some() { None } else { settled_percent(machine.image) },
        ended,
        created_unix_ms: unix_ms(machine.created),
        first_us: us(machine.forked.first),
        stages_us: stages(&machine.forked.stages),
        had_shell: machine.forked.had_shell,
        verified_pages: machine.verified_pages,
        ready: machine.readiness.as_deref().map(templates::ready),
        limit_bytes: machine.limit_bytes,
        task: machine.task.map(|(job, task)| TaskOf { job, task }),
        node: None,
    }
}

fn stages(stages: &ForkStages) -> Stages {
    Stages {
        shell: us(stages.shell),
        send: us(stages.send),
        map: us(stages.map),
        restore: us(stages.restore),
        run: us(stages.run),
    }
}

pub(super) fn failure(id: String, error: &NodeError) -> Failure {
    let reason = error.reason().map(|reason| reason.code().to_owned());
    Failure { id, code: error.code().to_owned(), message: error.to_string(), remedy: error.remedy(), reason }
}

pub(super) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
