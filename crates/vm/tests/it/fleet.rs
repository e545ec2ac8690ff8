//! Many machines in their workers: random operations against a model, and nothing left behind, whatever was killed when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use types::PageIndex;
use vm::Pool;
use vm::harness::{class, count, held, new_id, seed};
use vm::image::Image;
use vm::pool::{ForkOptions, Jailed};
use vm::probe::{self, Command};

use crate::workers::{check, fork, image, pool, who};

const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 16;

/// Epochs of the pages of work, 0 for zeros.
type Model = Vec<u64>;

struct Fleet {
    pool: Pool,
    dice: fastrand::Rng,
    machines: Vec<(Jailed, Model)>,
    images: Vec<(Arc<Image>, Model)>,
    machines_max: usize,
    next_epoch: u64,
    tally: BTreeMap<&'static str, u64>,
}

impl Fleet {
    fn new(seed: u64, machines_max: usize) -> Self {
        let pool = pool();
        let pages = usize::try_from(probe::work_pages(class(MIB, 1).memory())).unwrap();
        let parent = pool.boot_probe(class(MIB, 1), new_id()).unwrap();
        let images = vec![(parent.freeze().unwrap().image, vec![0; pages])];
        let dice = fastrand::Rng::with_seed(seed);
        Self { pool, dice, machines: Vec::new(), images, machines_max, next_epoch: 1, tally: BTreeMap::new() }
    }

    fn count(&mut self, what: &'static str, by: u64) {
        *self.tally.entry(what).or_default() += by;
    }

    fn step(&mut self) {
        match self.dice.u32(0..100) {
            0..35 => self.write(),
            35..60 => self.verify(),
            60..75 => self.fork(),
            75..85 => self.branch(),
            85..97 => self.kill(),
            _ => self.forget_image(),
        }
    }

    fn some_pages(&mut self) -> (u64, u64) {
        let pages = probe::work_pages(class(MIB, 1).memory());
        let count = self.dice.u64(1..=300);
        (self.dice.u64(0..=pages - count), count)
    }

    /// Several write at the same time.
    fn write(&mut self) {
        let writers = self.dice.usize(1..=4).min(self.machines.len());
        let mut posted = Vec::new();
        for _ in 0..writers {
            let at = self.dice.usize(0..self.machines.len());
            if posted.contains(&at) {
                continue;
            }
            let (first, count) = self.some_pages();
            self.next_epoch += 1;
            let (machine, model) = &mut self.machines[at];
            machine.post(0, Command::Fill { first: work(first), count, epoch: self.next_epoch }).unwrap();
            model[range(first, count)].fill(self.next_epoch);
            posted.push(at);
        }
        for at in &posted {
            self.machines[*at].0.answer(0).unwrap();
        }
        self.count("writes", posted.len() as u64);
    }

    fn verify(&mut self) {
        if self.machines.is_empty() {
            return;
        }
        let at = self.dice.usize(0..self.machines.len());
        let (first, count) = self.some_pages();
        let (machine, model) = &self.machines[at];
        verify(machine, model, first, count);
        self.count("pages verified", count);
    }

    fn fork(&mut self) {
        let room = self.machines_max.saturating_sub(self.machines.len());
        let wanted = self.dice.usize(1..=20).min(room);
        let at = self.dice.usize(0..self.images.len());
        let (image, model) = self.images[at].clone();
        for child in fork(&self.pool, &image, wanted) {
            self.machines.push((child, model.clone()));
        }
        self.count("forks", wanted as u64);
    }

    /// A branch, half of the time in the middle of a command that parent and child both finish.
    fn branch(&mut self) {
        if self.machines.is_empty() || self.images.len() >= 12 {
            return self.forget_image();
        }
        let at = self.dice.usize(0..self.machines.len());
        let (first, count) = self.some_pages();
        self.next_epoch += 1;
        let epoch = self.next_epoch;
        let is_writing = self.dice.bool();
        let (machine, model) = &mut self.machines[at];
        if is_writing {
            machine.post(0, Command::Fill { first: work(first), count, epoch }).unwrap();
            model[range(first, count)].fill(epoch);
        }
        let image = machine.freeze().unwrap().image;
        let model = model.clone();
        if is_writing {
            machine.answer(0).unwrap();
            let child = fork(&self.pool, &image, 1).remove(0);
            // It finishes what it inherited.
            child.stop(0).unwrap();
            verify(&child, &model, first, count);
            let after = child.freeze().unwrap().image;
            self.images.push((after, model));
        } else {
            self.images.push((image, model));
        }
        self.count("branches", 1);
    }

    fn kill(&mut self) {
        if self.machines.is_empty() {
            return;
        }
        let at = self.dice.usize(0..self.machines.len());
        let (machine, _) = self.machines.swap_remove(at);
        if self.dice.bool() {
            kill_process(Pid::from_raw(machine.pid().unwrap()).unwrap(), Signal::KILL).unwrap_or_default();
            assert!(machine.wait_for_end(PATIENCE).is_some());
        }
        drop(machine);
        self.count("kills", 1);
    }

    fn forget_image(&mut self) {
        if self.images.len() > 1 {
            let at = self.dice.usize(0..self.images.len());
            self.images.swap_remove(at);
        }
    }
}

fn work(page: u64) -> PageIndex {
    PageIndex(probe::first_work_page().0 + page)
}

fn range(first: u64, count: u64) -> std::ops::Range<usize> {
    usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap()
}

fn verify(machine: &Jailed, model: &[u64], first: u64, count: u64) {
    let mut page = first;
    for same in model[range(first, count)].chunk_by(|a, b| a == b) {
        let pages = same.len() as u64;
        // Pages that nobody has written yet are zero, whose sum the host computes.
        if same[0] == 0 {
            let sum = machine.call(0, Command::Checksum { first: work(page), count: pages }).unwrap()[0];
            let zeros = vec![0; usize::try_from(pages * types::PAGE_SIZE).unwrap()];
            assert_eq!(sum, probe::checksum(&zeros), "pages of zeros from {page} on");
        } else {
            let verify = Command::Verify { first: work(page), count: pages, epoch: same[0] };
            assert_eq!(machine.call(0, verify).unwrap()[0], 0, "pages {page} to {} of epoch {}", page + pages, same[0]);
        }
        page += pages;
    }
}

#[test]
fn random_operations_on_many_workers() {
    let seed = seed();
    let most = usize::try_from(count(60, 200)).unwrap();
    let mut fleet = Fleet::new(seed, most);
    let (first, model) = fleet.images[0].clone();
    for child in fork(&fleet.pool, &first, most) {
        fleet.machines.push((child, model.clone()));
    }
    for _ in 0..count(300, 4000) {
        fleet.step();
    }
    let mut pages = 0;
    for (machine, model) in &fleet.machines {
        assert_eq!(who(machine), machine.id());
        verify(machine, model, 0, model.len() as u64);
        pages += model.len() as u64;
    }
    held("machines alive at once at the start", most as u64);
    held("pages verified at the end", pages);
    fleet.tally.iter().for_each(|(what, count)| held(what, *count));
}

/// What this process and its workers have, as the kernel counts it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    workers: usize,
    processes: usize,
    groups: usize,
}

impl Held {
    /// When `self` was taken, something of before may have gone that was on its way out then.
    fn is_no_more_than(&self, before: &Self) -> bool {
        let counts = |held: &Self| [held.descriptors, held.threads, held.workers, held.processes, held.groups];
        counts(self).iter().zip(counts(before)).all(|(now, before)| *now <= before)
    }
}

fn have(pool: &Pool) -> Held {
    let entries = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
    let name = format!("farfork-test-{}", std::process::id());
    let groups = std::fs::read_dir("/sys/fs/cgroup/pids").into_iter().flatten().flatten();
    let groups = groups.filter(|entry| entry.file_name() == *name).map(|entry| entry.path().join("workers"));
    let is_directory = |entry: &std::fs::DirEntry| entry.path().is_dir();
    Held {
        descriptors: entries("/proc/self/fd"),
        threads: entries("/proc/self/task"),
        workers: pool.worker_count(),
        processes: descendants(std::process::id()),
        groups: groups.map(|path| std::fs::read_dir(path).into_iter().flatten().flatten().filter(is_directory).count()).sum(),
    }
}

fn descendants(pid: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    children.iter().map(|child| 1 + descendants(*child)).sum()
}

/// Kernel memory of the whole host that is not a cache, in MiB.
fn kernel_mib() -> i64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> i64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("0 kB");
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    (kib("SUnreclaim") + kib("PageTables") + kib("KernelStack") + kib("Percpu") + kib("Shmem") + kib("AnonPages")) / 1024
}

/// Waits until all is as before, but for the shells that wait.
fn wait_for(pool: &Pool, before: &Held, shells: usize) {
    let started = Instant::now();
    loop {
        let _settled = pool.wait_for_shells(class(MIB, 1), u32::try_from(shells).unwrap(), PATIENCE);
        let now = have(pool);
        if now.is_no_more_than(before) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{now:?} is left, not {before:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn create_and_kill_leaves_nothing_behind() {
    let seed = seed();
    let mut dice = fastrand::Rng::with_seed(seed);
    let settings = vm::pool::Settings { shells_min: 2, shells_max: 2, ..crate::workers::settings() };
    let pool = Pool::open(vm::harness::host(), settings).unwrap();
    let image = image(&pool, class(MIB, 1), 200);
    let mut round = |how: u32| {
        let child = fork(&pool, &image, 1).remove(0);
        match how {
            // At any moment of its life.
            0 => {}
            1 => drop(child.call(0, Command::Who).unwrap()),
            2 => {
                child.call(0, Command::Fill { first: probe::first_work_page(), count: 100, epoch: 9 }).unwrap();
                drop(child.freeze().unwrap());
            }
            3 => {
                child.post(0, Command::Spin { rounds: None }).unwrap();
            }
            _ => {
                // In the middle of a branch.
                let pid = Pid::from_raw(child.pid().unwrap()).unwrap();
                child.call(0, Command::Fill { first: probe::first_work_page(), count: 3000, epoch: 9 }).unwrap();
                let delay = Duration::from_micros(dice.u64(0..3000));
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(delay);
                        kill_process(pid, Signal::KILL).unwrap_or_default();
                    });
                    if let Err(error) = child.freeze() {
                        assert!(!error.remedy().is_empty());
                    }
                });
            }
        }
    };
    (0..10).for_each(|how| round(how % 5));
    let _settled = pool.wait_for_workers(2, PATIENCE);
    let _refilled = pool.wait_for_shells(class(MIB, 1), 2, PATIENCE);
    let (before, kernel_before) = (have(&pool), kernel_mib());
    let rounds = count(60, 1000);
    for how in 0..rounds {
        round(u32::try_from(how % 5).unwrap());
    }
    wait_for(&pool, &before, 2);
    let kernel_after = kernel_mib();
    println!("kernel memory, shared and anonymous memory of the host: {kernel_before} MiB before, {kernel_after} MiB after");
    // Other tests run on the same host in the quick form; alone, what a thousand lives leaked would show.
    if count(0, 1) == 1 {
        assert!(kernel_after - kernel_before < 64, "{} MiB", kernel_after - kernel_before);
    }
    held("lives of workers that left nothing behind", rounds);
}

/// As the kernel does when the host has no memory left: what it kills it may not be done with when the next fork comes.
#[test]
fn shells_that_are_killed_are_no_forks_failure() {
    let settings = vm::pool::Settings { shells_min: 4, shells_max: 4, ..crate::workers::settings() };
    let pool = Pool::open(vm::harness::host(), settings).unwrap();
    let image = image(&pool, class(MIB, 1), 200);
    let mut dice = fastrand::Rng::with_seed(seed());
    let (rounds, mut killed) = (count(20, 500), 0);
    for _ in 0..rounds {
        assert!(pool.wait_for_shells(class(MIB, 1), 4, PATIENCE));
        for pid in pool.shell_pids() {
            if dice.bool() {
                kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
                killed += 1;
            }
        }
        for child in fork(&pool, &image, 3) {
            child.call(0, Command::Who).unwrap();
        }
    }
    held("forks beside shells that were killed", rounds * 3);
    println!("{killed} shells were killed");
}

#[test]
fn a_zygote_killed_at_any_moment_leaves_nothing_behind() {
    let seed = seed();
    let mut dice = fastrand::Rng::with_seed(seed);
    let settings = vm::pool::Settings { shells_min: 2, shells_max: 2, ..crate::workers::settings() };
    let pool = Pool::open(vm::harness::host(), settings).unwrap();
    let image = image(&pool, class(MIB, 1), 200);
    drop(fork(&pool, &image, 2));
    let _settled = pool.wait_for_workers(2, PATIENCE);
    let _refilled = pool.wait_for_shells(class(MIB, 1), 2, PATIENCE);
    let before = have(&pool);
    let rounds = count(5, 100);
    for _ in 0..rounds {
        let delay = Duration::from_micros(dice.u64(0..30_000));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                kill_process(crate::workers::zygote_of(&pool), Signal::KILL).unwrap_or_default();
            });
            for _ in 0..4 {
                let ids = [new_id(), new_id(), new_id(), new_id()];
                for forked in pool.fork(&image, &ids, ForkOptions::default()) {
                    match forked {
                        Ok((child, _)) => {
                            child.freeze().map(drop).unwrap_or_default();
                        }
                        Err(error) => assert!(!error.remedy().is_empty(), "{error}"),
                    }
                }
            }
        });
        let started = Instant::now();
        let child = loop {
            match pool.fork(&image, &[new_id()], ForkOptions::default()).remove(0) {
                Ok((child, _)) => break child,
                Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
            }
        };
        check(&child, 200, 7);
    }
    wait_for(&pool, &before, 2);
    held("zygotes killed in the middle of forks", rounds);
}

#[test]
fn a_pool_stops_also_while_its_zygote_is_being_replaced() {
    let seed = seed();
    let mut dice = fastrand::Rng::with_seed(seed);
    let rounds = count(6, 60);
    for _ in 0..rounds {
        let pool = pool();
        pool.expect(class(MIB, 1), 3);
        kill_process(crate::workers::zygote_of(&pool), Signal::KILL).unwrap();
        std::thread::sleep(Duration::from_micros(dice.u64(0..400_000)));
        let started = Instant::now();
        pool.stop();
        assert!(started.elapsed() < PATIENCE / 4, "stopping took {:?}", started.elapsed());
        assert_eq!(pool.worker_count(), 0);
        assert_eq!(descendants(std::process::id()), 0);
    }
    held("pools stopped while their zygote was being replaced", rounds);
}
