//! Machines in their workers: what a child is, what ends it, and that an end is only its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use types::{MachineId, Reason};
use vm::harness::{Crash, class, held, host, new_id};
use vm::image::Image;
use vm::pool::{ForkOptions, Jailed, PoolError, Settings};
use vm::probe::{self, Command, Fault};
use vm::{Class, Pool};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn settings() -> Settings {
    Settings { groups: groups(), ..Settings::new(env!("CARGO_BIN_EXE_zygote"), []) }
}

/// Control groups of this test's own, where they can be made.
fn groups() -> Option<String> {
    if rustix::process::geteuid().is_root() {
        return Some(format!("test-{}", std::process::id()));
    }
    println!("SKIPPED: control groups: this user is not root");
    None
}

pub(crate) fn pool() -> Pool {
    Pool::open(host(), settings()).unwrap_or_else(|error| panic!("{error}; {}", error.remedy()))
}

/// An image whose first `count` pages of work hold the pattern of epoch 7.
pub(crate) fn image(pool: &Pool, class: Class, count: u64) -> Arc<Image> {
    let parent = pool.boot_probe(class, new_id()).unwrap();
    parent.call(0, Command::Fill { first: probe::first_work_page(), count, epoch: 7 }).unwrap();
    parent.freeze().unwrap().image
}

pub(crate) fn fork(pool: &Pool, image: &Arc<Image>, count: usize) -> Vec<Jailed> {
    let ids: Vec<MachineId> = (0..count).map(|_| new_id()).collect();
    let forked = pool.fork(image, &ids, ForkOptions::default());
    forked.into_iter().map(|forked| forked.unwrap_or_else(|error| panic!("{error}; {}", error.remedy())).0).collect()
}

pub(crate) fn check(child: &Jailed, count: u64, epoch: u64) {
    let [differ, _, compared, _] = child.call(0, Command::Verify { first: probe::first_work_page(), count, epoch }).unwrap();
    assert_eq!((differ, compared), (0, count), "{}", child.id());
}

/// The machine's id, as its guest says it.
pub(crate) fn who(child: &Jailed) -> MachineId {
    let [low, high, ..] = child.call(0, Command::Who).unwrap();
    let bytes = [low.to_le_bytes(), high.to_le_bytes()].concat();
    MachineId::from_uuid(uuid::Uuid::from_slice(&bytes).unwrap())
}

fn ended(child: &Jailed) -> Reason {
    let ended = child.wait_for_end(PATIENCE).unwrap_or_else(|| panic!("{} has not ended", child.id()));
    println!("{ended}");
    ended.reason
}

#[test]
fn children_are_their_image_and_know_who_they_are() {
    let pool = pool();
    for (mib, vcpus) in [(2, 1), (64, 1), (64, 4), (4096, 1)] {
        let class = class(mib, vcpus);
        let pages = probe::work_pages(class.memory()).min(1000);
        let image = image(&pool, class, pages);
        for child in fork(&pool, &image, 4) {
            assert_eq!(who(&child), child.id());
            check(&child, pages, 7);
            for vcpu in 1..vcpus {
                assert!(child.call(vcpu, Command::Ping).is_ok());
            }
        }
    }
}

#[test]
fn a_branch_of_a_writing_child_is_one_instant() {
    let pool = pool();
    let image = image(&pool, class(64, 1), 2000);
    let child = fork(&pool, &image, 1).remove(0);
    let pages = Command::Epochs { first: probe::first_work_page(), count: 500 };
    child.post(0, pages).unwrap();
    for _ in 0..5 {
        let frozen = child.freeze().unwrap();
        assert!(frozen.report.dirty_pages >= 1 && frozen.report.copied_extents >= 1, "{:?}", frozen.report);
        // The branch goes on writing until it is told to stop, and what it writes is in order.
        let branch = fork(&pool, &frozen.image, 1).remove(0);
        assert!(branch.stop(0).is_ok());
        let verify = Command::Verify { first: types::PageIndex(probe::first_work_page().0 + 500), count: 1500, epoch: 7 };
        assert_eq!(branch.call(0, verify).unwrap()[0], 0);
    }
    assert!(child.stop(0).unwrap()[0] > 0);
}

#[test]
fn a_machine_that_never_exits_runs_all_the_same() {
    let pool = pool();
    let image = image(&pool, class(64, 1), 10);
    let child = fork(&pool, &image, 1).remove(0);
    child.post(0, Command::Spin { rounds: None }).unwrap();
    let spinning = child.freeze().unwrap().image;
    let branch = fork(&pool, &spinning, 1).remove(0);
    branch.set_running(false).unwrap();
    branch.set_running(true).unwrap();
    assert!(branch.stop(0).is_ok());
    assert!(child.stop(0).is_ok());
}

#[test]
fn an_image_of_many_layers_is_forked() {
    let pool = pool();
    let mut image = image(&pool, class(64, 1), 4000);
    // Each branch writes one extent that none before it has, so that the image needs a layer for each.
    let depth = 260;
    for round in 0..depth {
        let child = fork(&pool, &image, 1).remove(0);
        let first = types::PageIndex(probe::first_work_page().0 + 32 * (round % 250));
        child.call(0, Command::Fill { first, count: 1, epoch: 100 + round }).unwrap();
        image = child.freeze().unwrap().image;
    }
    let child = fork(&pool, &image, 1).remove(0);
    for round in 10..depth {
        let first = types::PageIndex(probe::first_work_page().0 + 32 * (round % 250));
        let verify = Command::Verify { first, count: 1, epoch: 100 + round };
        assert_eq!(child.call(0, verify).unwrap()[0], 0, "what branch {round} wrote");
    }
    held("branches of branches, each in a worker", depth);
}

#[test]
fn one_end_is_only_its_own() {
    let pool = pool();
    let ends = pool.ends();
    let image = image(&pool, class(64, 1), 100);
    let children = fork(&pool, &image, 11);
    // The guest's own.
    children[0].post(0, Command::Fault(Fault::Triple)).unwrap();
    assert_eq!(ended(&children[0]), Reason::GuestTripleFault);
    // The worker's.
    let crashes = [
        (Crash::Panic, Reason::WorkerCrashed),
        (Crash::Fault, Reason::WorkerCrashed),
        (Crash::Exit, Reason::WorkerCrashed),
        (Crash::ForbiddenCall, Reason::JailViolation),
        (Crash::Lie, Reason::WorkerCrashed),
        (Crash::Garbage, Reason::WorkerCrashed),
    ];
    for (child, (crash, reason)) in children[1..].iter().zip(crashes) {
        child.crash(crash).unwrap();
        assert_eq!(ended(child), reason);
    }
    // Somebody's who is not the node.
    kill_process(Pid::from_raw(children[7].pid().unwrap()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(ended(&children[7]), Reason::WorkerCrashed);
    // The node's.
    children[8].kill();
    assert_eq!(ended(&children[8]), Reason::Killed);
    let error = children[8].call(0, Command::Ping).unwrap_err();
    assert!(matches!(error, PoolError::Ended(_)), "{error}");
    assert!(!error.remedy().is_empty());
    for child in &children[9..] {
        assert_eq!(who(child), child.id());
        check(child, 100, 7);
    }
    let told: Vec<(MachineId, Reason)> = ends.try_iter().map(|(id, ended)| (id, ended.reason)).collect();
    let reasons =
        [Reason::GuestTripleFault].into_iter().chain(crashes.map(|(_, reason)| reason)).chain([Reason::WorkerCrashed]);
    let due: Vec<_> = children.iter().map(Jailed::id).zip(reasons).collect();
    assert_eq!(told, due, "those that nobody asked for, in order");
}

#[test]
fn a_child_over_its_limit_ends_and_its_siblings_do_not() {
    if groups().is_none() {
        return;
    }
    let pool = pool();
    let image = image(&pool, class(256, 1), 100);
    let limited = ForkOptions { limit_bytes: Some(16 << 20) };
    let greedy = pool.fork(&image, &[new_id()], limited).remove(0).unwrap().0;
    let sibling = fork(&pool, &image, 1).remove(0);
    let all = Command::Fill { first: probe::first_work_page(), count: probe::work_pages(class(256, 1).memory()), epoch: 3 };
    greedy.post(0, all).unwrap();
    assert_eq!(ended(&greedy), Reason::Oom);
    // Without a limit of its own the same work is allowed, and branches on top of it.
    sibling.call(0, all).unwrap();
    for _ in 0..3 {
        sibling.freeze().unwrap();
        sibling.call(0, all).unwrap();
    }
    // Also while it writes over all of it, again and again: every page is then there three times.
    let count = probe::work_pages(class(256, 1).memory());
    sibling.post(0, Command::Epochs { first: probe::first_work_page(), count }).unwrap();
    for _ in 0..3 {
        sibling.freeze().unwrap();
    }
    sibling.stop(0).unwrap();
    assert_eq!(sibling.ended(), None);
    let error = pool.fork(&image, &[new_id()], ForkOptions { limit_bytes: Some(4096) }).remove(0).unwrap_err();
    assert!(matches!(error, PoolError::Limit { .. }), "{error}");
}

#[test]
fn a_zygote_that_is_killed_takes_its_workers_along_and_another_takes_its_place() {
    let pool = pool();
    let image = image(&pool, class(64, 1), 100);
    for _ in 0..3 {
        let children = fork(&pool, &image, 3);
        kill_process(zygote_of(&pool), Signal::KILL).unwrap();
        for child in &children {
            assert_eq!(ended(child), Reason::WorkerCrashed);
        }
        let started = Instant::now();
        let after = loop {
            // Between the two a fork is refused.
            match pool.fork(&image, &[new_id()], ForkOptions::default()).remove(0) {
                Ok((child, _)) => break child,
                Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
            }
        };
        check(&after, 100, 7);
    }
}

/// This test process has one pool, and so one child: the zygote.
pub(crate) fn zygote_of(_pool: &Pool) -> Pid {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok());
    let children: String = children.collect();
    let pids: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 1, "{pids:?}");
    Pid::from_raw(pids[0]).unwrap()
}

#[test]
fn a_zygote_that_cannot_be_started_says_so() {
    let missing = Settings { zygote: ("/nonexistent/farfork".into(), Vec::new()), ..settings() };
    let error = Pool::open(host(), missing).unwrap_err();
    assert!(error.to_string().contains("zygote"), "{error}");
    assert!(!error.remedy().is_empty());
    // Something else than a zygote at the other end.
    let wrong = Settings { zygote: ("/bin/true".into(), Vec::new()), ..settings() };
    let error = Pool::open(host(), wrong).unwrap_err();
    assert!(error.to_string().contains("zygote"), "{error}");
}

#[test]
fn a_stopped_pool_refuses_and_leaves_no_worker() {
    let pool = pool();
    let image = image(&pool, class(64, 1), 10);
    let child = fork(&pool, &image, 1).remove(0);
    pool.stop();
    assert_eq!(pool.worker_count(), 0);
    assert_eq!(ended(&child), Reason::Killed);
    let error = pool.fork(&image, &[new_id()], ForkOptions::default()).remove(0).unwrap_err();
    assert!(matches!(error, PoolError::Stopping), "{error}");
}

/// A shell restores only what differs from its own fresh state: that must be all that differs.
#[test]
fn a_child_has_every_register_of_its_image() {
    let pool = pool();
    for vcpus in [1, 4] {
        let parent = pool.boot_probe(class(64, vcpus), new_id()).unwrap();
        // General and vector registers that are not as they were at the start. No timer: a tick changes segments for its time.
        for vcpu in 0..vcpus {
            parent.post(vcpu, Command::Hold { vector_bytes: 32 }).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        let image = parent.freeze().unwrap().image;
        parent.call(0, Command::Ping).unwrap_err();
        let child = fork(&pool, &image, 1).remove(0);
        let again = child.freeze().unwrap().image;
        let differences = vm::harness::image_differences(&again, &image);
        // The child has run since: its program counter, the vectors that it compares, its timer may have moved on.
        let moves = |difference: &String| {
            [": REGS", ": XSAVE", ": VCPU_EVENTS", ": LAPIC"].iter().any(|part| difference.ends_with(part))
        };
        assert!(differences.iter().all(moves), "{differences:?}");
        for vcpu in 0..vcpus {
            assert_eq!(child.stop(vcpu).unwrap()[0], 0, "registers of vCPU {vcpu}");
        }
    }
}

#[test]
fn many_may_look_at_one_machine_at_once() {
    let pool = pool();
    let image = image(&pool, class(64, 1), 10);
    let child = fork(&pool, &image, 1).remove(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    child.console().unwrap();
                    child.call(0, Command::Ping).unwrap();
                    child.set_running(true).unwrap();
                }
            });
        }
    });
    assert_eq!(child.ended(), None);
    check(&child, 10, 7);
}

#[test]
fn a_first_parent_may_go_on_and_be_branched() {
    let pool = pool();
    let parent = pool.boot_probe(class(16, 1), new_id()).unwrap();
    let count = probe::work_pages(class(16, 1).memory());
    for epoch in 1..4 {
        parent.call(0, Command::Fill { first: probe::first_work_page(), count, epoch }).unwrap();
        let image = parent.freeze().unwrap().image;
        // It writes over all of its memory, all of which is the image's now.
        parent.call(0, Command::Fill { first: probe::first_work_page(), count, epoch: 100 + epoch }).unwrap();
        check(&fork(&pool, &image, 1)[0], count, epoch);
    }
}

#[test]
fn a_shell_that_cannot_be_built_is_one_forks_failure_and_no_other() {
    let with = Settings { shells_max: 0, ..settings() };
    let pool = Pool::open(host(), with).unwrap();
    let image = image(&pool, class(16, 1), 10);
    let ids: Vec<MachineId> = (0..6).map(|_| new_id()).collect();
    let armed = vm::failpoint::arm("pool.bear", 2, 12);
    let forked = pool.fork(&image, &ids, ForkOptions::default());
    drop(armed);
    let failures: Vec<&PoolError> = forked.iter().filter_map(|forked| forked.as_ref().err()).collect();
    assert_eq!(failures.len(), 1, "{failures:?}");
    assert_eq!(failures[0].errno(), Some(12), "{}", failures[0]);
    for (child, _) in forked.into_iter().flatten() {
        check(&child, 10, 7);
    }
}
