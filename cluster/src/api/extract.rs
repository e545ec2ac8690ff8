//! What a request holds, read within limits: at most so many bytes, within so much time, and JSON of exactly the expected shape.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header;
use axum::http::request::Parts;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::routes::{App, LARGE_BODIES_MAX};
use crate::node::NodeError;

/// A JSON body. The content type is not looked at: what is no JSON is refused anyway.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let limits = app.limits();
        let bytes = read(request, limits.body_bytes_max, limits.read_deadline).await?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| ApiError::bad_json(&error))
    }
}

/// The same, of a body that may be large: a job with its inputs and files. Few of them are dealt with at a time: it is this one's turn
/// until it is dropped.
pub struct LargeJsonBody<T>(pub T, pub Option<OwnedSemaphorePermit>);

/// The most bytes of such a body, and how long it may take to come.
pub const LARGE_BODY_BYTES_MAX: usize = 64 << 20;
const LARGE_BODY_WITHIN: Duration = Duration::from_secs(60);
/// How long its turn is waited for.
const LARGE_TURN_WITHIN: Duration = Duration::from_secs(30);

impl<T: DeserializeOwned + Send + 'static> FromRequest<App> for LargeJsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let limits = app.limits();
        if announced(&request).is_some_and(|bytes| bytes <= limits.body_bytes_max) {
            let JsonBody(value) = JsonBody::from_request(request, app).await?;
            return Ok(Self(value, None));
        }
        let turn = tokio::time::timeout(LARGE_TURN_WITHIN, app.large_body()).await;
        let turn = turn.map_err(|_| NodeError::Busy { queued: LARGE_BODIES_MAX })?;
        let bytes = read(request, LARGE_BODY_BYTES_MAX, LARGE_BODY_WITHIN).await?;
        // Some tenths of a second of work, for the largest.
        let parsed = tokio::task::spawn_blocking(move || serde_json::from_slice(&bytes)).await;
        let value = parsed.map_err(|_| ApiError::internal())?.map_err(|error| ApiError::bad_json(&error))?;
        Ok(Self(value, Some(turn)))
    }
}

/// The body that another node sends, which knows itself how long it waits: outputs and payloads are large, and links slow.
pub(super) async fn bytes_of(request: Request, bytes_max: usize) -> Result<Bytes, ApiError> {
    read(request, bytes_max, LARGE_BODY_WITHIN).await
}

fn announced(request: &Request) -> Option<usize> {
    request.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The one parameter of a path.
pub struct PathText(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathText {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        path.map(|Path(text)| Self(text)).map_err(|error| ApiError::bad_request(error.body_text()))
    }
}

/// The two parameters of a path.
pub struct PathTexts(pub (String, String));

impl<S: Send + Sync> FromRequestParts<S> for PathTexts {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path: Result<Path<(String, String)>, PathRejection> = Path::from_request_parts(parts, state).await;
        path.map(|Path(texts)| Self(texts)).map_err(|error| ApiError::bad_request(error.body_text()))
    }
}

/// The parameters after the question mark.
pub struct QueryOf<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryOf<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, state).await;
        query.map(|Query(query)| Self(query)).map_err(|error| ApiError::bad_request(error.body_text()))
    }
}

async fn read(request: Request, bytes_max: usize, deadline: Duration) -> Result<Bytes, ApiError> {
    /// So much of a body that is too long is read and thrown away, so that its sender gets to see the answer.
    const DISCARDED_MAX: usize = 4 << 20;
    if announced(&request).is_some_and(|announced| announced > bytes_max + DISCARDED_MAX) {
        return Err(ApiError::body_too_large(bytes_max));
    }
    let all = collect(request.into_body(), bytes_max, bytes_max + DISCARDED_MAX);
    tokio::time::timeout(deadline, all).await.map_err(|_| ApiError::slow_request(deadline))?
}

async fn collect(mut body: Body, bytes_max: usize, read_max: usize) -> Result<Bytes, ApiError> {
    let (mut kept, mut seen) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        // The client is gone or does not keep to HTTP; it will hardly read this.
        let frame = frame.map_err(|error| ApiError::bad_request(format!("the body: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        seen += data.len();
        if seen <= bytes_max {
            kept.extend_from_slice(&data);
        } else if seen > read_max {
            break;
        }
    }
    if seen > bytes_max { Err(ApiError::body_too_large(bytes_max)) } else { Ok(kept.into()) }
}
