//! Writes down who asked for what.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State as Shared};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::caller::{Caller, Who};
use super::error::ApiError;
use super::extract::QueryOf;
use super::routes::App;
use super::wire::ErrorAnswer;
use crate::node::audit::{Asked, AuditError, Line};

/// How often it is written down that somebody is turned away who is not known.
const STRANGERS_EVERY: Duration = Duration::from_secs(1);
/// The most lines of an answer.
const LINES_MAX: usize = 1000;

/// What a request is about, where its path does not say: handlers put it here.
#[derive(Clone, Debug, Default)]
pub(crate) struct About(Arc<OnceLock<String>>);

impl About {
    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        self.0.get_or_init(what);
    }
}

/// Writes a line of each request that may change something, and of each that is turned away.
pub(super) async fn note(Shared(app): Shared<App>, mut request: Request, next: Next) -> Response {
    let about = About::default();
    request.extensions_mut().insert(about.clone());
    let Some(audit) = app.audit().cloned() else { return next.run(request).await };
    let caller: Caller = request.extensions().get::<Caller>().expect("each connection adds it").clone();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // What nodes tell one another of tasks that run is not asked for by anybody: who submitted them is written down.
    let is_between = path.starts_with("/v1/between/") && matches!(caller.who, Who::Node(_));
    let changes = method != Method::GET && !is_between;
    if changes && let Err(error) = audit.check() {
        return ApiError::from(error).into_response();
    }
    let strangers = app.strangers();
    let answering = async move {
        let response = next.run(request).await;
        let status = response.status();
        let is_refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
        if caller.rights.is_none() && is_refused && !strangers.may_be_written_down() {
            return response;
        }
        if changes || is_refused {
            let asked = Asked {
                who: caller.who.to_string(),
                tenant: caller.tenant().map(ToString::to_string),
                method: method.to_string(),
                path,
                about: about.0.get().cloned(),
                status: status.as_u16(),
            };
            // It was done: its client gets to know that, and the next one that nothing can be written down.
            if let Err(error) = audit.write(asked) {
                tracing::error!(%error, remedy = error.remedy(), "it is not written down who asked for what");
            }
        }
        response
    };
    if !changes {
        return answering.await;
    }
    // What was begun goes on when its client hangs up, and is written down all the same.
    let span = tracing::Span::current();
    tokio::spawn(tracing::Instrument::instrument(answering, span))
        .await
        .unwrap_or_else(|_| ApiError::internal().into_response())
}

/// Strangers write into the log what they are turned away for: not more than so often. What is left out is counted.
#[derive(Debug, Default)]
pub(crate) struct Strangers(Mutex<Option<(Instant, u64)>>);

impl Strangers {
    fn may_be_written_down(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *last {
            Some((since, left_out)) if since.elapsed() < STRANGERS_EVERY => {
                *left_out += 1;
                false
            }
            last => {
                if let Some((_, left_out @ 1..)) = last {
                    tracing::warn!(left_out, "strangers were turned away, and not written down one by one");
                }
                *last = Some((Instant::now(), 0));
                true
            }
        }
    }
}

/// Which lines.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// Those after this number; all if it is left out.
    #[serde(default)]
    after: u64,
    /// The most, of 1,000 and less.
    limit: Option<usize>,
}

/// Lines of this node's log.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AuditAnswer {
    /// Oldest first.
    pub lines: Vec<Line>,
    /// The number of the last line that there is.
    pub last: u64,
    /// Its digest: noted elsewhere, it tells later that nothing was cut off.
    pub hash: String,
}

/// Shows who asked this node for what
///
/// Every node writes down what it was asked, and what others asked of it for somebody.
#[utoipa::path(
    get,
    path = "/v1/audit",
    tag = "node",
    params(AuditQuery),
    responses(
        (status = 200, description = "Lines", body = AuditAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "Failed", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(Shared(app): Shared<App>, QueryOf(query): QueryOf<AuditQuery>) -> Result<Json<AuditAnswer>, ApiError> {
    let Some(audit) = app.audit().cloned() else { return Err(ApiError::unknown_route()) };
    let most = query.limit.unwrap_or(LINES_MAX).min(LINES_MAX);
    let read = tokio::task::spawn_blocking(move || audit.lines(query.after, most));
    let (lines, head) = read.await.map_err(|_| ApiError::internal())??;
    Ok(Json(AuditAnswer { lines, last: head.seq, hash: head.hash }))
}

impl From<AuditError> for ApiError {
    fn from(error: AuditError) -> Self {
        tracing::error!(%error, "the log of who asked for what");
        Self::audit(&error)
    }
}
