//! The API does what its description says, whatever it is asked: schemathesis makes requests up from `/v1/openapi.json`, and looks
//! whether each answer is one that is described, of the described shape, and no failure. `make setup` installs it.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use vm::harness;

use crate::support::{Node, PROGRAM, Said};

/// Requests that are made up for each operation, besides those at the borders of what is described.
const EXAMPLES_QUICK: u64 = 20;
const EXAMPLES_FULL: u64 = 300;

/// What is looked at.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// Operations that are left out, by name, and why.
type Without = [(&'static str, &'static str)];

const AGENT: (&str, &str) = ("machines_connect", "after its answer the connection is no HTTP any more");

#[test]
fn each_answer_is_as_it_is_described() {
    let without = [
        AGENT,
        ("templates_export", "the engine that only pretends has no guests, and says so with 503"),
        ("templates_import", "the same"),
    ];
    run(&Node::start(""), &without);
}

/// The routes of a cluster, and those that need guests.
#[test]
fn real_each_answer_of_a_cluster_is_as_it_is_described() {
    let directory = tempfile::tempdir().unwrap();
    let passphrase = directory.path().join("passphrase");
    let command = || {
        let mut command = Command::new(PROGRAM);
        command.env("FARFORK_CA_PASSPHRASE_FILE", &passphrase).stdin(Stdio::null());
        command
    };
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut init = command();
    init.args(["cluster", "init", "--name", "node-1", "--advertise", &address, "--data"]).arg(directory.path().join("data"));
    let said = Said::of(init.output().unwrap());
    assert_eq!(said.code, Some(0), "{said:?}");
    let node = Node::start_by(command(), directory, &["--listen", &address]);
    crate::support::eventually("it leads", || node.cli(&["node", "ls"]).code == Some(0));
    let without = [AGENT, ("machines_fork", "it would start machines by the ten thousand"), ("machines_branch", "the same")];
    run(&node, &without);
}

/// Has schemathesis ask a node.
fn run(node: &Node, without: &Without) {
    let Some(program) = installed() else {
        return println!("SKIPPED: the API by its description, since schemathesis is not there: `make setup` installs it");
    };
    let described = node.http("GET", "/v1/openapi.json", b"").body;
    let place = tempfile::tempdir().unwrap();
    let mut command = Command::new(program);
    command.arg("run").arg(format!("http://{}/v1/openapi.json", forward(&node.socket)));
    command.args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing,stateful"]);
    command.args(["--max-examples", &harness::count(EXAMPLES_QUICK, EXAMPLES_FULL).to_string()]);
    command.args(["--seed", &harness::seed().to_string(), "--generation-database", "none", "--continue-on-failure"]);
    // A machine that is busy with other tests is no fault of the API.
    command.args(["--suppress-health-check", "all", "--request-timeout", "60", "--no-color", "--warnings", "off"]);
    for (name, why) in without {
        assert!(described.contains(&format!("\"operationId\": \"{name}\"")), "no operation is called {name}");
        println!("without {name}: {why}");
        command.args(["--exclude-operation-id", name]);
    }
    let output = command.current_dir(place.path()).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200, "the node goes on");
    assert!(!node.log().contains("panicked"), "{}", node.log());
    let count = said.lines().find_map(|line| line.trim().split_once(" generated")?.0.parse().ok());
    harness::held("answers that are as they are described", count.unwrap_or_default());
}

fn installed() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from).or_else(home)?;
    Some(cache.join("farfork/schemathesis/bin/st")).filter(|program| program.exists())
}

/// Where a node's socket is reached over TCP, which is what schemathesis speaks, for as long as the test runs.
fn forward(socket: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let socket = socket.to_owned();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // Who was turned away is told so by the end of the connection.
            let Ok(node) = UnixStream::connect(&socket) else { continue };
            relay(client, node);
        }
    });
    address
}

fn relay(client: TcpStream, node: UnixStream) {
    let (Ok(mut from_client), Ok(mut to_client)) = (client.try_clone(), client.try_clone()) else { return };
    let (Ok(mut from_node), Ok(mut to_node)) = (node.try_clone(), node.try_clone()) else { return };
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_node);
        let _ = to_node.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut from_node, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
}
