//! Nothing is left behind: descriptors, threads, mappings, processes.

use std::fs;
use std::time::{Duration, Instant};

use vm::harness::{child, class, count, held, host, parent};
use vm::probe::{self, Probe};

#[derive(Debug, PartialEq, Eq)]
struct Resources {
    descriptors: usize,
    threads: usize,
    guest_mappings: usize,
    processes: usize,
}

fn resources() -> Resources {
    let entries = |path: &str| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    // The kernel lists children by the thread that made them.
    let children: String = fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok())
        .collect();
    Resources {
        descriptors: entries("/proc/self/fd"),
        threads: entries("/proc/self/task"),
        guest_mappings: maps.lines().filter(|line| line.contains("memfd:") || line.contains("kvm-vcpu")).count(),
        processes: children.split_whitespace().count(),
    }
}

/// What is given back by others (the kernel, the thread that reaps copiers) may take a moment.
fn wait_for(expected: &Resources) {
    let started = Instant::now();
    while resources() != *expected {
        assert!(started.elapsed() < Duration::from_secs(30), "{:?} are left, not {expected:?}", resources());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn machines_and_images_leave_nothing_behind() {
    let host = host();
    let one_life = || {
        let mut parent = parent(&host, class(8, 2));
        Probe::of(&parent).fill(probe::first_work_page(), 100, 1).unwrap();
        let image = parent.freeze(&host).unwrap().image;
        let mut first = child(&host, &image);
        Probe::of(&first).fill(probe::first_work_page(), 10, 2).unwrap();
        let branch = first.freeze(&host).unwrap().image;
        let second = child(&host, &branch);
        assert_eq!(Probe::of(&second).verify(probe::first_work_page(), 10, 2).unwrap(), None);
    };
    one_life();
    wait_for(&Resources { processes: 0, ..resources() });
    let before = resources();
    let rounds = count(10, 300);
    for _ in 0..rounds {
        one_life();
    }
    wait_for(&before);
    held("lives of machines that left nothing behind", rounds);
}

#[test]
fn failures_leave_nothing_behind() {
    let host = host();
    let directory = tempfile::tempdir().unwrap();
    let mut parent = parent(&host, class(8, 1));
    let image = parent.freeze(&host).unwrap().image;
    let mut machine = child(&host, &image);
    let mut failing = || {
        for point in ["memfd.create", "freeze.copier", "freeze.copy", "memfd.seal"] {
            let armed = vm::failpoint::arm(point, 0, 12);
            machine.freeze(&host).unwrap_err();
            drop(armed);
        }
        for point in ["save.write", "save.sync", "save.rename"] {
            let armed = vm::failpoint::arm(point, 0, 28);
            vm::image::save(&image, &directory.path().join("image"), |_, _| {}).unwrap_err();
            drop(armed);
        }
        Probe::of(&machine).fill(probe::first_work_page(), 10, 3).unwrap();
    };
    failing();
    wait_for(&Resources { processes: 0, ..resources() });
    let before = resources();
    for _ in 0..5 {
        failing();
    }
    wait_for(&before);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
