//! Data directories that cannot be used.

use std::process::Command;

use crate::support::{PROGRAM, Said, is_root};

/// Runs a node in a mount namespace of its own, after `prepare` has made `$D` what it should be.
fn node_in(prepare: &str) -> Option<Said> {
    let directory = tempfile::tempdir().unwrap();
    let own = if is_root() { "-m" } else { "-rm" };
    let data = directory.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let mut probe = Command::new("unshare");
    probe.args([own, "mount", "-t", "tmpfs", "-o", "ro", "none"]).arg(&data);
    if !probe.status().is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: this user cannot mount anything");
        return None;
    }
    let script = format!("set -e; {prepare}; exec \"$P\" node --fake-engine '' --output json --socket \"$S\" --data \"$D\"");
    let mut command = Command::new("unshare");
    command.args([own, "sh", "-c", &script]);
    command.env("D", &data).env("P", PROGRAM).env("S", directory.path().join("s"));
    Some(Said::of(command.output().unwrap()))
}

fn assert_refused(said: &Said, what: &str) {
    assert_eq!(said.code, Some(4), "{said:?}");
    assert_eq!(said.error_code(), "DATA_DIRECTORY", "{said:?}");
    assert!(said.err.contains(what), "{said:?}");
}

#[test]
fn a_read_only_directory_is_refused() {
    let Some(said) = node_in("mount -t tmpfs -o ro none \"$D\"") else { return };
    assert_refused(&said, "read-only");
    // Also one that has been a node's before.
    let been = "mount -t tmpfs none \"$D\"; mkdir -m 700 \"$D/x\"; touch \"$D/lock\"; mount -o remount,bind,ro \"$D\"";
    assert_refused(&node_in(been).unwrap(), "read-only");
}

#[test]
fn a_full_directory_is_refused() {
    let fill = "mount -t tmpfs -o size=64k none \"$D\"; head -c 1000000 /dev/zero > \"$D/fill\" 2> /dev/null || true";
    let Some(said) = node_in(fill) else { return };
    assert_refused(&said, "full");
    // Room for the lock alone.
    assert_refused(&node_in("mount -t tmpfs -o size=4k none \"$D\"").unwrap(), "full");
}

#[test]
fn a_file_and_an_impossible_path_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    for data in [file.clone(), file.join("below"), "/proc/nowhere".into()] {
        let mut command = Command::new(PROGRAM);
        command.args(["node", "--fake-engine", "", "--output", "json", "--data"]).arg(&data);
        command.arg("--socket").arg(directory.path().join("s"));
        assert_refused(&Said::of(command.output().unwrap()), "cannot be used");
    }
}
