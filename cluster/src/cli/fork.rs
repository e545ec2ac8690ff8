//! `farfork fork`.

use std::process::ExitCode;

use clap::Args;

use super::client::{Answer, Found};
use super::error::CliError;
use super::output::{short, table, time};
use super::progress::{Progress, stage_cell, stages};
use super::{Context, size};
use crate::api::wire::{Failure, ForkAnswer, ForkRequest, ForkSource};
use crate::node::engine::Guest;
use crate::node::service::COUNT_MAX;
use crate::node::{ShortId, ShortIdError};

/// Fork children of a guest, an image or a running machine
///
/// Each child has all of its parent's memory, and none of its own until it writes. A running machine is frozen first, and goes
/// on. Interrupting the command does not undo what the node has begun.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork fork --guest probe -n 100 --memory 64MiB --verify   # start a guest, freeze it, fork it
  farfork fork --from a3d9e37c -n 10                          # of an image, or a running machine
  farfork fork --from a3d9e37c --limit 16MiB --output json")]
#[command(group(clap::ArgGroup::new("source").required(true).args(["guest", "from"])))]
pub struct Arguments {
    /// Start this guest, let it warm up, and freeze it
    #[arg(long, value_enum)]
    guest: Option<Guest>,
    /// The id of a machine or an image, or the last 4 and more digits of it
    #[arg(long, value_name = "ID", value_parser = id)]
    from: Option<String>,
    /// How many children
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// RAM of the guest, a multiple of 2MiB [default: 64MiB]
    #[arg(long, value_name = "SIZE", conflicts_with = "from", value_parser = size::parse)]
    memory: Option<u64>,
    /// Virtual CPUs of the guest [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "from", value_parser = clap::value_parser!(u64).range(1..=8))]
    vcpus: Option<u64>,
    /// The most memory of its own that each child may have [default: all of its RAM]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    limit: Option<u64>,
    /// Let each child prove its memory and identity
    #[arg(long)]
    verify: bool,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { guest, from, count, memory, vcpus, limit, verify } = arguments;
    let progress = Progress::start(format!("forking {count}"));
    let from = match (guest, from) {
        (Some(guest), _) => ForkSource::Guest(guest),
        (None, from) => source(&from.unwrap_or_default(), context).await?,
    };
    let request = ForkRequest { from, count, memory_bytes: memory, vcpus, limit_bytes: limit, verify };
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
        eprintln!("error: {}: {}\n  try: {}", failure.id, failure.message, failure.remedy);
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

/// An id or its end, checked before a node is asked.
pub(super) fn id(text: &str) -> Result<String, ShortIdError> {
    ShortId::parse(text).map(|_| text.to_owned())
}

async fn source(id: &str, context: &Context) -> Result<ForkSource, CliError> {
    Ok(match context.client.find(id).await? {
        Found::Machine(answer) => ForkSource::Machine(answer.value.machine.id.to_string()),
        Found::Image(answer) => ForkSource::Image(answer.value.id.to_string()),
    })
}

fn for_people(report: &ForkAnswer) -> String {
    let rows = report.children.iter().map(|child| {
        let verified = child.verified_pages.map_or_else(|| "-".to_owned(), |pages| format!("{pages} pages"));
        let shell = if child.had_shell { "ready" } else { "built" };
        [short(child.id.as_uuid()), child.first_us.to_string(), stage_cell(&child.stages_us), shell.to_owned(), verified]
    });
    let mut text = table(["MACHINE", "FIRST us", "= SHELL+SEND+MAP+RESTORE+RUN", "SHELL", "VERIFIED"], &[1], rows.collect());
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
    text
}
