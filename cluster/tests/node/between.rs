//! Real machines of one node on another: what a user of two nodes does and sees. Needs KVM, and root for the control groups.
//! (Their names begin with `real_`, which is how they are left out where there is no KVM.)

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{Node, eventually};

/// Nodes on loopback that trust one another, each with its address.
pub(crate) fn nodes(count: usize, more: &[&str]) -> Vec<(Node, String)> {
    let nodes: Vec<_> = (0..count).map(|_| listening(tempfile::tempdir().unwrap(), more, "")).collect();
    introduce(&nodes.iter().map(|(node, _)| node).collect::<Vec<_>>());
    nodes
}

/// A node that listens on the loopback, with guards taken out, and its address.
pub(crate) fn listening(directory: TempDir, more: &[&str], without: &str) -> (Node, String) {
    let node = Node::start_without(directory, &[&["--listen", "127.0.0.1:0"], more].concat(), without);
    let log = node.log();
    let address = log.split("listening=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    (node, address)
}

/// Has each trust all others.
pub(crate) fn introduce(nodes: &[&Node]) {
    for node in nodes {
        let file = node.path().join("certificate.pem");
        std::fs::write(&file, node.cli(&["trust", "show"]).out).unwrap();
        for other in nodes.iter().filter(|other| other.socket != node.socket) {
            let added = other.cli(&["trust", "add", file.to_str().unwrap()]);
            assert_eq!(added.code, Some(0), "{added:?}");
        }
    }
}

/// A warm image on a node: its id there, and its digest.
pub(crate) fn warm(node: &Node, memory: &str) -> (String, String) {
    let forked = node.json(&["fork", "--guest", "probe", "-n", "1", "--memory", memory]);
    let image = forked["image"]["id"].as_str().unwrap().to_owned();
    let digest = node.json(&["image", "digest", &image])["digest"].as_str().unwrap().to_owned();
    (image, digest)
}

#[test]
fn real_children_run_on_another_node_before_their_memory_is_there_and_settle() {
    let nodes = nodes(2, &[]);
    let [(a, _), (b, b_address)] = &nodes[..] else { unreachable!() };
    let (image, digest) = warm(a, "64MiB");
    let forked = a.json(&["fork", "--from", &image, "-n", "3", "--on", b_address, "--verify"]);
    let children = forked["children"].as_array().unwrap();
    assert_eq!(children.len(), 3, "{forked}");
    assert!(children.iter().all(|child| child["verified_pages"].as_u64() == Some(4096)), "{forked}");
    // They are that node's, and this one's own is still here.
    assert_eq!((a.machines().len(), b.machines().len()), (1, 3));
    let images = b.json(&["image", "ls"]);
    let there = images["images"].as_array().unwrap()[0].clone();
    assert_eq!(there["digest"].as_str(), Some(&*digest), "{images}");
    let watched = b.cli(&["watch", there["id"].as_str().unwrap(), "--timeout", "60s"]);
    assert_eq!(watched.code, Some(0), "{watched:?}");
    let shown = b.json(&["show", there["id"].as_str().unwrap()]);
    println!("{shown}");
    // A fork there is local now: the source is not needed.
    a.signal(Signal::KILL);
    let again = b.json(&["fork", "--from", there["id"].as_str().unwrap(), "-n", "2", "--verify"]);
    assert_eq!(again["children"].as_array().unwrap().len(), 2);
    assert_eq!(b.machines().len(), 5);
}

#[test]
fn real_images_that_nobody_has_any_more_are_let_go_of() {
    // Most of its memory is still absent then.
    let nodes = nodes(2, &["--no-stream"]);
    let [(a, _), (b, b_address)] = &nodes[..] else { unreachable!() };
    let (image, _) = warm(a, "256MiB");
    let is_held = || b.http("GET", "/metrics", b"").body.contains("farfork_read_leases{state=\"held\"} 1");
    for _ in 0..3 {
        a.json(&["fork", "--from", &image, "-n", "3", "--on", b_address]);
        eventually("it holds a lease", is_held);
        let there = b.json(&["image", "ls"])["images"][0]["id"].as_str().unwrap().to_owned();
        let children = b.machines();
        let killed = b.cli(&[&["kill"][..], &children.iter().map(String::as_str).collect::<Vec<_>>()].concat());
        assert_eq!(killed.code, Some(0), "{killed:?}");
        assert_eq!(b.cli(&["image", "rm", &there]).code, Some(0));
        eventually("the lease is given back", || !is_held());
    }
}

/// Also by readers whose image had arrived before it was time to tell.
#[test]
fn real_holders_hear_what_was_touched_and_the_next_host_fetches_it_ahead() {
    let mut nodes = nodes(2, &[]);
    nodes.push(listening(tempfile::tempdir().unwrap(), &["--no-stream"], ""));
    introduce(&nodes.iter().map(|(node, _)| node).collect::<Vec<_>>());
    let [(a, a_address), (b, _), (c, _)] = &nodes[..] else { unreachable!() };
    let (_, digest) = warm(a, "64MiB");
    let opened = b.json(&["fork", &digest, "--from", a_address, "--verify"]);
    let there = opened["image"]["id"].as_str().unwrap();
    assert_eq!(b.cli(&["watch", there, "--timeout", "60s"]).code, Some(0));
    eventually("its lease is given back", || {
        b.http("GET", "/metrics", b"").body.contains("farfork_read_leases{state=\"held\"} 0")
    });
    // The first that it opens: what it touches itself it would tell as well.
    c.json(&["fork", &digest, "--from", a_address]);
    eventually("the next one fetches ahead", || {
        let metrics = c.http("GET", "/metrics", b"").body;
        let replayed = metrics.lines().find_map(|line| line.strip_prefix("farfork_page_bytes_total{kind=\"replay\"} "));
        // More than the few extents that any child touches first.
        replayed.unwrap().trim().parse::<u64>().unwrap() > 32 << 16
    });
}
