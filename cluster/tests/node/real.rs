//! Nodes with real machines: what holds only together. Needs KVM, and root for the control groups.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use vm::harness::{count, held, seed};

use crate::support::{Node, eventually, ids, is_root, remove_groups};

fn start() -> Node {
    Node::start_in(tempfile::tempdir().unwrap(), &[])
}

pub(crate) fn pids() -> BTreeSet<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A process and all below it.
pub(crate) fn family(pid: i32) -> BTreeSet<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<i32> =
        children.flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect();
    children.into_iter().flat_map(family).chain([pid]).collect()
}

/// The groups of this node's workers, in the hierarchy that counts processes.
pub(crate) fn groups(node: &Node) -> usize {
    let data = std::fs::read_to_string(node.path().join("data/node.json")).unwrap();
    let id = serde_json::from_str::<Value>(&data).unwrap()["node"].as_str().unwrap().replace('-', "");
    let path = format!("/sys/fs/cgroup/pids/farfork-{}/workers", &id[20..]);
    std::fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count()
}

#[test]
fn a_user_forks_branches_saves_loads_and_kills() {
    let mut node = start();
    let forked = node.json(&["fork", "--guest", "probe", "-n", "20", "--memory", "16MiB", "--verify"]);
    let children = forked["children"].as_array().unwrap();
    assert_eq!(children.len(), 20, "{forked}");
    assert!(children.iter().all(|child| child["verified_pages"].as_u64().unwrap() == 1024), "{forked}");
    assert_eq!(node.machines().len(), 20);
    let image = forked["image"]["id"].as_str().unwrap();
    let first = children[0]["id"].as_str().unwrap();

    let branched = node.json(&["branch", first, "-n", "3"]);
    assert_eq!(branched["children"].as_array().unwrap().len(), 3, "{branched}");
    assert!(branched["freeze"]["dirty_pages"].as_u64().unwrap() > 0, "{branched}");
    let shown = node.json(&["show", first]);
    assert!(shown["usage"]["pss_bytes"].as_u64().unwrap() > 0, "{shown}");
    // The short id that tables show.
    assert_eq!(node.json(&["show", &first[first.len() - 8..]])["id"], shown["id"]);

    let saved = node.json(&["image", "save", image, "warm"]);
    let taken = node.cli(&["image", "save", image, "warm", "--output", "json"]);
    assert_eq!((taken.code, taken.error_code().as_str()), (Some(4), "NAME_TAKEN"));
    let loaded = node.json(&["image", "load", "warm"]);
    assert_eq!(loaded["digest"], saved["digest"], "{loaded}");
    assert_ne!(loaded["id"], image);
    let again = node.json(&["fork", "--from", loaded["id"].as_str().unwrap(), "-n", "2"]);
    assert_eq!(again["children"].as_array().unwrap().len(), 2);
    assert_eq!(node.cli(&["image", "rm", image]).code, Some(0));
    assert_eq!(node.cli(&["image", "rm", "warm"]).code, Some(0));
    assert_eq!(node.cli(&["fork", "--from", image]).code, Some(4));

    assert_eq!(node.machines().len(), 25);
    assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
    assert_eq!(node.machines().len(), 0);
    let metrics = node.http("GET", "/metrics", b"");
    assert!(metrics.body.contains("farfork_fork_stage_seconds_bucket"), "{metrics:?}");
    let before = family(node.pid().as_raw_pid());
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait().code(), Some(0));
    eventually("every process of the node is gone", || before.is_disjoint(&pids()));
    assert_eq!(groups(&node), 0);
}

#[test]
fn a_machine_that_ends_by_itself_is_shown_with_its_reason() {
    let node = start();
    let forked = node.json(&["fork", "--guest", "probe", "-n", "3", "--memory", "16MiB"]);
    let before = family(node.pid().as_raw_pid());
    // A worker is what is below the zygote; shells that wait are, too, so all but the first two levels are ended.
    let zygote: BTreeSet<i32> = before.iter().copied().filter(|pid| *pid != node.pid().as_raw_pid()).take(1).collect();
    for worker in before.iter().filter(|pid| **pid != node.pid().as_raw_pid() && !zygote.contains(pid)) {
        rustix::process::kill_process(rustix::process::Pid::from_raw(*worker).unwrap(), rustix::process::Signal::KILL)
            .unwrap_or_default();
    }
    eventually("no machine runs", || node.machines().is_empty());
    let ended = node.json(&["ls", "--all"]);
    let ended = ended["machines"].as_array().unwrap();
    assert_eq!(ids(&forked["children"]).len(), ended.len());
    for machine in ended {
        assert_eq!(machine["state"], "ended", "{machine}");
        assert_eq!(machine["ended"]["reason"], "WORKER_CRASHED", "{machine}");
    }
    // The node goes on.
    node.json(&["fork", "--from", forked["image"]["id"].as_str().unwrap(), "-n", "2"]);
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_left_of_it() {
    let node = start();
    let refused = node.cli(&["fork", "--guest", "probe", "--memory", "16MiB", "--limit", "4KiB", "--output", "json"]);
    assert_eq!((refused.code, refused.error_code().as_str()), (Some(2), "UNFIT"), "{refused:?}");
    let host_gib = vm::harness::host().memory_bytes() >> 30;
    if host_gib < 31 {
        let refused = node.cli(&["fork", "--guest", "probe", "--memory", "32GiB", "--output", "json"]);
        assert_eq!((refused.code, refused.error_code().as_str()), (Some(2), "UNFIT"), "{refused:?}");
    }
    assert_eq!(node.machines().len(), 0);
    let forked = node.json(&["fork", "--guest", "probe", "--memory", "16MiB", "--limit", "8MiB", "-n", "2"]);
    assert_eq!(forked["failures"].as_array().unwrap().len(), 0, "{forked}");
}

#[test]
fn a_node_killed_at_any_moment_leaves_nothing_that_the_next_one_does_not_reap() {
    let seed = seed();
    let mut dice = fastrand::Rng::with_seed(seed);
    let mut directory = tempfile::tempdir().unwrap();
    let rounds = count(4, 60);
    for _ in 0..rounds {
        let node = Node::start_in(directory, &[]);
        let mut asking = node.command(&["fork", "--guest", "probe", "-n", "40", "--memory", "16MiB"]);
        let mut asking = asking.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(dice.u64(0..250_000)));
        let before = family(node.pid().as_raw_pid());
        directory = node.crash();
        asking.wait().unwrap();
        eventually("every process of the node is gone", || before.is_disjoint(&pids()));
    }
    let node = Node::start_in(directory, &[]);
    assert_eq!(node.machines().len(), 0);
    assert_eq!(groups(&node), 0, "groups of nodes before this one");
    node.json(&["fork", "--guest", "probe", "-n", "2", "--memory", "16MiB", "--verify"]);
    held("nodes killed in the middle of forks", rounds);
}

#[test]
fn two_nodes_live_side_by_side() {
    let (one, other) = (start(), start());
    one.json(&["fork", "--guest", "probe", "-n", "3", "--memory", "16MiB"]);
    other.json(&["fork", "--guest", "probe", "-n", "4", "--memory", "16MiB"]);
    remove_groups(one.crash().path());
    assert_eq!(other.machines().len(), 4);
    other.json(&["fork", "--guest", "probe", "-n", "2", "--memory", "16MiB", "--verify"]);
}

#[test]
fn a_store_without_room_refuses_and_is_as_it_was() {
    if !is_root() {
        println!("SKIPPED: only root may mount a small file system");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("data/images");
    std::fs::create_dir_all(&store).unwrap();
    let small = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&store).status();
    assert!(small.unwrap().success(), "this test mounts a small file system: it needs root");
    let unmount = Unmount(store.clone());
    let node = Node::start_in(directory, &[]);
    let forked = node.json(&["fork", "--guest", "probe", "--memory", "64MiB"]);
    let refused = node.cli(&["image", "save", forked["image"]["id"].as_str().unwrap(), "warm", "--output", "json"]);
    assert_eq!((refused.code, refused.error_code().as_str()), (Some(4), "STORE_FULL"), "{refused:?}");
    assert!(refused.err.contains("room"), "{refused:?}");
    assert_eq!(std::fs::read_dir(&store).unwrap().count(), 0);
    assert_eq!(node.machines().len(), 1);
    drop(node);
    drop(unmount);
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
