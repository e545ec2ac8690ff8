//! `farfork node ls` and what becomes of a cluster's nodes; `farfork explain`.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::client::segment;
use super::error::CliError;
use super::fork::full_name;
use super::output::{printable, short, table};
use super::{Context, size};
use crate::api::wire::{ClusterAnswer, ExplainAnswer, TaskAnswer};
use crate::node::trust::Role;

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    Ls(List),
    /// Place nothing new on a node
    #[command(after_help = "Examples:\n  farfork node cordon node-2")]
    Cordon(Which),
    /// Place on it again
    #[command(after_help = "Examples:\n  farfork node uncordon node-2")]
    Uncordon(Which),
    /// Have what is on a node go elsewhere: images that only it has settle on others first. Machines run on until they end
    #[command(after_help = "Examples:\n  farfork node drain node-2 && farfork node ls    # until it has no images")]
    Drain(Which),
    /// Stop draining it
    #[command(after_help = "Examples:\n  farfork node undrain node-2")]
    Undrain(Which),
    /// Never let a node take part again: its certificate is worth nothing as soon as it has lost its vote
    #[command(after_help = "Examples:\n  farfork node revoke node-2")]
    Revoke(Which),
    /// Forget a node that is lost, or has been drained and has no machines left
    #[command(after_help = "Examples:\n  farfork node rm node-2")]
    Rm(Which),
}

/// List the nodes of the cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork node ls
  farfork node ls --stale                # also where no majority can be reached")]
pub(super) struct List {
    /// Show what this node has, which may be behind
    #[arg(long)]
    stale: bool,
}

#[derive(Debug, Args)]
pub(super) struct Which {
    /// Its name, its id, or the last 4 and more digits of that
    node: String,
}

/// Say where machines of a template, an image or a machine would run now, and why; or where a task of a job is
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork explain python -n 300
  farfork explain python --limit 1GiB --output json
  farfork explain a3d9e37c                 # where this machine is, and where more of its image would be
  farfork explain beef 17                  # where task 17 of that job is, or why it waits")]
pub struct ExplainArguments {
    /// A template of the cluster, an image's digest, a machine's id; with a task, a job's id
    #[arg(value_name = "NAME|DIGEST|ID", value_parser = full_name)]
    template: String,
    /// A task of that job, from 0
    #[arg(conflicts_with_all = ["count", "limit"])]
    task: Option<u32>,
    /// How many machines
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u64,
    /// The most memory of its own that each may have
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    limit: Option<u64>,
}

pub(super) async fn run(verb: Verb, context: &Context) -> Result<ExitCode, CliError> {
    let client = &context.client;
    let path = |which: &Which| format!("/v1/nodes/{}", segment(&which.node));
    let change = async |which: Which, verb: &str| client.post::<ClusterAnswer>(&format!("{}/{verb}", path(&which)), &()).await;
    let answer = match verb {
        Verb::Ls(List { stale }) => client.get(&format!("/v1/cluster?stale={stale}")).await?,
        Verb::Cordon(which) => change(which, "cordon").await?,
        Verb::Uncordon(which) => change(which, "uncordon").await?,
        Verb::Drain(which) => change(which, "drain").await?,
        Verb::Undrain(which) => change(which, "undrain").await?,
        Verb::Revoke(which) => change(which, "revoke").await?,
        Verb::Rm(which) => client.delete(&path(&which)).await?,
    };
    context.output.answer(&answer.raw, || for_people(&answer.value))?;
    Ok(types::ExitCode::Ok.into())
}

fn for_people(answer: &ClusterAnswer) -> String {
    let rows = answer.nodes.iter().map(|node| {
        let state = match (node.is_draining, node.is_cordoned) {
            (true, _) => format!("{}, draining", node.life),
            (_, true) => format!("{}, cordoned", node.life),
            _ => node.life.clone(),
        };
        let role = match (answer.leader == Some(node.id), node.role, node.votes) {
            (true, ..) => "leader",
            (_, Role::Voter, true) => "voter",
            (_, Role::Voter, false) => "voter soon",
            (_, Role::Learner, _) => "learner",
        };
        [
            node.name.clone(),
            short(node.id.as_uuid()),
            state,
            role.to_owned(),
            node.address.clone(),
            node.images.to_string(),
            node.taken.machines.to_string(),
            format!("{} of {}", size::bytes(node.taken.memory_bytes), size::bytes(node.capacity.memory_bytes)),
        ]
    });
    let mut text = table(["NODE", "ID", "STATE", "ROLE", "ADDRESS", "IMAGES", "MACHINES", "MEMORY"], &[5, 6], rows.collect());
    if answer.leader.is_none() {
        text.push_str("no leader is known: nothing can be changed until more than half of the voters reach one another\n");
    }
    text
}

pub(super) async fn explain(arguments: &ExplainArguments, context: &Context) -> Result<ExitCode, CliError> {
    if let Some(task) = arguments.task {
        let path = format!("/v1/jobs/{}/tasks/{task}", segment(&arguments.template));
        let answer = context.client.get::<TaskAnswer>(&path).await?;
        context.output.answer(&answer.raw, || task_for_people(&answer.value))?;
        return Ok(types::ExitCode::Ok.into());
    }
    let limit = arguments.limit.map_or_else(String::new, |limit| format!("&limit_bytes={limit}"));
    let path = format!("/v1/explain/{}?count={}{limit}", segment(&arguments.template), arguments.count);
    let answer = context.client.get::<ExplainAnswer>(&path).await?;
    context.output.answer(&answer.raw, || {
        let rows = answer.value.nodes.iter().map(|node| {
            let image = node.settled_percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent} %"));
            let sources = if node.sources.is_empty() { "-".to_owned() } else { node.sources.join(", ") };
            [node.name.clone(), node.count.to_string(), image, sources, node.why.clone()]
        });
        let mut text = table(["NODE", "GETS", "IMAGE", "FROM", "WHY"], &[1], rows.collect());
        if let Some(node) = &answer.value.runs_on {
            text.push_str(&format!("{} runs on {node}\n", arguments.template));
        }
        if answer.value.left > 0 {
            text.push_str(&format!("{} find no place\n", answer.value.left));
        }
        text
    })?;
    Ok(types::ExitCode::Ok.into())
}

fn task_for_people(task: &TaskAnswer) -> String {
    let mut text = format!("task {} ", task.task);
    let node = task.node.as_deref().unwrap_or("no node");
    match (task.state.as_str(), task.status, &task.reason) {
        ("waiting", ..) => text.push_str("waits"),
        ("placed", ..) => text.push_str(&format!("is on {node}")),
        (_, Some(status), _) => text.push_str(&format!("ended with status {status} on {node}")),
        (_, None, reason) => text.push_str(&format!("ended: {}", reason.as_deref().unwrap_or("for no known reason"))),
    }
    match task.attempt {
        Some(1) => text.push_str(", after one try"),
        Some(tries @ 2..) => text.push_str(&format!(", after {tries} tries")),
        _ => {}
    }
    if task.state == "waiting" && task.node.is_some() {
        text.push_str(&format!(", the last of them on {node}"));
    }
    if let Some(copy) = &task.copy {
        text.push_str(&format!("; its output is there and on {copy}"));
    }
    text.push('\n');
    task.why_waiting.iter().for_each(|why| text.push_str(&format!("  {why}\n")));
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_said_to_be_where_it_is() {
        let task = |json: serde_json::Value| task_for_people(&serde_json::from_value(json).unwrap());
        let said =
            task(serde_json::json!({"task": 7, "state": "waiting", "attempt": 2, "node": "a", "why_waiting": ["b is full"]}));
        assert_eq!(said, "task 7 waits, after 2 tries, the last of them on a\n  b is full\n");
        let said =
            task(serde_json::json!({"task": 7, "state": "ended", "status": 3, "node": "a", "copy": "b", "why_waiting": []}));
        assert_eq!(said, "task 7 ended with status 3 on a; its output is there and on b\n");
        let said = task(serde_json::json!({"task": 7, "state": "ended", "reason": "KILLED", "why_waiting": []}));
        assert_eq!(said, "task 7 ended: KILLED\n");
    }
}
