//! What host and agent say to each other, over a vsock stream to port [`PORT`] of the guest.
//!
//! ```text
//! host                                  agent
//! Hello{version}            ──▶
//!                           ◀──         Hello{version, phase}
//! a request                 ──▶
//! (Stdin, Resize, ...)      ◀─▶         (Stdout, Stderr, Data, ...)
//!                           ◀──         one last answer: Done, Ready, Gated, Exited, Reply or Failed
//! the next request          ──▶ ...
//! ```
//!
//! A frame is its length (u32, little-endian) and a postcard body of at most [`FRAME_MAX`] bytes. New variants go to the end; a
//! change of an old one is a new version. A host believes nothing of what a guest says but about that guest.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::MachineId;

/// The port on which agents listen.
pub const PORT: u32 = 1024;
/// The version that this build speaks.
pub const VERSION: u16 = 1;
/// The longest body of a frame.
pub const FRAME_MAX: usize = 64 << 10;
/// Bytes of a stream (output, a file) in one frame.
pub const PIECE: usize = 32 << 10;
/// The longest request to, and answer of, a warm main process.
pub const MAIN_MESSAGE_MAX: usize = 1 << 20;
/// The most steps of a report, and the longest text of one.
pub const STEPS_MAX: usize = 64;
/// See [`STEPS_MAX`].
pub const TEXT_MAX: usize = 512;

/// From the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// First.
    Hello {
        /// Of the protocol.
        version: u16,
    },
    /// Become somebody: the steps after a fork. Answer: [`FromAgent::Ready`].
    Identity(Identity),
    /// The machine is known to be ready: let its processes go on. Answer: [`FromAgent::Done`].
    Go,
    /// Wait in the gate, with every process stopped, to be frozen. Answer: [`FromAgent::Gated`].
    Gate(GateRules),
    /// Run a program. Answers: output, then [`FromAgent::Exited`].
    Exec(Exec),
    /// For the standard input of what runs.
    Stdin(Vec<u8>),
    /// Its end.
    StdinEnd,
    /// The terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in a line.
        columns: u16,
    },
    /// For what runs, and its process group.
    Signal(i32),
    /// Start the warm main process, and wait until it says that it is ready. Answer: [`FromAgent::Done`].
    StartMain(Exec),
    /// A request to the main process, in pieces: this many bytes follow as [`ToAgent::Data`]. Answer: [`FromAgent::Reply`], then
    /// as many bytes as [`FromAgent::Data`].
    Ask {
        /// Of the request.
        bytes: u32,
    },
    /// A piece of a stream.
    Data(Vec<u8>),
    /// The end of a stream.
    DataEnd,
    /// Unpack the tar archive that follows as [`ToAgent::Data`], up to [`ToAgent::DataEnd`], here. Answer: [`FromAgent::Done`].
    Put {
        /// A directory.
        path: String,
    },
    /// Pack a file or directory as a tar archive. Answers: [`FromAgent::Data`], then [`FromAgent::Done`].
    Get {
        /// Of the file.
        path: String,
    },
    /// End every process, write everything to the disk. Answer: [`FromAgent::Done`]; then the machine may be killed.
    Shutdown,
    /// Give the network card this address: before a template is warmed up. Answer: [`FromAgent::Done`].
    Address(Address),
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// Whatever it was told first, it says this.
    Hello {
        /// Of the protocol.
        version: u16,
        /// What it is doing.
        phase: Phase,
    },
    /// The steps after the fork are done.
    Ready(Vec<Step>),
    /// Every process is stopped.
    Gated {
        /// What the rules do not allow; then nothing was stopped.
        found: Vec<String>,
    },
    /// What was asked for is done.
    Done,
    /// It is not.
    Failed(Failed),
    /// Output of what runs.
    Stdout(Vec<u8>),
    /// The same.
    Stderr(Vec<u8>),
    /// What ran has ended.
    Exited(Exit),
    /// A piece of a stream.
    Data(Vec<u8>),
    /// The main process has answered with this many bytes.
    Reply {
        /// Of the answer.
        bytes: u32,
    },
    /// What was to be started runs; its process id in the guest.
    Started {
        /// The process id.
        pid: i32,
    },
}

/// What an agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Anything that it is asked.
    Running,
    /// It waits to be told who it is.
    Gated,
    /// It knows who it is, and waits for [`ToAgent::Go`].
    Ready,
}

/// Who a child is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its machine id.
    pub id: MachineId,
    /// Its host name.
    pub hostname: String,
    /// Fresh random bytes of the host's.
    pub seed: [u8; 32],
    /// The host's clock: nanoseconds since 1970, when this was sent.
    pub unix_ns: u64,
    /// Address and prefix length of its network card, and its gateway.
    pub address: Option<Address>,
    /// Steps to leave out, for the tests that show what each is for.
    pub without: Vec<String>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the seed.
        f.debug_struct("Identity").field("id", &self.id).field("hostname", &self.hostname).finish_non_exhaustive()
    }
}

/// Where a machine is on its network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// IPv4.
    pub address: [u8; 4],
    /// Of its network.
    pub prefix: u8,
    /// Whom it sends to what is not of its network.
    pub gateway: Option<[u8; 4]>,
}

/// What a machine may have when it is sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateRules {
    /// Established connections with others.
    pub allow_connections: bool,
    /// Keys, tokens and passwords that can be seen.
    pub allow_secrets: bool,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// Added to the environment that every program gets.
    pub environment: Vec<(String, String)>,
    /// Where it starts.
    pub directory: Option<String>,
    /// As whom: `name`, `uid`, or either with `:group`.
    pub user: Option<String>,
    /// With a terminal of this size (rows, columns).
    pub terminal: Option<(u16, u16)>,
    /// Whether standard input comes; otherwise it is empty.
    pub has_input: bool,
    /// Whether it is left to itself: the answer is [`FromAgent::Started`], and its output goes to the console.
    pub is_detached: bool,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself.
    Status(i32),
    /// By a signal.
    Signal(i32),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[error("{message}")]
pub struct Failed {
    /// What and why.
    pub message: String,
    /// The guest's error number behind it, 0 if there is none.
    pub errno: i32,
}

/// A step after a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name.
    pub name: String,
    /// How long it took, by the guest's clock.
    pub took_us: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done.
    Done,
    /// There was nothing to be done, or it was left out.
    Skipped(String),
    /// Not done; without it two children may be alike.
    Failed(String),
}

/// Why no frame could be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum FrameError {
    #[error("the other side is gone")]
    Gone,
    #[error("a frame of {bytes} bytes, where at most {FRAME_MAX} are allowed")]
    TooLong { bytes: usize },
    #[error("a frame does not decode: {0}")]
    Malformed(postcard::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The bytes of a frame.
///
/// # Errors
/// If the message is too long for one.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let body = postcard::to_extend(message, vec![0; 4]).map_err(FrameError::Malformed)?;
    let bytes = body.len() - 4;
    if bytes > FRAME_MAX {
        return Err(FrameError::TooLong { bytes });
    }
    let mut frame = body;
    frame[..4].copy_from_slice(&u32::try_from(bytes).expect("at most 64 KiB").to_le_bytes());
    Ok(frame)
}

/// Checks the length with which a frame begins.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn body_len(header: [u8; 4]) -> Result<usize, FrameError> {
    let bytes = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if bytes <= FRAME_MAX { Ok(bytes) } else { Err(FrameError::TooLong { bytes }) }
}

/// Reads the body of a frame.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(FrameError::Malformed(postcard::Error::DeserializeBadEncoding)),
        Err(error) => Err(FrameError::Malformed(error)),
    }
}

/// Writes a frame.
///
/// # Errors
/// [`FrameError`].
pub fn send<M: Serialize>(to: &mut impl Write, message: &M) -> Result<(), FrameError> {
    Ok(to.write_all(&encode(message)?)?)
}

/// Waits for a frame.
///
/// # Errors
/// [`FrameError`].
pub fn receive<M: DeserializeOwned>(from: &mut impl Read) -> Result<M, FrameError> {
    let mut header = [0; 4];
    read_whole(from, &mut header)?;
    let mut body = vec![0; body_len(header)?];
    read_whole(from, &mut body)?;
    decode(&body)
}

fn read_whole(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), FrameError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => FrameError::Gone,
        _ => FrameError::Io(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_received_and_anything_else_is_refused() {
        let message = ToAgent::Exec(Exec { arguments: vec!["true".into()], ..Exec::default() });
        let bytes = encode(&message).unwrap();
        assert_eq!(receive::<ToAgent>(&mut &bytes[..]).unwrap(), message);
        for len in 0..bytes.len() {
            assert!(matches!(receive::<ToAgent>(&mut &bytes[..len]), Err(FrameError::Gone)), "{len}");
        }
        let giant = u32::MAX.to_le_bytes();
        assert!(matches!(receive::<FromAgent>(&mut &giant[..]), Err(FrameError::TooLong { .. })));
        assert!(matches!(receive::<FromAgent>(&mut &[1, 0, 0, 0, 200][..]), Err(FrameError::Malformed(_))));
        let too_much = [&encode(&FromAgent::Done).unwrap()[4..], &[0]].concat();
        assert!(matches!(decode::<FromAgent>(&too_much), Err(FrameError::Malformed(_))));
        assert!(matches!(encode(&ToAgent::Stdin(vec![0; FRAME_MAX])), Err(FrameError::TooLong { .. })));
    }
}
