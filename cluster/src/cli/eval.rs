//! `farfork eval`.

use std::process::ExitCode;

use agent::protocol::{FromAgent, MAIN_MESSAGE_MAX, ToAgent};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::Context;
use super::error::CliError;
use super::fork::id;
use super::guest::{Guest, GuestError};
use super::output::{Output, print};

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

/// As docs/guests.md describes it.
#[derive(Serialize)]
struct Request<'a> {
    op: &'static str,
    code: &'a str,
}

#[derive(Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    stdout: String,
    #[serde(default)]
    error: String,
    #[serde(default)]
    traceback: String,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let mut guest = Guest::connect(&arguments.id, context).await?;
    let request = serde_json::to_vec(&Request { op: "eval", code: &arguments.code }).expect("text");
    let raw = ask(&mut guest, &request).await?;
    let answer: Answer = serde_json::from_slice(&raw).map_err(|_| GuestError::Nonsense)?;
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

/// A request to the main process, and its answer.
async fn ask(guest: &mut Guest, request: &[u8]) -> Result<Vec<u8>, GuestError> {
    if request.len() > MAIN_MESSAGE_MAX {
        return Err(GuestError::Refused(format!("the code has more than {MAIN_MESSAGE_MAX} bytes")));
    }
    let bytes = u32::try_from(request.len()).expect("at most 1 MiB");
    guest.says.say(&ToAgent::Ask { bytes }).await?;
    guest.says.say_data(request).await?;
    let FromAgent::Reply { bytes } = guest.hears.hear().await? else { return Err(GuestError::Nonsense) };
    let len = usize::try_from(bytes).ok().filter(|len| *len <= MAIN_MESSAGE_MAX).ok_or(GuestError::Nonsense)?;
    let mut answer = Vec::new();
    while answer.len() < len {
        let FromAgent::Data(piece) = guest.hears.hear().await? else { return Err(GuestError::Nonsense) };
        answer.extend(piece);
    }
    if answer.len() == len { Ok(answer) } else { Err(GuestError::Nonsense) }
}
