//! `farfork cluster`: begins a cluster, lets nodes in, joins one. To repair a node is in `repair`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use rustix::fs::Mode;
use serde::Serialize;
use types::Name;

use super::error::CliError;
use super::network::passphrase_file;
use super::output::Output;
use super::{Context, paths, repair};
use crate::api::wire::{TokenAnswer, TokenRequest};
use crate::member::files::{Member, PlaceError};
use crate::member::join;
use crate::member::seal::Passphrase;
use crate::member::token::{JoinToken, TokenError};
use crate::node::quic::Credentials;
use crate::node::trust::Role;
use crate::node::{DataDirectory, NodeAddress, NodeError};

/// Several hosts that place forks together
///
/// One node begins the cluster; every other joins with a token of its own. Three or five of them vote: the cluster decides as long
/// as more than half of those are there. `farfork node ls` lists them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cluster init --name node-1 --advertise 192.0.2.1:7117   # on the first host, then start its node
  farfork node --listen 192.0.2.1:7117 &
  farfork cluster token node-2 --voter                            # there; good once, for 15 minutes
  farfork cluster join ffjoin1-...                                # on the second host, then start its node
  farfork node --listen 192.0.2.2:7117 &
  farfork node ls")]
pub struct Arguments {
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    Init(Init),
    Token(Token),
    Join(Join),
    Repair(repair::Arguments),
}

/// Begin a cluster: make the data directory of a node that is not running its first voter's
///
/// It draws the authority that vouches for nodes. Its key is kept encrypted, under a passphrase in a file of its own: copy that file
/// to other voters, so that they too can let nodes in.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cluster init --name node-1 --advertise 192.0.2.1:7117
  farfork cluster init --name a --advertise 10.0.0.1:7117 --data /srv/farfork --ca-passphrase-file /root/ca-passphrase")]
pub(super) struct Init {
    /// What this node is called
    #[arg(long, value_parser = Name::parse)]
    name: Name,
    /// How other nodes will reach it: what its --listen or --advertise will say
    #[arg(long, value_name = "HOST:PORT")]
    advertise: NodeAddress,
    #[command(flatten)]
    places: Places,
}

/// Make a token that lets a node in, once, within 15 minutes; on a voter
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cluster token node-2 --voter
  farfork cluster token worker-17")]
pub(super) struct Token {
    /// What that node is to be called
    #[arg(value_parser = Name::parse)]
    name: Name,
    /// Give it a vote: three or five nodes of a cluster have one
    #[arg(long)]
    voter: bool,
}

/// Join a cluster: make the data directory of a node that is not running a member's
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cluster join ffjoin1-0121...
  farfork cluster join --data /srv/farfork \"$TOKEN\"")]
pub(super) struct Join {
    /// What `farfork cluster token` printed
    token: String,
    #[command(flatten)]
    places: Places,
}

#[derive(Debug, Args)]
struct Places {
    /// The node's data directory [default: as of `farfork node`]
    #[arg(long, env = "FARFORK_DATA", value_name = "PATH")]
    data: Option<PathBuf>,
    /// The passphrase of the cluster's authority; drawn if there is none [default: ~/.config/farfork/ca-passphrase; of root: /etc/farfork/ca-passphrase]
    #[arg(long, env = "FARFORK_CA_PASSPHRASE_FILE", value_name = "PATH")]
    ca_passphrase_file: Option<PathBuf>,
}

/// What a node became.
#[derive(Serialize)]
pub(super) struct Became {
    node: uuid::Uuid,
    name: String,
    role: &'static str,
    data: PathBuf,
}

impl Places {
    fn directory(&self) -> Result<PathBuf, CliError> {
        Ok(self.data.clone().map_or_else(paths::data, Ok)?)
    }
}

pub(super) fn init(arguments: &Init, output: Output) -> Result<ExitCode, CliError> {
    let (directory, address) = (arguments.places.directory()?, first_of(&arguments.advertise)?);
    let file = passphrase_file(arguments.places.ca_passphrase_file.clone())?;
    let (became, is_new) = begin(&directory, &arguments.name, address, &file)?;
    if is_new {
        eprintln!("the authority's passphrase is in {}: copy it to other voters, and keep a copy elsewhere", file.display());
    }
    became.answer(output, &format!("farfork node --listen {address}"))
}

pub(super) fn join(arguments: &Join, output: Output) -> Result<ExitCode, CliError> {
    let token = parse_token(&arguments.token)?;
    enter(&arguments.places.directory()?, &token)?.answer(output, "farfork node --listen ADDRESS:PORT")
}

/// Begins a cluster in the directory of a node that does not run. Also says whether the passphrase was drawn.
pub(super) fn begin(directory: &Path, name: &Name, address: SocketAddr, file: &Path) -> Result<(Became, bool), CliError> {
    let data = open(directory)?;
    let (passphrase, is_new) = Passphrase::read_or_draw(file).map_err(PlaceError::from)?;
    let credentials = Credentials::open(&data, None)?;
    Member::begin(&data, &credentials.identity, name, &address.to_string(), &passphrase)?;
    Ok((Became::new(&data, name, "voter"), is_new))
}

/// What somebody was given to join with.
pub(super) fn parse_token(text: &str) -> Result<JoinToken, CliError> {
    text.parse().map_err(|error: TokenError| CliError::Usage { message: error.to_string(), remedy: error.remedy().to_owned() })
}

/// Joins a cluster with the directory of a node that does not run. On a thread that has no runtime.
pub(super) fn enter(directory: &Path, token: &JoinToken) -> Result<Became, CliError> {
    let data = open(directory)?;
    let credentials = Credentials::open(&data, None)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let admitted = runtime.block_on(join::ask(&credentials.identity, token))?;
    let join::Admitted { certificate, root, sealed, seeds } = admitted;
    let role = if sealed.is_some() { "voter" } else { "learner" };
    let mut all: Vec<String> = seeds;
    all.extend(token.addresses.iter().map(SocketAddr::to_string));
    all.dedup();
    Member::join(&data, &token.name, all, &certificate, &root, sealed)?;
    Ok(Became::new(&data, &token.name, role))
}

/// Opens the directory of a node that does not run, and is of no cluster.
fn open(directory: &Path) -> Result<DataDirectory, CliError> {
    rustix::process::umask(Mode::from(0o077));
    let data = DataDirectory::open(directory)?;
    match Member::open(&data)? {
        Some(_) => Err(PlaceError::Taken { directory: directory.to_owned() }.into()),
        None => Ok(data),
    }
}

impl Became {
    fn new(data: &DataDirectory, name: &Name, role: &'static str) -> Self {
        Self { node: data.node(), name: name.to_string(), role, data: data.path().to_owned() }
    }

    fn answer(&self, output: Output, next: &str) -> Result<ExitCode, CliError> {
        let raw = serde_json::to_vec(self).expect("plain data");
        output.answer(&raw, || format!("{} is a {}; now start it: {next}\n", self.name, self.role))?;
        Ok(types::ExitCode::Ok.into())
    }
}

fn first_of(address: &NodeAddress) -> Result<SocketAddr, CliError> {
    Ok(*address.resolve().map_err(NodeError::from)?.first().expect("a name that was looked up has an address"))
}

pub(super) async fn token(arguments: &Token, context: &Context) -> Result<ExitCode, CliError> {
    let role = if arguments.voter { Role::Voter } else { Role::Learner };
    let request = TokenRequest { name: arguments.name.to_string(), role };
    let answer = context.client.post::<TokenAnswer>("/v1/cluster/tokens", &request).await?;
    context.output.answer(&answer.raw, || format!("{}\n", answer.value.token))?;
    Ok(types::ExitCode::Ok.into())
}
