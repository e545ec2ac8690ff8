//! Handlers that end machines, on whichever nodes they are.

use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::Method;
use axum::{Extension, Json};

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
    let mut answer = KillAnswer { killed: Vec::new(), failures: Vec::new() };
    let (ids, tenant) = (request.ids.clone(), caller.tenant().cloned());
    let is_away = move |service: &Service, id: &String| service.machine_id(id, tenant.as_ref()).is_err();
    let away: Vec<String> = app.look(move |service| Ok(ids.into_iter().filter(|id| is_away(service, id)).collect())).await?;
    let here: Vec<String> = request.ids.iter().filter(|id| !away.contains(id)).cloned().collect();
    let mut first = None;
    let mut missed: Vec<String> = Vec::new();
    for id in away {
        match member.locate(&id, caller).await {
            Err(error) => answer.failures.push(ApiError::from(error).body().of(id)),
            Ok(Some(node)) => match ask(node, KillRequest { ids: vec![id.clone()], all: false }).await {
                Ok(Ok(there)) => {
                    answer.killed.extend(there.killed);
                    answer.failures.extend(there.failures);
                }
                Ok(Err(_)) => missed.push(id),
                Err(error) => drop(first.get_or_insert(ApiError::from(error))),
            },
            // This node says that there is none.
            Ok(None) => missed.push(id),
        }
    }
    let rest: Vec<String> = here.into_iter().chain(missed).collect();
    if !rest.is_empty() || request.ids.is_empty() {
        match kill_these(app, caller, KillRequest { ids: rest, all: false }).await {
            Ok(Json(there)) => {
                answer.killed.extend(there.killed);
                answer.failures.extend(there.failures);
            }
            Err(error) if answer.killed.is_empty() => return Err(error),
            Err(error) => answer.failures.push(error.body().of("the others".to_owned())),
        }
    }
    match first {
        Some(error) if answer.killed.is_empty() => Err(error),
        _ => Ok(Json(answer)),
    }
}

async fn kill_these(app: &App, caller: &Caller, request: KillRequest) -> Result<Json<KillAnswer>, ApiError> {
    let tenant = caller.tenant().cloned();
    let (killed, failures) = app.act(move |service| service.kill(&request.ids, request.all, tenant.as_ref())).await?;
    let failures = failures.into_iter().map(|(id, error)| failure(id, &error)).collect();
    Ok(Json(KillAnswer { killed, failures }))
}
