//! `farfork show`.

use std::process::ExitCode;

use clap::Args;

use super::client::Found;
use super::error::CliError;
use super::fork::id_or_digest;
use super::output::time;
use super::progress::stage_cell;
use super::{Context, size};
use crate::api::wire::{Image, MachineAnswer, Residency, Source};
use crate::node::engine::SourceState;

/// Show a machine with what it costs and prints, or an image in memory, and how much of it is here
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork show a3d9e37c
  farfork show a3d9e37c --output json | jq .usage
  farfork show a3d9e37c --output json | jq .residency.sources")]
pub struct Arguments {
    /// The id of a machine or an image, the last 4 and more digits of it, or an image's digest
    #[arg(value_name = "ID", value_parser = id_or_digest)]
    id: String,
}

pub(crate) async fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CliError> {
    match context.client.find(&arguments.id).await? {
        Found::Machine(answer) => context.output.answer(&answer.raw, || machine(&answer.value))?,
        Found::Image(answer) => context.output.answer(&answer.raw, || image(&answer.value))?,
    }
    Ok(types::ExitCode::Ok.into())
}

fn machine(answer: &MachineAnswer) -> String {
    let machine = &answer.machine;
    let mut lines = Lines::default();
    lines.add("machine", machine.id);
    lines.add("image", machine.image);
    lines.add_some("parent", machine.parent);
    match &machine.ended {
        Some(ended) => lines.add("ended", format!("{}: {}", ended.reason, ended.detail)),
        None => lines.add("state", "running"),
    }
    lines.add("age", size::age(machine.created_unix_ms, pages::clock::wall()));
    lines.add("first", format!("{} us = {}", machine.first_us, stage_cell(&machine.stages_us)));
    if let Some(ready) = &machine.ready {
        let gate = if ready.was_gated { "" } else { ", ungated: a branch of what ran" };
        lines.add("ready", format!("{} after the fork, as {}{gate}", time(ready.after_us), ready.hostname));
        lines.add_some("address", ready.address.as_ref());
        for step in &ready.steps {
            let skipped = step.skipped.as_ref().map_or_else(String::new, |why| format!(" (skipped: {why})"));
            lines.add("", format!("{}: {}{skipped}", step.name, time(step.took_us)));
        }
    }
    lines.add_some("verified", machine.verified_pages.map(|pages| format!("{pages} pages")));
    lines.add_some("limit", machine.limit_bytes.map(size::bytes));
    if let Some(usage) = &answer.usage {
        lines.add("share", size::bytes(usage.pss_bytes));
        lines.add("private", size::bytes(usage.private_bytes));
        lines.add("tables", size::bytes(usage.page_table_bytes));
        lines.add("cpu", format!("{} us", usage.cpu_us));
        lines.add("faults", usage.faults);
    }
    if let Some(residency) = &answer.residency {
        lines.add_residency(residency);
    }
    if !answer.console.tail.is_empty() {
        lines.add("console", format!("{} bytes dropped before this", answer.console.dropped_bytes));
        lines.text.push_str(answer.console.tail.trim_end());
        lines.text.push('\n');
    }
    lines.text
}

fn image(image: &Image) -> String {
    let mut lines = Lines::default();
    lines.add("image", image.id);
    lines.add_some("digest", image.digest.as_ref());
    lines.add_some("name", image.name.as_ref());
    lines.add("tenant", &image.tenant);
    lines.add("origin", &image.origin);
    lines.add_some("parent", image.parent);
    lines.add("age", size::age(image.created_unix_ms, pages::clock::wall()));
    lines.add("memory", size::bytes(image.memory_bytes));
    lines.add("vcpus", image.vcpus);
    lines.add_some("disk", image.disk_bytes.map(size::bytes));
    lines.add("depth", image.depth);
    lines.add("own", size::bytes(image.own_bytes));
    lines.add("stored", size::bytes(image.stored_bytes));
    lines.add("proof", if image.verifiable { "children can prove their memory" } else { "none" });
    if let Some(residency) = &image.residency {
        lines.add_residency(residency);
    }
    lines.text
}

#[derive(Default)]
struct Lines {
    text: String,
}

impl Lines {
    fn add(&mut self, name: &str, value: impl std::fmt::Display) {
        self.text.push_str(&format!("{name:<9} {value}\n"));
    }

    /// What of the image is here. Of one that came from nowhere there is little to say.
    fn add_residency(&mut self, residency: &Residency) {
        let Residency { resident_bytes, remote_bytes, wire_bytes, faults, children, .. } = residency;
        self.add("resident", size::bytes(*resident_bytes));
        self.add("remote", size::bytes(*remote_bytes));
        self.add(
            "settled",
            match (&residency.failed, residency.is_settled, residency.settled_after_us) {
                (Some(failed), ..) => format!("no: {}: {}", failed.reason, failed.detail),
                (None, true, Some(us)) => format!("yes, {} after it was opened", time(us)),
                (None, true, None) => "yes".to_owned(),
                (None, false, _) => format!("{} %", residency.settled_percent),
            },
        );
        self.add("children", children);
        if !residency.sources.is_empty() {
            self.add("fetched", format!("{} on the wire, {faults} faults waited", size::bytes(*wire_bytes)));
        }
        for Source { address, node, state, extents, bytes, failures } in &residency.sources {
            let node = node.map_or_else(String::new, |node| format!(" (node {node})"));
            let state = name(*state);
            let bytes = size::bytes(*bytes);
            self.add("source", format!("{address}{node}: {state}, {extents} extents, {bytes}, {failures} failures"));
        }
    }

    fn add_some(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }
}

fn name(state: SourceState) -> &'static str {
    match state {
        SourceState::Good => "good",
        SourceState::Suspect => "suspect",
        SourceState::Quarantined => "quarantined",
        SourceState::Gone => "gone",
    }
}
