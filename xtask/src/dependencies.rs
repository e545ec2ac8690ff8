//! Who may depend on whom, what licences come in, and whether two versions of a rust-vmm crate do.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use spdx::{Expression, ParseMode};

/// For each crate of ours, those of ours that it may use. A crate that is not listed may not exist.
const MAY_USE: &[(&str, &[&str])] = &[
    ("farfork-types", &[]),
    ("farfork-vm", &["farfork-types"]),
    ("farfork-pages", &["farfork-types"]),
    ("farfork-control", &["farfork-types"]),
    ("farfork-agent", &["farfork-types"]),
    ("farfork", &["farfork-types", "farfork-vm", "farfork-pages", "farfork-control", "farfork-agent"]),
    (
        "farfork-bench",
        &["farfork-types", "farfork-vm", "farfork-pages", "farfork-control", "farfork-agent", "farfork", "farfork-chaos"],
    ),
    ("farfork-chaos", &["farfork-types", "farfork-vm", "farfork-pages", "farfork-control", "farfork"]),
    ("xtask", &[]),
];

/// For each crate of ours, what it may not use directly: its promise of absence.
const MAY_NOT_USE: &[(&str, &[&str])] = &[
    ("farfork-types", &["tokio", "quinn", "openraft", "rustix", "libc", "kvm-ioctls", "vm-memory", "fastrand", "rand"]),
    ("farfork-vm", &["tokio", "quinn", "openraft", "redb", "axum"]),
    ("farfork-pages", &["kvm-ioctls", "vm-memory", "openraft", "redb"]),
    ("farfork-control", &["tokio", "quinn", "openraft", "redb", "rustix", "libc", "fastrand", "rand"]),
];

/// The prefixes and names of crates of which there must be one version.
const RUST_VMM: &[&str] =
    &["kvm-", "vm-memory", "vm-superio", "vmm-sys-util", "virtio-", "linux-loader", "event-manager", "seccompiler", "vhost"];

/// For what is shipped. What only fuzzes may be under NCSA as well, which is LLVM's old one.
const LICENCES: &[&str] =
    &["MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unicode-3.0", "CC0-1.0", "Unlicense", "BSL-1.0"];

pub(crate) fn complaints(root: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let path = root.join(manifest);
        if !path.exists() {
            continue;
        }
        let metadata =
            MetadataCommand::new().manifest_path(&path).exec().with_context(|| format!("cargo metadata of {manifest}"))?;
        if manifest == "Cargo.toml" {
            complaints.extend(imports(&metadata));
        }
        complaints.extend(duplicates(&metadata));
        complaints.extend(metadata.packages.iter().filter_map(|package| licence(package, manifest)));
    }
    Ok(complaints)
}

fn imports(metadata: &Metadata) -> Vec<String> {
    let ours: Vec<&Package> = metadata.workspace_packages();
    let mut complaints = Vec::new();
    for package in &ours {
        let name = package.name.as_str();
        let Some((_, allowed)) = MAY_USE.iter().find(|(of, _)| *of == name) else {
            complaints.push(format!("{name}: no crate of the layout; docs/architecture.md and xtask say which there are"));
            continue;
        };
        let forbidden = MAY_NOT_USE.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, forbidden)| forbidden);
        for dependency in package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development) {
            let used = dependency.name.as_str();
            if ours.iter().any(|other| other.name.as_str() == used) && !allowed.contains(&used) {
                complaints.push(format!("{name}: may not use {used}"));
            }
            // An optional one is for the tests of others, and off in what is shipped.
            if !dependency.optional && forbidden.contains(&used) {
                complaints.push(format!("{name}: promises to do without {used}"));
            }
        }
    }
    complaints
}

fn duplicates(metadata: &Metadata) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        if RUST_VMM.iter().any(|prefix| name.starts_with(prefix)) {
            versions.entry(name).or_default().push(package.version.to_string());
        }
    }
    let twice = versions.into_iter().filter(|(_, versions)| versions.len() > 1);
    twice.map(|(name, versions)| format!("{name}: several versions: {}", versions.join(", "))).collect()
}

fn licence(package: &Package, manifest: &str) -> Option<String> {
    let Some(licence) = &package.license else {
        return Some(format!("{} {}: names no licence", package.name, package.version));
    };
    let Ok(expression) = Expression::parse_mode(licence, ParseMode::LAX) else {
        return Some(format!("{} {}: licence {licence:?} does not parse", package.name, package.version));
    };
    let allowed = expression.evaluate(|requirement| {
        requirement
            .license
            .id()
            .is_some_and(|id| LICENCES.contains(&id.name) || (manifest != "Cargo.toml" && id.name == "NCSA"))
    });
    (!allowed).then(|| format!("{} {}: licence {licence} is not on the list", package.name, package.version))
}

#[cfg(test)]
mod tests {
    #[test]
    fn dependencies_keep_their_direction_and_licences() {
        assert_eq!(super::complaints(&crate::root()).unwrap(), Vec::<String>::new());
    }
}
