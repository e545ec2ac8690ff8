//! The description of the API, for `docs/openapi.json` and whoever asks a node for it.

use utoipa::OpenApi;
use utoipa::openapi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};

use super::{archive, audit, cluster, facts, images, job_tasks, jobs, kill, machines, node, templates, trust, users};

/// The description of the API.
#[must_use]
pub fn openapi_json() -> String {
    let mut text = finished(Description::openapi()).to_pretty_json().expect("a description of our own types can be written");
    text.push('\n');
    text
}

/// Handlers of several kinds have the same names, and an operation's has to be its own; users over HTTPS show a token.
fn finished(mut api: openapi::OpenApi) -> openapi::OpenApi {
    for item in api.paths.paths.values_mut() {
        for operation in [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten() {
            let tag = operation.tags.iter().flatten().next().cloned().unwrap_or_default();
            operation.operation_id = operation.operation_id.take().map(|name| format!("{tag}_{name}"));
        }
    }
    let token = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    api.components.get_or_insert_default().add_security_scheme("token", token);
    // None over the socket.
    api.security = Some(vec![SecurityRequirement::default(), SecurityRequirement::new("token", [""; 0])]);
    api
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "farfork",
        description = "fork() for fleets of microVMs: the API of one node, over its Unix socket, and over HTTPS for users of its cluster.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        machines::fork,
        machines::branch,
        machines::list,
        machines::show,
        kill::kill_one,
        kill::kill,
        images::list,
        images::show,
        images::save,
        images::digest,
        images::load,
        images::remove,
        templates::build,
        templates::list,
        templates::show,
        templates::remove,
        templates::connect,
        archive::export,
        archive::import,
        trust::list,
        trust::own,
        trust::add,
        trust::remove,
        cluster::show,
        cluster::token,
        cluster::change,
        cluster::remove,
        facts::node,
        cluster::explain,
        jobs::submit,
        jobs::list,
        jobs::show,
        jobs::cancel,
        jobs::remove,
        jobs::events,
        job_tasks::results,
        job_tasks::task,
        job_tasks::log,
        job_tasks::files,
        users::list,
        users::add,
        users::remove,
        users::whoami,
        audit::list,
        node::show,
        node::openapi,
        node::metrics
    )
)]
struct Description;
