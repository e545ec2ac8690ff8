//! `farfork branch`.

use std::process::ExitCode;

use clap::Args;

use super::client::segment;
use super::error::CliError;
use super::fork::{finish, id};
use super::progress::Progress;
use super::{Context, size};
use crate::api::wire::BranchRequest;
use crate::node::service::COUNT_MAX;

/// Freeze a running machine, which goes on, and fork children of that instant
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork branch a3d9e37c                # one child
  farfork branch a3d9e37c -n 10 --limit 16MiB")]
pub struct Arguments {
    /// The machine's id, or the last 4 and more digits of it
    #[arg(value_name = "ID", value_parser = id)]
    machine: String,
    /// How many children
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// The most memory of its own that each child may have [default: all of its RAM]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    limit: Option<u64>,
    /// Plug each child into the node's network of guests
    #[arg(long)]
    network: bool,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { machine, count, limit, network } = arguments;
    let progress = Progress::start(format!("branching {machine}"));
    let path = format!("/v1/machines/{}/branch", segment(&machine));
    let answer = context.client.post(&path, &BranchRequest { count, limit_bytes: limit, network }).await?;
    drop(progress);
    finish(&answer, context)
}
