//! Handlers of images. In paths an image in memory goes by its id or the end of it; `name:` and a name stands for a saved one,
//! so that nothing can be both.

use axum::extract::State as Shared;
use axum::{Extension, Json};
use types::{FullName, Name, Tenant};

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{JsonBody, PathText};
use super::machines::{residency, unix_ms};
use super::routes::App;
use super::wire::{ErrorAnswer, Image, ImagesAnswer, NameRequest, RemovedAnswer, Stored};
use crate::node::NodeError;
use crate::node::registry::Origin;
use crate::node::service::ImageView;

/// What a saved image's name begins with where an id could stand as well.
pub const NAME_PREFIX: &str = "name:";

/// Lists images in memory and in the store
#[utoipa::path(
    get,
    path = "/v1/images",
    tag = "images",
    responses(
        (status = 200, description = "Images", body = ImagesAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "The store cannot be read", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<ImagesAnswer>, ApiError> {
    let (images, stored) = app.look(|service| service.images()).await?;
    let is_callers = |tenant: &Tenant| caller.tenant().is_none_or(|own| own == tenant);
    let images = images.iter().filter(|view| is_callers(&view.image.facts.tenant)).map(image).collect();
    let stored = stored.into_iter().filter(|(name, _)| is_callers(&name.tenant));
    let stored = stored.map(|(name, file_bytes)| Stored { name: name.to_string(), file_bytes }).collect();
    Ok(Json(ImagesAnswer { images, stored }))
}

/// Shows an image in memory
#[utoipa::path(
    get,
    path = "/v1/images/{id}",
    tag = "images",
    params(("id" = String, Path, description = "Full id, its last 4 and more hex digits, or its digest")),
    responses(
        (status = 200, description = "The image", body = Image),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
) -> Result<Json<Image>, ApiError> {
    let id = app.image_of(&caller, id).await?;
    Ok(Json(image(&app.look(move |service| service.image(&id)).await?)))
}

/// Saves an image in memory under a name
#[utoipa::path(
    post,
    path = "/v1/images/{id}/save",
    tag = "images",
    params(("id" = String, Path, description = "Full id, its last 4 and more hex digits, or its digest")),
    request_body = NameRequest,
    responses(
        (status = 200, description = "It is on disk", body = Image),
        (status = "4XX", description = "Refused; 409 NAME_TAKEN if there is one of this name", body = ErrorAnswer),
        (status = "5XX", description = "Failed; the store is as it was", body = ErrorAnswer)
    )
)]
pub(crate) async fn save(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    PathText(id): PathText,
    JsonBody(request): JsonBody<NameRequest>,
) -> Result<Json<Image>, ApiError> {
    about.say(|| request.name.clone());
    // Of whichever tenant the image is.
    let name = Name::parse(&request.name).map_err(NodeError::from)?;
    let id = app.image_of(&caller, id).await?;
    let (looked_at, saved) = (id.clone(), name.clone());
    let tenant = app.look(move |service| Ok(service.image(&looked_at)?.image.facts.tenant)).await?;
    let full = FullName { tenant, name };
    app.check_name(&full).await?;
    let view = app.act(move |service| service.save(&id, &saved)).await?;
    app.publish(&full).await?;
    Ok(Json(image(&view)))
}

/// Hashes an image in memory, if that has not been done: the digest is its name on other nodes
#[utoipa::path(
    post,
    path = "/v1/images/{id}/digest",
    tag = "images",
    params(("id" = String, Path, description = "Full id, its last 4 and more hex digits, or its digest")),
    responses(
        (status = 200, description = "The image, with its digest", body = Image),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn digest(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
) -> Result<Json<Image>, ApiError> {
    let id = app.image_of(&caller, id).await?;
    Ok(Json(image(&app.act(move |service| service.hashed(&id)).await?)))
}

/// Loads a saved image, verified
#[utoipa::path(
    post,
    path = "/v1/images/load",
    tag = "images",
    request_body = NameRequest,
    responses(
        (status = 200, description = "It is in memory", body = Image),
        (status = "4XX", description = "Refused; 422 BAD_IMAGE if it is damaged or of another CPU", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn load(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    JsonBody(request): JsonBody<NameRequest>,
) -> Result<Json<Image>, ApiError> {
    about.say(|| request.name.clone());
    let name = caller.name(&request.name)?;
    Ok(Json(image(&app.act(move |service| service.load(&name)).await?)))
}

/// Forgets an image in memory, or deletes a saved one
///
/// Machines that were forked from it go on.
#[utoipa::path(
    delete,
    path = "/v1/images/{id}",
    tag = "images",
    params(("id" = String, Path, description = "Of one in memory: full id, or its last 4 and more hex digits. Of a saved one: `name:` and its name")),
    responses(
        (status = 200, description = "It is gone", body = RemovedAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(id): PathText,
) -> Result<Json<RemovedAnswer>, ApiError> {
    let removed = match id.strip_prefix(NAME_PREFIX) {
        Some(name) => {
            let name = caller.name(name)?;
            app.act(move |service| service.delete(&name).map(|()| format!("{NAME_PREFIX}{name}"))).await?
        }
        None => {
            let id = app.image_of(&caller, id).await?;
            app.act(move |service| service.forget(&id).map(|id| id.to_string())).await?
        }
    };
    Ok(Json(RemovedAnswer { removed }))
}

pub(super) fn image(view: &ImageView) -> Image {
    let image = &view.image;
    let facts = &image.facts;
    let (origin, parent) = match &image.origin {
        Origin::Guest(_) => ("guest", None),
        Origin::Machine(parent) => ("machine", Some(*parent)),
        Origin::Store => ("store", None),
        Origin::Template => ("template", None),
        Origin::Remote => ("remote", None),
    };
    Image {
        id: facts.id,
        digest: facts.digest.map(|digest| digest.to_string()),
        tenant: facts.tenant.to_string(),
        memory_bytes: facts.class.memory().bytes(),
        vcpus: facts.class.vcpu_count(),
        disk_bytes: facts.class.disk().map(|disk| disk.bytes()),
        depth: facts.depth,
        own_bytes: facts.own_bytes,
        stored_bytes: facts.stored_bytes,
        verifiable: facts.verifiable,
        origin: origin.to_owned(),
        parent,
        name: image.name.as_ref().map(ToString::to_string),
        created_unix_ms: unix_ms(image.created),
        residency: view.residency.as_ref().map(residency),
    }
}
