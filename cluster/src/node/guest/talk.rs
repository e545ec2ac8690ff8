//! A conversation with the agent of a guest: one connection, one request. Nothing that comes back is believed but about that guest,
//! and nothing is waited for without a deadline.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent::protocol::{Failed, FrameError, FromAgent, Phase, ToAgent, VERSION, receive, send};
use thiserror::Error;

/// Why an agent did not do as it was told.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum TalkError {
    #[error("no agent listens in the guest")]
    NoAgent,
    #[error("the guest's agent did not answer within {} ms", deadline.as_millis())]
    Late { deadline: Duration },
    #[error("the guest's agent broke off")]
    Gone,
    #[error("the guest's agent speaks version {version} of the protocol; this node speaks {VERSION}")]
    OtherVersion { version: u16 },
    #[error("{0}")]
    Failed(Failed),
    #[error("the guest's agent said something that it was not asked: {what}")]
    Nonsense { what: String },
    #[error("talking to the guest failed: {0}")]
    Io(std::io::Error),
}

impl TalkError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoAgent => "start the guest with farfork's initrd (docs/guests.md), which is its agent",
            Self::Late { .. } => "look at what it printed (farfork logs); give it more time or memory",
            Self::Gone | Self::Nonsense { .. } => "look at what it printed (farfork logs), then fork again",
            Self::OtherVersion { .. } => "build the template again with this farfork's initrd (make guest)",
            Self::Failed(_) => "correct what it says, and try again",
            Self::Io(_) => "look for its cause in the node's log",
        }
    }
}

impl From<FrameError> for TalkError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Gone => Self::Gone,
            FrameError::Io(error) => Self::Io(error),
            error => Self::Nonsense { what: error.to_string() },
        }
    }
}

/// A conversation after its greeting.
#[derive(Debug)]
pub struct Talk {
    stream: UnixStream,
    until: Instant,
    deadline: Duration,
    phase: Phase,
}

impl Talk {
    /// Greets the agent at the other end of a stream that has just been connected.
    ///
    /// # Errors
    /// [`TalkError`]; [`TalkError::NoAgent`] if nobody listens there.
    pub fn begin(stream: UnixStream, deadline: Duration) -> Result<Self, TalkError> {
        let mut talk = Self { stream, until: Instant::now() + deadline, deadline, phase: Phase::Running };
        match talk.exchange(&ToAgent::Hello { version: VERSION }) {
            Ok(FromAgent::Hello { version: VERSION, phase }) => {
                talk.phase = phase;
                Ok(talk)
            }
            Ok(FromAgent::Hello { version, .. }) => Err(TalkError::OtherVersion { version }),
            Ok(other) => Err(nonsense(&other)),
            // Nobody is there who could have broken off.
            Err(TalkError::Gone) => Err(TalkError::NoAgent),
            Err(error) => Err(error),
        }
    }

    /// What the agent was doing when it was greeted.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Says something, and waits for what the agent says next. What it says of a failure is an error.
    ///
    /// # Errors
    /// [`TalkError`].
    pub fn exchange(&mut self, message: &ToAgent) -> Result<FromAgent, TalkError> {
        send(&mut Timed(self), message).map_err(|error| self.late(error.into()))?;
        self.hear()
    }

    /// Waits for what the agent says next.
    ///
    /// # Errors
    /// [`TalkError`].
    pub fn hear(&mut self) -> Result<FromAgent, TalkError> {
        match receive(&mut Timed(self)).map_err(|error| self.late(error.into()))? {
            FromAgent::Failed(mut failed) => {
                failed.message.truncate((0..=1024).rev().find(|at| failed.message.is_char_boundary(*at)).unwrap_or(0));
                Err(TalkError::Failed(failed))
            }
            message => Ok(message),
        }
    }

    /// A request whose answer is [`FromAgent::Done`].
    ///
    /// # Errors
    /// [`TalkError`].
    pub fn ask_done(&mut self, message: &ToAgent) -> Result<(), TalkError> {
        match self.exchange(message)? {
            FromAgent::Done => Ok(()),
            other => Err(nonsense(&other)),
        }
    }

    fn late(&self, error: TalkError) -> TalkError {
        match error {
            TalkError::Io(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                TalkError::Late { deadline: self.deadline }
            }
            error => error,
        }
    }
}

/// Reads and writes until the deadline of all of it, not of each piece: a guest that sends a byte a second gains nothing.
struct Timed<'a>(&'a mut Talk);

impl Timed<'_> {
    fn left(&self) -> std::io::Result<Option<Duration>> {
        let left = self.0.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(std::io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.stream.set_read_timeout(self.left()?)?;
        self.0.stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.stream.set_write_timeout(self.left()?)?;
        match self.0.stream.write(bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(std::io::ErrorKind::UnexpectedEof.into()),
            written => written,
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An answer to another question. What it holds is not shown: it may be long.
pub fn nonsense(message: &FromAgent) -> TalkError {
    let what = match message {
        FromAgent::Hello { .. } => "hello",
        FromAgent::Ready(_) => "ready",
        FromAgent::Gated { .. } => "gated",
        FromAgent::Done => "done",
        FromAgent::Failed(_) => "failed",
        FromAgent::Stdout(_) | FromAgent::Stderr(_) => "output",
        FromAgent::Exited(_) => "an exit",
        FromAgent::Data(_) => "data",
        FromAgent::Reply { .. } => "a reply",
        FromAgent::Started { .. } => "a start",
    };
    TalkError::Nonsense { what: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn against(guest: impl FnOnce(UnixStream) + Send + 'static, deadline: Duration) -> Result<Talk, TalkError> {
        let (ours, its) = UnixStream::pair().unwrap();
        let guest = std::thread::spawn(move || guest(its));
        let talk = Talk::begin(ours, deadline);
        guest.join().unwrap();
        talk
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn guests_that_do_not_speak_the_protocol_are_told_apart() {
        assert!(matches!(against(drop, LONG), Err(TalkError::NoAgent)));
        let other = |mut stream: UnixStream| {
            send(&mut stream, &FromAgent::Hello { version: 9, phase: Phase::Running }).unwrap();
            let _ = stream.read(&mut [0; 64]).unwrap();
        };
        assert!(matches!(against(other, LONG), Err(TalkError::OtherVersion { version: 9 })));
        let giant = |mut stream: UnixStream| {
            let _ = stream.read(&mut [0; 64]).unwrap();
            stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
        };
        assert!(matches!(against(giant, LONG), Err(TalkError::Nonsense { .. })));
        let forged = |mut stream: UnixStream| {
            let _ = stream.read(&mut [0; 64]).unwrap();
            send(&mut stream, &FromAgent::Ready(Vec::new())).unwrap();
        };
        assert!(matches!(against(forged, LONG), Err(TalkError::Nonsense { .. })));
    }

    /// The deadline is one for the whole conversation.
    #[test]
    fn a_guest_that_dribbles_is_not_waited_for() {
        let dribbles = |mut stream: UnixStream| {
            let _ = stream.read(&mut [0; 64]).unwrap();
            for byte in [200, 0, 0, 0].into_iter().chain([0; 200]) {
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        assert!(matches!(against(dribbles, Duration::from_millis(300)), Err(TalkError::Late { .. })));
    }
}
