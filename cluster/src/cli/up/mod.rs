//! `farfork up` and `farfork down`: a cluster on this one host, to try and to develop with.
//!
//! ```text
//!            up                    up, once all agree             down
//! nothing ───────▶ half of it ──────────────────────▶ all up ─────────────▶ stopped, with its data ── up ──▶ half of it
//!                      │ fails, Ctrl-C: stopped again                            │ down --purge
//!                      │ up was killed: up goes on, down clears up               ▼
//!                      ▼                                                      nothing
//!                   stopped
//! ```

mod error;
mod network;
mod nodes;
mod process;
mod state;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use rustix::fs::Mode;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::error::CliError;
use super::output::{Output, table};
use super::progress::Progress;
use super::{INTERRUPTED, paths};
use crate::member;
pub use error::UpError;
use nodes::Nodes;
use process::Stopped;
use state::{Directory, State};

/// What a program says when it was ended: 128 and the number of SIGTERM.
const TERMINATED: u8 = 143;

const COUNT: u8 = 3;

/// Bring up a cluster on this host alone, to try it
///
/// Each node is a process of its own with its own data. Of root each has a network namespace of its own, too, so that one can be
/// cut off with `ip -netns`; of others all are on the loopback. They run on when this ends. What was brought down comes up again
/// with its data.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork up
  farfork up --nodes 5 --data /tmp/five
  farfork up --no-namespaces                # also where namespaces may not be made
  farfork down                              # all of them stop; `farfork up` starts them again")]
pub struct Arguments {
    /// How many; three vote, of five or more five [default: 3, or as many as there were]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: Option<u8>,
    /// Where they have their data [default: $XDG_STATE_HOME/farfork-local; of root: /var/lib/farfork-local]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Have all nodes on the loopback, also as root
    #[arg(long)]
    no_namespaces: bool,
}

/// Stop the cluster that `farfork up` has brought up
///
/// Nodes have 20 s to end, then they are killed. Machines end with them; data, templates among it, stays.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork down
  farfork down --data /tmp/five --purge     # and remove all of it")]
pub struct DownArguments {
    /// Where they have their data [default: as of `farfork up`]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Remove their data as well
    #[arg(long)]
    purge: bool,
}

/// What runs.
#[derive(Serialize)]
struct Up {
    directory: String,
    /// Whether all of it ran before.
    was_up: bool,
    nodes: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    socket: String,
    address: String,
    role: &'static str,
    data: String,
    log: String,
    pid: Option<i32>,
}

/// What does not run any more.
#[derive(Serialize)]
struct Down {
    directory: String,
    stopped: Vec<String>,
    /// Those of them that did not end in time.
    killed: Vec<String>,
    is_purged: bool,
}

pub(super) fn up(arguments: &Arguments, output: Output) -> Result<ExitCode, CliError> {
    // Whatever is made here is nobody else's to read.
    rustix::process::umask(Mode::from(0o077));
    let path = arguments.data.clone().map_or_else(paths::local, Ok)?;
    let directory = Directory::make(&path)?;
    let state = match directory.read()? {
        Some(state) => arguments.agree_with(state, &directory)?,
        None => arguments.begin().map_err(|error| UpError::io(directory.path(), error))?,
    };
    let was_up = state.running()? == state.nodes.len();
    let mut nodes = Nodes::new(&directory, state);
    if was_up {
        eprintln!("it is up already");
    } else if let Some(code) = bring_up(&mut nodes)? {
        return Ok(code);
    }
    let answer = Up::new(&directory, &nodes.state, was_up);
    let raw = serde_json::to_vec(&answer).expect("plain data");
    output.answer(&raw, || answer.for_people(arguments.data.as_ref().map(|_| directory.path())))?;
    Ok(types::ExitCode::Ok.into())
}

/// Brings up what does not run. If that fails or is interrupted, what it has started is stopped again.
fn bring_up(nodes: &mut Nodes<'_>) -> Result<Option<ExitCode>, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let outcome = runtime.block_on(async {
        // Heard from here on, also while something is done that does not wait.
        let listen = |kind| signal(kind).map_err(CliError::Runtime);
        let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
        let stopped = |code| Ok(Some(ExitCode::from(code)));
        tokio::select! {
            biased;
            _ = interrupt.recv() => stopped(INTERRUPTED),
            _ = terminate.recv() => stopped(TERMINATED),
            up = nodes.bring_up() => up.map(|()| None),
        }
    });
    if !matches!(outcome, Ok(None))
        && let Err(error) = nodes.stop()
    {
        eprintln!("not all that was started could be stopped ({error}); `farfork down` tries it again");
    }
    outcome
}

pub(super) fn down(arguments: &DownArguments, output: Output) -> Result<ExitCode, CliError> {
    let path = arguments.data.clone().map_or_else(paths::local, Ok)?;
    let mut answer = Down { directory: path.display().to_string(), stopped: Vec::new(), killed: Vec::new(), is_purged: false };
    if let Some(directory) = Directory::find(&path)?
        && let Some(mut state) = directory.read()?
    {
        let progress = Progress::start(format!("{} nodes: stop", state.nodes.len()));
        let Stopped { names, killed } = state.stop(&directory, |_| true)?;
        answer.stopped = names.iter().map(ToString::to_string).collect();
        answer.killed = killed.iter().map(ToString::to_string).collect();
        if arguments.purge {
            directory.purge(&state)?;
            answer.is_purged = true;
        }
        drop(progress);
    }
    let raw = serde_json::to_vec(&answer).expect("plain data");
    output.answer(&raw, || answer.for_people())?;
    Ok(types::ExitCode::Ok.into())
}

impl Arguments {
    /// A cluster that was never up.
    fn begin(&self) -> std::io::Result<State> {
        let is_isolated = !self.no_namespaces && rustix::process::geteuid().is_root();
        State::new(usize::from(self.nodes.unwrap_or(COUNT)), is_isolated)
    }

    /// One that was: its nodes are as many as they were, and where they were.
    fn agree_with(&self, mut state: State, directory: &Directory) -> Result<State, UpError> {
        let different = |has: String| Err(UpError::Different { directory: directory.path().to_owned(), has });
        // What an `up` has left that came to nothing binds nobody.
        let is_begun = state.nodes.iter().any(|node| member::files::is_member(&directory.places(node).data));
        if !is_begun && state.running()? == 0 {
            state.stop(directory, |_| true)?;
            return self.begin().map_err(|error| UpError::io(directory.path(), error));
        }
        if self.nodes.is_some_and(|count| usize::from(count) != state.nodes.len()) {
            return different(format!("{} nodes", state.nodes.len()));
        }
        if self.no_namespaces && state.is_isolated {
            return different("its nodes in network namespaces".to_owned());
        }
        Ok(state)
    }
}

impl Up {
    fn new(directory: &Directory, state: &State, was_up: bool) -> Self {
        let text = |path: &Path| path.display().to_string();
        let nodes = state.nodes.iter().map(|node| {
            let places = directory.places(node);
            Row {
                name: node.name.to_string(),
                socket: text(&places.socket),
                address: node.address.to_string(),
                role: if node.votes { "voter" } else { "learner" },
                data: text(&places.data),
                log: text(&places.log),
                pid: node.process.as_ref().map(|process| process.pid),
            }
        });
        Self { directory: text(directory.path()), was_up, nodes: nodes.collect() }
    }

    /// What runs, and what one may do with it. A directory is named if it is not the default one.
    fn for_people(&self, directory: Option<&Path>) -> String {
        let row = |row: &Row| [row.name.clone(), row.socket.clone(), row.address.clone(), row.role.to_owned()];
        let mut text = table(["NODE", "SOCKET", "ADDRESS", "ROLE"], &[], self.nodes.iter().map(row).collect());
        let socket = self.nodes.first().map(|node| word(&node.socket)).unwrap_or_default();
        let data = directory.map(|path| format!(" --data {}", word(&path.display().to_string()))).unwrap_or_default();
        text.push_str(&format!(
            "\nnow try:\n  export FARFORK_SOCKET={socket}\n  farfork node ls\n  farfork template build base\n  \
             farfork fork base -n 30\n  farfork down{data}\n"
        ));
        text
    }
}

impl Down {
    fn for_people(&self) -> String {
        let mut text = match self.stopped.as_slice() {
            [] => format!("nothing was up in {}\n", self.directory),
            names => format!("stopped {}\n", names.join(", ")),
        };
        if !self.killed.is_empty() {
            text.push_str(&format!("{} did not end in time, and had to be killed\n", self.killed.join(", ")));
        }
        match (self.is_purged, self.stopped.is_empty()) {
            (true, _) => text.push_str(&format!("removed {}\n", self.directory)),
            (false, false) => text.push_str(&format!("their data stays in {}\n", self.directory)),
            (false, true) => {}
        }
        text
    }
}

/// A word for a shell.
fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_what_a_shell_takes_for_one() {
        assert_eq!(word("/var/lib/farfork-local/node-1/farfork.sock"), "/var/lib/farfork-local/node-1/farfork.sock");
        assert_eq!(word("/tmp/my dir/it's"), "'/tmp/my dir/it'\\''s'");
    }

    #[test]
    fn a_cluster_that_was_there_keeps_its_nodes() {
        let path = tempfile::tempdir().unwrap();
        let directory = Directory::make(path.path()).unwrap();
        let arguments = |nodes, no_namespaces| Arguments { nodes, data: None, no_namespaces };
        // One that came to nothing binds nobody.
        let other = arguments(Some(3), true).agree_with(State::new(5, true).unwrap(), &directory).unwrap();
        assert_eq!((other.nodes.len(), other.is_isolated), (3, false));
        let data = directory.places(&State::new(5, true).unwrap().nodes[0]).data;
        std::fs::create_dir_all(&data).unwrap();
        std::fs::write(data.join("cluster.json"), "{}").unwrap();
        let agree = |arguments: Arguments| arguments.agree_with(State::new(5, true).unwrap(), &directory);
        assert_eq!(agree(arguments(None, false)).unwrap().nodes.len(), 5);
        assert!(agree(arguments(Some(5), false)).is_ok());
        assert!(matches!(agree(arguments(Some(3), false)), Err(UpError::Different { .. })));
        assert!(matches!(agree(arguments(None, true)), Err(UpError::Different { .. })));
    }
}
