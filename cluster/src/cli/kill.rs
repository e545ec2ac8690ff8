//! `farfork kill`.

use std::process::ExitCode;

use clap::Args;

use super::Context;
use super::error::CliError;
use super::fork::{finish_partial, id};
use super::output::short;
use super::progress::Progress;
use crate::api::wire::{KillAnswer, KillRequest};

/// End machines
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork kill a3d9e37c 0b1f22d0
  farfork kill --all")]
#[command(group(clap::ArgGroup::new("which").required(true).args(["ids", "all"])))]
pub struct Arguments {
    /// Their ids, or the last 4 and more digits of each
    #[arg(value_name = "ID", value_parser = id)]
    ids: Vec<String>,
    /// All that run
    #[arg(long)]
    all: bool,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { ids, all } = arguments;
    let progress = Progress::start("killing".to_owned());
    let answer = context.client.post::<KillAnswer>("/v1/machines/kill", &KillRequest { ids, all }).await?;
    drop(progress);
    let KillAnswer { killed, failures } = &answer.value;
    context.output.answer(&answer.raw, || killed.iter().map(|id| format!("{}\n", short(id.as_uuid()))).collect())?;
    Ok(finish_partial(killed.is_empty(), failures))
}
