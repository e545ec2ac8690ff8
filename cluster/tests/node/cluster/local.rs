//! Clusters that `farfork up` brings up on one host, and what is left of them.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use chaos::network::Network;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{PROGRAM, Said, eventually, ids, is_root, wait};

/// A directory for one; what runs of it ends with the test.
struct Local(TempDir);

impl Local {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap().join("local")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).args(["--output", "json", "--data"]).arg(self.path()).stdin(Stdio::null());
        command
    }

    fn say(&self, arguments: &[&str]) -> Said {
        Said::of(self.command(arguments).output().unwrap())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let said = self.say(arguments);
        assert_eq!(said.code, Some(0), "{arguments:?}: {said:?}");
        serde_json::from_str(&said.out).unwrap()
    }

    /// What is written down; null if nothing is.
    fn state(&self) -> Value {
        let text = std::fs::read(self.path().join("up.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The ids of the nodes, of which so many are up, and all of those vote.
    fn agreed(&self, count: usize) -> Vec<String> {
        let socket = self.path().join("node-1/farfork.sock");
        let said = Command::new(PROGRAM).args(["node", "ls", "--output", "json", "--socket"]).arg(socket).output();
        let said = Said::of(said.unwrap());
        let list: Value = serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        let nodes = list["nodes"].as_array().unwrap();
        assert_eq!(nodes.len(), count, "{list}");
        assert!(nodes.iter().all(|node| node["life"] == "up" && node["votes"] == true), "{list}");
        ids(&list["nodes"])
    }

    /// Starts an `up`, and signals it as soon as it has started a node, counted from zero. Says what it exited with.
    fn end_up_after(&self, node: usize, signal: Signal, flags: &[&str]) -> Option<i32> {
        let mut up = self.command(&[&["up"], flags].concat()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("the node was started", || self.state()["nodes"][node]["process"]["pid"].is_number());
        // Two at once there cannot be.
        let second = self.say(&["up"]);
        assert_eq!((second.code, &*second.error_code()), (Some(4), "BUSY"), "{second:?}");
        kill_process(Pid::from_child(&up), signal).unwrap();
        wait(&mut up).code()
    }

    /// Checks that there is no process that has this directory on its command line, and no namespace that begins like this.
    fn nothing_runs(&self, namespaces: &Value) {
        let directory = self.path().display().to_string();
        let runs = || {
            let processes = std::fs::read_dir("/proc").unwrap().flatten();
            let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
            lines.filter(|line| String::from_utf8_lossy(line).contains(&directory)).count()
        };
        // What was not yet written down ends by itself.
        eventually("no process is left", || runs() == 0);
        if let Some(prefix) = namespaces.as_str() {
            let names = std::fs::read_dir("/run/netns").unwrap().flatten();
            let left: Vec<_> = names.filter(|name| name.file_name().to_string_lossy().starts_with(prefix)).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in 1..=9 {
                let log = std::fs::read_to_string(self.path().join(format!("node-{node}/log")));
                log.into_iter().for_each(|log| eprintln!("the log of node {node}:\n{log}"));
            }
        }
        let _ = self.command(&["down", "--purge"]).output();
    }
}

/// What root needs where it may not make namespaces.
fn flags() -> &'static [&'static str] {
    let may_isolate = !is_root() || Network::new("may", 1).unwrap().is_isolated();
    if may_isolate { &[] } else { &["--no-namespaces"] }
}

fn pids(up: &Value) -> Vec<i64> {
    up["nodes"].as_array().unwrap().iter().map(|node| node["pid"].as_i64().unwrap()).collect()
}

fn runs(pid: i64) -> bool {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

#[test]
fn a_local_cluster_comes_up_goes_down_and_comes_back_as_it_was() {
    let (local, flags) = (Local::new(), flags());
    let up = local.json(&[&["up", "--nodes", "3"], flags].concat());
    assert_eq!(up["was_up"], false);
    let first = local.agreed(3);
    let namespaces = local.state()["namespaces"].clone();
    assert_eq!(namespaces.is_string(), is_root() && flags.is_empty());
    // Again: it says that it runs, and the same as before.
    let again = local.json(&["up"]);
    assert_eq!((&again["was_up"], &again["nodes"]), (&true.into(), &up["nodes"]));
    let fewer = local.say(&["up", "--nodes", "2"]);
    assert_eq!((fewer.code, &*fewer.error_code()), (Some(2), "USAGE"), "{fewer:?}");
    // One that was killed is started again, the others are left alone.
    let before = pids(&up);
    kill_process(Pid::from_raw(before[2].try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    eventually("it has ended", || !runs(before[2]));
    let mended = pids(&local.json(&["up"]));
    assert!(mended[..2] == before[..2] && mended[2] != before[2], "{before:?} {mended:?}");
    assert_eq!(local.agreed(3), first);
    // Down, twice.
    let down = local.json(&["down"]);
    assert_eq!((down["stopped"].as_array().unwrap().len(), &down["killed"]), (3, &Value::Array(Vec::new())), "{down}");
    local.nothing_runs(&namespaces);
    let nothing = local.json(&["down"]);
    assert_eq!((&nothing["stopped"], &nothing["is_purged"]), (&Value::Array(Vec::new()), &false.into()));
    // They come back as who they were.
    let back = local.json(&["up"]);
    assert!(back["was_up"] == false && local.agreed(3) == first, "{back}");
    assert_eq!(local.json(&["down", "--purge"])["is_purged"], true);
    assert!(!local.path().exists());
    local.nothing_runs(&namespaces);
    assert_eq!(local.json(&["down", "--purge"])["is_purged"], false);
}

#[test]
fn what_a_killed_up_has_left_is_cleared_up_or_gone_on_with() {
    let (local, flags) = (Local::new(), flags());
    assert_eq!(local.end_up_after(0, Signal::KILL, flags), None);
    let namespaces = local.state()["namespaces"].clone();
    local.json(&["down"]);
    local.nothing_runs(&namespaces);
    // Ctrl-C: it clears up itself.
    assert_eq!(local.end_up_after(0, Signal::INT, &[]), Some(130));
    local.nothing_runs(&namespaces);
    assert_eq!(local.end_up_after(1, Signal::KILL, &[]), None);
    let up = local.json(&["up"]);
    assert_eq!(up["was_up"], false);
    local.agreed(3);
    local.json(&["down", "--purge"]);
    local.nothing_runs(&namespaces);
}

#[test]
fn a_node_that_cannot_start_is_named_with_its_log_and_what_was_started_stops() {
    let local = Local::new();
    let up = local.json(&["up", "--nodes", "2", "--no-namespaces"]);
    local.agreed(2);
    local.json(&["down"]);
    let address = up["nodes"][1]["address"].as_str().unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{up}");
    let taken = UdpSocket::bind(address).unwrap();
    let failed = local.say(&["up"]);
    assert_eq!((failed.code, &*failed.error_code()), (Some(4), "NODE_ENDED"), "{failed:?}");
    let log = up["nodes"][1]["log"].as_str().unwrap();
    assert!(failed.err.contains("node-2 ended") && failed.err.contains(log) && failed.err.contains("in use"), "{failed:?}");
    local.nothing_runs(&Value::Null);
    drop(taken);
    local.json(&["up"]);
    local.agreed(2);
}
