//! Who may use a node.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::support::{Node, Said, is_root};

const NOBODY: &str = "65534";

#[test]
fn another_user_is_turned_away_and_logged_unless_allowed() {
    if !is_root() {
        eprintln!("SKIPPED: only root can ask as another user");
        return;
    }
    let node = Node::start("");
    let said = ask_as_nobody(&node);
    assert_eq!((said.code, said.error_code().as_str()), (Some(4), "FORBIDDEN"), "{said:?}");
    assert!(node.log().contains("turned away uid=65534 gid=65534 pid="), "{}", node.log());
    assert!(node.http("GET", "/metrics", b"").body.contains("farfork_api_refused_peers_total 1"));
    drop(node);
    let node = Node::start_with("", &["--allow-uid", NOBODY]);
    let said = ask_as_nobody(&node);
    assert_eq!(said.code, Some(0), "{said:?}");
}

#[test]
fn the_sockets_mode_keeps_others_out_already() {
    if !is_root() {
        eprintln!("SKIPPED: only root can ask as another user");
        return;
    }
    let node = Node::start("");
    assert_eq!(node.socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    open_to_all(node.path(), 0o755);
    open_to_all(node.socket.parent().unwrap(), 0o755);
    let said = run_as_nobody(&node);
    assert_eq!((said.code, said.error_code().as_str()), (Some(3), "NO_NODE"), "{said:?}");
    assert!(said.err.contains("ask as the user who runs the node"), "{said:?}");
}

fn ask_as_nobody(node: &Node) -> Said {
    open_to_all(node.path(), 0o755);
    open_to_all(node.socket.parent().unwrap(), 0o755);
    open_to_all(&node.socket, 0o666);
    run_as_nobody(node)
}

fn run_as_nobody(node: &Node) -> Said {
    // The program itself may lie where others cannot read.
    let program = node.path().join("farfork");
    std::fs::copy(crate::support::PROGRAM, &program).unwrap();
    open_to_all(&program, 0o755);
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(program).args(["ls", "--output", "json"]);
    Said::of(command.env("FARFORK_SOCKET", &node.socket).output().unwrap())
}

fn open_to_all(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
