//! `farfork logs`.

use std::process::ExitCode;

use clap::Args;

use super::Context;
use super::client::segment;
use super::error::CliError;
use super::fork::id;
use crate::api::wire::MachineAnswer;

/// Print what a machine printed on its console, the newest 64 KiB of it; of one that has ended, the last 4 KiB
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork logs a3d9
  farfork logs a3d9 --output json | jq -r .console.tail")]
pub struct Arguments {
    /// The machine: its id, or the last 4 and more digits of it
    #[arg(value_name = "ID", value_parser = id)]
    id: String,
}

pub(crate) async fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let answer = context.client.get::<MachineAnswer>(&format!("/v1/machines/{}", segment(&arguments.id))).await?;
    let console = &answer.value.console;
    if console.dropped_bytes > 0 {
        eprintln!("{} bytes were dropped before this", console.dropped_bytes);
    }
    // A serial port ends its lines with both.
    context.output.answer(&answer.raw, || console.tail.replace("\r\n", "\n"))?;
    Ok(types::ExitCode::Ok.into())
}
