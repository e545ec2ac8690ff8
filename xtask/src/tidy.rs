//! Rules that a reader relies on and no compiler checks.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where `unsafe` may stand.
const UNSAFE_ISLANDS: &[&str] = &["crates/vm/src/sys/", "crates/agent/src/sys/"];
/// The most lines of a Rust file that is not on the ratchet.
const LINES_MAX: usize = 500;
/// Longer files and their lengths, which may only shrink.
const RATCHET: &str = "xtask/file-lengths.txt";
/// Reads and draws that the pure crates promise to do without.
const PURE: &[(&str, &[&str])] = &[
    (
        "crates/types/src/",
        &["std::fs", "std::net", "std::env", "std::thread", "Instant::now", "SystemTime", "async fn", "now_v7"],
    ),
    (
        "crates/control/src/",
        &["std::fs", "std::net", "std::env", "std::thread", "Instant::now", "SystemTime", "async fn", "now_v7"],
    ),
];
const UNFINISHED: &[&str] = &["TO\u{44}O", "FIX\u{4d}E", "#[ign\u{6f}re", "todo\u{21}(", "unimplemented\u{21}("];

pub(crate) fn complaints(root: &Path) -> Result<Vec<String>> {
    let files = tracked_files(root)?;
    let mut complaints = Vec::new();
    let mut lengths = BTreeMap::new();
    for path in &files {
        let name = path.to_string_lossy().into_owned();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !matches!(extension, Some("rs" | "md" | "sh" | "toml")) {
            continue;
        }
        let text = fs::read_to_string(root.join(path)).with_context(|| name.clone())?;
        complaints.extend(unfinished(&name, &text));
        if extension == Some("rs") {
            lengths.insert(name.clone(), text.lines().count());
            complaints.extend(unsafe_outside_islands(&name, &text));
            complaints.extend(impure(&name, &text));
        }
        if extension == Some("md") {
            complaints.extend(dead_links(root, path, &text));
        }
    }
    complaints.extend(crate_roots(root, &files)?);
    complaints.extend(too_long(root, &lengths)?);
    Ok(complaints)
}

fn tracked_files(root: &Path) -> Result<Vec<PathBuf>> {
    let arguments = ["ls-files", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().context("git ls-files")?;
    ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout)?;
    Ok(names.lines().map(PathBuf::from).filter(|path| root.join(path).is_file()).collect())
}

fn unfinished(name: &str, text: &str) -> Vec<String> {
    let found = numbered(text).filter(|(_, line)| UNFINISHED.iter().any(|mark| line.contains(mark)));
    found.map(|(number, _)| format!("{name}:{number}: unfinished work is no part of a commit")).collect()
}

fn unsafe_outside_islands(name: &str, text: &str) -> Vec<String> {
    if UNSAFE_ISLANDS.iter().any(|island| name.starts_with(island)) {
        return Vec::new();
    }
    let uses = numbered(text).filter(|(_, line)| {
        let code = line.split("//").next().unwrap_or_default();
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "allow(unsafe_code", "expect(unsafe_code"]
            .iter()
            .any(|mark| code.contains(mark) && !code.contains('"'))
    });
    uses.map(|(number, _)| format!("{name}:{number}: unsafe belongs in {}", UNSAFE_ISLANDS.join(" or "))).collect()
}

fn impure(name: &str, text: &str) -> Vec<String> {
    let Some((_, marks)) = PURE.iter().find(|(prefix, _)| name.starts_with(prefix)) else { return Vec::new() };
    let found = numbered(text).filter(|(_, line)| {
        let code = line.split("//").next().unwrap_or_default();
        marks.iter().any(|mark| code.contains(mark))
    });
    found.map(|(number, line)| format!("{name}:{number}: this crate promises to do without: {}", line.trim())).collect()
}

/// Every crate says in its first lines what it may not do to memory.
fn crate_roots(root: &Path, files: &[PathBuf]) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for path in files.iter().filter(|path| path.ends_with("src/lib.rs") || path.ends_with("src/main.rs")) {
        let name = path.to_string_lossy().into_owned();
        let text = fs::read_to_string(root.join(path))?;
        let has_island = UNSAFE_ISLANDS.iter().any(|island| island.starts_with(name.trim_end_matches("lib.rs")));
        let due = if has_island { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
        if !text.contains(due) {
            complaints.push(format!("{name}: lacks {due}"));
        }
        if !text.starts_with("//!") {
            complaints.push(format!("{name}: does not begin with what the crate is"));
        }
    }
    Ok(complaints)
}

/// Longer files than the limit are on a list with their length; the list only ever gets shorter.
fn too_long(root: &Path, lengths: &BTreeMap<String, usize>) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    let listed = fs::read_to_string(root.join(RATCHET)).unwrap_or_default();
    let mut allowed = BTreeMap::new();
    for line in listed.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, length) = line.rsplit_once(' ').with_context(|| format!("{RATCHET}: {line}"))?;
        allowed.insert(name.to_owned(), length.parse::<usize>().with_context(|| format!("{RATCHET}: {line}"))?);
    }
    for (name, length) in lengths {
        match allowed.remove(name) {
            Some(listed) if *length < listed => {
                complaints
                    .push(format!("{RATCHET}: {name} has {length} lines now; write that down (or drop it at {LINES_MAX})"));
            }
            Some(listed) if *length > listed => complaints.push(format!("{name}: grew from {listed} to {length} lines")),
            None if *length > LINES_MAX => {
                complaints.push(format!("{name}: {length} lines; split it (the limit is {LINES_MAX})"))
            }
            _ => {}
        }
    }
    complaints.extend(allowed.into_keys().map(|name| format!("{RATCHET}: {name} is gone")));
    Ok(complaints)
}

/// Links to files and headings of this repository lead somewhere.
fn dead_links(root: &Path, path: &Path, text: &str) -> Vec<String> {
    let name = path.display();
    let mut complaints = Vec::new();
    for (number, line) in numbered(text) {
        for target in links(line).filter(|target| !target.contains("://") && !target.starts_with("mailto:")) {
            let (file, heading) = target.split_once('#').map_or((target, None), |(file, heading)| (file, Some(heading)));
            let file = if file.is_empty() { root.join(path) } else { root.join(path).with_file_name(file) };
            if !file.exists() {
                complaints.push(format!("{name}:{number}: {target} does not exist"));
                continue;
            }
            let heading_is_there = |heading: &str| {
                fs::read_to_string(&file).is_ok_and(|text| text.lines().filter_map(anchor).any(|anchor| anchor == heading))
            };
            if heading.is_some_and(|heading| !heading_is_there(heading)) {
                complaints.push(format!("{name}:{number}: {target} has no such heading"));
            }
        }
    }
    complaints
}

/// The targets of `[text](target)` in a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

/// How a heading is linked to.
fn anchor(line: &str) -> Option<String> {
    let heading = line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' ')?;
    let kept =
        heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).collect::<String>();
    Some(kept.replace(' ', "-"))
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        assert_eq!(complaints(&crate::root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn each_rule_finds_what_it_forbids() {
        let code = "fn f() { unsafe { g() } }\n";
        assert_eq!(unsafe_outside_islands("crates/vm/src/machine/mod.rs", code).len(), 1);
        assert_eq!(unsafe_outside_islands("crates/vm/src/sys/slot.rs", code).len(), 0);
        assert_eq!(impure("crates/types/src/id.rs", "use std::fs::File;\n").len(), 1);
        assert_eq!(impure("crates/vm/src/host.rs", "use std::fs::File;\n").len(), 0);
        assert_eq!(unfinished("a.rs", &format!("// {}: later\n", UNFINISHED[0])).len(), 1);
        let root = crate::root();
        let dead = |text| dead_links(&root, Path::new("README.md"), text).len();
        assert_eq!(dead("[a](Cargo.toml) [b](missing.md) [c](#missing)"), 2);
        let long = BTreeMap::from([("a.rs".to_owned(), LINES_MAX + 1)]);
        assert_eq!(too_long(&root, &long).unwrap().iter().filter(|complaint| complaint.starts_with("a.rs")).count(), 1);
    }

    #[test]
    fn headings_become_anchors() {
        assert_eq!(anchor("## What is it, then?").as_deref(), Some("what-is-it-then"));
        assert_eq!(anchor("#!/bin/sh"), None);
    }
}
