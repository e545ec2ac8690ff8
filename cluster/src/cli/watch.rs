//! `farfork watch`.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::client::{Client, Found, segment};
use super::error::CliError;
use super::fork::id_or_digest;
use super::output::{Output, print, printable};
use super::{Context, size};
use crate::api::wire::{Image, MachineAnswer, Residency};

/// How often the node is asked.
const EVERY: Duration = Duration::from_millis(200);

/// Wait until all memory of an image is on this node, and show how far it is
///
/// Of a machine its image is watched. Exits with 0 once the image is settled: then none of its machines needs another node any
/// more. Exits with 4 if that cannot be any more, because no node is left that has what is missing.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork watch a3d9e37c
  farfork watch a3d9e37c --timeout 60s && echo settled
  farfork watch a3d9e37c --output json      # an object a line, whenever something has changed")]
pub struct Arguments {
    /// The id of a machine or an image, the last 4 and more digits of it, or an image's digest
    #[arg(value_name = "ID", value_parser = id_or_digest)]
    id: String,
    /// How long to wait at most [default: as long as it takes]
    #[arg(long, value_name = "TIME", value_parser = size::duration)]
    timeout: Option<Duration>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { id, timeout } = arguments;
    let began = Instant::now();
    let watched = Watched::find(&id, &context.client).await?;
    let mut display = Display::new(context.output);
    loop {
        // What has ended or was forgotten meanwhile has none.
        let residency = watched.residency(&context.client).await?.ok_or_else(|| CliError::Gone { id: id.clone() })?;
        display.show(&residency)?;
        if let Some(failed) = residency.failed {
            return Err(CliError::Lost { image: id, reason: failed.reason, detail: failed.detail });
        }
        if residency.is_settled {
            return Ok(types::ExitCode::Ok.into());
        }
        if let Some(deadline) = timeout.filter(|timeout| began.elapsed() >= *timeout) {
            return Err(CliError::Late { id, deadline, settled_percent: residency.settled_percent });
        }
        let left = timeout.map_or(EVERY, |timeout| timeout.saturating_sub(began.elapsed()));
        tokio::time::sleep(EVERY.min(left)).await;
    }
}

/// What is asked for again and again, by its full id: another may get the same end.
enum Watched {
    Machine(String),
    Image(String),
}

impl Watched {
    async fn find(id: &str, client: &Client) -> Result<Self, CliError> {
        Ok(match client.find(id).await? {
            Found::Machine(answer) => Self::Machine(format!("/v1/machines/{}", answer.value.machine.id)),
            Found::Image(answer) => Self::Image(format!("/v1/images/{}", segment(&answer.value.id.to_string()))),
        })
    }

    async fn residency(&self, client: &Client) -> Result<Option<Residency>, CliError> {
        Ok(match self {
            Self::Machine(path) => client.get::<MachineAnswer>(path).await?.value.residency,
            Self::Image(path) => client.get::<Image>(path).await?.value.residency,
        })
    }
}

/// A bar where there is a terminal, lines elsewhere, objects for programs.
struct Display {
    output: Output,
    bar: Option<ProgressBar>,
    shown: Option<Residency>,
}

impl Display {
    fn new(output: Output) -> Self {
        let is_for_people = output == Output::Table && std::io::stderr().is_terminal();
        let bar = is_for_people.then(|| {
            let template = "{bar:30} {percent:>3} %  {bytes} of {total_bytes}, {msg}, {eta} left";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Self { output, bar, shown: None }
    }

    fn show(&mut self, residency: &Residency) -> Result<(), CliError> {
        if self.shown.as_ref() == Some(residency) {
            return Ok(());
        }
        self.shown = Some(residency.clone());
        let is_last = residency.is_settled || residency.failed.is_some();
        match (&self.bar, self.output) {
            (_, Output::Json) => {
                let line = serde_json::to_string(residency).expect("numbers and texts");
                print(format!("{line}\n").as_bytes())
            }
            (Some(bar), Output::Table) if !is_last => {
                bar.set_length(residency.data_bytes);
                bar.set_position(residency.resident_bytes);
                bar.set_message(format!("{} faults", residency.faults));
                Ok(())
            }
            (bar, Output::Table) => {
                bar.iter().for_each(ProgressBar::finish_and_clear);
                print(printable(&line(residency)).as_bytes())
            }
        }
    }
}

fn line(residency: &Residency) -> String {
    let Residency { resident_bytes, data_bytes, wire_bytes, faults, children, .. } = residency;
    let (here, all, wire) = (size::bytes(*resident_bytes), size::bytes(*data_bytes), size::bytes(*wire_bytes));
    let settled = residency.in_short();
    format!("settled: {settled}, {here} of {all}, {wire} on the wire, {faults} faults, {children} children\n")
}
