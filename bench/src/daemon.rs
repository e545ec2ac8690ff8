//! The real daemon, in a process of its own, driven by its HTTP API over the Unix socket.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use vm::probe::PATIENCE;

use crate::http;

/// The farfork program: the one that was named, or the one beside this program.
pub(crate) fn program(named: Option<&Path>) -> Result<PathBuf> {
    let beside_this = || -> Result<PathBuf> { Ok(std::env::current_exe()?.with_file_name("farfork")) };
    named.map_or_else(beside_this, |path| Ok(path.to_owned()))
}

/// The daemon closes connections that are idle for 10 s.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// Nothing that it is asked takes so long.
const ANSWER_PATIENCE: Duration = Duration::from_secs(600);

/// A daemon, and a connection to it.
pub(crate) struct Daemon {
    pub(crate) directory: tempfile::TempDir,
    child: Child,
    connection: UnixStream,
    used: Instant,
}

impl Daemon {
    /// Starts `command`, which has to come down to the farfork program, as a node, and waits until it serves.
    pub(crate) fn start<S: AsRef<OsStr>>(command: Command, more: impl IntoIterator<Item = S>) -> Result<Self> {
        Self::start_in(tempfile::tempdir()?, command, more)
    }

    fn start_in<S: AsRef<OsStr>>(
        directory: tempfile::TempDir,
        mut command: Command,
        more: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let socket = socket_in(&directory);
        let mut child = command
            .arg("node")
            .arg("--data")
            .arg(directory.path().join("data"))
            .arg("--socket")
            .arg(&socket)
            .args(more)
            .env("FARFORK_LOG", std::env::var_os("FARFORK_LOG").unwrap_or_else(|| "error".into()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {command:?} (build farfork, or name it with --farfork PATH)"))?;
        let started = Instant::now();
        let connection = loop {
            if let Ok(connection) = UnixStream::connect(&socket) {
                break connection;
            }
            if let Some(status) = child.try_wait()? {
                return Err(anyhow!("{command:?} ended with {status}"));
            }
            ensure!(started.elapsed() < PATIENCE, "the daemon does not open its socket");
            std::thread::sleep(Duration::from_millis(5));
        };
        connection.set_read_timeout(Some(ANSWER_PATIENCE))?;
        Ok(Self { directory, child, connection, used: Instant::now() })
    }

    /// Another connection to it.
    pub(crate) fn connect(&self) -> Result<UnixStream> {
        let connection = UnixStream::connect(socket_in(&self.directory))?;
        connection.set_read_timeout(Some(ANSWER_PATIENCE))?;
        Ok(connection)
    }

    /// The connection to it, open.
    pub(crate) fn connection(&mut self) -> Result<&mut UnixStream> {
        if self.used.elapsed() > IDLE_MAX {
            self.connection = self.connect()?;
        }
        self.used = Instant::now();
        Ok(&mut self.connection)
    }

    pub(crate) fn ask(&mut self, verb: &str, path: &str, body: &str) -> Result<Value> {
        http::json(&http::request(self.connection()?, verb, path, body)?)
    }

    /// Ends it as a crash would, and starts `command` in its place: with the same data directory.
    pub(crate) fn restart<S: AsRef<OsStr>>(mut self, command: Command, more: impl IntoIterator<Item = S>) -> Result<Self> {
        self.kill()?;
        let successor = tempfile::tempdir()?;
        let directory = std::mem::replace(&mut self.directory, successor);
        Self::start_in(directory, command, more)
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn socket_in(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("run/socket")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It stops its machines and removes its groups; a node that does not is ended.
        if let (Ok(None), Some(pid)) = (self.child.try_wait(), rustix::process::Pid::from_raw(self.child.id().cast_signed())) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap_or_default();
        }
        let started = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}
