//! Handlers of templates, and the way to the agents of Linux guests.

use std::time::Duration;

use agent::protocol::{GateRules, Outcome};
use axum::Json;
use axum::extract::{Extension, Request, State as Shared};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use types::{FullName, MemorySize};

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{JsonBody, PathText};
use super::images::image;
use super::machines::us;
use super::routes::App;
use super::server::Served;
use super::wire::{
    BuildRequest, BuildingNow, ErrorAnswer, Ready, RemovedAnswer, StageTook, StepTook, Template, TemplatesAnswer,
};
use crate::member::forward::Forwarded;
use crate::node::NodeError;
use crate::node::guest::identity::Readiness;
use crate::node::guest::template::{BuildOrder, WarmUp};
use crate::node::service::TemplateView;

/// What a client asks to speak with a guest's agent by.
pub const AGENT_PROTOCOL: &str = "farfork-agent/1";
/// How long a stage in the guest may take unless it is said.
const DEADLINE: Duration = Duration::from_secs(600);

/// Builds a template: boots a Linux guest, warms it up, seals, freezes and saves it
///
/// The answer comes when it is built; meanwhile `GET /v1/templates/{name}` says what it is at.
#[utoipa::path(
    post,
    path = "/v1/templates",
    tag = "templates",
    request_body = BuildRequest,
    responses(
        (status = 200, description = "It is built and saved", body = Template),
        (status = "4XX", description = "Refused; 422 GUEST if the guest is not what it has to be", body = ErrorAnswer),
        (status = "5XX", description = "Failed; there is no such template", body = ErrorAnswer)
    )
)]
pub(crate) async fn build(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    JsonBody(request): JsonBody<BuildRequest>,
) -> Result<Json<Template>, ApiError> {
    about.say(|| request.name.clone());
    caller.check_owner()?;
    let tenant = caller.tenant_for(request.tenant.as_deref())?.unwrap_or_default();
    let name = FullName::parse_of(&request.name, &tenant).map_err(NodeError::from)?;
    let order = order(request)?;
    app.check_name(&name).await?;
    let built = name.clone();
    app.act(move |service| service.build_template(&built, &order)).await?;
    app.publish(&name).await?;
    let view = app.look(move |service| service.template(&name)).await?;
    Ok(Json(template(&view)))
}

/// Lists templates, those that are being built too
#[utoipa::path(
    get,
    path = "/v1/templates",
    tag = "templates",
    responses(
        (status = 200, description = "Templates", body = TemplatesAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "The store cannot be read", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<TemplatesAnswer>, ApiError> {
    let mut views = app.look(|service| service.templates()).await?;
    views.retain(|view| caller.tenant().is_none_or(|own| *own == view.name.tenant));
    Ok(Json(TemplatesAnswer { templates: views.iter().map(template).collect() }))
}

/// Shows a template
#[utoipa::path(
    get,
    path = "/v1/templates/{name}",
    tag = "templates",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The template", body = Template),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(name): PathText,
) -> Result<Json<Template>, ApiError> {
    let name = caller.name(&name)?;
    Ok(Json(template(&app.look(move |service| service.template(&name)).await?)))
}

/// Removes a template
///
/// Machines that were forked from it go on.
#[utoipa::path(
    delete,
    path = "/v1/templates/{name}",
    tag = "templates",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is gone", body = RemovedAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    forwarded: Option<Extension<Forwarded>>,
    PathText(name): PathText,
) -> Result<Json<RemovedAnswer>, ApiError> {
    let name = caller.name(&name)?;
    // Another node says so of a name that it took away. What has got that name since is not meant.
    if forwarded.is_some() && app.is_named(&name).await? {
        return Ok(Json(RemovedAnswer { removed: name.to_string() }));
    }
    let was_the_clusters = forwarded.is_none() && app.unpublish(&name, &caller).await?;
    let removing = name.clone();
    match app.act(move |service| service.remove_template(&removing)).await {
        // It was on other nodes, which let go of it.
        Err(error) if !(was_the_clusters && error.code() == "UNKNOWN_TEMPLATE") => Err(error),
        _ => Ok(Json(RemovedAnswer { removed: name.to_string() })),
    }
}

/// Connects with the agent of a Linux guest
///
/// The answer is 101, after which the connection is the agent's own: `agent::protocol` of the source describes what is spoken.
#[utoipa::path(
    post,
    path = "/v1/machines/{id}/agent",
    tag = "machines",
    params(
        ("id" = String, Path, description = "Full id, or its last 4 and more hex digits"),
        ("upgrade" = String, Header, description = "farfork-agent/1, with `connection: upgrade`")
    ),
    responses(
        (status = 101, description = "Connected"),
        (status = "4XX", description = "Refused; 409 NOT_READY before it has been told who it is", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn connect(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
    mut request: Request,
) -> Result<Response, ApiError> {
    let is_asked = request.headers().get(header::UPGRADE).is_some_and(|value| value == AGENT_PROTOCOL);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().filter(|_| is_asked);
    let Some(upgrade) = upgrade else {
        return Err(ApiError::bad_request(format!("the request does not ask for an upgrade to {AGENT_PROTOCOL}")));
    };
    let id = app.machine_of(&caller, id).await?;
    let permit = app.hand_over()?;
    let guest = app.act(move |service| service.connect(&id)).await?;
    let failed = |error: std::io::Error| {
        tracing::error!(%error, "a stream to a guest");
        ApiError::internal()
    };
    guest.set_nonblocking(true).map_err(failed)?;
    let guest = UnixStream::from_std(guest).map_err(failed)?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => relay(client, guest).await,
            Err(error) => tracing::debug!(%error, "a client left before its upgrade"),
        }
        drop(permit);
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, AGENT_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Passes bytes on, both ways, until either side is done. A client may take as long as it likes to read.
pub(crate) async fn relay(client: Upgraded, mut guest: impl AsyncRead + AsyncWrite + Unpin) {
    let relayed = match client.downcast::<Served>() {
        Ok(parts) => {
            let mut client = parts.io.into_inner().into_stream();
            match tokio::io::AsyncWriteExt::write_all(&mut guest, &parts.read_buf).await {
                Ok(()) => tokio::io::copy_bidirectional(&mut client, &mut guest).await.map(drop),
                Err(error) => Err(error),
            }
        }
        // Through another node, whose connection has no such deadline.
        Err(client) => tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut guest).await.map(drop),
    };
    if let Err(error) = relayed {
        tracing::debug!(%error, "a conversation with a guest broke off");
    }
}

/// What a guest reported.
pub(super) fn ready(of: &Readiness) -> Ready {
    let step = |step: &agent::protocol::Step| StepTook {
        name: step.name.clone(),
        took_us: step.took_us,
        skipped: match &step.outcome {
            Outcome::Skipped(why) => Some(why.clone()),
            Outcome::Done | Outcome::Failed(_) => None,
        },
    };
    Ready {
        after_us: us(of.after),
        was_gated: of.was_gated,
        hostname: of.hostname.clone(),
        address: of.link.map(|link| link.guest.to_string()),
        steps: of.steps.iter().map(step).collect(),
    }
}

pub(super) fn template(view: &TemplateView) -> Template {
    let times = view.image.as_ref().map(|view| &*view.image.built).unwrap_or_default();
    Template {
        name: view.name.to_string(),
        image: view.image.as_ref().map(image),
        file_bytes: view.file_bytes,
        building: view.building.map(|now| BuildingNow { stage: now.stage, for_us: us(now.since.elapsed()) }),
        built: times.iter().map(|time| StageTook { stage: time.stage, took_us: us(time.took) }).collect(),
    }
}

fn order(request: BuildRequest) -> Result<BuildOrder, NodeError> {
    let BuildRequest { kernel, initrd, rootfs, memory_bytes, vcpus, disk_bytes, kernel_arguments, warm, ready, main, .. } =
        request;
    Ok(BuildOrder {
        kernel: kernel.into(),
        initrd: initrd.into(),
        rootfs: rootfs.into(),
        memory: MemorySize::from_bytes(memory_bytes)?,
        vcpus: u8::try_from(vcpus).map_err(|_| NodeError::Vcpus { asked: vcpus })?,
        disk: disk_bytes.map(MemorySize::from_bytes).transpose()?,
        network: request.network,
        kernel_arguments,
        warm: WarmUp { command: warm, ready, main },
        rules: GateRules { allow_connections: request.allow_connections, allow_secrets: request.allow_secrets },
        deadline: request.deadline_ms.map_or(DEADLINE, Duration::from_millis),
    })
}
