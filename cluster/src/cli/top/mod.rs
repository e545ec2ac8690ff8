//! `farfork top`.
//!
//! ```text
//!  ask: requests ──▶ snapshot: what is seen, and how fast it changes ──▶ draw: one frame ──▶ screen, or stdout with --once
//! ```

mod ask;
mod draw;
mod screen;
mod snapshot;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::Context;
use super::error::CliError;
use super::output::Output;
use snapshot::Snapshot;

/// How often nodes are asked.
const EVERY: Duration = Duration::from_secs(1);

/// Watch hosts, templates and jobs
///
/// Of each host: machines and memory that are taken, of how much; children forked a second; bytes of images' memory that come in
/// a second; images of other nodes that are settled, + those that arrive. HOLDERS of a template are nodes that have all of its
/// image, + those that have some. A star marks the node that leads. `q` leaves, tab and arrows choose.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork top
  farfork top --once                     # tables, a second after it was begun: rates take two looks
  farfork top --once --output json | jq '.hosts[] | {name, forks_per_s}'")]
pub struct Arguments {
    /// Print what there is, and leave
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CliError> {
    if arguments.once {
        once(context).await?;
    } else {
        let usage = |message: &str| CliError::Usage { message: message.to_owned(), remedy: "add --once".to_owned() };
        if context.output == Output::Json {
            return Err(usage("what is drawn on a terminal is no JSON"));
        }
        if !screen::is_there() {
            return Err(usage("stdin and stdout are no terminal"));
        }
        screen::run(&context.client).await?;
    }
    Ok(types::ExitCode::Ok.into())
}

async fn once(context: &Context) -> Result<(), CliError> {
    let before = ask::ask(&context.client).await?;
    tokio::time::sleep(EVERY).await;
    let snapshot = Snapshot::of(&ask::ask(&context.client).await?, Some(&before));
    let raw = serde_json::to_vec(&snapshot).expect("plain data");
    context.output.answer(&raw, || draw::tables(&snapshot))?;
    if context.output == Output::Table {
        for trouble in &snapshot.troubles {
            eprintln!("{}", super::output::printable(trouble));
        }
    }
    Ok(())
}
