//! Handlers that end machines, on whichever nodes they are.

use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::Method;
use axum::{Extension, Json};
use futures_util::StreamExt;

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{JsonBody, PathText};
use super::machines::failure;
use super::routes::App;
use super::wire::{ErrorAnswer, KillAnswer, KillRequest};
use crate::member::forward::Forwarded;
use crate::member::{ClusterError, Membership};
use crate::node::Service;
use crate::node::service::check_count;

/// So many machines are looked for on other nodes at once.
const LOOKED_FOR_AT_ONCE: usize = 16;
/// How long other nodes may take to end machines.
const KILL_WITHIN: Duration = Duration::from_secs(60);

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
pub(crate) async fn kill_one(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
) -> Result<Json<KillAnswer>, ApiError> {
    kill_these(&app, &caller, KillRequest { ids: vec![id], all: false }).await
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
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    forwarded: Option<Extension<Forwarded>>,
    JsonBody(request): JsonBody<KillRequest>,
) -> Result<Json<KillAnswer>, ApiError> {
    about.say(|| if request.all { "all".to_owned() } else { request.ids.join(" ") });
    match app.member().ok().filter(|_| forwarded.is_none()) {
        Some(member) => kill_everywhere(&app, &caller, member, request).await,
        None => kill_these(&app, &caller, request).await,
    }
}

/// On whichever nodes they are.
async fn kill_everywhere(
    app: &App,
    caller: &Caller,
    member: &Membership,
    request: KillRequest,
) -> Result<Json<KillAnswer>, ApiError> {
    let others = member.others();
    let ask = |node, request: KillRequest| async move {
        let asking = member.ask_json::<KillAnswer>(node, Some(caller), Method::POST, "/v1/machines/kill", Some(&request));
        let late = || ClusterError::NoAnswer { node, detail: format!("not within {KILL_WITHIN:?}") };
        tokio::time::timeout(KILL_WITHIN, asking).await.unwrap_or_else(|_| Err(late()))
    };
    if request.all {
        let mut answer = kill_these(app, caller, request.clone()).await?.0;
        let asked = others.into_iter().map(async |node| (node, ask(node, request.clone()).await));
        for (node, there) in futures_util::future::join_all(asked).await {
            match there {
                Ok(Ok(there)) => {
                    answer.killed.extend(there.killed);
                    answer.failures.extend(there.failures);
                }
                // Its machines may run on.
                Ok(Err((status, _))) => {
                    let error = ClusterError::NoAnswer { node, detail: format!("it answered {status}") };
                    answer.failures.push(ApiError::from(error).body().of(format!("machines of node {node}")));
                }
                Err(error) => answer.failures.push(ApiError::from(error).body().of(format!("machines of node {node}"))),
            }
        }
        return Ok(Json(answer));
    }
    check_count(request.ids.len() as u64)?;
    let (ids, tenant) = (request.ids.clone(), caller.tenant().cloned());
    let is_away = move |service: &Service, id: &String| service.machine_id(id, tenant.as_ref()).is_err();
    let (away, here): (Vec<String>, Vec<String>) =
        app.look(move |service| Ok(ids.into_iter().partition(|id| is_away(service, id)))).await?;
    let located = futures_util::stream::iter(away).map(async |id| {
        let node = member.locate(&id, caller).await;
        let asked = match &node {
            Ok(Some(node)) => Some(ask(*node, KillRequest { ids: vec![id.clone()], all: false }).await),
            _ => None,
        };
        (id, node, asked)
    });
    let located: Vec<_> = located.buffer_unordered(LOOKED_FOR_AT_ONCE).collect().await;
    let mut answer = KillAnswer { killed: Vec::new(), failures: Vec::new() };
    // Of those that no node has, this one says that there is none.
    let mut rest = here;
    for (id, node, asked) in located {
        match (node, asked) {
            (Err(error), _) | (_, Some(Err(error))) => answer.failures.push(ApiError::from(error).body().of(id)),
            (_, Some(Ok(Ok(there)))) => {
                answer.killed.extend(there.killed);
                answer.failures.extend(there.failures);
            }
            (_, Some(Ok(Err((status, bytes))))) => {
                let said = serde_json::from_slice::<ErrorAnswer>(&bytes).map(|answer| answer.error);
                let unread = || {
                    ApiError::from(ClusterError::NoAnswer {
                        node: member.node(),
                        detail: format!("the machine's node answered {status}"),
                    })
                    .body()
                };
                answer.failures.push(said.unwrap_or_else(|_| unread()).of(id));
            }
            (Ok(_), None) => rest.push(id),
        }
    }
    if !rest.is_empty() {
        match kill_these(app, caller, KillRequest { ids: rest, all: false }).await {
            Ok(Json(there)) => {
                answer.killed.extend(there.killed);
                answer.failures.extend(there.failures);
            }
            Err(error) if answer.killed.is_empty() && answer.failures.is_empty() => return Err(error),
            Err(error) => answer.failures.push(error.body().of("the others".to_owned())),
        }
    }
    match answer.failures.first() {
        Some(first) if answer.killed.is_empty() => Err(ApiError::of_another(first)),
        _ => Ok(Json(answer)),
    }
}

async fn kill_these(app: &App, caller: &Caller, request: KillRequest) -> Result<Json<KillAnswer>, ApiError> {
    let tenant = caller.tenant().cloned();
    let (killed, failures) = app.act(move |service| service.kill(&request.ids, request.all, tenant.as_ref())).await?;
    let failures = failures.into_iter().map(|(id, error)| failure(id, &error)).collect();
    Ok(Json(KillAnswer { killed, failures }))
}
