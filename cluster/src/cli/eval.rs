//! `farfork eval`.

use std::process::ExitCode;

use clap::Args;

use super::Context;
use super::error::CliError;
use super::fork::id;
use super::guest::{self, GuestError};
use super::output::{Output, print};
use crate::node::guest::words::{Evaluate, Evaluated};

/// Evaluate an expression in a machine's warm main process
///
/// The process has been running since its template was built: what it had imported and computed then is there. Statements are
/// run as well; what they define stays for the next request. Exits with 1 if the code raised an exception.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork eval a3d9 'sum(range(10))'
  farfork eval a3d9 'import math; x = math.pi' && farfork eval a3d9 x
  farfork eval a3d9 'json.dumps({1: 2})' --output json")]
pub struct Arguments {
    /// The machine: its id, or the last 4 and more digits of it
    #[arg(value_name = "ID", value_parser = id)]
    id: String,
    /// What to evaluate
    code: String,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let mut guest = guest::connect(&arguments.id, context).await?;
    let raw = guest.ask(&Evaluate::bytes(&arguments.code)).await?;
    let answer: Evaluated = serde_json::from_slice(&raw).map_err(|_| GuestError::Nonsense)?;
    if context.output == Output::Json {
        print(&raw)?;
        print(b"\n")?;
    } else {
        print(answer.stdout.as_bytes())?;
        if let Some(value) = answer.value {
            print(format!("{value}\n").as_bytes())?;
        }
        if !answer.ok {
            let text = if answer.traceback.is_empty() { answer.error } else { answer.traceback };
            eprintln!("{}", super::output::printable(text.trim_end()));
        }
    }
    Ok(if answer.ok { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
