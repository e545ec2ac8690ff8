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
    /// Its process and what it keeps its files in, unless it was there before.
    own: Option<(Child, tempfile::TempDir)>,
    socket: PathBuf,
    connection: UnixStream,
    used: Instant,
}

impl Daemon {
    /// Where it is asked.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

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
        Ok(Self { own: Some((child, directory)), socket, connection, used: Instant::now() })
    }

    /// One that runs already, by the socket of its API.
    pub(crate) fn attach(socket: &Path) -> Result<Self> {
        let connection = connect(socket)?;
        Ok(Self { own: None, socket: socket.to_owned(), connection, used: Instant::now() })
    }

    /// Where it keeps its files, if this process has started it.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.own.as_ref().map(|(_, directory)| directory.path())
    }

    /// Another connection to it.
    pub(crate) fn connect(&self) -> Result<UnixStream> {
        connect(&self.socket)
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
        let (_, directory) = self.own.take().context("a daemon of this process")?;
        Self::start_in(directory, command, more)
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let (child, _) = self.own.as_mut().context("a daemon of this process")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let connection = UnixStream::connect(socket).with_context(|| format!("the API at {}", socket.display()))?;
    connection.set_read_timeout(Some(ANSWER_PATIENCE))?;
    Ok(connection)
}

fn socket_in(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("run/socket")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some((child, _)) = &mut self.own else { return };
        // It stops its machines and removes its groups; a node that does not is ended.
        if let (Ok(None), Some(pid)) = (child.try_wait(), rustix::process::Pid::from_raw(child.id().cast_signed())) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap_or_default();
        }
        let started = Instant::now();
        while matches!(child.try_wait(), Ok(None)) && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap_or_default();
        child.wait().map(drop).unwrap_or_default();
    }
}
