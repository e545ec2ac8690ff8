//! `farfork fork`.

use std::process::ExitCode;

use clap::Args;
use types::{Digest, FullName, NameError, Tenant};

use axum::http::StatusCode;

use super::client::{Answer, ClientError, Found, segment};
use super::error::CliError;
use super::output::{printable, short, table, time};
use super::progress::{Progress, stage_cell, stages};
use super::{Context, size};
use crate::api::wire::{Failure, ForkAnswer, ForkRequest, ForkSource, OtherNode, RemoteSource, Template};
use crate::node::engine::Guest;
use crate::node::service::COUNT_MAX;
use crate::node::{AddressError, NodeAddress, ShortId, ShortIdError};

/// Fork children of a guest, an image or a running machine, here or on another node
///
/// Each child has all of its parent's memory, and none of its own until it writes. A running machine is frozen first, and goes
/// on. Interrupting the command does not undo what the node has begun.
///
/// On another node the children run before their memory is there: it comes as they touch it, and the rest after that
/// (`farfork watch`). Both nodes must listen for one another (`farfork node --listen`) and trust one another (`farfork trust`).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork fork --guest probe -n 100 --memory 64MiB --verify   # start a guest, freeze it, fork it
  farfork fork a3d9e37c -n 10                                 # of an image, or a running machine
  farfork fork python -n 10                                   # of a template (farfork template)
  farfork fork a3d9e37c --limit 16MiB --output json
  farfork fork web -n 10 --network                            # each has an address (farfork node --guest-network)
  farfork fork a3d9e37c -n 8 --on node-b.example:7117         # there, of what is here
  farfork fork $(farfork --socket /run/b.sock image digest 77f0) -n 8 --from 192.0.2.7:7117   # here, of what is there")]
#[command(group(clap::ArgGroup::new("source").required(true).multiple(true).args(["guest", "image", "from"])))]
pub struct Arguments {
    /// What to fork: a template, the id of a machine or an image, the last 4 and more digits of it, or an image's digest
    #[arg(value_name = "NAME|ID|DIGEST", value_parser = id_digest_or_name, conflicts_with = "guest")]
    image: Option<String>,
    /// Start this guest, let it warm up, and freeze it
    #[arg(long, value_enum)]
    guest: Option<Guest>,
    /// A node that holds the image of this digest; several may be named. (Or an id, as without --from)
    #[arg(long, value_name = "HOST:PORT", value_parser = FromWhere::parse, conflicts_with = "guest")]
    from: Vec<FromWhere>,
    /// The node that the children are to run on [default: this one]
    #[arg(long, value_name = "HOST:PORT")]
    on: Option<NodeAddress>,
    /// Whose the image is [default: default; of an image that is here, whoever's it is]
    #[arg(long, value_name = "NAME")]
    tenant: Option<Tenant>,
    /// How many children
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// RAM of the guest, a multiple of 2MiB [default: 64MiB]
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["image", "from"], value_parser = size::parse)]
    memory: Option<u64>,
    /// Virtual CPUs of the guest [default: 1]
    #[arg(long, value_name = "N", conflicts_with_all = ["image", "from"], value_parser = clap::value_parser!(u64).range(1..=8))]
    vcpus: Option<u64>,
    /// The most memory of its own that each child may have [default: all of its RAM]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    limit: Option<u64>,
    /// Let each child prove its memory and identity
    #[arg(long)]
    verify: bool,
    /// Plug each child into the node's network of guests; its template has to be built with --network
    #[arg(long, conflicts_with = "guest")]
    network: bool,
}

/// What follows `--from`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum FromWhere {
    Holder(NodeAddress),
    Id(String),
}

impl FromWhere {
    fn parse(text: &str) -> Result<Self, String> {
        // No id has a colon.
        if text.contains(':') {
            return text.parse().map(Self::Holder).map_err(|error: AddressError| format!("{error}: {}", error.remedy()));
        }
        id_or_digest(text).map(Self::Id).map_err(|error| error.to_string())
    }
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { image, guest, from, on, tenant, count, memory, vcpus, limit, verify, network } = arguments;
    let what = what(image, from, on.is_some())?;
    let progress = Progress::start(format!("forking {count}"));
    let from = match (guest, what) {
        (Some(guest), _) => ForkSource::Guest(guest),
        (None, What::Here(id)) => source(&id, context).await?,
        (None, What::Elsewhere(remote)) => ForkSource::Remote(remote),
    };
    let (tenant, on) = (tenant.map(String::from), on.map(String::from));
    let request = ForkRequest { from, count, memory_bytes: memory, vcpus, limit_bytes: limit, verify, network, tenant, on };
    let answer = context.client.post("/v1/forks", &request).await?;
    drop(progress);
    finish(&answer, context)
}

/// Prints what a fork or branch has done.
pub(super) fn finish(answer: &Answer<ForkAnswer>, context: &Context) -> Result<ExitCode, CliError> {
    let report = &answer.value;
    context.output.answer(&answer.raw, || for_people(report))?;
    stages(&report.children);
    Ok(finish_partial(report.children.is_empty(), &report.failures))
}

/// Says on stderr what was not done, and returns the exit code.
pub(super) fn finish_partial(none_done: bool, failures: &[Failure]) -> ExitCode {
    /// More of them say nothing new.
    const SHOWN_MAX: usize = 10;
    for failure in failures.iter().take(SHOWN_MAX) {
        eprintln!("{}", printable(&format!("error: {}: {}\n  try: {}", failure.id, failure.message, failure.remedy)));
    }
    if failures.len() > SHOWN_MAX {
        eprintln!("error: and {} more", failures.len() - SHOWN_MAX);
    }
    match (failures.is_empty(), none_done) {
        (true, _) => types::ExitCode::Ok.into(),
        (false, false) => types::ExitCode::Partial.into(),
        (false, true) => types::ExitCode::Refused.into(),
    }
}

/// An id, its end or a digest, checked before a node is asked.
pub(super) fn id_or_digest(text: &str) -> Result<String, ShortIdError> {
    if text.parse::<Digest>().is_ok() { Ok(text.to_owned()) } else { id(text) }
}

/// The same, or a template's name.
fn id_digest_or_name(text: &str) -> Result<String, String> {
    match (id_or_digest(text), full_name(text)) {
        (Err(_), Err(error)) => Err(error.to_string()),
        _ => Ok(text.to_owned()),
    }
}

/// A name, or one of a tenant (`team-7/warm`), as it was typed: whose it is without that is for the node to say.
pub(super) fn full_name(text: &str) -> Result<String, NameError> {
    FullName::parse(text).map(|_| text.to_owned())
}

/// An id or its end, checked before a node is asked.
pub(super) fn id(text: &str) -> Result<String, ShortIdError> {
    ShortId::parse(text).map(|_| text.to_owned())
}

enum What {
    /// By its id or digest.
    Here(String),
    Elsewhere(RemoteSource),
}

/// What `ID`, `--from` and `--on` say together.
fn what(image: Option<String>, from: Vec<FromWhere>, is_on: bool) -> Result<What, CliError> {
    let usage = |message: &str, remedy: &str| Err(CliError::Usage { message: message.to_owned(), remedy: remedy.to_owned() });
    let (mut holders, mut ids) = (Vec::new(), Vec::from_iter(image));
    for from in from {
        match from {
            FromWhere::Holder(address) => holders.push(address.to_string()),
            FromWhere::Id(id) => ids.push(id),
        }
    }
    let id = match ids.len() {
        0 if holders.is_empty() => String::new(),
        0 => return usage("--from says where the image is, but not which it is", "name it by its digest, before the options"),
        1 => ids.remove(0),
        _ => return usage("more than one image or machine is named", "name one"),
    };
    if holders.is_empty() {
        return Ok(What::Here(id));
    }
    if id.parse::<Digest>().is_err() {
        let remedy = "name it by what `farfork image digest ID` prints on a node that has it";
        return usage(&format!("{id} is no digest, and ids mean nothing on other nodes"), remedy);
    }
    if is_on {
        return usage("an image of other nodes is to be forked on yet another node", "run the command on that node");
    }
    Ok(What::Elsewhere(RemoteSource { image: id, holders }))
}

async fn source(id: &str, context: &Context) -> Result<ForkSource, CliError> {
    if id_or_digest(id).is_err() {
        return Ok(ForkSource::Template(id.to_owned()));
    }
    if id.parse::<Digest>().is_ok() {
        // Which of those with this digest is meant is for who knows the tenant.
        return Ok(ForkSource::Image(id.to_owned()));
    }
    let found = match context.client.find(id).await {
        // A name may consist of hex digits.
        Err(ClientError::Refused { body, .. }) if body.code == "UNKNOWN_ID" && full_name(id).is_ok() => {
            return match context.client.get::<Template>(&format!("/v1/templates/{}", segment(id))).await {
                Ok(_) => Ok(ForkSource::Template(id.to_owned())),
                Err(_) => Err(ClientError::Refused { status: StatusCode::NOT_FOUND, body }.into()),
            };
        }
        found => found?,
    };
    Ok(match found {
        Found::Machine(answer) => ForkSource::Machine(answer.value.machine.id.to_string()),
        Found::Image(answer) => ForkSource::Image(answer.value.id.to_string()),
    })
}

fn for_people(report: &ForkAnswer) -> String {
    let rows = report.children.iter().map(|child| {
        let verified = child.verified_pages.map_or_else(|| "-".to_owned(), |pages| format!("{pages} pages"));
        let shell = if child.had_shell { "ready" } else { "built" };
        let ready = child.ready_us.map_or_else(|| "-".to_owned(), time);
        let stages = stage_cell(&child.stages_us);
        let address = child.address.clone().unwrap_or_else(|| "-".to_owned());
        [short(child.id.as_uuid()), child.first_us.to_string(), stages, shell.to_owned(), ready, address, verified]
    });
    let head = ["MACHINE", "FIRST us", "= SHELL+SEND+MAP+RESTORE+RUN", "SHELL", "READY", "ADDRESS", "VERIFIED"];
    let mut text = table(head, &[1, 4], rows.collect());
    if let Some(freeze) = &report.freeze {
        text.push_str(&format!(
            "froze the machine: stalled {}, copied {}, {} dirty pages\n",
            time(freeze.stall_us),
            time(freeze.copy_us),
            freeze.dirty_pages
        ));
    }
    let (children, wall_us) = (report.children.len(), report.wall_us);
    text.push_str(&format!("{children} of image {} in {}\n", short(report.image.id.as_uuid()), time(wall_us)));
    if let Some(OtherNode { node, address }) = &report.on {
        text.push_str(&format!("they run on node {node} ({address}); `farfork ls` and `farfork show ID` there show them\n"));
    } else if report.image.residency.as_ref().is_some_and(|residency| !residency.is_settled) {
        text.push_str(&format!("its memory is still coming: farfork watch {}\n", short(report.image.id.as_uuid())));
    }
    text
}
