//! What the verbs that speak with a guest share: the conversation with its agent.

use agent::protocol::{FRAME_MAX, Failed, FromAgent, PIECE, ToAgent, VERSION, body_len, decode, encode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::Context;
use super::error::CliError;

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
pub(super) const OWN_FAILURE: u8 = 125;

/// A conversation after its greeting.
pub(super) struct Guest {
    pub(super) hears: Hears,
    pub(super) says: Says,
}

/// The half that listens.
pub(super) struct Hears(ReadHalf<TokioIo<Upgraded>>);

/// The half that speaks.
pub(super) struct Says(WriteHalf<TokioIo<Upgraded>>);

impl Guest {
    /// Connects with the agent of a machine.
    pub(super) async fn connect(id: &str, context: &Context) -> Result<Self, CliError> {
        let stream = context.client.agent(id).await?;
        let (hears, says) = tokio::io::split(stream);
        let mut guest = Self { hears: Hears(hears), says: Says(says) };
        guest.says.say(&ToAgent::Hello { version: VERSION }).await?;
        match guest.hears.hear().await? {
            FromAgent::Hello { version: VERSION, .. } => Ok(guest),
            FromAgent::Hello { version, .. } => Err(GuestError::OtherVersion(version).into()),
            _ => Err(GuestError::Nonsense.into()),
        }
    }
}

impl Says {
    pub(super) async fn say(&mut self, message: &ToAgent) -> Result<(), GuestError> {
        let frame = encode(message).map_err(|error| GuestError::Refused(error.to_string()))?;
        self.0.write_all(&frame).await.map_err(|_| GuestError::Gone)
    }

    /// Says all of it, in pieces.
    pub(super) async fn say_data(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        for piece in bytes.chunks(PIECE) {
            self.say(&ToAgent::Data(piece.to_vec())).await?;
        }
        Ok(())
    }
}

impl Hears {
    /// The next message. One that says that something failed is an error.
    pub(super) async fn hear(&mut self) -> Result<FromAgent, GuestError> {
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
