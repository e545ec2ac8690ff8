//! What any node of the cluster says of itself: asked for by whoever watches, once a second and node by node.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::State as Shared;
use axum::http::Method;
use axum::{Extension, Json};
use types::{ImageId, NodeId};

use super::caller::Caller;
use super::error::ApiError;
use super::extract::PathText;
use super::node::memory;
use super::routes::App;
use super::wire::{ErrorAnswer, HostImageCounts, ImageHere, NodeFactsAnswer};
use crate::cli::client::segment;
use crate::member::forward::Forwarded;
use crate::member::{ClusterError, Membership};
use crate::node::engine::Residency;
use crate::node::metrics::Totals;
use crate::node::service::ImageView;
use crate::node::{Service, ShortId};

/// How long another node may take to answer.
const OTHERS_WITHIN: Duration = Duration::from_secs(3);

/// Shows what a node runs and has, and what it has done since it started
///
/// The node itself answers, whichever one is asked.
#[utoipa::path(
    get,
    path = "/v1/nodes/{id}",
    tag = "cluster",
    params(("id" = String, Path, description = "Its name, its id, or the last 4 and more hex digits of that; of a node that stands alone its id")),
    responses(
        (status = 200, description = "What it says", body = NodeFactsAnswer),
        (status = "4XX", description = "Refused; 404 UNKNOWN_NODE if there is none, 409 NO_CLUSTER if the node that is asked stands alone and is another one", body = ErrorAnswer),
        (status = "5XX", description = "502 UNREACHABLE, 504 NO_ANSWER if it cannot be asked, or does not answer", body = ErrorAnswer)
    )
)]
pub(crate) async fn node(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    forwarded: Option<Extension<Forwarded>>,
    PathText(given): PathText,
) -> Result<Json<NodeFactsAnswer>, ApiError> {
    let is_this_one = ShortId::parse(&given).is_ok_and(|short| short.matches(&app.node()));
    let Ok(member) = app.member() else {
        return if is_this_one { here(&app, &caller).await } else { Err(ClusterError::Alone.into()) };
    };
    // Also where no majority can be reached: then there is most to be watched.
    let node = match Membership::find(&member.consensus.stale(), &given) {
        Err(ClusterError::UnknownNode(_)) if is_this_one => member.node(),
        found => found?,
    };
    if node == member.node() {
        return here(&app, &caller).await;
    }
    // Nodes take different ones for it: it goes no further.
    if forwarded.is_some() {
        return Err(ClusterError::UnknownNode(given).into());
    }
    elsewhere(member, node, &caller).await
}

async fn elsewhere(member: &Membership, node: NodeId, caller: &Caller) -> Result<Json<NodeFactsAnswer>, ApiError> {
    let path = format!("/v1/nodes/{}", segment(&node.to_string()));
    let asking = member.ask_json::<NodeFactsAnswer>(node, Some(caller), Method::GET, &path, None::<&()>);
    let late = || ClusterError::NoAnswer { node, detail: format!("not within {} ms", OTHERS_WITHIN.as_millis()) };
    let answer = tokio::time::timeout(OTHERS_WITHIN, asking).await.map_err(|_| late())??;
    answer.map(Json).map_err(|(status, bytes)| {
        let unread = ClusterError::NodeAway { node, detail: format!("it answered {status}") };
        match serde_json::from_slice::<ErrorAnswer>(&bytes) {
            Ok(said) => ApiError::of_another(&said.error.of(format!("node {node}"))),
            Err(_) => unread.into(),
        }
    })
}

async fn here(app: &App, caller: &Caller) -> Result<Json<NodeFactsAnswer>, ApiError> {
    let tenant = caller.tenant().cloned();
    let looked = app.look(move |service: &Service| {
        let (mut images, running) = service.images_and_running();
        images.retain(|view| tenant.as_ref().is_none_or(|own| *own == view.image.facts.tenant));
        Ok((images, running, service.host_images()))
    });
    let (images, running, host_images) = looked.await?;
    let Totals { forks, fetched_bytes, served_bytes } = Totals::now();
    Ok(Json(NodeFactsAnswer {
        node: NodeId::from_uuid(app.node()),
        name: app.member().ok().map(|member| member.name().to_string()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_ms: u64::try_from(app.uptime().as_millis()).unwrap_or(u64::MAX),
        running: running.values().sum(),
        forks,
        wire_bytes: fetched_bytes,
        served_bytes,
        host_images: HostImageCounts {
            arriving: host_images.arriving as u64,
            settled: host_images.settled as u64,
            failed: host_images.failed as u64,
        },
        memory: memory(),
        images: images.iter().map(|view| image(view, &running)).collect(),
    }))
}

fn image(view: &ImageView, running: &HashMap<ImageId, u64>) -> ImageHere {
    let facts = &view.image.facts;
    ImageHere {
        image: facts.digest.map_or_else(|| facts.id.to_string(), |digest| digest.to_string()),
        tenant: facts.tenant.to_string(),
        name: view.image.name.as_ref().map(ToString::to_string),
        settled_percent: view.residency.as_ref().map(Residency::settled_percent),
        running: running.get(&facts.id).copied().unwrap_or_default(),
    }
}
