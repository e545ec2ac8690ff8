//! Handlers of machines.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State as Shared;
use types::{Digest, ImageId, MemorySize, Name, Tenant};
use vm::Class;

use super::error::ApiError;
use super::extract::{JsonBody, PathText, QueryOf};
use super::images;
use super::routes::App;
use super::templates;
use super::wire::{
    BranchRequest, Child, Console, EndedBecause, ErrorAnswer, Failed, Failure, ForkAnswer, ForkRequest, ForkSource, Freeze,
    KillAnswer, KillRequest, Listed, Machine, MachineAnswer, MachinesAnswer, MachinesQuery, OtherNode, RemoteSource, Residency,
    Source, Stages, State, Usage,
};
use crate::node::engine::{self, ForkStages};
use crate::node::peers::ForkedChild;
use crate::node::registry::{self, MachineState};
use crate::node::service::{ForkFrom, ForkOrder, ForkReport, MachineView};
use crate::node::{NodeAddress, NodeError, Service};

const DEFAULT_MEMORY_BYTES: u64 = 64 << 20;
const DEFAULT_VCPUS: u64 = 1;

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
    JsonBody(request): JsonBody<ForkRequest>,
) -> Result<Json<ForkAnswer>, ApiError> {
    let order = order(request)?;
    Ok(Json(fork_answer(&app.act(move |service| service.fork(&order)).await?)))
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
    PathText(id): PathText,
    JsonBody(request): JsonBody<BranchRequest>,
) -> Result<Json<ForkAnswer>, ApiError> {
    let BranchRequest { count, limit_bytes, network } = request;
    let order = ForkOrder { from: ForkFrom::Machine(id), count, limit_bytes, verify: false, network, tenant: None, on: None };
    Ok(Json(fork_answer(&app.act(move |service| service.fork(&order)).await?)))
}

/// Lists machines, oldest first
#[utoipa::path(
    get,
    path = "/v1/machines",
    tag = "machines",
    params(MachinesQuery),
    responses(
        (status = 200, description = "Machines", body = MachinesAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(
    Shared(app): Shared<App>,
    QueryOf(query): QueryOf<MachinesQuery>,
) -> Result<Json<MachinesAnswer>, ApiError> {
    let wanted = move |machine: &Machine| match query.state {
        Listed::All => true,
        Listed::Running => machine.state == State::Running,
        Listed::Ended => machine.state == State::Ended,
    };
    let list = move |service: &Service| {
        // Thousands of machines have one image.
        let mut percents: HashMap<ImageId, Option<u8>> = HashMap::new();
        let mut percent = |image| *percents.entry(image).or_insert_with(|| Some(service.residency(image)?.settled_percent()));
        let listed = service.machines();
        let listed = listed.iter().map(|facts| machine(facts, &mut percent)).filter(wanted);
        Ok(listed.collect())
    };
    Ok(Json(MachinesAnswer { machines: app.look(list).await? }))
}

/// Shows a machine with what it costs and prints
#[utoipa::path(
    get,
    path = "/v1/machines/{id}",
    tag = "machines",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "The machine", body = MachineAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(Shared(app): Shared<App>, PathText(id): PathText) -> Result<Json<MachineAnswer>, ApiError> {
    let view = app.look(move |service| service.machine(&id)).await?;
    let MachineView { machine: facts, usage, console, console_dropped_bytes, residency: here } = view;
    let usage = usage.map(|usage| Usage {
        pss_bytes: usage.pss_bytes,
        private_bytes: usage.private_bytes,
        page_table_bytes: usage.page_table_bytes,
        cpu_us: us(usage.cpu),
        faults: usage.faults,
    });
    let console = Console { tail: String::from_utf8_lossy(&console).into_owned(), dropped_bytes: console_dropped_bytes };
    let machine = machine(&facts, |_| here.as_ref().map(engine::Residency::settled_percent));
    Ok(Json(MachineAnswer { machine, usage, residency: here.as_ref().map(residency), console }))
}

/// Ends a machine
#[utoipa::path(
    delete,
    path = "/v1/machines/{id}",
    tag = "machines",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "It is gone", body = KillAnswer),
        (status = "4XX", description = "Refused; 409 ENDED if it has ended already", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn kill_one(Shared(app): Shared<App>, PathText(id): PathText) -> Result<Json<KillAnswer>, ApiError> {
    kill_these(&app, KillRequest { ids: vec![id], all: false }).await
}

/// Ends many machines, or all
#[utoipa::path(
    post,
    path = "/v1/machines/kill",
    tag = "machines",
    request_body = KillRequest,
    responses(
        (status = 200, description = "Some or all are gone", body = KillAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn kill(
    Shared(app): Shared<App>,
    JsonBody(request): JsonBody<KillRequest>,
) -> Result<Json<KillAnswer>, ApiError> {
    kill_these(&app, request).await
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

async fn kill_these(app: &App, request: KillRequest) -> Result<Json<KillAnswer>, ApiError> {
    let (killed, failures) = app.act(move |service| service.kill(&request.ids, request.all)).await?;
    let failures = failures.into_iter().map(|(id, error)| failure(id, &error)).collect();
    Ok(Json(KillAnswer { killed, failures }))
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
        ForkSource::Template(name) => ForkFrom::Template(Name::parse(&name)?),
        ForkSource::Machine(id) => ForkFrom::Machine(id),
        ForkSource::Remote(RemoteSource { image, holders }) => {
            let holders = holders.iter().map(|holder| holder.parse::<NodeAddress>()).collect::<Result<_, _>>()?;
            ForkFrom::Remote { image: image.parse::<Digest>()?, holders }
        }
    };
    let tenant = tenant.map(|tenant| tenant.parse::<Tenant>()).transpose()?;
    let on = on.map(|on| on.parse::<NodeAddress>()).transpose()?;
    Ok(ForkOrder { from, count, limit_bytes, verify, network, tenant, on })
}

fn fork_answer(report: &ForkReport) -> ForkAnswer {
    ForkAnswer {
        image: images::image(&report.image),
        on: report.on.map(|on| OtherNode { node: on.node, address: on.address.to_string() }),
        freeze: report.freeze.map(|freeze| Freeze {
            stall_us: us(freeze.stall),
            copy_us: us(freeze.copy),
            dirty_pages: freeze.dirty_pages,
            copied_extents: freeze.copied_extents,
        }),
        children: report.children.iter().map(child).collect(),
        failures: report.failures.iter().map(|(id, error)| failure(id.to_string(), error)).collect(),
        wall_us: us(report.wall),
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
    }
}

fn machine(machine: &registry::Machine, settled_percent: impl FnOnce(ImageId) -> Option<u8>) -> Machine {
    let ended = match &machine.state {
        MachineState::Ended { ended, at, .. } => {
            Some(EndedBecause { reason: ended.reason.code().to_owned(), detail: ended.detail.clone(), unix_ms: unix_ms(*at) })
        }
        MachineState::Running | MachineState::Ending => None,
    };
    Machine {
        id: machine.forked.id,
        image: machine.image,
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

fn failure(id: String, error: &NodeError) -> Failure {
    let reason = error.reason().map(|reason| reason.code().to_owned());
    Failure { id, code: error.code().to_owned(), message: error.to_string(), remedy: error.remedy(), reason }
}

pub(super) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
