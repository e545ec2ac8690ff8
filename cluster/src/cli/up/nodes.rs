//! How nodes come up. Each step looks at what there is already, so that an `up` that was cut off is taken up where it was.
//!
//! ```text
//! namespaces ─▶ node-1 begins the cluster ─▶ members start ─▶ the others, one by one: token, join, start ─▶ all up and voting
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::error::UpError;
use super::network::{Namespaces, within};
use super::process::{Process, Stopped};
use super::state::{Directory, Node, Places, State};
use crate::api::wire::{ClusterAnswer, NodeRow, TokenAnswer, TokenRequest};
use crate::cli::client::{Client, ClientError, Target};
use crate::cli::error::CliError;
use crate::cli::progress::Progress;
use crate::cli::{cluster, network};
use crate::member::files::is_member;
use crate::node::trust::Role;

/// What a node has until it answers, and all of them until they agree: many may share few processors.
const WITHIN: Duration = Duration::from_secs(120);
/// What one answer has.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Of a log, for its last line.
const LAST_BYTES: u64 = 16 << 10;

/// A local cluster that comes up.
pub(super) struct Nodes<'a> {
    directory: &'a Directory,
    pub(super) state: State,
    /// By this process.
    started: BTreeMap<usize, Started>,
}

struct Started {
    child: Child,
    /// What its log held before.
    log_bytes: u64,
}

impl<'a> Nodes<'a> {
    pub(super) fn new(directory: &'a Directory, state: State) -> Self {
        Self { directory, state, started: BTreeMap::new() }
    }

    /// Has all of them run, and waits until they agree on that.
    pub(super) async fn bring_up(&mut self) -> Result<(), CliError> {
        let count = self.state.nodes.len();
        let progress = Progress::start(format!("{count} nodes: network"));
        self.directory.write(&self.state)?;
        if self.state.is_isolated && self.state.running()? == 0 {
            self.make_network()?;
        }
        if !is_member(&self.places(0).data) {
            let node = &self.state.nodes[0];
            cluster::begin(&self.places(0).data, &node.name, node.address, &self.directory.passphrase())?;
        }
        // Together: it may take all of them for a majority.
        progress.say(format!("{count} nodes: start"));
        let (members, others): (Vec<_>, Vec<_>) = (0..count).partition(|index| is_member(&self.places(*index).data));
        for index in &members {
            if !self.state.nodes[*index].runs()? {
                self.start(*index)?;
            }
        }
        for index in members {
            self.answers(index).await?;
        }
        for index in others {
            progress.say(format!("{count} nodes: {} joins", self.state.nodes[index].name));
            self.let_in(index).await?;
            self.start(index)?;
            self.answers(index).await?;
        }
        progress.say(format!("{count} nodes: agree"));
        self.agree().await
    }

    /// Ends those that this process has started.
    pub(super) fn stop(&mut self) -> Result<Stopped, UpError> {
        let stopped = self.state.stop(self.directory, |index| self.started.contains_key(&index));
        for Started { child, .. } in self.started.values_mut() {
            // What has ended is forgotten by the kernel; what has not is told of in `stopped`.
            child.try_wait().unwrap_or_default();
        }
        stopped
    }

    fn places(&self, index: usize) -> Places {
        self.directory.places(&self.state.nodes[index])
    }

    fn client(&self, index: usize) -> Client {
        Client::new(Target::Socket(self.places(index).socket))
    }

    fn make_network(&mut self) -> Result<(), UpError> {
        if let Some(left) = self.state.namespaces.take() {
            left.remove(&self.state.nodes)?;
        }
        let namespaces = Namespaces::of(self.directory.path());
        // Written first, so that half of them is found again.
        self.state.namespaces = Some(namespaces.clone());
        self.directory.write(&self.state)?;
        namespaces.make(&self.state.nodes)
    }

    /// Starts a node that is a member.
    fn start(&mut self, index: usize) -> Result<(), UpError> {
        let node = &self.state.nodes[index];
        let failed = |source| UpError::Start { name: node.name.to_string(), source };
        let places = self.directory.places(node);
        let log =
            File::options().append(true).create(true).open(&places.log).map_err(|error| UpError::io(&places.log, error))?;
        let log_bytes = log.metadata().map_err(failed)?.len();
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["node", "--detached", "--label", "zone=local", "--listen", &node.address.to_string()]);
        // Each would take the host's memory for its own.
        let memory_bytes = network::capacity(None).memory_bytes / self.state.nodes.len() as u64;
        command.args(["--machine-memory", &format!("{}KiB", memory_bytes >> 10)]);
        command.arg("--data").arg(&places.data).arg("--socket").arg(&places.socket);
        command.arg("--ca-passphrase-file").arg(self.directory.passphrase());
        command.stdin(Stdio::piped()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let namespace = self.state.namespace(node);
        let mut child = within(namespace.as_deref(), || command.spawn())?.map_err(failed)?;
        let go = child.stdin.take().expect("it is piped");
        let process = Process::of(Pid::from_child(&child)).map_err(failed)?;
        self.state.nodes[index].process = Some(process);
        self.started.insert(index, Started { child, log_bytes });
        self.directory.write(&self.state)?;
        // It has waited for being written down. If it is gone already, whoever waits for its answer says why.
        (&go).write_all(b"\n").unwrap_or_default();
        Ok(())
    }

    /// Gets a token for a node, and has it join.
    async fn let_in(&mut self, index: usize) -> Result<(), CliError> {
        let Node { name, votes, .. } = self.state.nodes[index].clone();
        self.until("node-1 has a majority", 0, async |client| {
            client.get::<ClusterAnswer>("/v1/cluster").await.map(|_| Some(()))
        })
        .await?;
        let (role, what) = (if votes { Role::Voter } else { Role::Learner }, format!("a token for {name}"));
        let token = self.until(&what, 0, async |client| {
            let request = TokenRequest { name: name.to_string(), role };
            client.post::<TokenAnswer>("/v1/cluster/tokens", &request).await.map(|answer| Some(answer.value.token))
        });
        let token = cluster::parse_token(&token.await?)?;
        let (data, namespace) = (self.places(index).data, self.state.namespace(&self.state.nodes[index]));
        within(namespace.as_deref(), || cluster::enter(&data, &token))??;
        Ok(())
    }

    /// Waits until a node answers.
    async fn answers(&mut self, index: usize) -> Result<(), CliError> {
        let what = format!("{} answers", self.state.nodes[index].name);
        let ask = async |client: &Client| client.get::<ClusterAnswer>("/v1/cluster?stale=true").await.map(|_| Some(()));
        self.until(&what, index, ask).await
    }

    /// Waits until a majority says that all are up, and all voters vote.
    async fn agree(&mut self) -> Result<(), CliError> {
        let nodes = self.state.nodes.clone();
        let is_there =
            |node: &Node, row: &NodeRow| row.name == node.name.as_str() && row.life == "up" && row.votes == node.votes;
        let ask = async |client: &Client| {
            let answer = client.get::<ClusterAnswer>("/v1/cluster").await?.value;
            Ok(nodes.iter().all(|node| answer.nodes.iter().any(|row| is_there(node, row))).then_some(()))
        };
        self.until("all nodes are up, and all voters vote", 0, ask).await
    }

    /// Asks a node until it says something, for as long as all live that this process has started.
    async fn until<T>(
        &mut self,
        what: &str,
        index: usize,
        ask: impl AsyncFn(&Client) -> Result<Option<T>, ClientError>,
    ) -> Result<T, CliError> {
        let (began, client) = (Instant::now(), self.client(index));
        loop {
            match tokio::time::timeout(ANSWER_WITHIN, ask(&client)).await {
                Ok(Ok(Some(value))) => return Ok(value),
                Ok(Err(ClientError::Refused { status, body })) if status.is_client_error() => {
                    return Err(ClientError::Refused { status, body }.into());
                }
                // It does not listen yet, or no majority is there yet.
                _ => {}
            }
            self.live()?;
            if began.elapsed() > WITHIN {
                let directory = self.directory.path().to_owned();
                return Err(UpError::Late { what: what.to_owned(), within: WITHIN, directory }.into());
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Finds out whether one has ended.
    fn live(&mut self) -> Result<(), UpError> {
        for (index, node) in self.state.nodes.iter().enumerate() {
            if node.process.is_some() && !self.started.contains_key(&index) && !node.runs()? {
                let (name, log) = (node.name.to_string(), self.directory.places(node).log);
                let (said, remedy) = last_words(&log, 0).unwrap_or_default();
                return Err(UpError::Ended { name, log, said, remedy, code: None });
            }
        }
        for (index, Started { child, log_bytes }) in &mut self.started {
            let node = &self.state.nodes[*index];
            let name = node.name.to_string();
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => {
                    let log = self.directory.places(node).log;
                    let (said, remedy) = last_words(&log, *log_bytes).unwrap_or_default();
                    let said = if said.is_empty() { status.to_string() } else { said };
                    return Err(UpError::Ended { name, log, said, remedy, code: status.code() });
                }
                Err(source) => return Err(UpError::Start { name, source }),
            }
        }
        Ok(())
    }
}

/// The last line of a log that held so many bytes before; and what to do about it, if the program says that.
fn last_words(log: &Path, before: u64) -> io::Result<(String, Option<String>)> {
    let mut file = File::open(log)?;
    let begin = file.metadata()?.len().saturating_sub(LAST_BYTES).max(before);
    file.seek(SeekFrom::Start(begin))?;
    let mut bytes = Vec::new();
    file.take(LAST_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let last = lines.next().unwrap_or_default();
    // As `CliError::report` says it.
    let (line, remedy) = match last.strip_prefix("try: ") {
        Some(remedy) => (lines.next().unwrap_or_default(), Some(remedy.to_owned())),
        None => (last, None),
    };
    Ok((line.strip_prefix("error: ").unwrap_or(line).to_owned(), remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_ends_with_what_was_wrong_and_what_to_do() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let said = |text: &str, before| {
            std::fs::write(log.path(), text).unwrap();
            last_words(log.path(), before).unwrap()
        };
        let words = |line: &str, remedy: Option<&str>| (line.to_owned(), remedy.map(str::to_owned));
        assert_eq!(said("INFO ready\nerror: no KVM\n  try: load it\n", 0), words("no KVM", Some("load it")));
        assert_eq!(said("INFO ready\nthread panicked\n\n", 0), words("thread panicked", None));
        assert_eq!(said("of the time before\n", 19), words("", None));
    }
}
