//! `farfork ls`.

use std::process::ExitCode;

use clap::Args;

use super::error::CliError;
use super::output::{short, table};
use super::{Context, size};
use crate::api::wire::{MachinesAnswer, State, settled_in_short};

/// List machines, oldest first
///
/// SETTLED says whether all memory of a machine's image is on this node, or how much of it in percent.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork ls
  farfork ls --all                       # those that ended too, with the reason
  farfork ls --output json | jq -r '.machines[].id'")]
pub struct Arguments {
    /// Also those that have ended
    #[arg(short, long)]
    all: bool,
}

pub(crate) async fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let path = if arguments.all { "/v1/machines?state=all" } else { "/v1/machines" };
    let answer = context.client.get::<MachinesAnswer>(path).await?;
    context.output.answer(&answer.raw, || for_people(&answer.value))?;
    Ok(types::ExitCode::Ok.into())
}

fn for_people(answer: &MachinesAnswer) -> String {
    let now = pages::clock::wall();
    let rows = answer.machines.iter().map(|machine| {
        let state = match (&machine.ended, machine.state) {
            (Some(ended), _) => ended.reason.clone(),
            (None, State::Running) => "running".to_owned(),
            (None, State::Ended) => "ended".to_owned(),
        };
        [
            short(machine.id.as_uuid()),
            short(machine.image.as_uuid()),
            machine.parent.map_or_else(|| "-".to_owned(), |parent| short(parent.as_uuid())),
            state,
            settled_in_short(machine.settled_percent),
            size::age(machine.created_unix_ms, now),
            machine.first_us.to_string(),
        ]
    });
    table(["MACHINE", "IMAGE", "PARENT", "STATE", "SETTLED", "AGE", "FIRST us"], &[4, 5, 6], rows.collect())
}
