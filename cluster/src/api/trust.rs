//! Handlers of trust: whose certificates open this node to whose images.

use axum::extract::State as Shared;
use axum::{Extension, Json};
use types::Tenant;

use super::audit::About;
use super::error::ApiError;
use super::extract::{JsonBody, PathText};
use super::machines::unix_ms;
use super::routes::App;
use super::wire::{Certificate, ErrorAnswer, TrustAnswer, TrustRequest, TrustedNode};
use crate::node::{NodeError, trust};

/// Lists nodes that are trusted
#[utoipa::path(
    get,
    path = "/v1/trust",
    tag = "trust",
    responses(
        (status = 200, description = "They", body = TrustAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(Shared(app): Shared<App>) -> Result<Json<TrustAnswer>, ApiError> {
    let nodes = app.look(|service| service.trusted()).await?;
    Ok(Json(TrustAnswer { nodes: nodes.iter().map(trusted_node).collect() }))
}

/// Shows this node's own certificate, to be given to others
#[utoipa::path(
    get,
    path = "/v1/trust/own",
    tag = "trust",
    responses(
        (status = 200, description = "The certificate", body = Certificate),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn own(Shared(app): Shared<App>) -> Result<Json<Certificate>, ApiError> {
    Ok(Json(certificate(&app.look(|service| service.own_certificate()).await?)))
}

/// Trusts the node of a certificate
///
/// It is let in at once, without a restart. Tenants replace those that were given with the same certificate before.
#[utoipa::path(
    post,
    path = "/v1/trust",
    tag = "trust",
    request_body = TrustRequest,
    responses(
        (status = 200, description = "It is trusted", body = TrustedNode),
        (status = "4XX", description = "Refused; 409 OTHER_CERTIFICATE if the node is trusted with another one", body = ErrorAnswer),
        (status = "5XX", description = "Failed; everything is as it was", body = ErrorAnswer)
    )
)]
pub(crate) async fn add(
    Shared(app): Shared<App>,
    Extension(about): Extension<About>,
    JsonBody(request): JsonBody<TrustRequest>,
) -> Result<Json<TrustedNode>, ApiError> {
    let TrustRequest { certificate, tenants } = request;
    about.say(|| {
        let node = pages::Certificate::from_pem(certificate.as_bytes())
            .map_or_else(|_| "?".to_owned(), |of| of.peer().node.to_string());
        format!("node {node} for {}", tenants.join(", "))
    });
    let tenants = tenants.iter().map(|tenant| tenant.parse::<Tenant>().map_err(NodeError::from)).collect::<Result<_, _>>()?;
    let added = app.act(move |service| service.trust(&certificate, tenants)).await?;
    Ok(Json(trusted_node(&added)))
}

/// Trusts a node no longer, and closes its connections
#[utoipa::path(
    delete,
    path = "/v1/trust/{id}",
    tag = "trust",
    params(("id" = String, Path, description = "Full id of the node, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "It is not trusted any more", body = TrustedNode),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed; it is still trusted", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(Shared(app): Shared<App>, PathText(id): PathText) -> Result<Json<TrustedNode>, ApiError> {
    Ok(Json(trusted_node(&app.act(move |service| service.distrust(&id)).await?)))
}

fn trusted_node(trusted: &trust::Trusted) -> TrustedNode {
    let tenants = trusted.tenants.iter().map(ToString::to_string).collect();
    TrustedNode { certificate: certificate(&trusted.certificate), tenants }
}

fn certificate(of: &trust::Certificate) -> Certificate {
    Certificate {
        node: of.node,
        role: of.role,
        fingerprint: of.fingerprint.to_string(),
        not_after_unix_ms: unix_ms(of.not_after),
        pem: of.pem.clone(),
    }
}
