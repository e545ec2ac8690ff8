//! Faults of the node that children run on.

use std::path::PathBuf;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use vm::harness::{count, seed};

use super::stage::{IMAGE_BYTES, Stage, family};
use super::{CHILDREN, inject_all, only};
use crate::support::Node;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    PagerPanics,
    NodeKilled,
    WorkersKilled,
    /// Its control group has no memory left for what arrives.
    OutOfMemory,
}

const FAULTS: [Fault; 4] = [Fault::PagerPanics, Fault::NodeKilled, Fault::WorkersKilled, Fault::OutOfMemory];

#[test]
fn real_children_end_with_their_node_pager_or_worker() {
    let run = (seed(), count(8, 150));
    inject_all("faults of the node that children run on", run, &FAULTS, inject, |seed| Stage::new(seed, &[], ""));
}

fn inject(stage: &mut Stage, dice: &mut Rng, fault: Fault) -> Vec<String> {
    let digest = stage.warm();
    let group = MemoryGroup::new();
    let mut asked = stage.ask(&digest, CHILDREN, &[&stage.holder()]);
    stage.wait_until(&mut asked, dice.u64(1..IMAGE_BYTES));
    match fault {
        Fault::PagerPanics => stage.destination().signal(Signal::USR2),
        Fault::NodeKilled => stage.destination().signal(Signal::KILL),
        Fault::WorkersKilled => {
            let node = stage.destination().pid().as_raw_pid();
            // Below it is the zygote, and below that are workers and shells.
            for process in family(node).into_iter().filter(|pid| *pid != node).skip(1).filter(|_| dice.bool()) {
                // It may be gone.
                kill_process(Pid::from_raw(process).unwrap(), Signal::KILL).unwrap_or_default();
            }
        }
        Fault::OutOfMemory => match &group {
            Some(group) => group.take_in(stage.destination()),
            None => println!("SKIPPED: only root may limit memory, by control groups of version 1"),
        },
    }
    let outcomes = asked.outcomes();
    match fault {
        Fault::PagerPanics => only(&outcomes, &["complete", "PAGE_SOURCE_LOST"]),
        Fault::NodeKilled => {
            only(&outcomes, &["complete", "NODE_LOST"]);
            stage.replace_destination();
        }
        // The kernel ends the node, or the node a child, whichever asks first.
        Fault::OutOfMemory => {
            only(&outcomes, &["complete", "OOM", "NODE_LOST"]);
            stage.replace_destination();
        }
        Fault::WorkersKilled => only(&outcomes, &["complete", "WORKER_CRASHED"]),
    }
    stage.forks_well(&digest);
    if fault != Fault::WorkersKilled {
        // A holder keeps the connections of readers that died until they have been idle for 5 s, and a reader has 12.
        std::thread::sleep(Duration::from_millis(2500));
    }
    outcomes
}

/// Most of what is fetched has to be given back while it is still in use, again and again.
#[test]
fn real_children_are_right_where_their_image_does_not_fit() {
    let mut dice = Rng::with_seed(seed());
    let stage = Stage::new(dice.u64(..), &["--host-image-memory", "1MiB"], "");
    for _ in 0..count(2, 50) {
        let digest = stage.warm();
        let asked = stage.ask(&digest, CHILDREN, &[&stage.holder()]);
        only(&asked.outcomes(), &["complete"]);
        stage.clear();
    }
    stage.end();
}

/// A control group with next to no memory.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new() -> Option<Self> {
        let group = Self(format!("/sys/fs/cgroup/memory/farfork-test-{}", uuid::Uuid::now_v7().simple()).into());
        let is_made =
            std::fs::create_dir(&group.0).is_ok() && std::fs::write(group.0.join("memory.limit_in_bytes"), "1M").is_ok();
        is_made.then_some(group)
    }

    /// What the node needs from now on it has to find here.
    fn take_in(&self, node: &Node) {
        std::fs::write(self.0.join("cgroup.procs"), node.pid().as_raw_pid().to_string()).unwrap();
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Empty once the node that was in it is gone.
        std::fs::remove_dir(&self.0).unwrap_or_default();
    }
}
