//! The command line: what it prints, and what it exits with.

use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal};
use serde_json::json;

use crate::support::{Node, PROGRAM, Said, eventually, ids, wait};

fn alone(arguments: &[&str]) -> Said {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env("FARFORK_SOCKET", "/nonexistent/farfork.sock");
    Said::of(command.output().unwrap())
}

#[test]
fn the_journey_of_the_manual() {
    let node = Node::start("");
    let fork = node.cli(&["fork", "--guest", "probe", "-n", "3", "--memory", "64MiB", "--vcpus", "1", "--verify"]);
    assert_eq!(fork.code, Some(0), "{fork:?}");
    assert!(fork.out.contains("16128 pages") && fork.out.contains("3 of image"), "{fork:?}");
    assert_eq!(fork.err, "", "nothing on stderr where that is no terminal");
    let machines = node.machines();
    let (machine, end) = (&machines[0], &machines[0][28..]);
    assert!(node.cli(&["ls"]).out.contains(end));
    assert!(node.cli(&["show", end]).out.contains("hello from a fake"));
    let branch = node.cli(&["branch", end, "-n", "2", "--limit", "16MiB"]);
    assert!(branch.out.contains("froze the machine: stalled 900 us"), "{branch:?}");
    let images = ids(&node.json(&["image", "ls"])["images"]);
    assert_eq!(node.json(&["show", &images[0]])["origin"], "guest");
    assert_eq!(node.cli(&["image", "save", &images[0], "warm"]).code, Some(0));
    let taken = node.cli(&["image", "save", &images[0], "warm", "--output", "json"]);
    assert_eq!((taken.code, taken.error_code().as_str()), (Some(4), "NAME_TAKEN"));
    let loaded = node.json(&["image", "load", "warm"]);
    let from_image = node.json(&["fork", "--from", loaded["id"].as_str().unwrap(), "-n", "2"]);
    assert_eq!(from_image["freeze"], json!(null));
    let from_machine = node.json(&["fork", "--from", machine]);
    assert_eq!(from_machine["freeze"]["dirty_pages"], 100);
    assert_eq!(node.json(&["image", "rm", "warm"]), json!({"removed": "name:warm"}));
    assert_eq!(node.json(&["image", "rm", &images[0]]), json!({"removed": images[0]}));
    assert_eq!(node.json(&["kill", end])["killed"], json!([machine]));
    assert!(node.cli(&["ls", "--all"]).out.contains("KILLED"));
    assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
    assert_eq!(node.cli(&["ls"]).out.lines().count(), 1, "only the head");
}

#[test]
fn a_command_line_that_is_wrong_exits_with_2_and_asks_nobody() {
    let long = "x".repeat(300);
    let digest = "a".repeat(64);
    let wrong: &[&[&str]] = &[
        &[],
        &["fly"],
        &["fork"],
        &["fork", "--guest", "probe", "-n", "0"],
        &["fork", "--guest", "probe", "-n", "10001"],
        &["fork", "--guest", "probe", "-n", "-1"],
        &["fork", "--guest", "probe", "-n", "99999999999999999999999"],
        &["fork", "--guest", "linux"],
        &["fork", "--guest", "probe", "--from", "abcd"],
        &["fork", "--from", "abc"],
        &["fork", "--from", "../x"],
        &["fork", "--from", "abcd", "--memory", "64MiB"],
        &["fork", "--guest", "probe", "--memory", "64M"],
        &["fork", "--guest", "probe", "--memory", "64"],
        &["fork", "--guest", "probe", "--memory", "-64MiB"],
        &["fork", "--guest", "probe", "--vcpus", "0"],
        &["fork", "--guest", "probe", "--vcpus", "9"],
        &["fork", "--guest", "probe", "--limit", "1GB"],
        &["branch"],
        &["branch", "abcd", "-n", "0"],
        &["show"],
        &["show", "xyz"],
        &["kill"],
        &["kill", "--all", "abcd"],
        &["image"],
        &["image", "save", "abcd", "a/b"],
        &["image", "save", "abcd", ""],
        &["image", "save", "abcd", &long],
        &["image", "save", "abcd", ".."],
        &["image", "load", "../../etc/passwd"],
        &["image", "rm", &long],
        &["ls", "--output", "xml"],
        &["completions", "tcsh"],
        &["node", "--allow-uid", "root"],
        &["node", "--listen", "7117"],
        &["node", "--listen", "node-b:7117"],
        &["node", "--advertise", "node-b:7117"],
        &["node", "--listen", "0.0.0.0:7117", "--advertise", "node-b"],
        &["node", "--page-deadline", "0s"],
        &["node", "--page-deadline", "30"],
        &["node", "--host-image-memory", "1GB"],
        &["fork", "abcd", "--guest", "probe"],
        &["fork", "abcd", "--from", "abcd"],
        &["fork", "abcd", "--from", "192.0.2.7:7117"],
        &["fork", "--from", "192.0.2.7:7117"],
        &["fork", &digest, "--from", "192.0.2.7"],
        &["fork", &digest, "--from", "192.0.2.7:0"],
        &["fork", &digest, "--from", "192.0.2.7:1", "--on", "192.0.2.8:1"],
        &["fork", &digest.to_uppercase(), "--from", "192.0.2.7:1"],
        &["fork", "abcd", "--on", "2001:db8::7:7117"],
        &["fork", "abcd", "--on", "192.0.2.7:7117", "--tenant", "A"],
        &["watch"],
        &["watch", "abcd", "--timeout", "60"],
        &["image", "digest", "xyz"],
        &["trust"],
        &["trust", "add"],
        &["trust", "add", "/nonexistent.pem"],
        &["trust", "add", "/nonexistent.pem", "--tenant", "-a"],
        &["trust", "rm", "abc"],
        &["ls", "--socket", ""],
    ];
    for arguments in wrong {
        let said = alone(arguments);
        assert_eq!(said.code, Some(2), "{arguments:?}: {said:?}");
        assert!(!said.err.is_empty() && said.out.is_empty(), "{arguments:?}: {said:?}");
    }
    assert!(alone(&["fork", "--guest", "probe", "--memory", "64M"]).err.contains("did you mean 64MiB?"));
}

#[test]
fn without_a_node_every_verb_exits_with_3_and_says_how_to_start_one() {
    let verbs: &[&[&str]] = &[
        &["fork", "--guest", "probe"],
        &["fork", "--from", "abcd"],
        &["branch", "abcd"],
        &["ls"],
        &["show", "abcd"],
        &["kill", "--all"],
        &["image", "ls"],
        &["image", "save", "abcd", "a"],
        &["image", "load", "a"],
        &["image", "rm", "abcd"],
        &["image", "rm", "warm"],
        &["image", "digest", "abcd"],
        &["fork", "abcd", "--on", "192.0.2.7:7117"],
        &["watch", "abcd"],
        &["trust", "show"],
        &["trust", "ls"],
        &["trust", "rm", "abcd"],
    ];
    for arguments in verbs {
        let said = alone(arguments);
        assert_eq!(said.code, Some(3), "{arguments:?}: {said:?}");
        assert!(said.err.contains("farfork node"), "{said:?}");
    }
    assert_eq!(alone(&["ls", "--output", "json"]).error_code(), "NO_NODE");
}

#[test]
fn refusals_exit_with_4_and_what_is_done_in_part_with_5() {
    let node = Node::start("fail_every=3");
    let partial = node.cli(&["fork", "--guest", "probe", "-n", "5"]);
    assert_eq!(partial.code, Some(5), "{partial:?}");
    assert!(partial.err.contains("no memory for another machine"), "{partial:?}");
    let unknown = node.cli(&["show", "00000000", "--output", "json"]);
    assert_eq!((unknown.code, unknown.error_code().as_str()), (Some(4), "UNKNOWN_ID"));
    for verb in ["branch", "kill"] {
        let unknown = node.cli(&[verb, "00000000", "--output", "json"]);
        assert_eq!((unknown.code, unknown.error_code().as_str()), (Some(4), "UNKNOWN_MACHINE"));
    }
    let machine = &node.machines()[0];
    assert_eq!(node.cli(&["kill", machine, "00000000"]).code, Some(5));
    assert_eq!(node.cli(&["kill", machine]).code, Some(4));
    let odd = node.cli(&["fork", "--guest", "probe", "--memory", "3MiB", "--output", "json"]);
    assert_eq!((odd.code, odd.error_code().as_str()), (Some(2), "BAD_MEMORY"), "the input is wrong, whoever notices");
    drop(node);
    let node = Node::start("fail_every=1");
    let none = node.cli(&["fork", "--guest", "probe", "-n", "5", "--output", "json"]);
    assert_eq!((none.code, none.error_code().as_str()), (Some(4), "EXHAUSTED"));
}

#[test]
fn a_name_that_reads_like_an_id_can_be_told_apart() {
    let node = Node::start("");
    node.json(&["fork", "--guest", "probe"]);
    let image = ids(&node.json(&["image", "ls"])["images"])[0].clone();
    let end = &image[28..];
    node.json(&["image", "save", &image, end]);
    let said = node.cli(&["image", "rm", end, "--output", "json"]);
    assert_eq!((said.code, said.error_code().as_str()), (Some(4), "AMBIGUOUS_ID"));
    assert_eq!(node.json(&["image", "rm", &format!("name:{end}")]), json!({"removed": format!("name:{end}")}));
    assert_eq!(node.json(&["image", "rm", end]), json!({"removed": image}));
}

#[test]
fn a_closed_stdout_is_no_failure_and_no_panic() {
    let node = Node::start("");
    node.json(&["fork", "--guest", "probe", "-n", "100"]);
    let verbs: &[&[&str]] =
        &[&["ls"], &["ls", "--output", "json"], &["completions", "bash"], &["fork", "--guest", "probe"], &["--help"]];
    for arguments in verbs {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = node.command(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let said = Said::of(child.wait_with_output().unwrap());
        assert_eq!((said.code, said.err.as_str()), (Some(0), ""), "{arguments:?}");
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = node.command(&["doctor"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(Said::of(child.wait_with_output().unwrap()).err, "");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let child = node.command(&["ls"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let said = Said::of(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(4), "what could not be written is a failure: {said:?}");
}

#[test]
fn an_interrupted_fork_ends_at_once_and_its_machines_are_listed() {
    let node = Node::start("fork_ms=2000");
    let mut fork = node.command(&["fork", "--guest", "probe", "-n", "3"]).stdout(Stdio::piped()).spawn().unwrap();
    eventually("the fork is on its way", || node.log().contains("origin=Guest"));
    rustix::process::kill_process(Pid::from_child(&fork), Signal::INT).unwrap();
    assert_eq!(wait(&mut fork).code(), Some(130));
    eventually("what the node had begun is listed", || node.machines().len() == 3);
    assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
}

#[test]
fn json_is_what_the_api_answers() {
    let node = Node::start("");
    node.json(&["fork", "--guest", "probe", "-n", "2"]);
    for (arguments, path) in
        [(&["ls"][..], "/v1/machines"), (&["ls", "--all"], "/v1/machines?state=all"), (&["image", "ls"], "/v1/images")]
    {
        assert_eq!(node.json(arguments), node.http("GET", path, b"").json());
    }
}

#[test]
fn every_help_has_an_example() {
    let verbs = ["node", "fork", "branch", "ls", "show", "watch", "kill", "image", "trust", "doctor", "completions"];
    for verb in verbs {
        let said = alone(&[verb, "--help"]);
        assert_eq!(said.code, Some(0));
        assert!(said.out.contains("Example") && said.out.contains(&format!("farfork {verb}")), "{said:?}");
    }
    for verb in ["ls", "digest", "save", "load", "rm"] {
        assert!(alone(&["image", verb, "--help"]).out.contains(&format!("farfork image {verb}")));
    }
    for verb in ["show", "add", "ls", "rm"] {
        assert!(alone(&["trust", verb, "--help"]).out.contains(&format!("farfork trust {verb}")));
    }
}

#[test]
fn completions_are_scripts() {
    for (shell, mark) in [("bash", "complete -F"), ("zsh", "#compdef farfork"), ("fish", "complete -c farfork")] {
        let said = alone(&["completions", shell]);
        assert_eq!(said.code, Some(0));
        assert!(said.out.contains(mark), "{shell}");
    }
}

#[test]
fn doctor_needs_no_node_and_says_what_it_found() {
    let said = alone(&["doctor", "--output", "json"]);
    let report: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    let items = report["items"].as_array().unwrap();
    assert!(items.len() >= 13);
    let fails = items.iter().any(|item| item["status"] == "fail");
    assert_eq!(said.code, Some(if fails { 4 } else { 0 }), "{said:?}");
    for item in items.iter().filter(|item| item["status"] != "ok") {
        assert!(item["remedy"].is_string(), "{item}");
    }
    let table = alone(&["doctor"]);
    assert!(items.iter().all(|item| table.out.contains(item["id"].as_str().unwrap())), "{table:?}");
}

#[test]
fn top_shows_a_node_alone_and_says_what_it_cannot_do() {
    let node = Node::start("");
    node.json(&["fork", "--guest", "probe", "-n", "3"]);
    let image = ids(&node.json(&["image", "ls"])["images"])[0].clone();
    node.json(&["image", "save", &image, "warm"]);
    let seen = node.json(&["top", "--once"]);
    assert_eq!((&seen["hosts"][0]["machines"], &seen["hosts"][0]["forks_per_s"]), (&json!(3), &json!(0.0)), "{seen}");
    assert_eq!((&seen["templates"][0]["name"], &seen["templates"][0]["children"]), (&json!("warm"), &json!(3)), "{seen}");
    assert_eq!((&seen["jobs"], &seen["troubles"]), (&json!([]), &json!([])));
    let text = node.cli(&["top", "--once"]);
    assert!(
        text.code == Some(0) && text.err.is_empty() && text.out.contains("this node") && text.out.contains("warm"),
        "{text:?}"
    );
    let own = node.http("GET", "/v1/node", b"").json()["node"].as_str().unwrap().to_owned();
    assert_eq!(node.http("GET", &format!("/v1/nodes/{own}"), b"").json()["running"], 3);
    node.http("GET", "/v1/nodes/node-1", b"").refused(409, "NO_CLUSTER");
    // Without a terminal there is nothing to draw on.
    for arguments in [&["top"][..], &["top", "--output", "json"]] {
        let said = node.cli(arguments);
        assert!(said.code == Some(2) && said.err.contains("--once"), "{said:?}");
    }
    assert_eq!(alone(&["top", "--once"]).code, Some(3));
}
