//! `farfork audit`: who asked a node for what.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::error::CliError;
use super::output::{Output, table};
use super::{Context, paths, size};
use crate::api::audit::AuditAnswer;
use crate::node::audit;

/// Who asked this node for what
///
/// Every node writes down each request that may change something, and each that it turned away. Every line carries the digest of
/// the one before it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork audit ls -n 20
  farfork audit verify                # reads the files, also of a node that does not run
  farfork audit verify --data /srv/farfork")]
pub struct Arguments {
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List the newest lines
    #[command(after_help = "Example:\n  farfork audit ls -n 20")]
    Ls {
        /// How many
        #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=1000))]
        count: u64,
    },
    /// Check that no line was changed, taken out or put in
    ///
    /// It prints which lines are here, and the last one's digest: noted elsewhere, it tells later whether lines were cut off the end.
    #[command(after_help = "Example:\n  farfork audit verify")]
    Verify {
        /// The node's data directory [default: as of `farfork node`]
        #[arg(long, env = "FARFORK_DATA", value_name = "PATH")]
        data: Option<PathBuf>,
    },
}

pub(crate) async fn list(count: u64, context: &Context) -> Result<ExitCode, CliError> {
    let newest = context.client.get::<AuditAnswer>("/v1/audit?limit=0").await?.value.last;
    let path = format!("/v1/audit?after={}&limit={count}", newest.saturating_sub(count));
    let answer = context.client.get::<AuditAnswer>(&path).await?;
    let rows = answer.value.lines.iter().map(|line| {
        let asked = &line.asked;
        [
            line.seq.to_string(),
            size::age(line.unix_ms, pages::clock::wall()),
            asked.who.clone(),
            asked.tenant.clone().unwrap_or_else(|| "-".to_owned()),
            format!("{} {}", asked.method, asked.path),
            asked.status.to_string(),
            asked.about.clone().unwrap_or_default(),
        ]
    });
    let head = ["LINE", "AGO", "WHO", "TENANT", "ASKED", "STATUS", "ABOUT"];
    context.output.answer(&answer.raw, || table(head, &[0, 1, 5], rows.collect()))?;
    Ok(types::ExitCode::Ok.into())
}

pub(crate) fn verify(data: Option<PathBuf>, output: Output) -> Result<ExitCode, CliError> {
    let data = data.map_or_else(paths::data, Ok)?;
    let checked = audit::verify(&data)?;
    let raw = serde_json::to_vec(&checked).expect("plain data");
    output.answer(&raw, || format!("lines {} to {}, the last one {}\n", checked.first, checked.last, checked.hash))?;
    Ok(types::ExitCode::Ok.into())
}
