//! HTTP/1.1 over the node's Unix socket, or over TLS with a node of a cluster.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{Method, Request, Response, StatusCode, header, request};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::client::conn::http1::{Connection, SendRequest};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsConnector, rustls};
use types::{Digest, ExitCode};

use crate::api::templates::AGENT_PROTOCOL;
use crate::api::wire::{ErrorAnswer, ErrorBody, Image, MachineAnswer};

/// How long a node may take to answer the phone before the next one is tried.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Asks a node. A connection per request: verbs ask once or twice.
#[derive(Clone, Debug)]
pub struct Client {
    target: Target,
}

/// Where a node is.
#[derive(Clone, Debug)]
pub enum Target {
    /// On this host.
    Socket(PathBuf),
    /// One of a cluster, over HTTPS.
    Users(Arc<Remote>),
}

/// A cluster, as a user asks it.
pub struct Remote {
    /// What the user calls it.
    pub name: String,
    /// Its nodes: the first that answers is asked.
    pub urls: Vec<Url>,
    /// How they are known, and what they are shown.
    pub tls: Arc<rustls::ClientConfig>,
    /// Says who asks.
    pub token: Option<String>,
}

/// `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// A name or an address.
    pub host: String,
    /// Of TCP.
    pub port: u16,
}

/// Without the token.
impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("name", &self.name).field("urls", &self.urls).finish_non_exhaustive()
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}:{}", self.host, self.port)
    }
}

/// A connection of whichever kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// An answer, as it came and as it is understood.
#[derive(Clone, Debug)]
pub struct Answer<T> {
    /// The body.
    pub raw: Bytes,
    /// What it says.
    pub value: T,
}

/// An answer that comes piece by piece.
#[derive(Debug)]
pub struct Pieces(Incoming);

impl Pieces {
    /// The next one; none at the end. A call that is dropped loses nothing.
    ///
    /// # Errors
    /// [`ClientError::Lost`] if it was broken off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.0.frame().await {
            if let Ok(data) = frame?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
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
    /// For a node there.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Self { target }
    }

    /// Whom it asks, as the user calls it.
    #[must_use]
    pub fn whom(&self) -> String {
        match &self.target {
            Target::Socket(socket) => socket.display().to_string(),
            Target::Users(remote) => remote.name.clone(),
        }
    }

    /// What every request has.
    fn request(&self, method: Method, path: &str) -> request::Builder {
        let request = Request::builder().method(method).uri(path).header(header::HOST, "farfork");
        match &self.target {
            Target::Users(remote) => match &remote.token {
                Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
                None => request,
            },
            Target::Socket(_) => request,
        }
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
        self.post_bytes(path, serde_json::to_vec(body).expect("requests are maps with text keys").into()).await
    }

    /// POST of JSON that was written before, and may be sent again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_bytes<T: DeserializeOwned>(&self, path: &str, body: Bytes) -> Result<Answer<T>, ClientError> {
        self.call(Method::POST, path, body).await
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
        let mut pieces = self.open(path).await?;
        while let Some(piece) = pieces.next().await? {
            each(&piece)?;
        }
        Ok(())
    }

    /// GET of an answer that comes piece by piece. It has begun when this returns.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn open(&self, path: &str) -> Result<Pieces, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection);
        let request = self.request(Method::GET, path).body(Full::new(Bytes::new()));
        let response = sender.send_request(request.map_err(|_| ClientError::Request)?).await?;
        let status = response.status();
        let body = response.into_body();
        if !status.is_success() {
            return Err(refused(status, &body.collect().await?.to_bytes())?);
        }
        Ok(Pieces(body))
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
        let body = StreamBody::new(Box::pin(frames));
        let request = self.request(Method::PUT, path).body(body).map_err(|_| ClientError::Request)?;
        understood(sender.send_request(request).await?).await
    }

    /// Connects with the agent of a machine.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn agent(&self, id: &str) -> Result<TokioIo<Upgraded>, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection.with_upgrades());
        let request = self
            .request(Method::POST, &format!("/v1/machines/{}/agent", segment(id)))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, AGENT_PROTOCOL)
            .body(Full::new(Bytes::new()))
            .map_err(|_| ClientError::Request)?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refused(status, &response.into_body().collect().await?.to_bytes())?);
        }
        Ok(TokioIo::new(hyper::upgrade::on(response).await?))
    }

    async fn connect<B>(&self) -> Result<(SendRequest<B>, Connection<TokioIo<Box<dyn Stream>>, B>), ClientError>
    where
        B: Body + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream: Box<dyn Stream> = match &self.target {
            Target::Socket(socket) => {
                let no_node = |source| ClientError::NoNode { socket: socket.clone(), source };
                Box::new(UnixStream::connect(socket).await.map_err(no_node)?)
            }
            Target::Users(remote) => Box::new(remote.connect().await?),
        };
        Ok(hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?)
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<Answer<T>, ClientError> {
        let (mut sender, connection) = self.connect().await?;
        tokio::spawn(connection);
        let mut request = self.request(method, path);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(body)).map_err(|_| ClientError::Request)?;
        understood(sender.send_request(request).await?).await
    }
}

impl Remote {
    /// Connects with the first node that answers.
    async fn connect(&self) -> Result<TlsStream<TcpStream>, ClientError> {
        let mut tried = Vec::new();
        for url in &self.urls {
            let connecting = tokio::time::timeout(CONNECT_WITHIN, self.connect_with(url)).await;
            match connecting.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => return Ok(stream),
                Err(error) => tried.push(format!("{url}: {error}")),
            }
        }
        Err(ClientError::NoCluster { context: self.name.clone(), tried: tried.join("; ") })
    }

    async fn connect_with(&self, url: &Url) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect((url.host.as_str(), url.port)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
        TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await
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
    #[error("no node of context {context} answers: {tried}")]
    NoCluster { context: String, tried: String },
    #[error("the request cannot be written: its token has characters that none has")]
    Request,
    #[error("the node broke off: {0}")]
    Lost(#[from] hyper::Error),
    #[error("the node does not answer for {} s", within.as_secs())]
    Late { within: Duration },
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
            Self::NoNode { .. } | Self::NoCluster { .. } | Self::Lost(_) | Self::Late { .. } => ExitCode::Unreachable,
            Self::Request => ExitCode::Usage,
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
            Self::NoCluster { .. } => {
                let remedy =
                    "look whether its nodes run with --https, and at the context's urls and authority: `farfork context ls`";
                body("NO_NODE", remedy.to_owned())
            }
            Self::Request => body("USAGE", "give the token that `farfork user add` printed".to_owned()),
            Self::Lost(_) => body("NODE_LOST", "look into the node's log; `farfork ls` shows what it did".to_owned()),
            Self::Late { .. } => body("NO_ANSWER", "look whether the node runs, and into its log".to_owned()),
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
