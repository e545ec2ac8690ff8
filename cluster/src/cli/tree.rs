//! `farfork tree`: which machine was forked from what.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use types::{MachineId, NodeId};

use super::Context;
use super::client::ClientError;
use super::error::CliError;
use super::output::short;
use crate::api::wire::{ClusterAnswer, ImagesAnswer, Machine, MachinesAnswer, State, TaskOf};

/// So many children of an image are drawn unless all are asked for.
const DRAWN: usize = 5;

/// Show which machines were forked from what
///
/// Children stand under their image, and images that were frozen from a machine under that machine; in a cluster those of all nodes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork tree
  farfork tree --all          # each of many children, and machines that have ended")]
pub struct Arguments {
    /// Every machine, those that have ended too
    #[arg(short, long)]
    all: bool,
}

/// An image with what was forked from it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Image {
    /// Its digest, or its id on its node while it has none.
    image: String,
    /// Its name, if this node has it under one.
    name: Option<String>,
    running: usize,
    ended: usize,
    machines: Vec<Forked>,
}

/// A machine with what was frozen from it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Forked {
    id: MachineId,
    node: Option<NodeId>,
    task: Option<TaskOf>,
    state: &'static str,
    images: Vec<Image>,
}

pub(crate) async fn run(arguments: &Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let machines = context.client.get::<MachinesAnswer>("/v1/machines?state=all").await?.value;
    let images = context.client.get::<ImagesAnswer>("/v1/images").await?.value;
    let mut names = BTreeMap::new();
    for image in images.images {
        let Some(name) = image.name else { continue };
        names.insert(image.id.to_string(), name.clone());
        names.extend(image.digest.map(|digest| (digest, name)));
    }
    // A node alone has no others, and users of one tenant do not see them: then ids are enough.
    let cluster = match context.client.get::<ClusterAnswer>("/v1/cluster?stale=true").await {
        Err(ClientError::Refused { body, .. }) if matches!(body.code.as_str(), "NO_CLUSTER" | "FORBIDDEN") => None,
        answer => Some(answer?),
    };
    let nodes =
        cluster.into_iter().flat_map(|answer| answer.value.nodes.into_iter().map(|node| (node.id, node.name))).collect();
    let tree = grown(&machines.machines, &names, arguments.all);
    let raw = serde_json::to_vec(&tree).expect("plain data");
    context.output.answer(&raw, || drawn(&tree, &nodes, if arguments.all { usize::MAX } else { DRAWN }))?;
    for node in machines.unheard {
        eprintln!("node {node} does not answer: its machines are missing here");
    }
    Ok(types::ExitCode::Ok.into())
}

/// Images whose parents are not there, or were never machines, with all below them.
fn grown(machines: &[Machine], names: &BTreeMap<String, String>, all: bool) -> Vec<Image> {
    let by_id: BTreeMap<MachineId, &Machine> = machines.iter().map(|machine| (machine.id, machine)).collect();
    let parent = |machine: &Machine| machine.parent.filter(|parent| by_id.contains_key(parent));
    // What has ended is of interest as long as something of it runs.
    let mut kept = BTreeSet::new();
    for machine in machines.iter().filter(|machine| all || machine.state == State::Running) {
        let mut next = Some(machine);
        while let Some(machine) = next.filter(|machine| kept.insert(machine.id)) {
            next = parent(machine).map(|id| by_id[&id]);
        }
    }
    let mut below: BTreeMap<Option<MachineId>, Vec<&Machine>> = BTreeMap::new();
    for machine in machines.iter().filter(|machine| kept.contains(&machine.id)) {
        below.entry(parent(machine)).or_default().push(machine);
    }
    images(None, &below, names)
}

fn images(
    of: Option<MachineId>,
    below: &BTreeMap<Option<MachineId>, Vec<&Machine>>,
    names: &BTreeMap<String, String>,
) -> Vec<Image> {
    let mut images: Vec<Image> = Vec::new();
    for machine in below.get(&of).into_iter().flatten() {
        let image = machine.image_digest.clone().unwrap_or_else(|| machine.image.to_string());
        let forked = Forked {
            id: machine.id,
            node: machine.node,
            task: machine.task,
            state: if machine.state == State::Running { "running" } else { "ended" },
            images: self::images(Some(machine.id), below, names),
        };
        let runs = machine.state == State::Running;
        let index = images.iter().position(|known| known.image == image).unwrap_or_else(|| {
            let name = names.get(&image).cloned();
            images.push(Image { image, name, running: 0, ended: 0, machines: Vec::new() });
            images.len() - 1
        });
        let known = &mut images[index];
        known.running += usize::from(runs);
        known.ended += usize::from(!runs);
        known.machines.push(forked);
    }
    images
}

fn drawn(tree: &[Image], nodes: &BTreeMap<NodeId, String>, most: usize) -> String {
    let mut text = String::new();
    for image in tree {
        draw_image(image, nodes, most, ("", ""), &mut text);
    }
    text
}

fn draw_image(image: &Image, nodes: &BTreeMap<NodeId, String>, most: usize, (first, rest): (&str, &str), text: &mut String) {
    let shown = image.image.get(..12).filter(|_| image.image.len() == 64).unwrap_or(&image.image);
    let name = image.name.as_deref().map_or_else(String::new, |name| format!("{name} "));
    let ended = if image.ended > 0 { format!(", {} ended", image.ended) } else { String::new() };
    writeln!(text, "{first}{name}image {shown}: {} running{ended}", image.running).expect("text grows");
    // Those that something was frozen from are the interesting ones.
    let (parents, others): (Vec<&Forked>, Vec<&Forked>) = image.machines.iter().partition(|machine| !machine.images.is_empty());
    let room = most.saturating_sub(parents.len());
    let lines: Vec<&Forked> = parents.into_iter().chain(others.iter().take(room).copied()).collect();
    let left = others.len().saturating_sub(room);
    for (at, machine) in lines.iter().enumerate() {
        let is_last = at + 1 == lines.len() && left == 0;
        let (branch, below) = if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let node = machine.node.map(|node| nodes.get(&node).cloned().unwrap_or_else(|| short(node.as_uuid())));
        let node = node.map_or_else(String::new, |node| format!("  {node}"));
        let state = if machine.state == "running" { "" } else { "  ended" };
        let task = machine.task.map(|of| format!("  task {} of job {}", of.task, short(&of.job))).unwrap_or_default();
        writeln!(text, "{rest}{branch}{}{node}{task}{state}", short(machine.id.as_uuid())).expect("text grows");
        for (at, image) in machine.images.iter().enumerate() {
            let is_last = at + 1 == machine.images.len();
            let (branch, under) = if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            let (first, rest) = (format!("{rest}{below}{branch}"), format!("{rest}{below}{under}"));
            draw_image(image, nodes, most, (&first, &rest), text);
        }
    }
    if left > 0 {
        writeln!(text, "{rest}└─ {left} more (--all)").expect("text grows");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn machine(number: u128, image: &str, parent: Option<u128>, state: &str) -> Machine {
        let id = |number| Uuid::from_u128(number).to_string();
        serde_json::from_value(json!({
            "id": id(number), "image": id(99), "image_digest": image.repeat(64), "tenant": "default", "parent": parent.map(id),
            "state": state, "created_unix_ms": 0, "first_us": 0, "had_shell": true,
            "stages_us": {"shell": 0, "send": 0, "map": 0, "restore": 0, "run": 0},
        }))
        .unwrap()
    }

    #[test]
    fn children_stand_under_what_they_were_forked_from() {
        let job = Uuid::from_u128(0xBEEF);
        let mut machines =
            vec![machine(1, "a", None, "running"), machine(2, "a", None, "ended"), machine(3, "b", Some(1), "running")];
        machines.extend((10..18).map(|number| machine(number, "b", Some(1), "running")));
        // Its parent is on a node that does not answer.
        machines.push(machine(30, "c", Some(77), "running"));
        machines[2].task = Some(TaskOf { job, task: 17 });
        let names = [("a".repeat(64), "py".to_owned())].into_iter().collect();
        let text = drawn(&grown(&machines, &names, false), &BTreeMap::new(), DRAWN);
        let expected = "\
py image aaaaaaaaaaaa: 1 running
└─ 00000001
   └─ image bbbbbbbbbbbb: 9 running
      ├─ 00000003  task 17 of job 0000beef
      ├─ 0000000a
      ├─ 0000000b
      ├─ 0000000c
      ├─ 0000000d
      └─ 4 more (--all)
image cccccccccccc: 1 running
└─ 0000001e
";
        assert_eq!(text, expected);
        // All of them, and what has ended.
        let all = grown(&machines, &names, true);
        assert_eq!((all[0].running, all[0].ended, all[0].machines[0].images[0].machines.len()), (1, 1, 9));
        assert!(drawn(&all, &BTreeMap::new(), usize::MAX).contains("00000002  ended"));
        // A parent that has ended stays as long as a child runs.
        machines[0] = machine(1, "a", None, "ended");
        assert_eq!(grown(&machines, &names, false)[0].machines[0].images[0].running, 9);
    }
}
