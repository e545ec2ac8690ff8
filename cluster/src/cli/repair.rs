//! `farfork cluster repair`: lets a node in again whose log is damaged or gone.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use rustix::fs::Mode;
use serde::Serialize;

use super::error::CliError;
use super::output::Output;
use super::paths;
use crate::member::repair::{Repair, RepairError, Repaired};
use crate::node::{DataDirectory, NodeAddress, NodeError};

/// Repair a node that does not start since its log is damaged or gone
///
/// A node that has lost its log may have promised its vote, and does not know to whom. So it is let in again as another one: under a
/// new id, by its old name and role, proven by its old certificate and key. The old id is revoked. Images and templates in the
/// directory stay; what is left of the log is kept as raft.redb.damaged-SECONDS. It may be run again if it was cut off.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cluster repair --from-peers
  farfork cluster repair --from-peers --peer 192.0.2.1:7117 --data /srv/farfork")]
pub(super) struct Arguments {
    /// Have the other voters let it in again: more than half of all voters must be there
    #[arg(long, required = true)]
    from_peers: bool,
    /// A voter to ask first, and then those that the node knew; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    peer: Vec<NodeAddress>,
    /// The node's data directory [default: as of `farfork node`]
    #[arg(long, env = "FARFORK_DATA", value_name = "PATH")]
    data: Option<PathBuf>,
}

/// What a node became.
#[derive(Serialize)]
struct Became {
    node: uuid::Uuid,
    name: String,
    role: &'static str,
    data: PathBuf,
    set_aside: Option<PathBuf>,
}

impl From<RepairError> for CliError {
    fn from(error: RepairError) -> Self {
        match error {
            RepairError::Place(error) => error.into(),
            RepairError::NotLetIn(error) => error.into(),
        }
    }
}

pub(super) fn run(arguments: &Arguments, output: Output) -> Result<ExitCode, CliError> {
    debug_assert!(arguments.from_peers, "there is no other way yet, and this one is named");
    rustix::process::umask(Mode::from(0o077));
    let path = arguments.data.clone().map_or_else(paths::data, Ok)?;
    let mut repair = Repair::begin(DataDirectory::open(&path)?)?;
    if !repair.is_admitted() {
        let voters = voters(arguments, &repair)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
        runtime.block_on(repair.ask(&voters))?;
    }
    let Repaired { node, name, is_voter, set_aside } = repair.install()?;
    let role = if is_voter { "voter" } else { "learner" };
    let set_aside = set_aside.map(|file| path.join(file));
    let kept =
        set_aside.as_ref().map_or_else(String::new, |file| format!("; what is left of its log is in {}", file.display()));
    let said =
        format!("{name} is a {role} again, under the id {node}{kept}; now start it: farfork node --listen ADDRESS:PORT\n");
    let became = Became { node, name: name.to_string(), role, data: path, set_aside };
    output.answer(&serde_json::to_vec(&became).expect("plain data"), || said)?;
    Ok(types::ExitCode::Ok.into())
}

/// Each once: those that are named, and those that the node knew.
fn voters(arguments: &Arguments, repair: &Repair) -> Result<Vec<SocketAddr>, CliError> {
    let mut voters: Vec<SocketAddr> = Vec::new();
    for peer in &arguments.peer {
        voters.extend(peer.resolve().map_err(NodeError::from)?.first());
    }
    for seed in repair.seeds() {
        if !voters.contains(&seed) {
            voters.push(seed);
        }
    }
    if voters.is_empty() {
        return Err(CliError::Usage {
            message: "this node has never known another voter".to_owned(),
            remedy: "name one with --peer HOST:PORT; `farfork node ls` on it lists all".to_owned(),
        });
    }
    Ok(voters)
}
