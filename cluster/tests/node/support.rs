//! Nodes to ask, and ways to ask them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farfork::api::{Access, App, Limits, Socket, serve};
use farfork::node::fake::{FakeEngine, FakeOptions};
use farfork::node::{Engine, Service};
use serde_json::Value;
use tempfile::TempDir;

/// Far above what anything here takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_farfork");

/// The program as a node, killed when dropped.
pub(crate) struct Node {
    directory: Option<TempDir>,
    pub(crate) socket: PathBuf,
    child: Child,
}

impl Node {
    pub(crate) fn start(fake: &str) -> Self {
        Self::start_with(fake, &[])
    }

    pub(crate) fn start_with(fake: &str, more: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[&["--fake-engine", fake], more].concat())
    }

    /// A node in a directory that one before it may have used.
    pub(crate) fn start_in(directory: TempDir, more: &[&str]) -> Self {
        Self::start_without(directory, more, "")
    }

    /// As [`Node::start_in`], with children that leave out steps after a fork.
    pub(crate) fn start_leaving_out(steps: &str) -> Self {
        Self::start_as(tempfile::tempdir().unwrap(), &[], &[("FARFORK_TEST_LEAVE_OUT", steps)])
    }

    /// As [`Node::start_in`], with guards taken out, as `FARFORK_TEST_WITHOUT` names them.
    pub(crate) fn start_without(directory: TempDir, more: &[&str], guards: &str) -> Self {
        Self::start_as(directory, more, &[("FARFORK_TEST_WITHOUT", guards)])
    }

    fn start_as(directory: TempDir, more: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.envs(environment.iter().copied());
        Self::start_by(command, directory, more)
    }

    /// By this command, which is the program, wherever it is to run.
    pub(crate) fn start_by(mut command: Command, directory: TempDir, more: &[&str]) -> Self {
        let socket = directory.path().join("run/farfork.sock");
        let log = File::create(directory.path().join("log")).unwrap();
        command.arg("node").arg("--data").arg(directory.path().join("data"));
        command.arg("--socket").arg(&socket).args(more).stdout(Stdio::null()).stderr(log);
        let node = Self { child: command.spawn().unwrap(), directory: Some(directory), socket };
        eventually("the node is ready", || node.log().contains("ready"));
        node
    }

    /// Where its directory is.
    pub(crate) fn path(&self) -> &Path {
        self.directory.as_ref().unwrap().path()
    }

    /// Ends it as a crash would, and gives back its directory.
    pub(crate) fn crash(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.directory.take().unwrap()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap()
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }

    /// The command line, asking this node.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("FARFORK_SOCKET", &self.socket).stdin(Stdio::null());
        command
    }

    pub(crate) fn cli(&self, arguments: &[&str]) -> Said {
        Said::of(self.command(arguments).output().unwrap())
    }

    /// The command line's answer in JSON, which has to be a success.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let said = self.cli(&[arguments, &["--output", "json"]].concat());
        assert_eq!(said.code, Some(0), "{arguments:?}: {said:?}");
        serde_json::from_str(&said.out).unwrap()
    }

    pub(crate) fn http(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        http(&self.socket, method, path, body)
    }

    pub(crate) fn machines(&self) -> Vec<String> {
        ids(&self.json(&["ls"])["machines"])
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(directory) = &self.directory {
            remove_groups(directory.path());
        }
        if std::thread::panicking() && self.directory.is_some() {
            eprintln!("the node's log:\n{}", self.log());
        }
    }
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        let said = Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!said.err.contains("panicked"), "{said:?}");
        said
    }

    /// The code in the error that it printed as JSON.
    pub(crate) fn error_code(&self) -> String {
        let error: Value = serde_json::from_str(&self.err).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        error["error"]["code"].as_str().unwrap().to_owned()
    }
}

/// The server in this process, with limits of its own.
pub(crate) struct InProcess {
    pub(crate) socket: PathBuf,
    _directory: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl InProcess {
    pub(crate) fn start(limits: Limits, fake: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let options: FakeOptions = fake.parse().unwrap();
        let engine: Arc<dyn Engine> = Arc::new(FakeEngine::new(options));
        let service = Service::start(engine, None);
        let app = App::new(Arc::clone(&service), uuid::Uuid::nil(), limits);
        let bound = Socket::bind(&socket).unwrap();
        runtime.spawn(serve(bound, None, service, app, Access::of_this_process([]), std::future::pending()));
        Self { socket, _directory: directory, _runtime: runtime }
    }
}

/// What an API said.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it is a refusal in the documented shape.
    pub(crate) fn refused(&self, status: u16, code: &str) {
        let json = self.json();
        assert_eq!((self.status, json["error"]["code"].as_str()), (status, Some(code)), "{self:?}");
        assert!(!json["error"]["message"].as_str().unwrap().is_empty(), "{self:?}");
        assert!(!json["error"]["remedy"].as_str().unwrap().is_empty(), "{self:?}");
    }
}

pub(crate) fn http(socket: &Path, method: &str, path: &str, body: &[u8]) -> Answer {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut stream = connect(socket);
    // A node may refuse before it has read everything.
    let _ = stream.write_all(&[head.as_bytes(), body].concat());
    read_answer(&mut stream)
}

/// Sends bytes as they are, and nothing after them, and reads all that comes back.
pub(crate) fn raw(socket: &Path, bytes: &[u8]) -> Answer {
    let mut stream = connect(socket);
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    read_answer(&mut stream)
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

pub(crate) fn read_answer(stream: &mut UnixStream) -> Answer {
    let mut all = Vec::new();
    let mut buffer = [0; 1 << 16];
    // A connection that is reset after the answer has given its answer.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        all.extend_from_slice(&buffer[..count]);
    }
    let text = String::from_utf8(all).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Answer { status, head: head.to_lowercase(), body: body.to_owned() }
}

pub(crate) fn ids(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually("the process ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Removes the control groups of a node that was killed and has no successor.
pub(crate) fn remove_groups(directory: &Path) {
    let Ok(text) = std::fs::read(directory.join("data/node.json")) else { return };
    let Ok(node) = serde_json::from_slice::<Value>(&text) else { return };
    let id = node["node"].as_str().unwrap_or_default().replace('-', "");
    let Some(name) = id.get(20..) else { return };
    let is_there = |root: &str| Path::new(root).join(format!("farfork-{name}")).exists();
    if ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].into_iter().any(is_there)
        && let Ok(groups) = vm::jail::cgroup::Groups::open(name)
    {
        groups.close();
    }
}
