//! Root file systems. (No machine is started here, so this runs without KVM, too.)

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/guest/build.sh");

/// The same tree, whatever the order in which it comes to be.
fn make(tree: &Path, is_backwards: bool) {
    let mut names: Vec<String> = (0..300).map(|number| format!("file {number}")).collect();
    if is_backwards {
        names.reverse();
    }
    for directory in ["etc", "usr", "usr/bin"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    for name in names {
        fs::write(tree.join("usr/bin").join(&name), name.repeat(500)).unwrap();
        symlink(format!("../usr/bin/{name}"), tree.join("etc").join(&name)).unwrap();
    }
    fs::set_permissions(tree.join("usr/bin/file 7"), fs::Permissions::from_mode(0o4755)).unwrap();
}

fn built(in_directory: &Path, is_backwards: bool) -> Vec<u8> {
    let directory = tempfile::tempdir_in(in_directory).unwrap();
    let (tree, image) = (directory.path().join("tree"), directory.path().join("image.ext4"));
    make(&tree, is_backwards);
    let built = Command::new(BUILD).arg("file-system").args([&tree, &image]).arg("16").output().unwrap();
    assert!(built.status.success(), "{built:?}");
    let ls = Command::new("debugfs").args(["-R", "stat \"/usr/bin/file 7\""]).arg(&image).output().unwrap();
    let said = String::from_utf8_lossy(&ls.stdout).into_owned();
    assert!(said.contains("Mode:  04755") && said.contains("User:     0") && said.contains("Size: 3000"), "{said}");
    fs::read(&image).unwrap()
}

#[test]
fn root_file_systems_are_the_same_wherever_they_are_built() {
    let (here, there) = (std::env::temp_dir(), Path::new("/dev/shm"));
    let first = built(&here, false);
    let second = built(if there.is_dir() { there } else { &here }, true);
    assert!(first == second, "two images of one tree differ");
}
