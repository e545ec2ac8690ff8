//! Images on disk: what is saved is what is loaded, and no failure leaves half of one.

use std::fs;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vm::harness::{all_memory, child, child_at_rest, class, count, held, host, parent, seed};
use vm::image::{SaveError, load, save};
use vm::probe::{self, Probe};
use vm::{Host, Image};

fn image_with(host: &Host, mib: u64, pages: u64, epoch: u64) -> Arc<Image> {
    let mut parent = parent(host, class(mib, 1));
    Probe::of(&parent).fill(probe::first_work_page(), pages, epoch).unwrap();
    parent.freeze(host).unwrap().image
}

fn quiet(_: u64, _: u64) {}

#[test]
fn a_loaded_image_is_the_saved_one() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let image = image_with(&host, 16, 700, 3);
    assert_eq!(image.digest(), None, "an image has no digest before it is hashed");
    let mut steps = Vec::new();
    let saved = save(&image, &path, |done, total| steps.push((done, total))).unwrap();
    assert_eq!(image.digest(), Some(saved.digest));
    assert!(steps.is_sorted() && steps.iter().all(|(_, total)| *total == steps.len() as u64), "{steps:?}");
    let loaded = load(&host, &path, quiet).unwrap();
    assert_eq!(loaded.digest(), Some(saved.digest));
    assert_eq!(loaded.class(), image.class());
    let (a, b) = (child_at_rest(&host, &image), child_at_rest(&host, &loaded));
    let identity = usize::try_from(image.identity_page().unwrap().0).unwrap();
    let clock = usize::try_from(probe::clock_page(0).0).unwrap();
    let own = |mut memory: Vec<u8>| {
        memory[identity..identity + 16].fill(0);
        memory[clock..clock + 32].fill(0);
        memory
    };
    assert!(own(all_memory(&a)) == own(all_memory(&b)));
    assert_eq!(b.state_difference(&host, &image).unwrap(), None);
    let child = child(&host, &loaded);
    assert_eq!(Probe::of(&child).verify(probe::first_work_page(), 700, 3).unwrap(), None);
    // Saved again it is the same, bit for bit in its head.
    assert_eq!(save(&loaded, &directory.path().join("again"), quiet).unwrap().digest, saved.digest);
}

#[test]
fn a_branch_is_saved_whole_and_names_its_parents() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let base = image_with(&host, 16, 700, 3);
    save(&base, &directory.path().join("base"), quiet).unwrap();
    let mut machine = child(&host, &base);
    Probe::of(&machine).fill(probe::first_work_page(), 100, 4).unwrap();
    let branch = machine.freeze(&host).unwrap().image;
    let path = directory.path().join("branch");
    save(&branch, &path, quiet).unwrap();
    drop((base, machine, branch));
    let loaded = load(&host, &path, quiet).unwrap();
    assert_eq!(loaded.depth(), 1);
    let child = child(&host, &loaded);
    let first = probe::first_work_page();
    assert_eq!(Probe::of(&child).verify(first, 100, 4).unwrap(), None);
    assert_eq!(Probe::of(&child).verify(types::PageIndex(first.0 + 100), 600, 3).unwrap(), None);
}

#[test]
fn a_save_that_fails_leaves_the_old_image_and_nothing_else() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let old = save(&image_with(&host, 4, 50, 1), &path, quiet).unwrap().digest;
    let new = image_with(&host, 4, 60, 2);
    for (point, skip) in [("save.write", 0), ("save.write", 3), ("save.sync", 0), ("save.rename", 0)] {
        let armed = vm::failpoint::arm(point, skip, 28);
        let error = save(&new, &path, quiet).unwrap_err();
        drop(armed);
        assert!(matches!(error, SaveError::Full { .. }), "{point}: {error}");
        assert!(!error.to_string().contains('\n') && error.remedy().contains("free room"));
        assert_eq!(load(&host, &path, quiet).unwrap().digest(), Some(old), "{point}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "{point} left something behind");
    }
    let armed = vm::failpoint::arm("save.write", 0, 5);
    assert!(matches!(save(&new, &path, quiet).unwrap_err(), SaveError::Io { .. }));
    drop(armed);
    assert_ne!(save(&new, &path, quiet).unwrap().digest, old);
}

#[test]
fn places_that_cannot_hold_an_image_are_refused() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let image = image_with(&host, 2, 10, 1);
    for path in ["missing/image", ".", "/", "/proc/image"] {
        let error = save(&image, &directory.path().join(path), quiet).unwrap_err();
        assert!(!error.remedy().is_empty(), "{path}: {error}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// A real file system without room: tmpfs of 1 MiB.
#[test]
fn a_full_disk_is_named_and_nothing_is_left_on_it() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: mounting a small file system needs root");
        return;
    }
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| Process::new("mount").args(arguments).arg(directory.path()).status().unwrap();
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "farfork-test"]).success() {
        println!("skipped: mounting is not allowed here");
        return;
    }
    let result = save(&image_with(&host, 16, 1000, 1), &directory.path().join("image"), quiet);
    let left = fs::read_dir(directory.path()).unwrap().count();
    assert!(Process::new("umount").arg(directory.path()).status().unwrap().success());
    let error = result.unwrap_err();
    assert!(matches!(error, SaveError::Full { .. }), "{error}");
    assert_eq!(left, 0, "something is left on the full disk");
}

const VICTIM: &str = "FARFORK_TEST_SAVE_INTO";

/// Runs only as the child process of the test below: saves two images in turn for ever.
#[test]
fn victim_of_the_kill_test() {
    let Ok(path) = std::env::var(VICTIM) else { return };
    let host = host();
    let images = [image_with(&host, 4, 300, 1), image_with(&host, 4, 400, 2)];
    loop {
        for image in &images {
            save(image, Path::new(&path), quiet).unwrap();
        }
    }
}

#[test]
fn a_process_killed_while_it_saves_leaves_a_whole_image() {
    let host = host();
    let mut dice = fastrand::Rng::with_seed(seed());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let rounds = count(5, 100);
    for round in 0..rounds {
        let mut victim = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "save::victim_of_the_kill_test"])
            .env(VICTIM, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = std::time::Instant::now();
        while !path.exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "the victim does not save");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_micros(dice.u64(0..60_000)));
        victim.kill().unwrap();
        victim.wait().unwrap();
        let loaded = load(&host, &path, quiet).unwrap_or_else(|error| panic!("round {round}: {error}"));
        let child = child(&host, &loaded);
        let first = probe::first_work_page();
        let whole = Probe::of(&child).verify(first, 300, 1).unwrap().is_none()
            || Probe::of(&child).verify(first, 400, 2).unwrap().is_none();
        assert!(whole, "round {round}: a mixture was loaded");
        for entry in fs::read_dir(directory.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name == "image" || (name.starts_with(".image.") && name.ends_with(".tmp")), "{name} was left behind");
        }
    }
    held("kills in the middle of a save, each with a whole image after it", rounds);
}
