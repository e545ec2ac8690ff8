//! `farfork doctor`: can this host run machines, how many, and what stands in the way. Asks no node.

mod checks;
mod host;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::error::CliError;
use super::output::{Output, table};
use host::HostView;

/// Check what this host needs to run machines
///
/// Exit code 0 if nothing fails, else 4. What only warns works, but not as well or not for as many machines.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork doctor
  farfork doctor --output json | jq -r '.items[] | select(.status != \"ok\") | .remedy'")]
pub struct Arguments {}

/// All items.
#[derive(Debug, Serialize)]
struct Report {
    /// The worst of the items.
    status: Status,
    items: Vec<Item>,
}

/// One prerequisite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Item {
    id: &'static str,
    status: Status,
    found: String,
    needed: &'static str,
    /// What to do about it, if there is something to do.
    remedy: Option<String>,
}

/// How good it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

pub(crate) fn run(_arguments: &Arguments, output: Output) -> Result<ExitCode, CliError> {
    let report = report(&HostView::this());
    let raw = serde_json::to_vec(&report).expect("a report is text");
    output.answer(&raw, || for_people(&report))?;
    let code = if report.status == Status::Fail { types::ExitCode::Refused } else { types::ExitCode::Ok };
    Ok(code.into())
}

fn report(host: &HostView) -> Report {
    let items = checks::all(host);
    let status = items.iter().map(|item| item.status).max().unwrap_or(Status::Ok);
    Report { status, items }
}

fn for_people(report: &Report) -> String {
    let rows = report
        .items
        .iter()
        .map(|item| [item.id.to_owned(), item.status.word().to_owned(), item.found.clone(), item.needed.to_owned()]);
    let mut text = table(["ITEM", "STATUS", "FOUND", "NEEDED"], &[], rows.collect());
    for item in &report.items {
        if let Some(remedy) = &item.remedy {
            text.push_str(&format!("{}: {remedy}\n", item.id));
        }
    }
    text
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}
