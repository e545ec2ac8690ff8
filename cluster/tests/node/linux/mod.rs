//! Linux guests, as users of a node meet them. Needs KVM, root for the control groups, and what `make guest` builds. (Names that
//! begin with `real_` are how tests are left out where there is no KVM.)
//!
//! Booting a guest takes half a minute where KVM emulates guest kernels: each template is built once for all tests of this build
//! of the program, by whichever test needs it first, and kept beside the build.

mod bad_guests;
mod images;
mod network;
mod oracle;
mod stories;
mod uniqueness;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{Node, PROGRAM, Said};

/// Five times what the slowest thing here takes on a machine that is busy with other tests.
pub(super) const PATIENCE: Duration = Duration::from_secs(240);

/// A template that tests share.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub(super) name: &'static str,
    arguments: &'static [&'static str],
}

/// busybox.
pub(super) const BASE: Shared = Shared { name: "base", arguments: &["--rootfs", "base", "--memory", "64MiB"] };
/// Python with modules imported, and a dataset in memory; its root is read-only, so that nothing changes its disk.
pub(super) const PYTHON: Shared = Shared {
    name: "py",
    arguments: &[
        "--rootfs",
        "python",
        "--memory",
        "192MiB",
        "--warm",
        "cat /usr/bin/python3.11 /usr/lib/x86_64-linux-gnu/libcrypto.so.3 > /dev/shm/data && \
         sha256sum < /dev/shm/data > /dev/shm/digest && sync && mount -o remount,ro /",
        "--main",
        "python3 /usr/lib/farfork/main.py random uuid hashlib json socket",
    ],
};

/// Puts a template into a node's store, building it if no test has so far.
pub(super) fn provide(node: &Node, template: Shared) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates");
    fs::create_dir_all(&directory).unwrap();
    let kept = directory.join(format!("{}-{}.img", template.name, key(template)));
    // Tests are processes: one of them builds, the others wait for it.
    let lock = File::create(directory.join(format!("{}.lock", template.name))).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let in_store = |node: &Node| node.path().join(format!("data/images/{}.img", template.name));
    if !kept.exists() {
        remove_older(&directory, template.name);
        let arguments = [&["template", "build", template.name][..], template.arguments].concat();
        let built = node.cli(&arguments);
        assert_eq!(built.code, Some(0), "{built:?}");
        println!("{}", built.out);
        let new = kept.with_extension("new");
        copy(&in_store(node), &new);
        fs::rename(&new, &kept).unwrap();
        return;
    }
    drop(lock);
    copy(&kept, &in_store(node));
}

/// With its holes.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

fn remove_older(directory: &Path, name: &str) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let file = entry.file_name().into_string().unwrap();
        if file.starts_with(&format!("{name}-")) {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

/// Of everything that a template is made by and from.
fn key(template: Shared) -> String {
    let mut all = fs::read(PROGRAM).unwrap();
    for file in ["vmlinux", "initrd", "base.ext4", "python.ext4"] {
        // Each is in a directory that is named after what it was made from.
        let made =
            fs::canonicalize(guests().join(file)).unwrap_or_else(|error| panic!("run `make guest` first: {file}: {error}"));
        all.extend(made.to_str().unwrap().bytes());
    }
    template.arguments.iter().for_each(|argument| all.extend(argument.bytes()));
    types::Digest::of(&all).to_string()[..16].to_owned()
}

pub(super) fn guests() -> PathBuf {
    farfork::cli::paths::guests().unwrap()
}

/// A node with a template in its store.
pub(super) fn node_with(template: Shared) -> Node {
    let node = Node::start_in(tempfile::tempdir().unwrap(), &[]);
    provide(&node, template);
    node
}

/// Forks children of a template; their ids.
pub(super) fn fork(node: &Node, template: Shared, count: u64) -> Vec<String> {
    let forked = node.json(&["fork", template.name, "-n", &count.to_string()]);
    let children = crate::support::ids(&forked["children"]);
    assert_eq!(children.len() as u64, count, "{forked}");
    assert!(forked["children"].as_array().unwrap().iter().all(|child| child["ready_us"].as_u64().is_some()), "{forked}");
    children
}

/// Runs a shell command in a machine; what it said, without the line's end.
pub(super) fn sh(node: &Node, machine: &str, command: &str) -> String {
    let said = exec(node, machine, command);
    assert_eq!(said.code, Some(0), "{command}: {said:?}");
    said.out.trim_end().to_owned()
}

pub(super) fn exec(node: &Node, machine: &str, command: &str) -> Said {
    node.cli(&["exec", machine, "--", "sh", "-c", command])
}

/// Evaluates Python in a machine's main process; what it says.
pub(super) fn eval(node: &Node, machine: &str, code: &str) -> String {
    let said = node.cli(&["eval", machine, code]);
    if said.code != Some(0) {
        // A guest that breaks off may be on its way to its end.
        std::thread::sleep(Duration::from_secs(5));
        panic!("{code}: {said:?}; {}", node.cli(&["show", machine]).out);
    }
    said.out.trim_end().to_owned()
}

/// As `eventually`, with patience for guests.
pub(super) fn in_time(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
