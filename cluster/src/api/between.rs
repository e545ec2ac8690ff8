//! What nodes of a cluster ask one another for jobs. Nobody else may, and no node in another's name.

use axum::Json;
use axum::extract::{Extension, Path, Request, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use control::state::JobId;
use types::Digest;
use uuid::Uuid;

use super::error::ApiError;
use super::extract::{PathText, QueryOf, bytes_of};
use super::jobs::here_of;
use super::routes::App;
use super::wire::{JobHere, LogQuery};
use crate::jobs::keeper::{Copies, MESSAGE_BYTES_MAX};
use crate::jobs::payload::PAYLOAD_BYTES_MAX;
use crate::jobs::results::{ANSWER_BYTES, Asked, blocking};
use crate::jobs::store::StoreError;
use crate::member::ClusterError;
use crate::member::forward::Forwarded;
use crate::node::NodeError;

/// Keeps copies of the asking node's outputs.
pub(crate) async fn keep_outputs(
    Shared(app): Shared<App>,
    Extension(from): Extension<Forwarded>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let bytes = bytes_of(request, MESSAGE_BYTES_MAX).await?;
    let copies = Copies::decode(&bytes, from.node).map_err(|what| ApiError::bad_request(format!("outputs: {what}")))?;
    // Of jobs that nobody has submitted nothing is kept. One that this node has not heard of yet comes again.
    let state = app.member()?.consensus.stale();
    if let Some((of, _)) = copies.records.iter().find(|(of, _)| !state.jobs.contains_key(&of.job)) {
        return Err(ClusterError::UnknownJob(of.job.to_string()).into());
    }
    let store = std::sync::Arc::clone(&app.jobs()?.store);
    blocking(move || store.put(&copies.records)).await?;
    Ok(StatusCode::OK)
}

/// Tells what is kept of some tries.
pub(crate) async fn read_outputs(Shared(app): Shared<App>, request: Request) -> Result<Vec<u8>, ApiError> {
    let bytes = bytes_of(request, app.limits().body_bytes_max).await?;
    let asked: Asked = postcard::from_bytes(&bytes).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let store = std::sync::Arc::clone(&app.jobs()?.store);
    let told = blocking(move || store.get(&asked.tries, asked.with_files, ANSWER_BYTES)).await?;
    Ok(postcard::to_stdvec(&told).expect("plain data"))
}

/// Keeps what the tasks of a job do.
pub(crate) async fn keep_payload(
    Shared(app): Shared<App>,
    PathText(digest): PathText,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let digest: Digest = digest.parse().map_err(NodeError::from)?;
    let bytes = bytes_of(request, PAYLOAD_BYTES_MAX).await?;
    if Digest::of(&bytes) != digest {
        return Err(ApiError::bad_request(format!("the payload is not {digest}")));
    }
    let store = std::sync::Arc::clone(&app.jobs()?.store);
    blocking(move || store.put_payload(&bytes)).await?;
    Ok(StatusCode::OK)
}

/// Tells what the tasks of a job do.
pub(crate) async fn read_payload(Shared(app): Shared<App>, PathText(digest): PathText) -> Result<Response, ApiError> {
    let digest: Digest = digest.parse().map_err(NodeError::from)?;
    let store = std::sync::Arc::clone(&app.jobs()?.store);
    let payload = blocking(move || store.payload(digest)).await?;
    Ok(payload.map_or_else(|| StatusCode::NOT_FOUND.into_response(), IntoResponse::into_response))
}

/// Tells what this node has done for a job.
pub(crate) async fn here(Shared(app): Shared<App>, Path(job): Path<Uuid>) -> Result<Json<Option<JobHere>>, ApiError> {
    here_of(&app, JobId(job)).await.map(Json)
}

/// Tells what a task prints that runs here.
pub(crate) async fn printed(
    Shared(app): Shared<App>,
    Path((job, task)): Path<(Uuid, u32)>,
    QueryOf(from): QueryOf<LogQuery>,
) -> Result<Vec<u8>, ApiError> {
    let printed = app.jobs()?.tasks.printed(JobId(job), task, from).unwrap_or_default();
    Ok(postcard::to_stdvec(&printed).expect("plain data"))
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        ClusterError::Outputs(error).into()
    }
}
