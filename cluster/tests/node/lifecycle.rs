//! How a node starts beside others, and how it stops.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Node, PROGRAM, Said, eventually, http};

fn second(socket: &Path, data: &Path) -> Said {
    let mut command = Command::new(PROGRAM);
    command.args(["node", "--output", "json", "--fake-engine", ""]);
    command.arg("--socket").arg(socket).arg("--data").arg(data);
    Said::of(command.output().unwrap())
}

/// The error is the last line of what a node says; its log comes before.
fn refusal(said: &Said) -> Value {
    let line = said.err.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

#[test]
fn a_socket_and_a_directory_have_one_node_each() {
    let node = Node::start("");
    let (data, other) = (node.path().join("data"), node.path().join("other"));
    let said = second(&node.socket, &other);
    assert_eq!((said.code, &refusal(&said)["error"]["code"]), (Some(4), &Value::from("SOCKET")), "{said:?}");
    assert!(refusal(&said)["error"]["remedy"].as_str().unwrap().contains("--socket"));
    let said = second(&node.path().join("s2"), &data);
    assert_eq!((said.code, &refusal(&said)["error"]["code"]), (Some(4), &Value::from("DATA_DIRECTORY")), "{said:?}");
    let pid = node.pid().as_raw_nonzero().get();
    assert!(said.err.contains(&format!("process {pid}")), "{said:?}");
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200, "the first one goes on");
}

#[test]
fn a_stale_socket_is_replaced_and_the_node_keeps_its_id() {
    let mut node = Node::start("");
    let first = node.http("GET", "/v1/node", b"").json()["node"].clone();
    node.signal(Signal::KILL);
    node.wait();
    assert!(node.socket.exists(), "a killed node leaves its socket");
    let said = node.cli(&["ls"]);
    assert_eq!(said.code, Some(3), "{said:?}");
    let mut again = Command::new(PROGRAM)
        .args(["node", "--fake-engine", ""])
        .args(["--data".as_ref(), node.path().join("data").as_os_str()])
        .args(["--socket".as_ref(), node.socket.as_os_str()])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it serves", || node.cli(&["ls"]).code == Some(0));
    assert_eq!(node.http("GET", "/v1/node", b"").json()["node"], first);
    again.kill().unwrap();
    again.wait().unwrap();
}

#[test]
fn what_others_have_there_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (foreign, file) = (directory.path().join("foreign"), directory.path().join("file"));
    let listener = UnixListener::bind(&foreign).unwrap();
    std::fs::write(&file, "precious").unwrap();
    for socket in [&foreign, &file, &directory.path().join("x".repeat(150))] {
        let said = second(socket, &directory.path().join("data"));
        assert_eq!((said.code, &refusal(&said)["error"]["code"]), (Some(4), &Value::from("SOCKET")), "{said:?}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    drop(listener);
}

#[test]
fn requests_in_flight_end_before_the_node_does() {
    let mut node = Node::start("fork_ms=1000");
    let socket = node.socket.clone();
    let fork = std::thread::spawn(move || http(&socket, "POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#));
    eventually("the fork is on its way", || node.log().contains("origin=Guest"));
    node.signal(Signal::TERM);
    assert_eq!(fork.join().unwrap().status, 200);
    assert_eq!(node.wait().code(), Some(0));
    assert!(!node.socket.exists());
    assert!(node.log().contains("stopped"));
    assert_eq!(node.cli(&["ls"]).code, Some(3));
}

#[test]
fn a_second_signal_ends_the_node_at_once() {
    let mut node = Node::start("fork_ms=120000");
    let mut fork = node.command(&["fork", "--guest", "probe"]).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the fork is on its way", || node.log().contains("origin=Guest"));
    node.signal(Signal::INT);
    eventually("it is stopping", || node.log().contains("stopping"));
    node.signal(Signal::TERM);
    assert_eq!(node.wait().code(), Some(143));
    let said = Said::of({
        let status = crate::support::wait(&mut fork);
        assert_eq!(status.code(), Some(3), "the client hears that the node is gone");
        fork.wait_with_output().unwrap()
    });
    assert!(said.err.contains("broke off"), "{said:?}");
}

#[test]
fn logs_can_be_json() {
    let node = Node::start_with("", &["--log", "json"]);
    node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#);
    std::thread::sleep(Duration::from_millis(50));
    for line in node.log().lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(line["level"].is_string());
    }
    assert!(node.log().contains("\"route\":\"/v1/forks\""), "{}", node.log());
}
