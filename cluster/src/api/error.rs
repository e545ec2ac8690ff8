//! Refusals and failures as HTTP status and body `{"error":{"code","message","remedy","reason"}}`.
//!
//! | status | codes | whose |
//! |---|---|---|
//! | 400 | `BAD_JSON`, `BAD_REQUEST`, `BAD_COUNT`, `BAD_MEMORY`, `BAD_VCPUS`, `BAD_LIMIT`, `BAD_NAME`, `BAD_ID`, `BAD_DIGEST`, `BAD_TENANT`, `BAD_ADDRESS`, `BAD_HOLDERS`, `BAD_CERTIFICATE`, `BAD_MESSAGE`, `UNFIT` | the request is wrong, whatever the node's state |
//! | 401 | `UNAUTHORIZED` | over HTTPS: no user of the cluster is known by what was shown |
//! | 403 | `FORBIDDEN`, `NOT_TRUSTED`, `NOT_A_VOTER` | this user may not use this node, or not for this; two nodes do not trust each other; only a voter may |
//! | 404 | `UNKNOWN_ROUTE`, `UNKNOWN_MACHINE`, `UNKNOWN_IMAGE`, `UNKNOWN_TEMPLATE`, `UNKNOWN_NODE`, `UNKNOWN_JOB` | there is none |
//! | 405 | `METHOD_NOT_ALLOWED` | the route exists, for other methods |
//! | 408 | `SLOW_REQUEST` | the body did not come within the deadline |
//! | 409 | `NAME_TAKEN`, `ENDED`, `NOT_READY`, `NOT_SETTLED`, `AMBIGUOUS_ID`, `OTHER_TENANT`, `REFUSED`, `NO_NETWORK`, `NO_CLUSTER`, `AUTHORITY_SEALED`, `NO_GUEST_NETWORK`, `NOT_LISTENING`, `NOT_ADVERTISED`, `OTHER_CERTIFICATE`, `TOO_MANY_NODES`, `OUTPUT_LOST` | not in this state; another request may pass. `REFUSED`: by another node |
//! | 413 | `BODY_TOO_LARGE` | more than 1 MiB |
//! | 422 | `BAD_IMAGE`, `GUEST`, `NOT_VERIFIABLE`, `NO_NETWORK_CARD`, `WRONG_PROOF` | understood, but this image or machine cannot |
//! | 429 | `BUSY` | too many calls wait; `Retry-After` |
//! | 500 | `INTERNAL`, `STORE` | something of ours failed |
//! | 502 | `UNREACHABLE`, `SOURCE_LOST` | another node cannot be reached, or none is left that has what is missing |
//! | 503 | `EXHAUSTED`, `HOST`, `STOPPING`, `NO_QUORUM`, `NO_PLACE`, `LOG_FAILED`, `AUDIT_FAILED` | the node, or the cluster, is short of something, or going; `Retry-After` |
//! | 504 | `NO_ANSWER`, `OUTCOME_UNKNOWN`, `DEADLINE_EXCEEDED` | another node was asked and did not answer in time: it may have done it |
//! | 507 | `STORE_FULL` | the store's file system is full |

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use types::Reason;

use super::caller::Who;
use super::wire::{ErrorAnswer, ErrorBody, Failure};
use crate::member::ClusterError;
use crate::node::audit::AuditError;
use crate::node::{NodeError, metrics};

/// What a client is told when it does not get what it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    remedy: String,
    reason: Option<Reason>,
    closes: bool,
}

impl ApiError {
    /// 400: the body is no JSON of the shape that the route takes.
    #[must_use]
    pub fn bad_json(error: &serde_json::Error) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BAD_JSON", format!("the body: {error}"), "GET /v1/openapi.json says what it takes")
    }

    /// 400: something else of the request is malformed.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BAD_REQUEST", message, "GET /v1/openapi.json says what each route takes")
    }

    /// 403: a user of the host.
    #[must_use]
    pub fn forbidden_uid(who: &Who) -> Self {
        let message = format!("{who} may not use this node");
        Self::new(StatusCode::FORBIDDEN, "FORBIDDEN", message, "start the node with --allow-uid, or ask as its own user")
            .closing()
    }

    /// 403: it is known who asks, and that is not for that one.
    #[must_use]
    pub fn forbidden(who: &Who, why: &str) -> Self {
        let message = format!("{who} may not do this: {why}");
        Self::new(
            StatusCode::FORBIDDEN,
            "FORBIDDEN",
            message,
            "ask an admin of the cluster: `farfork user ls` lists who may what",
        )
    }

    /// 503: it cannot be written down who asks for what.
    #[must_use]
    pub fn audit(error: &AuditError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "AUDIT_FAILED", error.to_string(), error.remedy())
    }

    /// 401: nobody knows the token or the certificate, or none was shown.
    #[must_use]
    pub fn unknown_user() -> Self {
        let remedy = "show a token (authorization: Bearer ...) or a certificate that `farfork user add` was given, and that is not out of date";
        Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "it is not known who asks", remedy).closing()
    }

    /// 404: no such route.
    #[must_use]
    pub fn unknown_route() -> Self {
        let remedy = "GET /v1/openapi.json lists the routes";
        Self::new(StatusCode::NOT_FOUND, "UNKNOWN_ROUTE", "there is no such route", remedy)
    }

    /// 405.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        let remedy = "the header Allow lists its methods";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", "the route does not take this method", remedy)
    }

    /// 408: the body did not come in time.
    #[must_use]
    pub fn slow_request(deadline: std::time::Duration) -> Self {
        let message = format!("the body did not come within {} ms", deadline.as_millis());
        Self::new(StatusCode::REQUEST_TIMEOUT, "SLOW_REQUEST", message, "send the body at once").closing()
    }

    /// 413.
    #[must_use]
    pub fn body_too_large(max_bytes: usize) -> Self {
        let message = format!("the body is longer than {max_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "BODY_TOO_LARGE", message, "split it into several requests").closing()
    }

    /// 500: a handler panicked.
    #[must_use]
    pub fn internal() -> Self {
        NodeError::Panicked.into()
    }

    fn new(status: StatusCode, code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), remedy: remedy.into(), reason: None, closes: false }
    }

    /// The connection cannot be used any further: what is left of the body was not read.
    fn closing(self) -> Self {
        Self { closes: true, ..self }
    }
}

impl ApiError {
    /// The code that programs match on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// What a client reads.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let reason = self.reason.map(|reason| reason.code().to_owned());
        ErrorBody { code: self.code.to_owned(), message: self.message.clone(), remedy: self.remedy.clone(), reason }
    }

    /// What another node failed with, which was asked for this one's client.
    #[must_use]
    pub fn of_another(failure: &Failure) -> Self {
        let Failure { id, code, message, remedy, .. } = failure;
        let reason = failure.reason.as_deref().and_then(|code| Reason::ALL.into_iter().find(|reason| reason.code() == code));
        let status = status(code);
        // Codes that this version does not know are refusals.
        let (status, code) =
            CODES.iter().find(|known| *known == code).map_or((StatusCode::CONFLICT, "REFUSED"), |code| (status, code));
        Self { reason, ..Self::new(status, code, format!("{id}: {message}"), remedy.clone()) }
    }
}

impl From<ClusterError> for ApiError {
    fn from(error: ClusterError) -> Self {
        NodeError::from(error).into()
    }
}

impl From<NodeError> for ApiError {
    fn from(error: NodeError) -> Self {
        let mut answer = Self::new(status(error.code()), error.code(), error.to_string(), error.remedy());
        answer.reason = error.reason();
        answer
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        metrics::failed(self.code);
        if self.status.is_server_error() {
            tracing::error!(code = self.code, message = self.message, "failed");
        } else {
            tracing::debug!(code = self.code, message = self.message, "refused");
        }
        let (status, closes) = (self.status, self.closes);
        let body = ErrorAnswer { error: self.body() };
        let mut response = (status, Json(body)).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if closes {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// What another node may have said that is passed on as it was.
const CODES: [&str; 17] = [
    "EXHAUSTED",
    "NO_PLACE",
    "NO_QUORUM",
    "UNREACHABLE",
    "SOURCE_LOST",
    "BUSY",
    "STOPPING",
    "UNKNOWN_IMAGE",
    "BAD_LIMIT",
    "NOT_VERIFIABLE",
    "WRONG_PROOF",
    "NO_NETWORK_CARD",
    "ENDED",
    "AMBIGUOUS_ID",
    "FORBIDDEN",
    "NO_ANSWER",
    "AUDIT_FAILED",
];

/// The table above.
fn status(code: &str) -> StatusCode {
    match code {
        "BAD_COUNT" | "BAD_MEMORY" | "BAD_VCPUS" | "BAD_LIMIT" | "BAD_REQUEST" | "BAD_NAME" | "BAD_ID" | "BAD_DIGEST"
        | "BAD_TENANT" | "BAD_ADDRESS" | "BAD_HOLDERS" | "BAD_CERTIFICATE" | "BAD_MESSAGE" | "UNFIT" => StatusCode::BAD_REQUEST,
        "NOT_TRUSTED" | "FORBIDDEN" | "NOT_A_VOTER" => StatusCode::FORBIDDEN,
        "UNKNOWN_MACHINE" | "UNKNOWN_IMAGE" | "UNKNOWN_TEMPLATE" | "UNKNOWN_NODE" | "UNKNOWN_JOB" => StatusCode::NOT_FOUND,
        "NAME_TAKEN" | "ENDED" | "NOT_READY" | "NOT_SETTLED" | "AMBIGUOUS_ID" | "OTHER_TENANT" | "REFUSED" | "NO_NETWORK"
        | "NO_CLUSTER" | "AUTHORITY_SEALED" | "NO_GUEST_NETWORK" | "NOT_LISTENING" | "NOT_ADVERTISED" | "OTHER_CERTIFICATE"
        | "TOO_MANY_NODES" | "OUTPUT_LOST" => StatusCode::CONFLICT,
        "BAD_IMAGE" | "GUEST" | "NOT_VERIFIABLE" | "NO_NETWORK_CARD" | "WRONG_PROOF" => StatusCode::UNPROCESSABLE_ENTITY,
        "BUSY" => StatusCode::TOO_MANY_REQUESTS,
        "UNREACHABLE" | "SOURCE_LOST" => StatusCode::BAD_GATEWAY,
        "NO_ANSWER" | "OUTCOME_UNKNOWN" | "DEADLINE_EXCEEDED" => StatusCode::GATEWAY_TIMEOUT,
        "EXHAUSTED" | "HOST" | "STOPPING" | "NO_QUORUM" | "NO_PLACE" | "LOG_FAILED" | "AUDIT_FAILED" => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        "STORE_FULL" => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes between backticks of a table's rows, each with the status of its row.
    fn table(text: &str) -> Vec<(u16, &str)> {
        let rows = text.lines().filter_map(|line| {
            let (status, rest) = line.trim_start_matches("//! ").strip_prefix("| ")?.split_once(" | ")?;
            Some((status.parse::<u16>().ok()?, rest))
        });
        let codes = rows.flat_map(|(status, rest)| rest.split('`').skip(1).step_by(2).map(move |code| (status, code)));
        codes.filter(|(_, code)| code.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')).collect()
    }

    #[test]
    fn each_code_has_the_status_that_both_tables_say() {
        // Not made of an error of the node.
        const OWN: [&str; 6] =
            ["BAD_JSON", "UNAUTHORIZED", "UNKNOWN_ROUTE", "METHOD_NOT_ALLOWED", "SLOW_REQUEST", "BODY_TOO_LARGE"];
        let source = include_str!("error.rs");
        let (head, rest) = source.split_once("\nuse ").unwrap();
        let (page, own) = (table(include_str!("../../../docs/api.md")), table(head));
        for (expected, code) in &page {
            assert!(OWN.contains(code) || status(code).as_u16() == *expected, "{code} is {} and not {expected}", status(code));
            assert!(own.contains(&(*expected, code)), "{code} is not in the table of this file");
        }
        for (expected, code) in own {
            assert!(page.contains(&(expected, code)), "{code} is not in docs/api.md");
        }
        let (_, function) = rest.split_once("fn status(").unwrap();
        let (function, _) = function.split_once("#[cfg(test)]").unwrap();
        for code in function.split('"').skip(1).step_by(2) {
            assert!(page.iter().any(|(_, known)| *known == code), "{code} is not in docs/api.md");
        }
    }
}
