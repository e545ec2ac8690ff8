//! Images on disk: what is saved is what is loaded, and no failure leaves half of one.

use std::fs;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::Duration;

use types::PageIndex;
use vm::harness::{all_memory, child, child_at_rest, class, count, held, host, parent, seed};
use vm::image::{self, load::LoadErrorKind};
use vm::image::{LoadError, SaveError, load, load_branch, save, save_branch};
use vm::probe::{self, Command, Probe};
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
    assert_eq!(b.state_differences(&host, &image).unwrap(), Vec::<String>::new());
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

/// The size of a branch on disk is its touched extents; what it shares with its base is shared again when it is loaded.
#[test]
fn a_branch_saved_upon_its_base_is_as_large_as_what_was_touched() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let first = probe::first_work_page();
    let base = image_with(&host, 64, 8000, 3);
    let mut machine = child(&host, &base);
    Probe::of(&machine).fill(first, 100, 4).unwrap();
    Probe::of(&machine).fill(PageIndex(first.0 + 9000), 20, 5).unwrap();
    let frozen = machine.freeze(&host).unwrap();
    let branch = frozen.image;
    assert!(matches!(save_branch(&branch, &base, &path("early"), quiet), Err(SaveError::UnsavedBase)));
    save(&base, &path("base"), quiet).unwrap();
    let saved = save_branch(&branch, &base, &path("branch"), quiet).unwrap();
    let touched_bytes = frozen.report.copied_extents * types::EXTENT_SIZE;
    assert!(saved.written_bytes <= touched_bytes, "{} bytes written for {touched_bytes} touched", saved.written_bytes);
    assert!(saved.written_bytes >= 120 * 4096, "{} bytes cannot hold 120 pages", saved.written_bytes);
    let on_disk = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path("branch")).unwrap()) * 512;
    assert!(on_disk <= touched_bytes + (256 << 10), "{on_disk} bytes on disk for {touched_bytes} touched");
    // It is the same image as when it is saved whole.
    assert_eq!(save(&branch, &path("whole"), quiet).unwrap().digest, saved.digest);
    drop((base, machine, branch));

    let kind = |result: Result<Arc<Image>, LoadError>| *result.unwrap_err().kind;
    assert!(matches!(kind(load(&host, &path("branch"), quiet)), LoadErrorKind::NeedsBase { .. }));
    let other = image_with(&host, 64, 10, 1);
    assert!(matches!(kind(load_branch(&host, &other, &path("branch"), quiet)), LoadErrorKind::OtherBase { .. }));
    let base = load(&host, &path("base"), quiet).unwrap();
    let loaded = load_branch(&host, &base, &path("branch"), quiet).unwrap();
    assert_eq!(loaded.digest(), Some(saved.digest));
    assert!(loaded.own_bytes().unwrap() <= touched_bytes, "what is in the base takes memory again");
    let child = child(&host, &loaded);
    assert_eq!(Probe::of(&child).verify(first, 100, 4).unwrap(), None);
    assert_eq!(Probe::of(&child).verify(PageIndex(first.0 + 100), 7900, 3).unwrap(), None);
    assert_eq!(Probe::of(&child).verify(PageIndex(first.0 + 9000), 20, 5).unwrap(), None);

    // The list of what the file has is covered by no digest: whatever it says, no wrong byte is loaded.
    let file = fs::read(path("branch")).unwrap();
    let bits_at = 4096 + (64 << 10) + 32 * 1024;
    assert!(file[bits_at..bits_at + 128].iter().any(|byte| *byte != 0));
    let mut dice = fastrand::Rng::with_seed(seed());
    for round in 0..count(30, 300) {
        let mut lying = file.clone();
        match round {
            0 => lying[bits_at..bits_at + 128].fill(0),
            1 => lying[bits_at..bits_at + 128].fill(0xFF),
            _ => lying[bits_at + dice.usize(0..128)] ^= 1 << dice.u32(0..8),
        }
        fs::write(path("lying"), &lying).unwrap();
        match load_branch(&host, &base, &path("lying"), quiet) {
            Ok(image) => {
                let child = vm::harness::child(&host, &image);
                assert_eq!(Probe::of(&child).verify(first, 100, 4).unwrap(), None);
                assert_eq!(Probe::of(&child).verify(PageIndex(first.0 + 100), 7900, 3).unwrap(), None);
            }
            Err(error) => assert!(!error.remedy().is_empty(), "{error}"),
        }
    }
}

/// Sealing for the save looks for pages that somebody uses; children that fault all the time must not make it fail.
#[test]
fn an_image_is_saved_while_its_children_read_and_write_with_all_their_might() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let (first, pages) = (probe::first_work_page(), 3000);
    let rounds = count(3, 60);
    for round in 0..rounds {
        let mut parent = parent(&host, class(16, 1));
        Probe::of(&parent).fill(first, pages, 1).unwrap();
        let base = parent.freeze(&host).unwrap().image;
        let mut machine = child(&host, &base);
        Probe::of(&machine).fill(first, 1000, 2).unwrap();
        let branch = machine.freeze(&host).unwrap().image;
        let children: Vec<_> = (0..4).map(|_| child(&host, &branch)).collect();
        let faulting: Vec<_> = (0u64..)
            .zip(&children)
            .map(|(seed, child)| {
                let shuffled = Command::TouchRead { first, count: pages, stride: 1, shuffle: Some(seed) };
                let written = Command::TouchWrite { first, count: pages, stride: 1, shuffle: true, value: seed };
                Probe::of(child).post(if seed % 2 == 0 { shuffled } else { written }).unwrap()
            })
            .collect();
        let digest = save(&branch, &directory.path().join("image"), quiet).unwrap().digest;
        for (child, pending) in children.iter().zip(faulting) {
            assert_eq!(Probe::of(child).wait(pending).unwrap()[1], pages, "round {round}");
        }
        let loaded = load(&host, &directory.path().join("image"), quiet).unwrap();
        assert_eq!(loaded.digest(), Some(digest));
        assert_eq!(Probe::of(&child(&host, &loaded)).verify(first, 1000, 2).unwrap(), None, "round {round}");
    }
    held("saves under faulting children", rounds);
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
    // After the renaming only the directory can fail, and the error says what is there.
    let armed = vm::failpoint::arm("save.sync", 1, 5);
    let error = save(&new, &path, quiet).unwrap_err();
    drop(armed);
    assert!(error.to_string().contains("the image is there"), "{error}");
    assert_eq!(load(&host, &path, quiet).unwrap().digest(), new.digest());
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
        // From here on a kill meets a save.
        fs::write(format!("{path}.ready"), b"").unwrap();
    }
}

#[test]
fn a_process_killed_while_it_saves_leaves_a_whole_image() {
    let host = host();
    let mut dice = fastrand::Rng::with_seed(seed());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let rounds = count(8, 100);
    let ready = directory.path().join("image.ready");
    let mut met_a_save = 0;
    for round in 0..rounds {
        fs::remove_file(&ready).unwrap_or_default();
        let mut victim = Process::new(std::env::current_exe().unwrap())
            .args(["--exact", "save::victim_of_the_kill_test"])
            .env(VICTIM, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = std::time::Instant::now();
        while !ready.exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "the victim does not save");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_micros(dice.u64(0..20_000)));
        victim.kill().unwrap();
        victim.wait().unwrap();
        let loaded = load(&host, &path, quiet).unwrap_or_else(|error| panic!("round {round}: {error}"));
        let child = child(&host, &loaded);
        let first = probe::first_work_page();
        let whole = Probe::of(&child).verify(first, 300, 1).unwrap().is_none()
            || Probe::of(&child).verify(first, 400, 2).unwrap().is_none();
        assert!(whole, "round {round}: a mixture was loaded");
        for entry in fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if name.starts_with(".image.") && name.ends_with(".tmp") {
                met_a_save += 1;
                fs::remove_file(entry.path()).unwrap();
            } else {
                assert!(name == "image" || name == "image.ready", "{name} was left behind");
            }
        }
    }
    assert!(met_a_save > 0, "none of {rounds} kills met a save");
    held("kills in the middle of a save, each with a whole image after it", met_a_save);
}

#[test]
fn a_store_is_never_left_by_a_name_or_a_link() {
    use std::ffi::OsStr;
    use std::os::fd::AsFd;
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("store");
    fs::create_dir(&store).unwrap();
    let image = parent(&host, class(8, 1)).freeze(&host).unwrap().image;
    let open = fs::File::open(&store).unwrap();
    for name in ["", ".", "..", "../outside", "a/b", "/outside", "./a"] {
        let error = image::save_in(&image, open.as_fd(), OsStr::new(name), |_, _| {}).unwrap_err();
        assert!(matches!(error, image::SaveError::NoName { .. }), "{name:?}: {error}");
    }
    let outside = directory.path().join("outside");
    let report = image::save(&image, &outside, |_, _| {}).unwrap();
    // A link in the store is replaced by a save, and refused by a load, wherever it leads.
    std::os::unix::fs::symlink(&outside, store.join("link")).unwrap();
    let error = image::load_in(&host, open.as_fd(), OsStr::new("link"), |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("cannot be opened"), "{error}");
    let error = image::load_in(&host, open.as_fd(), OsStr::new("../outside"), |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("cannot be opened"), "{error}");
    let length = fs::metadata(&outside).unwrap().len();
    image::save_in(&image, open.as_fd(), OsStr::new("link"), |_, _| {}).unwrap();
    assert!(fs::symlink_metadata(store.join("link")).unwrap().is_file());
    assert_eq!(fs::metadata(&outside).unwrap().len(), length);
    let loaded = image::load_in(&host, open.as_fd(), OsStr::new("link"), |_, _| {}).unwrap();
    assert_eq!(loaded.digest(), Some(report.digest));
}
