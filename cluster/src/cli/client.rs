//! HTTP/1.1 over the node's Unix socket.

use std::io;
use std::path::{Path, PathBuf};

use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::client::conn::http1::{Connection, SendRequest};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use types::{Digest, ExitCode};

use crate::api::templates::AGENT_PROTOCOL;
use crate::api::wire::{ErrorAnswer, ErrorBody, Image, MachineAnswer};

/// Asks the node on one socket. A connection per request: verbs ask once or twice.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// An answer, as it came and as it is understood.
#[derive(Clone, Debug)]
pub struct Answer<T> {
    /// The body.
    pub raw: Bytes,
    /// What it says.
    pub value: T,
}

/// What an id turned out to be.
#[derive(Clone, Debug)]
pub enum Found {
    /// Of a machine.
    Machine(Box<Answer<MachineAnswer>>),
    /// Of an image in memory.
    Image(Box<Answer<Image>>),
}

impl Client {
    /// For the node on this socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// GET.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Answer<T>, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// DELETE.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<Answer<T>, ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    /// POST.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<Answer<T>, ClientError> {
        let body = serde_json::to_vec(body).expect("requests are maps with text keys");
        self.call(Method::POST, path, body.into()).await
    }

    /// Finds out what `id` is the end of.
    ///
    /// # Errors
    /// [`ClientError`]; a refusal if it is neither, or both.
    pub async fn find(&self, id: &str) -> Result<Found, ClientError> {
        let image = self.get(&format!("/v1/images/{}", segment(id))).await;
        if id.parse::<Digest>().is_ok() {
            // Machines have none.
            return Ok(Found::Image(Box::new(image?)));
        }
        let machine = self.get(&format!("/v1/machines/{}", segment(id))).await;
        match (machine, image) {
            (Ok(_), Ok(_)) => Err(ClientError::refusal(
                "AMBIGUOUS_ID",
                format!("{id} is the end of a machine's id and of an image's"),
                "give more digits from the end of the id",
            )),
            (Ok(machine), Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. })) => {
                Ok(Found::Machine(Box::new(machine)))
            }
            (Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }), Ok(image)) => Ok(Found::Image(Box::new(image))),
            (Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }), Err(ClientError::Refused { status, .. }))
                if status == StatusCode::NOT_FOUND =>
            {
                Err(ClientError::refusal(
                    "UNKNOWN_ID",
                    format!("no machine and no image {id}"),
                    "`farfork ls --all` and `farfork image ls` list them",
                ))
            }
            // What is ambiguous among its own kind is ambiguous.
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// GET of an answer that is no JSON, given to `each` piece by piece.
    ///
    /// # Errors
    /// [`ClientError`], also those of `each`.
    pub async fn download<E: From<ClientError>>(
        &self,
        path: &str,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection);
        let request = Request::builder().uri(path).header(header::HOST, "farfork").body(Full::new(Bytes::new()));
        let response = sender.send_request(request.expect("paths are encoded")).await.map_err(ClientError::from)?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let raw = body.collect().await.map_err(ClientError::from)?.to_bytes();
            return Err(refused(status, &raw)?.into());
        }
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(ClientError::from)?.into_data() {
                each(&data)?;
            }
        }
        Ok(())
    }

    /// PUT of a body that comes piece by piece.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        pieces: mpsc::Receiver<io::Result<Bytes>>,
    ) -> Result<Answer<T>, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection);
        let frames = futures_util::stream::unfold(pieces, |mut pieces| async move {
            let piece = pieces.recv().await?;
            Some((piece.map(Frame::data), pieces))
        });
        let request = Request::builder().method(Method::PUT).uri(path).header(header::HOST, "farfork");
        let body = StreamBody::new(Box::pin(frames));
        understood(sender.send_request(request.body(body).expect("paths are encoded")).await?).await
    }

    /// Connects with the agent of a machine.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn agent(&self, id: &str) -> Result<TokioIo<Upgraded>, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection.with_upgrades());
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("/v1/machines/{}/agent", segment(id)))
            .header(header::HOST, "farfork")
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, AGENT_PROTOCOL)
            .body(Full::new(Bytes::new()))
            .expect("paths are encoded");
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refused(status, &response.into_body().collect().await?.to_bytes())?);
        }
        Ok(TokioIo::new(hyper::upgrade::on(response).await?))
    }

    async fn connect<B>(&self) -> Result<(SendRequest<B>, Connection<TokioIo<UnixStream>, B>), ClientError>
    where
        B: Body + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let no_node = |source| ClientError::NoNode { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).await.map_err(no_node)?;
        Ok(hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?)
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<Answer<T>, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "farfork");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).expect("paths are encoded");
        understood(sender.send_request(request).await?).await
    }
}

/// An answer to its end, which is a success or says why not.
async fn understood<T: DeserializeOwned>(response: Response<Incoming>) -> Result<Answer<T>, ClientError> {
    let status = response.status();
    let raw = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        return Err(refused(status, &raw)?);
    }
    let value = serde_json::from_slice(&raw).map_err(|source| ClientError::Answer { status, source })?;
    Ok(Answer { raw, value })
}

/// What an answer that is no success says.
fn refused(status: StatusCode, raw: &[u8]) -> Result<ClientError, ClientError> {
    let body = serde_json::from_slice::<ErrorAnswer>(raw).map_err(|source| ClientError::Answer { status, source })?;
    Ok(ClientError::Refused { status, body: Box::new(body.error) })
}

/// `text` as one segment of a path.
pub(crate) fn segment(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => encoded.push(char::from(byte)),
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

/// Why a node did not answer as asked.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum ClientError {
    #[error("no node answers on {}: {source}", socket.display())]
    NoNode { socket: PathBuf, source: io::Error },
    #[error("the node broke off: {0}")]
    Lost(#[from] hyper::Error),
    #[error("the node's answer ({status}) is not understood: {source}")]
    Answer { status: StatusCode, source: serde_json::Error },
    #[error("{}", body.message)]
    Refused { status: StatusCode, body: Box<ErrorBody> },
}

impl ClientError {
    /// What the program exits with.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoNode { .. } | Self::Lost(_) => ExitCode::Unreachable,
            Self::Refused { status: StatusCode::BAD_REQUEST, .. } => ExitCode::Usage,
            // Another node is it that cannot be reached.
            Self::Refused { body, .. } if matches!(body.code.as_str(), "UNREACHABLE" | "NO_ANSWER") => ExitCode::Unreachable,
            Self::Answer { .. } | Self::Refused { .. } => ExitCode::Refused,
        }
    }

    /// What it is in JSON.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let body =
            |code: &str, remedy: String| ErrorBody { code: code.to_owned(), message: self.to_string(), remedy, reason: None };
        match self {
            Self::NoNode { socket, source } => body("NO_NODE", no_node_remedy(socket, source)),
            Self::Lost(_) => body("NODE_LOST", "look into the node's log; `farfork ls` shows what it did".to_owned()),
            Self::Answer { .. } => body("BAD_ANSWER", "use the same version of farfork as the node".to_owned()),
            Self::Refused { body, .. } => (**body).clone(),
        }
    }

    fn refusal(code: &str, message: String, remedy: &str) -> Self {
        let body = ErrorBody { code: code.to_owned(), message, remedy: remedy.to_owned(), reason: None };
        Self::Refused { status: StatusCode::CONFLICT, body: Box::new(body) }
    }
}

fn no_node_remedy(socket: &Path, source: &io::Error) -> String {
    if source.kind() == io::ErrorKind::PermissionDenied {
        return "ask as the user who runs the node".to_owned();
    }
    format!("start one with `farfork node --socket {}`, or name its socket with --socket or FARFORK_SOCKET", socket.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cannot_leave_their_place_in_the_path() {
        assert_eq!(segment("a3d9e37c"), "a3d9e37c");
        assert_eq!(segment("name:warm"), "name%3Awarm");
        assert_eq!(segment("../x?y#z \0"), "..%2Fx%3Fy%23z%20%00");
    }
}
