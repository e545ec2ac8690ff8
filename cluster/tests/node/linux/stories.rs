//! What users do with Linux guests.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chaos::relay::{Config, Direction, Impairment, Rate, Relay};
use vm::harness::{count, held, seed};

use super::{BASE, PYTHON, eval, exec, fork, in_time, node_with, provide, sh};
use crate::between::{introduce, listening};
use crate::real::groups;
use crate::support::{Node, eventually};

/// The fields, from the shell's own commands: a program that is started costs a second where kernels are emulated.
const WHO: &str = "read h < /proc/sys/kernel/hostname; read m < /etc/machine-id; read u < /proc/sys/kernel/random/uuid; \
                   echo $h $m $u $(date +%s)";

#[test]
fn real_children_of_a_template_are_themselves_and_private() {
    let node = node_with(BASE);
    let children = fork(&node, BASE, count(20, 200));
    let mut seen = std::collections::BTreeSet::new();
    for child in &children {
        let said = sh(&node, child, WHO);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let fields: Vec<&str> = said.split(' ').collect();
        let [hostname, machine_id, uuid, clock] = fields[..] else { panic!("{said}") };
        assert_eq!(machine_id, child.replace('-', ""));
        assert!(hostname.starts_with("m-") && child.replace('-', "").ends_with(&hostname[2..]), "{said}");
        let clock: u64 = clock.parse().unwrap();
        assert!(now.abs_diff(clock) < 60, "the guest says {clock}, the host {now}");
        for field in [hostname, machine_id, uuid] {
            assert!(seen.insert(field.to_owned()), "{field} twice");
        }
    }
    // Files are their own; streams, exit codes, environment, directory and user come through.
    let (one, other) = (&children[0], &children[1]);
    sh(&node, one, "echo mine > /root/file");
    assert_eq!(exec(&node, other, "cat /root/file").code, Some(1));
    assert_eq!(sh(&node, one, "cat /root/file"), "mine");
    assert_eq!(exec(&node, one, "exit 7").code, Some(7));
    assert_eq!(exec(&node, one, "kill -9 $$").code, Some(128 + 9));
    assert_eq!(node.cli(&["exec", one, "--", "no-such-program"]).code, Some(127));
    assert_eq!(node.cli(&["exec", &"0".repeat(8), "--", "true"]).code, Some(125));
    let said = exec(&node, one, "echo out; echo err >&2");
    assert_eq!((said.out.as_str(), said.err.as_str()), ("out\n", "err\n"));
    let arguments = ["--env", "A=b c", "-w", "/tmp", "-u", "nobody", "--", "sh", "-c", "echo $A $PWD $(id -u)"];
    assert_eq!(node.cli(&[&["exec", one], &arguments[..]].concat()).out, "b c /tmp 65534\n");
    let mut fed = node.command(&["exec", one, "-i", "--", "cat"]);
    let mut fed = fed.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    // More than all pipes on the way hold: whoever passes it on must not wait for one end alone.
    let mut input = fed.stdin.take().unwrap();
    let feeding = std::thread::spawn(move || std::io::Write::write_all(&mut input, &vec![b'x'; 1 << 20]));
    assert!(fed.wait_with_output().unwrap().stdout == vec![b'x'; 1 << 20]);
    feeding.join().unwrap().unwrap();

    // Files in and out.
    let here = tempfile::tempdir().unwrap();
    let tree = here.path().join("tree");
    std::fs::create_dir_all(tree.join("below")).unwrap();
    std::fs::write(tree.join("below/file"), vec![7; 300_000]).unwrap();
    std::os::unix::fs::symlink("below/file", tree.join("link")).unwrap();
    let copied = node.cli(&["cp", tree.to_str().unwrap(), &format!("{one}:/root")]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let back = tempfile::tempdir().unwrap();
    let copied = node.cli(&["cp", &format!("{one}:/root/tree"), back.path().to_str().unwrap()]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert_eq!(std::fs::read(back.path().join("tree/below/file")).unwrap(), vec![7; 300_000]);
    assert_eq!(std::fs::read_link(back.path().join("tree/link")).unwrap().to_str(), Some("below/file"));
    assert_eq!(node.cli(&["cp", tree.to_str().unwrap(), &format!("{one}:/nowhere")]).code, Some(4));

    let shown = node.json(&["show", one]);
    let ready = &shown["machine"]["ready"];
    assert!(ready["was_gated"] == true && ready["steps"].as_array().unwrap().len() >= 7, "{shown}");
    assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
    eventually("nothing is left", || groups(&node) <= 4 && node.machines().is_empty());
    held("Linux children that were themselves", children.len() as u64);
}

/// A job that counts in its memory, and into a file.
const JOB: &str = "i=0; while true; do i=$((i+1)); echo $i >> /root/count; sleep 0.1; done";

fn counted(node: &Node, machine: &str) -> (u64, u64) {
    let text = sh(node, machine, "cat /root/count");
    let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    // Every number once and in order, whatever happened in between.
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{numbers:?}");
    (numbers.len() as u64, *numbers.last().unwrap())
}

fn has_counted_past(node: &Node, machine: &str, number: u64) -> bool {
    counted(node, machine).0 > number
}

#[test]
fn real_branches_go_on_where_their_parent_was() {
    let node = node_with(BASE);
    let parent = fork(&node, BASE, 1).remove(0);
    assert_eq!(node.cli(&["exec", &parent, "--detach", "--", "sh", "-c", JOB]).code, Some(0));
    in_time("the job runs", || exec(&node, &parent, "test -s /root/count").code == Some(0));
    let before = counted(&node, &parent).0;
    let branched = node.json(&["branch", &parent, "-n", "2"]);
    let children = crate::support::ids(&branched["children"]);
    assert_eq!(children.len(), 2, "{branched}");
    for machine in children.iter().chain([&parent]) {
        in_time("the job goes on", || has_counted_past(&node, machine, before + 3));
    }
    let shown = node.json(&["show", &children[0]]);
    assert_eq!(shown["machine"]["ready"]["was_gated"], false, "a branch of what runs cannot be held back: {shown}");
    let names: std::collections::BTreeSet<String> = children
        .iter()
        .chain([&parent])
        .map(|machine| sh(&node, machine, "read h < /proc/sys/kernel/hostname; echo $h"))
        .collect();
    assert_eq!(names.len(), 3);
    // Their files are their own from there on.
    sh(&node, &children[0], "echo changed > /root/mine");
    assert_eq!(exec(&node, &children[1], "cat /root/mine").code, Some(1));
}

#[test]
fn real_children_work_and_are_branched_elsewhere_while_memory_and_disk_arrive() {
    let (a, a_address) = listening(tempfile::tempdir().unwrap(), &[], "");
    let (b, _) = listening(tempfile::tempdir().unwrap(), &[], "");
    introduce(&[&a, &b]);
    provide(&a, PYTHON);
    let image = a.json(&["image", "load", PYTHON.name])["id"].as_str().unwrap().to_owned();
    let digest = a.json(&["image", "digest", &image])["digest"].as_str().unwrap().to_owned();
    // A hundred megabytes at this rate take half a minute.
    let slow = Impairment { rate: Some(Rate::new(4 << 20)), ..Impairment::default() };
    let config = Config { seed: seed(), to_client: slow, ..Config::to(a_address.parse().unwrap()) };
    let relay = Relay::start(config).unwrap();
    let forked = b.json(&["fork", &digest, "--from", &relay.address().to_string()]);
    let child = forked["children"][0]["id"].as_str().unwrap().to_owned();
    let settled = |machine: &str| b.json(&["show", machine])["residency"]["is_settled"] == true;
    assert!(!settled(&child), "all of it was there before anything was tried");
    assert_eq!(eval(&b, &child, "json.dumps([1])"), "'[1]'");
    eval(&b, &child, "counter = 41");
    let branched = b.json(&["branch", &child]);
    let grandchild = branched["children"][0]["id"].as_str().unwrap().to_owned();
    let was_arriving = !settled(&grandchild);
    relay.set(Direction::ToClient, Impairment::default());
    assert_eq!(eval(&b, &grandchild, "counter + 1"), "42");
    eval(&b, &child, "counter = 0");
    assert_eq!(eval(&b, &grandchild, "counter"), "41");
    assert!(was_arriving, "all of it was there before it was branched");
    in_time("it settles", || settled(&child));
    // What was in memory and on the disk of the parent is there.
    let check = "hashlib.sha256(open('/dev/shm/data','rb').read()).hexdigest() == open('/dev/shm/digest').read().split()[0]";
    for machine in [&child, &grandchild] {
        assert_eq!(eval(&b, machine, check), "True");
    }
}

#[test]
fn real_children_evaluate_with_what_was_imported_before_the_fork() {
    let node = node_with(PYTHON);
    let children = fork(&node, PYTHON, count(10, 50));
    for (number, child) in (0u64..).zip(&children) {
        let said = eval(&node, child, &format!("json.dumps({{'n': {number}, 'h': socket.gethostname()}})"));
        assert!(said.contains(&format!("\"n\": {number}")), "{said}");
    }
    let one = &children[0];
    let failed = node.cli(&["eval", one, "1/0"]);
    assert!(failed.code == Some(1) && failed.err.contains("ZeroDivisionError"), "{failed:?}");
    let too_much = node.cli(&["eval", one, "'x' * 3000000"]);
    assert!(too_much.code == Some(1) && too_much.err.contains("at most"), "{too_much:?}");
    assert_eq!(eval(&node, one, "print('said'); kept = 5"), "said");
    assert_eq!(eval(&node, one, "kept"), "5", "what is defined stays");
    assert_eq!(node.cli(&["eval", &children[1], "kept"]).code, Some(1), "and is private");
    let raw: serde_json::Value = serde_json::from_str(&node.cli(&["eval", one, "2**10", "--output", "json"]).out).unwrap();
    assert_eq!(raw["value"], "1024");
    // A process that has gone is said to be gone.
    let gone = node.cli(&["eval", one, "__import__('os')._exit(3)"]);
    assert_eq!(gone.code, Some(125), "{gone:?}");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(node.cli(&["eval", one, "1"]).code, Some(125));
    held("Linux children that evaluated with what was imported", children.len() as u64);
}

#[test]
fn real_templates_move_between_nodes_and_are_verified_where_they_come_in() {
    let (a, b) = (node_with(BASE), Node::start_in(tempfile::tempdir().unwrap(), &[]));
    let here = tempfile::tempdir().unwrap();
    let file = here.path().join("base.img").to_str().unwrap().to_owned();
    let exported = a.cli(&["template", "export", BASE.name, &file]);
    assert_eq!(exported.code, Some(0), "{exported:?}");
    assert_eq!(a.cli(&["template", "export", BASE.name, &file]).code, Some(2), "a file is never overwritten");
    let imported = b.cli(&["template", "import", "moved", &file]);
    assert_eq!(imported.code, Some(0), "{imported:?}");
    let forked = b.json(&["fork", "moved", "-n", "1"]);
    let child = crate::support::ids(&forked["children"]).remove(0);
    assert_eq!(sh(&b, &child, "echo here"), "here");

    let taken = b.cli(&["template", "import", "moved", &file, "--output", "json"]);
    assert_eq!((taken.code, taken.error_code().as_str()), (Some(4), "NAME_TAKEN"));
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    let at = whole.iter().rposition(|byte| *byte != 0).unwrap();
    flipped[at] ^= 1;
    for damaged in [&whole[..whole.len() / 2], &flipped, b"no image"] {
        let bad = here.path().join("bad");
        std::fs::write(&bad, damaged).unwrap();
        let refused = b.cli(&["template", "import", "bad", bad.to_str().unwrap(), "--output", "json"]);
        assert_eq!((refused.code, refused.error_code().as_str()), (Some(4), "BAD_IMAGE"), "{refused:?}");
    }
    let left = std::fs::read_dir(b.path().join("data/images")).unwrap().count();
    assert_eq!(left, 1, "what was refused is gone");
    let none = a.cli(&["template", "export", "nosuch", "-", "--output", "json"]);
    assert_eq!(none.error_code(), "UNKNOWN_TEMPLATE");
}
