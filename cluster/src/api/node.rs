//! Handlers of the node itself.

use axum::extract::State as Shared;
use axum::http::header;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use control::state::{Counts, Life};

use super::caller::Caller;
use super::description::openapi_json;
use super::error::ApiError;
use super::routes::App;
use super::wire::{CountsAnswer, ErrorAnswer, Memory, NetworkAnswer, NodeAnswer, Pool};
use crate::node::{Network, Service, metrics as counted};

/// Shows the node
#[utoipa::path(
    get,
    path = "/v1/node",
    tag = "node",
    responses(
        (status = 200, description = "The node", body = NodeAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(Shared(app): Shared<App>, Extension(caller): Extension<Caller>) -> Result<Json<NodeAnswer>, ApiError> {
    let facts = |service: &Service| Ok((service.pool(), service.counts(), memory(), service.network().ok().map(network)));
    let (pool, counts, memory, network) = app.look(facts).await?;
    Ok(Json(NodeAnswer {
        node: app.node(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_ms: u64::try_from(app.uptime().as_millis()).unwrap_or(u64::MAX),
        caller: caller.who.to_string(),
        network,
        memory,
        pool: pool
            .iter()
            .map(|facts| Pool {
                memory_bytes: facts.class.memory().bytes(),
                vcpus: facts.class.vcpu_count(),
                ready: facts.ready,
                building: facts.building,
                wanted: facts.wanted,
            })
            .collect(),
        counts: CountsAnswer { running: counts.running as u64, ended: counts.ended as u64, images: counts.images as u64 },
    }))
}

/// Describes this API
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    tag = "node",
    responses(
        (status = 200, description = "OpenAPI 3.1", content_type = "application/json"),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json())
}

/// Everything that is counted, as Prometheus text
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "node",
    responses(
        (status = 200, description = "Metrics", content_type = "text/plain"),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn metrics(Shared(app): Shared<App>) -> Result<impl IntoResponse, ApiError> {
    if let Ok(member) = app.member() {
        // One that leads and is cut off does not know it until it asks.
        let has_quorum = member.read().await.is_ok();
        let state = member.consensus.stale();
        let count = |life: Life| state.nodes.values().filter(|node| node.life == life).count();
        counted::cluster([Life::Up, Life::Suspect, Life::Lost].map(count), has_quorum);
        let running = || state.jobs.values().filter(|job| job.ended.is_none());
        let sum = |count: fn(Counts) -> u32| running().map(|job| count(job.tasks.counts()) as usize).sum::<usize>();
        counted::jobs(running().count(), sum(|counts| counts.waiting), sum(|counts| counts.placed));
    }
    let text = app.look(|service| Ok(counted::render(service.counts(), service.host_images(), &service.pool()))).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

fn network(network: &Network) -> NetworkAnswer {
    NetworkAnswer {
        listening: network.listening.map(|address| address.to_string()),
        advertise: network.advertise.as_ref().map(ToString::to_string),
    }
}

pub(super) fn memory() -> Memory {
    let info = rustix::system::sysinfo();
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    Memory {
        total_bytes: info.totalram * u64::from(info.mem_unit),
        available_bytes: line.and_then(|kib| kib.parse::<u64>().ok()).map(|kib| kib << 10),
    }
}
