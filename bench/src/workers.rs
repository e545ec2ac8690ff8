//! `bench workers`: rows L1 to L5 and L7 of docs/specification.md: machines in jailed workers, by the pool of a node.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use types::{MachineId, MemorySize, PAGE_SIZE};
use vm::jail::{Jail, Mechanism};
use vm::pool::{ForkOptions, ForkTimes, Jailed, Memory, PoolError, Settings};
use vm::probe::{self, Command, PATIENCE};
use vm::{Class, Image, Pool};

use crate::report::{Report, Row, Samples, announce};
use crate::{firecracker, floor, proof};

/// Children that are alive while memory is measured, and in the smaller batch.
const BATCH: u32 = 100;
/// Children of the larger batch.
const LARGE_BATCH: u32 = 1000;
/// How the course of available memory is watched, before and after.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// What has begun when children answer.
const COMING_TO_REST: Duration = Duration::from_secs(1);
/// Beyond this share of what children took, it is not known; nor where the limit lies between what it may have been.
const UNSURE_MAX: f64 = 0.1;
/// Pages that each child of a batch computes a checksum over.
const ANSWER_PAGES: u64 = 4;

pub(crate) fn run(json: Option<&Path>, quick: bool, firecracker: Option<&Path>, without: &[String]) -> Result<()> {
    let host = floor::open_host()?;
    let mut report = Report::new(&host, quick);
    let jail = jail_without(without)?;
    if !without.is_empty() {
        report.note(format!("the jail was not whole: without {}", without.join(", ")));
    }
    if !rustix::process::geteuid().is_root() {
        report.note("this user is not root: workers have no control groups and no user ids of their own");
    }
    crate::local::warm_host_memory();
    single_forks(&mut report, &jail, quick, firecracker)?;
    ablations(&mut report, &jail, quick)?;
    batches(&mut report, &jail, quick)?;
    report.finish(json)
}

static POOLS: AtomicU32 = AtomicU32::new(0);

/// A pool as a node has it, that keeps no more shells than said.
fn pool(jail: &Jail, shells_max: u32) -> Result<Pool> {
    let program = std::env::current_exe()?;
    // One name for each pool: a pool ends whatever it finds in groups of its name.
    let number = POOLS.fetch_add(1, Ordering::Relaxed);
    let groups = rustix::process::geteuid().is_root().then(|| format!("bench-{}-{number}", std::process::id()));
    let settings = Settings {
        groups,
        jail: jail.clone(),
        shells_min: 1,
        shells_max,
        ..Settings::new(program, [OsString::from("zygote")])
    };
    Pool::open(floor::open_host()?, settings).map_err(with_remedy)
}

fn jail_without(names: &[String]) -> Result<Jail> {
    let named = |name: &String| -> Result<Vec<Mechanism>> {
        if name == "all" {
            return Ok(Mechanism::ALL.to_vec());
        }
        let found = Mechanism::ALL.into_iter().find(|mechanism| format!("{mechanism:?}").eq_ignore_ascii_case(name));
        Ok(vec![found.with_context(|| format!("no mechanism of the jail is called {name}: they are {:?}", Mechanism::ALL))?])
    };
    let left_out: Vec<Vec<Mechanism>> = names.iter().map(named).collect::<Result<_>>()?;
    Ok(Jail::without(left_out.into_iter().flatten()))
}

fn with_remedy(error: PoolError) -> anyhow::Error {
    anyhow!("{error}; {}", error.remedy())
}

/// An image, half of whose memory is written.
fn half_full(pool: &Pool, mib: u64) -> Result<Arc<Image>> {
    let memory = MemorySize::from_mib(mib)?;
    let parent = pool.boot_probe(Class::new(memory, 1)?, proof::new_id()).map_err(with_remedy)?;
    let count = probe::work_pages(memory).min(memory.bytes() / PAGE_SIZE / 2);
    let [filled, ..] =
        parent.call(0, Command::Fill { first: probe::first_work_page(), count, epoch: 1 }).map_err(with_remedy)?;
    ensure!(filled == count, "the parent filled {filled} of {count} pages");
    Ok(parent.freeze().map_err(with_remedy)?.image)
}

fn fork(pool: &Pool, image: &Arc<Image>, count: u32) -> Result<Vec<(Jailed, ForkTimes)>> {
    let ids: Vec<MachineId> = (0..count).map(|_| proof::new_id()).collect();
    let forked = pool.fork(image, &ids, ForkOptions::default());
    forked.into_iter().map(|forked| forked.map_err(with_remedy)).collect()
}

/// What each child must answer: the checksum of its first pages, as the host computes it.
fn expected_answer() -> u64 {
    let first = probe::first_work_page().0;
    let bytes: Vec<u8> = (first..first + ANSWER_PAGES).flat_map(|page| probe::fill_page(types::PageIndex(page), 1)).collect();
    probe::checksum(&bytes)
}

fn have_all_answer(children: &[(Jailed, ForkTimes)]) -> Result<()> {
    let checksum = Command::Checksum { first: probe::first_work_page(), count: ANSWER_PAGES };
    for (child, _) in children {
        child.post(0, checksum).map_err(with_remedy)?;
    }
    let expected = expected_answer();
    for (child, _) in children {
        let [sum, ..] = child.answer(0).map_err(with_remedy)?;
        ensure!(sum == expected, "a child's memory is not its image");
    }
    Ok(())
}

/// Ends children, and waits until they are gone.
fn end(pool: &Pool, children: Vec<(Jailed, ForkTimes)>, left: usize) -> Result<()> {
    drop(children);
    ensure!(pool.wait_for_workers(left, PATIENCE), "workers do not end");
    Ok(())
}

/// L1, L2, L7: one fork at a time, one machine alive, with a shell ready and without, each beside a bare fork.
fn single_forks(report: &mut Report, jail: &Jail, quick: bool, firecracker: Option<&Path>) -> Result<()> {
    let n = if quick { 20 } else { 200 };
    let with_shells = pool(jail, 1)?;
    let without = pool(jail, 0)?;
    let mut sizes = Vec::new();
    for mib in [64, 512, 4096] {
        if with_shells.host().check_memory(MemorySize::from_mib(mib)?).is_err() {
            report.note(format!("L1 at {mib} MiB: not measurable here: the host has less memory"));
            continue;
        }
        announce(&format!("L1: an image of {mib} MiB, half of it written"));
        sizes.push(Size { mib, image: half_full(&with_shells, mib)?, forks: Vec::new(), floors: Vec::new() });
    }
    announce("L1: forks with a shell ready");
    for _ in 0..n {
        for size in &mut sizes {
            size.floors.push(floor::sample(size.mib, Duration::ZERO)?.total());
            let class = size.image.class();
            with_shells.expect(class, 1);
            ensure!(with_shells.wait_for_shells(class, 1, PATIENCE), "no shell is built");
            // The builder goes to sleep before the clock starts, as in a node that is not just refilling.
            std::thread::sleep(Duration::from_millis(2));
            let children = fork(&with_shells, &size.image, 1)?;
            size.forks.push(children[0].1);
            ensure!(children[0].1.had_shell, "the shell that was ready was not used");
            have_all_answer(&children)?;
            let shells: u32 = with_shells.shelves().iter().map(|shelf| shelf.ready + shelf.building).sum();
            drop(children);
            ensure!(with_shells.wait_for_workers(shells as usize + 1, PATIENCE), "workers do not end");
        }
    }
    let mut medians = Vec::new();
    for size in &sizes {
        medians.push((size.mib, size.report(report)));
    }
    if let [(_, smallest), .., (mib, largest)] = &medians[..] {
        let met = largest.p50() <= 1.15 * smallest.p50();
        report.add(
            Row::new("L7", format!("flatness: {mib} MiB beside 64 MiB"), largest, Some(smallest.p50()))
                .reaching("<= 1.15x", met),
        );
    }
    announce("L2: forks with no shell ready");
    let Some(size) = sizes.iter().find(|size| size.mib == 512) else { return Ok(()) };
    let mut firsts = Vec::with_capacity(n);
    let mut shells = Vec::with_capacity(n);
    for _ in 0..n {
        let children = fork(&without, &size.image, 1)?;
        ensure!(!children[0].1.had_shell, "a shell was ready");
        firsts.push(children[0].1.first);
        shells.push(children[0].1.shell);
        have_all_answer(&children)?;
        end(&without, children, 0)?;
    }
    let (firsts, shells) = (Samples::of(&firsts), Samples::of(&shells));
    report.keep("L2 fork to first, no shell", &firsts);
    report.keep("L2 building the shell", &shells);
    let met = firsts.p50() <= 4000.0;
    report.add(
        Row::new("L2", "one fork, no shell ready, to first instruction, 512 MiB", &firsts, None).reaching("p50 <= 4 ms", met),
    );
    report.add(Row::new("L2", "  of it: building the shell", &shells, None));
    match firecracker {
        None => report.note("Firecracker snapshot/load: control not run; name its binary with --firecracker PATH"),
        Some(binary) => {
            announce("L2: the Firecracker control");
            let samples = firecracker::snapshot_loads(binary, if quick { 10 } else { 50 })?;
            report.keep("Firecracker snapshot/load, 512 MiB", &samples);
            let what = "Firecracker: process start, snapshot/load, resume; 512 MiB; beside our fork without a shell";
            report.add(Row::new("control", what, &samples, Some(firsts.p50())));
        }
    }
    Ok(())
}

/// L1 at 512 MiB without its jail, and what it would be if a fork hashed its image first. In turn with one that does neither.
fn ablations(report: &mut Report, jail: &Jail, quick: bool) -> Result<()> {
    announce("L1: without the jail, and with a hash of the image");
    let [whole, bare] = [pool(jail, 1)?, pool(&Jail::without(Mechanism::ALL), 1)?];
    let image = half_full(&whole, 512)?;
    let mut firsts = [Vec::new(), Vec::new()];
    for _ in 0..if quick { 20 } else { 200 } {
        for (pool, firsts) in [&whole, &bare].into_iter().zip(&mut firsts) {
            pool.expect(image.class(), 1);
            ensure!(pool.wait_for_shells(image.class(), 1, PATIENCE), "no shell is built");
            std::thread::sleep(Duration::from_millis(2));
            let children = fork(pool, &image, 1)?;
            firsts.push(children[0].1.first);
            have_all_answer(&children)?;
        }
    }
    let [with, without] = firsts.map(|firsts| Samples::of(&firsts));
    report.keep("L1 ablations: whole", &with);
    report.keep("L1 ablations: without the jail", &without);
    report.add(Row::new("L1", "  ablation: 512 MiB without the jail; beside the same with it", &without, Some(with.p50())));
    let mut hashes = Vec::new();
    for _ in 0..if quick { 2 } else { 10 } {
        let image = half_full(&whole, 512)?;
        let began = Instant::now();
        image.manifest(|_, _| {})?;
        hashes.push(began.elapsed());
    }
    let hashes = Samples::of(&hashes);
    report.keep("L1 ablations: hashing the image", &hashes);
    report.add(Row::new("L1", "  ablation: hashing 512 MiB, half written, on the way of a fork", &hashes, Some(with.p50())));
    Ok(())
}

type Stage = (&'static str, fn(&ForkTimes) -> Duration);

struct Size {
    mib: u64,
    image: Arc<Image>,
    forks: Vec<ForkTimes>,
    floors: Vec<Duration>,
}

impl Size {
    fn report(&self, report: &mut Report) -> Samples {
        let of = |stage: fn(&ForkTimes) -> Duration| Samples::of(&self.forks.iter().map(stage).collect::<Vec<_>>());
        let (firsts, floors) = (of(|times| times.first), Samples::of(&self.floors));
        report.keep(&format!("L1 fork to first, {} MiB", self.mib), &firsts);
        report.keep(&format!("L1 bare fork, {} MiB", self.mib), &floors);
        let met =
            firsts.p50() <= 1.5 * floors.p50() && firsts.p50() <= 600.0 && firsts.percentile(99) <= 3.0 * floors.percentile(99);
        let what = format!("one fork, shell ready, to first instruction, {} MiB", self.mib);
        let reach = "<= 1.5x floor, <= 600 us, p99 <= 3x floor's";
        report.add(Row::new("L1", what, &firsts, Some(floors.p50())).reaching(reach, met));
        let object = of(|times| times.shell + times.send + times.map + times.restore);
        report.keep(&format!("L1 {} MiB: object", self.mib), &object);
        report.add(Row::new("L1", format!("  {} MiB: object, which is all but the run", self.mib), &object, None));
        let stages: [Stage; 5] = [
            ("taking the shell", |times| times.shell),
            ("sending the image", |times| times.send),
            ("mapping", |times| times.map),
            ("restoring", |times| times.restore),
            ("to the first exit", |times| times.run),
        ];
        for (stage, samples) in stages.map(|(stage, duration)| (stage, of(duration))) {
            report.keep(&format!("L1 {} MiB: {stage}", self.mib), &samples);
            report.add(Row::new("L1", format!("  {} MiB: {stage}", self.mib), &samples, None));
        }
        firsts
    }
}

/// L3, L4, L5: many children at once.
fn batches(report: &mut Report, jail: &Jail, quick: bool) -> Result<()> {
    let rounds = if quick { 3 } else { 15 };
    {
        // First: what the kernel still has of many that have ended would be counted against it.
        let pool_of_none = pool(jail, 0)?;
        let image = half_full(&pool_of_none, 512)?;
        memory(report, &pool_of_none, &image)?;
    }
    let pool_of_shells = pool(jail, BATCH)?;
    let image = half_full(&pool_of_shells, 512)?;
    announce("L3: batches with shells ready");
    let mut with_shells = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        pool_of_shells.expect(image.class(), BATCH);
        ensure!(pool_of_shells.wait_for_shells(image.class(), BATCH, PATIENCE), "shells are not built");
        std::thread::sleep(Duration::from_millis(20));
        let started = Instant::now();
        let children = fork(&pool_of_shells, &image, BATCH)?;
        have_all_answer(&children)?;
        with_shells.push(started.elapsed());
        ensure!(children.iter().all(|(_, times)| times.had_shell), "a shell was missing");
        end(&pool_of_shells, children, BATCH as usize)?;
    }
    add_batch(report, "L3", &format!("{BATCH} children, all answered, shells ready"), &with_shells, 100.0);
    drop(pool_of_shells);

    announce("L3: batches without shells");
    let pool_of_none = pool(jail, 0)?;
    let mut without = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let started = Instant::now();
        let children = fork(&pool_of_none, &image, BATCH)?;
        have_all_answer(&children)?;
        without.push(started.elapsed());
        end(&pool_of_none, children, 0)?;
    }
    add_batch(report, "L3", &format!("{BATCH} children, all answered, without shells"), &without, 400.0);

    announce("L4: a thousand children");
    let mut thousands = Vec::new();
    for _ in 0..if quick { 1 } else { 3 } {
        let started = Instant::now();
        let children = fork(&pool_of_none, &image, LARGE_BATCH)?;
        have_all_answer(&children)?;
        thousands.push(started.elapsed());
        ensure!(children.iter().all(|(child, _)| child.ended().is_none()), "a child ended");
        end(&pool_of_none, children, 0)?;
    }
    add_batch(report, "L4", &format!("{LARGE_BATCH} children, all answered, all alive, without shells"), &thousands, 2500.0);
    Ok(())
}

fn add_batch(report: &mut Report, id: &str, what: &str, took: &[Duration], reach_ms: f64) {
    let samples = Samples::of(took);
    report.keep(&format!("{id} {what}"), &samples);
    let met = samples.p50() <= reach_ms * 1000.0;
    report.add(Row::new(id, what, &samples, None).reaching(format!("p50 <= {reach_ms} ms"), met));
}

/// L5: what one more idle child costs, at 100, all alive.
fn memory(report: &mut Report, pool: &Pool, image: &Arc<Image>) -> Result<()> {
    announce("L5: memory of idle children");
    let slot_bytes = image.class().memory().bytes();
    // One alive before the first look: what all share is there.
    let first = fork(pool, image, 1)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let began = Instant::now();
    let before = Course::of(&available(began)?);
    let last = began.elapsed();
    let children = fork(pool, image, BATCH)?;
    std::thread::sleep(COMING_TO_REST);
    let then = began.elapsed();
    let after = Course::of(&available(began)?);
    // Where both lines are known best.
    let at = (last + then).as_secs_f64() / 2.0;
    let taken_mib = before.at(at) - after.at(at);
    // Whatever made the two differ in their slope may be the children's.
    let until_end = began.elapsed().as_secs_f64() - at;
    let unsure_mib = before.farthest + after.farthest + (before.slope - after.slope).abs() * until_end;
    let limit = 0.6 * 1e6 / 1048576.0 + mib(slot_bytes) / 400.0;
    let is_decided = (taken_mib / f64::from(BATCH) - limit).abs() >= unsure_mib / f64::from(BATCH);
    let is_known = unsure_mib <= UNSURE_MAX * taken_mib && is_decided;
    report.note(format!(
        "L5, all memory: {BATCH} children took {taken_mib:.0} MiB, give or take {unsure_mib:.0}; MemAvailable went by {:.1} MiB a second \
         before them and {:.1} after, which is not counted{}",
        before.slope,
        after.slope,
        if is_known { "" } else { ": not measurable this time" }
    ));
    let each: Vec<Memory> =
        children.iter().map(|(child, _)| child.memory()).collect::<std::io::Result<_>>().context("reading /proc")?;
    let of = |get: fn(&Memory) -> u64| Samples::from_us(each.iter().map(|memory| mib(get(memory))).collect());
    let (pss, tables) = (of(|memory| memory.pss_bytes), of(|memory| memory.page_table_bytes));
    let all = Samples::from_us(vec![taken_mib.max(0.0) / f64::from(BATCH)]);
    let kernel = Samples::from_us(vec![(all.p50() - pss.p50()).max(0.0)]);
    for (name, samples) in [("PSS", &pss), ("page tables", &tables), ("all", &all), ("kernel", &kernel)] {
        report.keep(&format!("L5 {name}, MiB"), samples);
    }
    report.add(
        Row::new("L5", "PSS of an idle child", &pss, None).in_mib().reaching("<= 0.5 MB", pss.p50() <= 0.5 * 1e6 / 1048576.0),
    );
    report.add(Row::new("L5", "its page tables", &tables, None).in_mib());
    let of_what = if is_known { "" } else { " (not measurable this time)" };
    let what = format!("all memory for one more: MemAvailable over 100{of_what}");
    let row = Row::new("L5", what, &all, Some(limit)).in_mib();
    report.add(if is_known { row.reaching("<= 0.6 MB + 0.25 % of the slot", all.p50() <= limit) } else { row });
    let what = format!("  of it not in PSS: page tables, and KVM's tables for the slot{of_what}");
    report.add(Row::new("L5", what, &kernel, None).in_mib());
    have_all_answer(&children)?;
    drop(first);
    end(pool, children, 0)
}

/// Memory that is available, in MiB, now and then: the kernel gives back what ended machines had when it finds time, and hosts that watch
/// over memory take some.
fn available(began: Instant) -> Result<Vec<(f64, f64)>> {
    let mut seen = Vec::new();
    for _ in 0..LOOKS {
        seen.push((began.elapsed().as_secs_f64(), vm::host::available_memory()? as f64 / f64::from(1 << 20)));
        std::thread::sleep(BETWEEN_LOOKS);
    }
    Ok(seen)
}

/// The straight line that is nearest to what was seen.
struct Course {
    start: f64,
    slope: f64,
    /// How far what was seen is from it, at most.
    farthest: f64,
}

impl Course {
    fn of(seen: &[(f64, f64)]) -> Self {
        let count = seen.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| seen.iter().map(of).sum::<f64>() / count;
        let (time, value) = (mean(|seen| seen.0), mean(|seen| seen.1));
        let sum = |of: &dyn Fn(&(f64, f64)) -> f64| seen.iter().map(of).sum::<f64>();
        let slope = sum(&|seen| (seen.0 - time) * (seen.1 - value)) / sum(&|seen| (seen.0 - time).powi(2));
        let line = Self { start: value - slope * time, slope, farthest: 0.0 };
        let farthest = seen.iter().map(|seen| (seen.1 - line.at(seen.0)).abs()).fold(0.0, f64::max);
        Self { farthest, ..line }
    }

    fn at(&self, time: f64) -> f64 {
        self.start + self.slope * time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_goes_by_itself_is_not_counted() {
        let seen: Vec<(f64, f64)> = (0..20).map(f64::from).map(|at| (at / 10.0, 1000.0 - 3.0 * at / 10.0)).collect();
        let line = Course::of(&seen);
        assert!((line.slope + 3.0).abs() < 1e-9 && (line.at(10.0) - 970.0).abs() < 1e-6 && line.farthest < 1e-9);
        let mut off = seen;
        off[7].1 += 40.0;
        let line = Course::of(&off);
        assert!(line.farthest > 30.0 && line.farthest < 40.0, "{}", line.farthest);
    }
}
