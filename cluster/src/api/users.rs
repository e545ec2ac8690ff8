//! Handlers of users: who may ask over HTTPS.

use axum::extract::State as Shared;
use axum::{Extension, Json};
use control::command::Command;
use control::state::{Level, Rights, User};
use ring::rand::{SecureRandom, SystemRandom};
use types::{Digest, Name};

use super::audit::About;
use super::caller::Caller;
use super::cluster::only_from_voters;
use super::error::ApiError;
use super::extract::{JsonBody, PathText};
use super::routes::App;
use super::wire::{ErrorAnswer, RemovedAnswer, UserAnswer, UserRequest, UserRow, UsersAnswer, WhoAnswer};
use crate::member::ClusterError;
use crate::member::forward::Forwarded;
use crate::node::NodeError;

/// What a token begins with: whoever finds one knows what it is.
const PREFIX: &str = "ffuser_";

/// What the cluster knows of a token.
pub(super) fn digest_of(token: &str) -> Digest {
    Digest::of(&[b"farfork user token".as_slice(), token.as_bytes()].concat())
}

/// Lists users
#[utoipa::path(
    get,
    path = "/v1/users",
    tag = "users",
    responses(
        (status = 200, description = "Users, without what they show", body = UsersAnswer),
        (status = "4XX", description = "Refused; 409 NO_CLUSTER if the node stands alone", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(Shared(app): Shared<App>) -> Result<Json<UsersAnswer>, ApiError> {
    let state = app.member()?.read().await?;
    let row = |(name, user): (&Name, &User)| UserRow {
        name: name.to_string(),
        level: user.rights.level,
        tenant: user.rights.tenant.as_ref().map(ToString::to_string),
        expires_in_s: user.until.map(|until| (until - state.time).as_secs()),
    };
    Ok(Json(UsersAnswer { users: state.users.iter().map(row).collect() }))
}

/// Lets somebody ask over HTTPS, with a token that is drawn for it, or with a certificate of its own
#[utoipa::path(
    post,
    path = "/v1/users",
    tag = "users",
    request_body = UserRequest,
    responses(
        (status = 200, description = "It may", body = UserAnswer),
        (status = "4XX", description = "Refused; 403 NOT_A_VOTER on a node without a vote", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn add(
    Shared(app): Shared<App>,
    Extension(about): Extension<About>,
    forwarded: Option<Extension<Forwarded>>,
    JsonBody(request): JsonBody<UserRequest>,
) -> Result<Json<UserAnswer>, ApiError> {
    let member = app.member()?;
    only_from_voters(forwarded)?;
    let name = Name::parse(&request.name).map_err(NodeError::from)?;
    let tenant = request.tenant.as_deref().map(str::parse).transpose().map_err(NodeError::from)?;
    // All of a cluster has to be said in so many words.
    let tenant = if request.all_tenants { tenant } else { Some(tenant.unwrap_or_default()) };
    if request.all_tenants && tenant.is_some() {
        return Err(ApiError::bad_request("a tenant, and all tenants"));
    }
    let rights = Rights { level: request.level, tenant };
    about.say(|| {
        let tenant = rights.tenant.as_ref().map_or("all tenants", types::Tenant::as_str);
        format!("user {name}, {:?} of {tenant}", rights.level)
    });
    let (token, credential) = match &request.certificate {
        Some(pem) => {
            let digest = pages::https::key_digest_of_pem(pem.as_bytes());
            (None, digest.map_err(|error| ApiError::bad_request(format!("the certificate: {error}")))?)
        }
        None => {
            let token = draw()?;
            let digest = digest_of(&token);
            (Some(token), digest)
        }
    };
    let lasts_ms = request.lasts_s.map(|seconds| seconds.saturating_mul(1000));
    member.propose(None, Command::AddUser { name: name.clone(), credential, rights, lasts_ms }).await?;
    let authority = member.authority_digest().to_string();
    Ok(Json(UserAnswer {
        name: name.to_string(),
        token,
        authority,
        url: app.https().map(|address| format!("https://{address}")),
    }))
}

/// Lets somebody ask no more
///
/// What it has started goes on.
#[utoipa::path(
    delete,
    path = "/v1/users/{name}",
    tag = "users",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is agreed on", body = RemovedAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(
    Shared(app): Shared<App>,
    forwarded: Option<Extension<Forwarded>>,
    PathText(name): PathText,
) -> Result<Json<RemovedAnswer>, ApiError> {
    only_from_voters(forwarded)?;
    let name = Name::parse(&name).map_err(NodeError::from)?;
    app.member()?.propose(None, Command::RemoveUser { name: name.clone() }).await?;
    Ok(Json(RemovedAnswer { removed: name.to_string() }))
}

/// Says who asks, and what that one may do
#[utoipa::path(
    get,
    path = "/v1/whoami",
    tag = "users",
    responses(
        (status = 200, description = "You", body = WhoAnswer),
        (status = "4XX", description = "Refused; 401 UNAUTHORIZED if it is not known", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn whoami(Shared(app): Shared<App>, Extension(caller): Extension<Caller>) -> Json<WhoAnswer> {
    let rights = caller.rights.clone().unwrap_or(Rights { level: Level::Read, tenant: None });
    Json(WhoAnswer {
        who: caller.who.to_string(),
        level: rights.level,
        tenant: rights.tenant.map(|tenant| tenant.to_string()),
        node: app.node(),
    })
}

fn draw() -> Result<String, ClusterError> {
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| ClusterError::NoRandomness)?;
    let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{PREFIX}{digits}"))
}
