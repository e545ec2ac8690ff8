//! Guests that are none, or turn bad: users are told what it was, and nobody else notices.

use std::fs;
use std::path::Path;

use super::{BASE, exec, fork, guests, in_time, node_with, sh};
use crate::support::{Node, Said, is_root};

fn refused(said: &Said, code: &str, words: &[&str]) {
    assert!(matches!(said.code, Some(2 | 4)), "{said:?}");
    assert_eq!(said.error_code(), code, "{said:?}");
    for word in words {
        assert!(said.err.contains(word), "{word:?} is not in {said:?}");
    }
}

fn build(node: &Node, name: &str, more: &[&str]) -> Said {
    node.cli(&[&["template", "build", name, "--memory", "64MiB", "--output", "json"], more].concat())
}

#[test]
fn real_files_that_are_no_guest_are_refused_before_anything_is_started() {
    let node = Node::start_in(tempfile::tempdir().unwrap(), &[]);
    let here = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = here.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let vmlinux = fs::read(guests().join("vmlinux")).unwrap();
    let text = file("text", b"not a kernel");
    refused(&build(&node, "t", &["--kernel", &text]), "GUEST", &["neither an ELF vmlinux nor a bzImage"]);
    let mut other = vmlinux.clone();
    other[18] = 183;
    let other = file("arm", &other[..1 << 20]);
    refused(&build(&node, "t", &["--kernel", &other]), "GUEST", &["64-bit Arm"]);
    let cut = file("cut", &vmlinux[..vmlinux.len() / 2]);
    refused(&build(&node, "t", &["--kernel", &cut]), "GUEST", &["damaged, or cut short"]);
    let large = here.path().join("large");
    fs::File::create(&large).unwrap().set_len(1 << 30).unwrap();
    refused(&build(&node, "t", &["--initrd", large.to_str().unwrap()]), "GUEST", &["initrd", "does not fit"]);
    refused(&build(&node, "t", &["--rootfs", &text]), "ROOTFS", &["neither an ext4 image"]);
    refused(&build(&node, "t", &["--rootfs", "/dev/null"]), "ROOTFS", &["neither an ext4 image"]);
    refused(&build(&node, "t", &["--rootfs", "/nonexistent.ext4"]), "INPUT", &["/nonexistent.ext4"]);
    refused(&build(&node, "t", &["--disk", "2MiB"]), "UNFIT", &["the disk was asked to have 2 MiB"]);
    refused(&build(&node, "t", &["--vcpus", "2"]), "GUEST", &["one virtual CPU"]);
    refused(&build(&node, "t", &["--kernel-arguments", &"x".repeat(2048)]), "GUEST", &["command line"]);
    refused(&node.cli(&["fork", "nosuch", "--output", "json"]), "UNKNOWN_TEMPLATE", &[]);
    refused(&node.cli(&["template", "rm", "nosuch", "--output", "json"]), "UNKNOWN_TEMPLATE", &[]);
    let templates = node.json(&["template", "ls"]);
    assert_eq!(templates["templates"].as_array().unwrap().len(), 0, "{templates}");
    assert_eq!(node.json(&["image", "ls"])["images"].as_array().unwrap().len(), 0);
}

/// One boot each: an initrd without an agent, and a warm-up that fails or never ends.
#[test]
fn real_guests_that_do_not_become_ready_say_why() {
    let node = Node::start_in(tempfile::tempdir().unwrap(), &[]);
    let here = tempfile::tempdir().unwrap();
    let empty = here.path().join("empty");
    fs::write(&empty, [0; 512]).unwrap();
    let no_agent = build(&node, "t", &["--initrd", empty.to_str().unwrap()]);
    refused(&no_agent, "GUEST", &["booting", "GUEST_PANIC", "Kernel panic", "the last that it printed"]);
    let fails = build(&node, "t", &["--warm", "echo it is broken >&2; exit 3"]);
    refused(&fails, "GUEST", &["ended with status 3", "it is broken"]);
    let hangs = build(&node, "t", &["--warm", "sleep 1000", "--deadline", "90"]);
    refused(&hangs, "GUEST", &["warming up", "did not answer within 90000 ms"]);
    let secret = build(&node, "t", &["--warm", "mkdir -p /root/.ssh; echo x > /root/.ssh/id_ed25519"]);
    refused(&secret, "GUEST", &["/root/.ssh/id_ed25519", "--allow-secrets"]);
    in_time("nothing runs any more", || node.json(&["template", "ls"])["templates"].as_array().unwrap().is_empty());
    assert!(node.machines().is_empty());
    if is_root() {
        in_time("no worker is left but shells", || crate::real::groups(&node) <= 4);
    }
}

#[test]
fn real_guests_that_turn_bad_end_alone() {
    let node = node_with(BASE);
    let children = fork(&node, BASE, 5);
    let [resets, panics, floods, chatty, sibling] = &children[..] else { unreachable!() };
    let ended = |machine: &str| node.json(&["show", machine])["machine"]["ended"]["reason"].as_str().map(str::to_owned);

    // The kernel's restart, and a panic: the agent is the first process, whose end is one.
    exec(&node, resets, "reboot -f");
    in_time("it has reset itself", || ended(resets).as_deref() == Some("GUEST_SHUTDOWN"));
    sh(&node, panics, "echo 1 > /proc/sys/kernel/panic_on_oops 2>/dev/null; true");
    exec(&node, panics, "echo c > /proc/sysrq-trigger 2>/dev/null || kill -9 1; sleep 1; exit 0");
    let spare = ended(panics);
    assert!(spare.is_none() || spare.as_deref() == Some("GUEST_PANIC"), "{spare:?}");

    // A console that is never silent, and output that is never read.
    node.cli(&["exec", floods, "--detach", "--", "sh", "-c", "while true; do echo flood flood flood > /dev/console; done"]);
    node.cli(&["exec", chatty, "--detach", "--", "sh", "-c", "while true; do cat /proc/kallsyms /etc/passwd; done"]);
    let printed = || node.json(&["show", floods])["console"]["tail"].as_str().unwrap().len();
    in_time("it floods", || printed() > 1000);
    assert!(printed() <= 64 << 10);
    let much = node.cli(&["exec", chatty, "--", "head", "-c", "3000000", "/dev/zero"]);
    assert_eq!((much.code, much.out.len()), (Some(0), 3_000_000));
    assert_eq!(sh(&node, sibling, "echo well"), "well");
    let logs = node.cli(&["logs", floods]);
    assert!(logs.code == Some(0) && logs.out.contains("flood"), "{:?}", logs.code);
    assert!(Path::new("/dev/kvm").exists());
    assert_eq!(node.cli(&["exec", resets, "--", "true"]).code, Some(125), "its machine has ended");
}
