//! A conversation with the agent of a guest, over whatever stream leads there. Nothing that comes back is believed but about that guest.

use agent::protocol::{FRAME_MAX, Failed, FromAgent, MAIN_MESSAGE_MAX, PIECE, ToAgent, VERSION, body_len, decode, encode};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// Why a conversation with a guest did not come to its end.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum GuestError {
    #[error("the guest broke off; the machine may have ended")]
    Gone,
    #[error("the guest's agent speaks another version of the protocol ({0})")]
    OtherVersion(u16),
    #[error("the guest's agent said something that was not asked")]
    Nonsense,
    #[error("in the guest: {0}")]
    Failed(Failed),
    #[error("{0}")]
    Refused(String),
}

impl GuestError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Gone => "`farfork ls --all` says whether it ended, `farfork logs` what it printed last",
            Self::OtherVersion(_) => "build its template again with this farfork's agent (make guest)",
            Self::Nonsense => "do not trust this machine: end it, and fork another",
            Self::Failed(_) => "correct what it says, and try again",
            Self::Refused(_) => "`farfork help` shows how the command is used",
        }
    }

    /// What the program exits with: what shells say of commands that are not there or not to be run, otherwise 125 as of
    /// containers' tools, since other numbers are the guest's.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Failed(Failed { errno: 2, .. }) => 127,
            Self::Failed(Failed { errno: 13, .. }) => 126,
            _ => OWN_FAILURE,
        }
    }
}

/// What `exec` and `eval` exit with when it was not the guest's program that failed.
pub const OWN_FAILURE: u8 = 125;

/// A conversation after its greeting.
pub struct Guest<S> {
    /// The half that listens.
    pub hears: Hears<S>,
    /// The half that speaks.
    pub says: Says<S>,
}

/// The half that listens.
pub struct Hears<S>(ReadHalf<S>);

/// The half that speaks.
pub struct Says<S>(WriteHalf<S>);

impl<S: AsyncRead + AsyncWrite> Guest<S> {
    /// Greets the agent at the other end of a stream.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn greet(stream: S) -> Result<Self, GuestError> {
        let (hears, says) = tokio::io::split(stream);
        let mut guest = Self { hears: Hears(hears), says: Says(says) };
        guest.says.say(&ToAgent::Hello { version: VERSION }).await?;
        match guest.hears.hear().await? {
            FromAgent::Hello { version: VERSION, .. } => Ok(guest),
            FromAgent::Hello { version, .. } => Err(GuestError::OtherVersion(version)),
            _ => Err(GuestError::Nonsense),
        }
    }

    /// A request to the main process, and its answer.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn ask(&mut self, request: &[u8]) -> Result<Vec<u8>, GuestError> {
        if request.len() > MAIN_MESSAGE_MAX {
            return Err(GuestError::Refused(format!("the code has more than {MAIN_MESSAGE_MAX} bytes")));
        }
        let bytes = u32::try_from(request.len()).expect("at most 1 MiB");
        self.says.say(&ToAgent::Ask { bytes }).await?;
        self.says.say_data(request).await?;
        let FromAgent::Reply { bytes } = self.hears.hear().await? else { return Err(GuestError::Nonsense) };
        let len = usize::try_from(bytes).ok().filter(|len| *len <= MAIN_MESSAGE_MAX).ok_or(GuestError::Nonsense)?;
        let mut answer = Vec::new();
        while answer.len() < len {
            let FromAgent::Data(piece) = self.hears.hear().await? else { return Err(GuestError::Nonsense) };
            answer.extend(piece);
        }
        if answer.len() == len { Ok(answer) } else { Err(GuestError::Nonsense) }
    }
}

impl<S: AsyncWrite> Says<S> {
    /// Says something.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn say(&mut self, message: &ToAgent) -> Result<(), GuestError> {
        let frame = encode(message).map_err(|error| GuestError::Refused(error.to_string()))?;
        self.0.write_all(&frame).await.map_err(|_| GuestError::Gone)
    }

    /// Says all of it, in pieces.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn say_data(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        for piece in bytes.chunks(PIECE) {
            self.say(&ToAgent::Data(piece.to_vec())).await?;
        }
        Ok(())
    }
}

impl<S: AsyncRead> Hears<S> {
    /// The next message. One that says that something failed is an error.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn hear(&mut self) -> Result<FromAgent, GuestError> {
        let mut header = [0; 4];
        self.0.read_exact(&mut header).await.map_err(|_| GuestError::Gone)?;
        let len = body_len(header).map_err(|_| GuestError::Nonsense)?;
        debug_assert!(len <= FRAME_MAX);
        let mut body = vec![0; len];
        self.0.read_exact(&mut body).await.map_err(|_| GuestError::Gone)?;
        match decode(&body).map_err(|_| GuestError::Nonsense)? {
            FromAgent::Failed(failed) => Err(GuestError::Failed(failed)),
            message => Ok(message),
        }
    }
}

/// What is asked of a warm main process, as docs/guests.md describes it.
#[derive(Debug, Serialize)]
pub struct Evaluate<'a> {
    op: &'static str,
    code: &'a str,
}

impl<'a> Evaluate<'a> {
    /// The bytes of a request to evaluate this.
    #[must_use]
    pub fn bytes(code: &'a str) -> Vec<u8> {
        serde_json::to_vec(&Self { op: "eval", code }).expect("text")
    }
}

/// What it answers.
#[derive(Debug, Deserialize)]
pub struct Evaluated {
    /// Whether no exception was raised.
    pub ok: bool,
    /// What the code came to.
    #[serde(default)]
    pub value: Option<String>,
    /// What it printed.
    #[serde(default)]
    pub stdout: String,
    /// The exception, in a line.
    #[serde(default)]
    pub error: String,
    /// And where it was raised.
    #[serde(default)]
    pub traceback: String,
}
