//! The warm main process: a program that has done its start-up work when the machine is sealed, and answers requests in its
//! children. docs/guests.md describes what is spoken; `farfork_main.py` speaks it.
//!
//! Its standard input is a socket. A message is its length (u32, little-endian) and as many bytes, JSON by convention.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::reaper::{Reaper, pid_of};
use crate::protocol::MAIN_MESSAGE_MAX;

/// How long hooks of the main process may take after a fork.
const FORKED_PATIENCE: Duration = Duration::from_secs(120);

/// See the module.
pub(super) struct Warm {
    socket: UnixStream,
    pid: Pid,
}

impl Warm {
    /// Starts it, and waits for its first message, which says that it is ready.
    pub(super) fn start(reaper: &Reaper, command: &mut Command) -> io::Result<Self> {
        let (ours, its) = UnixStream::pair()?;
        command.stdin(Stdio::from(std::os::fd::OwnedFd::from(its)));
        let (child, _end) = reaper.spawn(command)?;
        let pid = Pid::from_raw(pid_of(&child)).ok_or(io::ErrorKind::InvalidData)?;
        // The command holds the other end: without it gone, the end of the process would not show.
        command.stdin(Stdio::null());
        let mut warm = Self { socket: ours, pid };
        match warm.receive() {
            Ok(_) => Ok(warm),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(io::Error::other("the main process ended before it said that it is ready"))
            }
            Err(error) => Err(error),
        }
    }

    /// A request, and its answer.
    pub(super) fn ask(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        let len = u32::try_from(request.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let gone = |error: io::Error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                io::Error::other("the main process has ended")
            }
            _ => error,
        };
        self.socket.write_all(&len.to_le_bytes()).and_then(|()| self.socket.write_all(request)).map_err(gone)?;
        self.receive().map_err(gone)
    }

    /// Tells it, while all else is stopped, that it was forked.
    pub(super) fn forked(&mut self, seed: &[u8; 32], machine: &str, was_stopped: bool) -> io::Result<Vec<u8>> {
        kill_process(self.pid, Signal::CONT)?;
        let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        let request = format!(r#"{{"op":"forked","seed":"{hex}","machine":"{machine}"}}"#);
        self.socket.set_read_timeout(Some(FORKED_PATIENCE))?;
        let answer = self.ask(request.as_bytes());
        self.socket.set_read_timeout(None)?;
        if was_stopped {
            kill_process(self.pid, Signal::STOP)?;
        }
        answer
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut header = [0; 4];
        self.socket.read_exact(&mut header)?;
        let len = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
        if len > MAIN_MESSAGE_MAX {
            // Read and forgotten, so that the next answer is found.
            io::copy(&mut (&self.socket).take(len as u64), &mut io::sink())?;
            return Err(io::Error::other(format!("an answer of {len} bytes, where at most {MAIN_MESSAGE_MAX} are allowed")));
        }
        let mut message = vec![0; len];
        self.socket.read_exact(&mut message)?;
        Ok(message)
    }
}

/// To every process but this one, the first.
pub(super) fn signal_all(signal: Signal) -> io::Result<()> {
    match rustix::process::kill_process_group(Pid::INIT, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
