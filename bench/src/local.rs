//! `bench local`: rows L6, L7 and L8 of docs/specification.md, in one process.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use types::{EXTENT_SIZE, MemorySize, PAGE_SIZE, PageIndex};
use vm::bare::{self, Touch};
use vm::probe::{self, Command, PATIENCE, Probe};
use vm::{Class, Host, Image, Shell};

use crate::firecracker;
use crate::floor::{self, TOUCHED_PAGES};
use crate::proof;
use crate::report::{Report, Row, Samples, announce};

pub(crate) fn run(json: Option<&Path>, quick: bool, firecracker: Option<&Path>) -> Result<()> {
    let host = floor::open_host()?;
    announce("nothing yet: the proof of work comes first");
    proof::check(&host, Class::new(MemorySize::from_mib(64)?, 1)?)?;
    warm_host_memory();
    let mut report = Report::new(&host, quick);
    page_touches(&host, &mut report, quick)?;
    let fork_p50 = flatness(&host, &mut report, quick)?;
    match firecracker {
        None => report.note("Firecracker snapshot/load: control not run; name its binary with --firecracker PATH"),
        Some(binary) => {
            announce("L7: the Firecracker control");
            let samples = firecracker::snapshot_loads(binary, if quick { 10 } else { 50 })?;
            report.keep("Firecracker snapshot/load, 512 MiB", &samples);
            let what = "Firecracker: process start, snapshot/load, resume; 512 MiB; beside our fork as its control";
            report.add(Row::new("control", what, &samples, fork_p50));
        }
    }
    branches(&host, &mut report, quick)?;
    report.finish(json)
}

/// The host's own first touch of memory is slow on virtual hosts; it is paid before anything is timed.
pub(crate) fn warm_host_memory() {
    announce("nothing yet: touching the host's memory once");
    let bytes = vec![1u8; 2 << 30];
    assert_eq!(bytes.iter().step_by(4096).map(|byte| u64::from(*byte)).sum::<u64>(), (2 << 30) / 4096);
}

/// L6: what a page costs a child, beside the same touch by a guest on a plain private mapping. Pairs, in turn.
fn page_touches(host: &Host, report: &mut Report, quick: bool) -> Result<()> {
    let class = Class::new(MemorySize::from_mib(64)?, 1)?;
    let mut parent = proof::boot(host, class)?;
    // The same guest addresses and the same number of pages as the control.
    let first = PageIndex((16 << 20) / PAGE_SIZE);
    let count = u64::from(TOUCHED_PAGES);
    Probe::of(&parent).fill(first, count, 1)?;
    let image = parent.freeze(host)?.image;
    drop(parent);
    let n = if quick { 8 } else { 30 };
    for (name, touch) in [("read", Touch::Read), ("write", Touch::Write)] {
        announce(&format!("L6: page {name}s"));
        let (mut ours, mut raw) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for _ in 0..n {
            let child = proof::fork(host, &image)?;
            let probe = Probe::of(&child);
            probe.call(Command::Ping)?;
            let command = match touch {
                Touch::Read => Command::TouchRead { first, count, stride: 1, shuffle: None },
                Touch::Write => Command::TouchWrite { first, count, stride: 1, shuffle: false, value: 9 },
            };
            let started = Instant::now();
            let [sum, touched, ..] = probe.call(command)?;
            ours.push(started.elapsed().as_secs_f64() * 1e6 / f64::from(TOUCHED_PAGES));
            let expected: u64 = match touch {
                Touch::Read => (first.0..first.0 + count).map(|page| probe::page_word(PageIndex(page), 1, 0) & 0xFF).sum(),
                Touch::Write => 0,
            };
            ensure!((sum, touched) == (expected, count), "the child did not touch what it was told to");
            drop(child);
            raw.push(
                bare::touch(host, class.memory().bytes(), TOUCHED_PAGES, touch)?.as_secs_f64() * 1e6 / f64::from(TOUCHED_PAGES),
            );
        }
        let (ours, raw) = (Samples::from_us(ours), Samples::from_us(raw));
        report.keep(&format!("L6 page {name}"), &ours);
        report.keep(&format!("L6 page {name}, raw"), &raw);
        let met = ours.p50() <= 1.1 * raw.p50();
        report.add(Row::new("L6", format!("page {name} in a child"), &ours, Some(raw.p50())).reaching("<= 1.1x raw", met));
    }
    Ok(())
}

/// L7: a fork, from the call until its first instruction was observed, with a shell ready and one machine alive, at three
/// sizes of memory. Each size in turn within a round, and each beside a bare fork of its own process. Returns the median at
/// 512 MiB.
fn flatness(host: &Host, report: &mut Report, quick: bool) -> Result<Option<f64>> {
    let n = if quick { 20 } else { 200 };
    let mut sizes = Vec::new();
    for mib in [64, 512, 4096] {
        let memory = MemorySize::from_mib(mib)?;
        if host.check_memory(memory).is_err() {
            report.note(format!("L7 at {mib} MiB: not measurable here: the host has less memory"));
            continue;
        }
        announce(&format!("L7: an image of {mib} MiB, half of it written"));
        sizes.push(Size {
            mib,
            image: half_full(host, Class::new(memory, 1)?)?,
            forks: Vec::new(),
            floors: Vec::new(),
            stages: Vec::new(),
        });
    }
    announce("L7: forks");
    for _ in 0..n {
        for size in &mut sizes {
            size.floors.push(floor::sample(size.mib, Duration::ZERO)?.total());
            size.measure(host)?;
        }
    }
    let mut medians = Vec::new();
    for size in &sizes {
        let (forks, floors) = (Samples::of(&size.forks), Samples::of(&size.floors));
        report.keep(&format!("L7 fork to first, {} MiB", size.mib), &forks);
        report.keep(&format!("L7 bare fork, {} MiB", size.mib), &floors);
        let met =
            forks.p50() <= 1.5 * floors.p50() && forks.p50() <= 600.0 && forks.percentile(99) <= 3.0 * floors.percentile(99);
        let what = format!("fork to first instruction, {} MiB", size.mib);
        let reach = "L1's: <= 1.5x floor, <= 600 us, p99 <= 3x floor's";
        report.add(Row::new("L7", what, &forks, Some(floors.p50())).reaching(reach, met));
        for (stage, of) in [("map", 0), ("restore", 1), ("start to first", 2)] {
            let durations: Vec<Duration> = size.stages.iter().map(|stages| stages[of]).collect();
            let samples = Samples::of(&durations);
            let what = format!("fork {} MiB: {stage}", size.mib);
            report.keep(&format!("L7 {what}"), &samples);
            report.add(Row::new("L7", what, &samples, None));
        }
        medians.push((size.mib, forks));
    }
    if let [(_, smallest), .., (mib, largest)] = &medians[..] {
        let met = largest.p50() <= 1.15 * smallest.p50();
        let what = format!("flatness: {mib} MiB beside 64 MiB");
        report.add(Row::new("L7", what, largest, Some(smallest.p50())).reaching("<= 1.15x", met));
    }
    Ok(medians.iter().find(|(mib, _)| *mib == 512).map(|(_, forks)| forks.p50()))
}

struct Size {
    mib: u64,
    image: Arc<Image>,
    forks: Vec<Duration>,
    floors: Vec<Duration>,
    stages: Vec<[Duration; 3]>,
}

impl Size {
    fn measure(&mut self, host: &Host) -> Result<()> {
        let shell = Shell::build(host, self.image.class())?;
        let id = proof::new_id();
        let started = Instant::now();
        let mut child = shell.fork(&self.image, id)?;
        let forked = Instant::now();
        child.resume();
        let first = child.wait_for_first_exit(PATIENCE).context("a child ran no instruction")?;
        self.forks.push(first - started);
        self.stages.push([child.stages().map, child.stages().restore, first - forked]);
        ensure!(Probe::of(&child).who()? == id, "a child does not know who it is");
        Ok(())
    }
}

fn half_full(host: &Host, class: Class) -> Result<Arc<Image>> {
    let memory = class.memory();
    let mut parent = proof::boot(host, class)?;
    Probe::of(&parent).fill(probe::first_work_page(), probe::work_pages(memory).min(memory.bytes() / PAGE_SIZE / 2), 1)?;
    Ok(parent.freeze(host)?.image)
}

/// L8: branches of a machine that writes with all its might into so many pages, over and over.
fn branches(host: &Host, report: &mut Report, quick: bool) -> Result<()> {
    let class = Class::new(MemorySize::from_mib(512)?, 1)?;
    let n = if quick { 5 } else { 40 };
    // L1 as this process has it, for the second half of the row.
    let image = half_full(host, class)?;
    let mut size = Size { mib: 512, image, forks: Vec::new(), floors: Vec::new(), stages: Vec::new() };
    for _ in 0..n {
        size.measure(host)?;
    }
    let fork_p50 = Samples::of(&size.forks).p50();
    for (pages, has_read_all) in [(100u32, false), (2000, false), (20_000, false), (2000, true)] {
        announce(&format!("L8: branches of a machine that writes {pages} pages"));
        let mut parent = proof::fork(host, &size.image)?;
        if has_read_all {
            // Its page tables then hold every page of the image's data, which the copier's birth copies as well.
            let read = Command::TouchRead { first: probe::first_work_page(), count: 65_000, stride: 1, shuffle: None };
            ensure!(Probe::of(&parent).call(read)?[1] == 65_000, "the parent did not read what it was told to");
        }
        let mut branches = Branches::default();
        for _ in 0..n {
            branches.measure(host, &mut parent, u64::from(pages))?;
        }
        branches.report(report, pages, has_read_all, fork_p50);
    }
    Ok(())
}

#[derive(Default)]
struct Branches {
    stalls: Vec<Duration>,
    stages: Vec<[Duration; 5]>,
    bare_copies: Vec<Duration>,
    copies_at_rest: Vec<Duration>,
    firsts: Vec<Duration>,
    /// What each `first` may take, less a fork: its own stall and a bare copy of as many extents.
    allowances: Vec<Duration>,
    rewrites: Vec<Duration>,
    rewrites_after: Vec<Duration>,
}

impl Branches {
    fn measure(&mut self, host: &Host, parent: &mut vm::Machine, pages: u64) -> Result<()> {
        let first = probe::first_work_page();
        let rewrite = Command::TouchWrite { first, count: pages, stride: 1, shuffle: false, value: 5 };
        let timed_rewrite = |parent: &vm::Machine| -> Result<Duration> {
            let started = Instant::now();
            ensure!(Probe::of(parent).call(rewrite)?[1] == pages, "the parent did not write what it was told to");
            Ok(started.elapsed())
        };
        timed_rewrite(parent)?;
        self.rewrites.push(timed_rewrite(parent)?);
        let writing = Probe::of(parent).post(Command::Epochs { first, count: pages })?;
        let shell = Shell::build(host, parent.class())?;
        std::thread::sleep(Duration::from_millis(2));

        let started = Instant::now();
        let frozen = parent.freeze(host)?;
        let mut child = shell.fork(&frozen.image, proof::new_id())?;
        // It is in the middle of its parent's writing; told to stop, it comes out after one more page.
        Probe::of(&child).tell_to_stop()?;
        child.resume();
        let first_seen = child.wait_for_first_exit(PATIENCE).context("a child ran no instruction")?;
        self.firsts.push(first_seen - started);
        let inherited = Probe::of(&child).inherited(Command::Epochs { first, count: pages })?;
        let [epoch, ..] = Probe::of(&child).wait(inherited)?;
        ensure!(epoch > 0, "the child of a branch did not go on with its parent's work");
        drop(child);

        let report = frozen.report;
        ensure!(report.dirty_pages >= pages, "{} dirty pages where {pages} were written", report.dirty_pages);
        self.stalls.push(parent.last_stall(PATIENCE).context("the parent did not go on")?);
        self.stages.push([report.rest, report.capture, report.scan, report.instant, report.copy]);
        let bare_copy = bare::copy(report.copied_extents * EXTENT_SIZE)?;
        self.bare_copies.push(bare_copy);
        self.allowances.push(report.stall + bare_copy);
        ensure!(Probe::of(parent).stop(writing)?[0] > 0, "the parent did not go on");

        // The same copy without a guest that has to copy the same pages at the same time.
        parent.pause()?;
        self.copies_at_rest.push(parent.freeze(host)?.report.copy);
        parent.resume();
        // The tail: the parent rewrites all it has while the copier still shares every page with it.
        let freezing = parent.begin_freeze(host)?;
        self.rewrites_after.push(timed_rewrite(parent)?);
        freezing.finish()?;
        Ok(())
    }

    fn report(&self, report: &mut Report, pages: u32, has_read_all: bool, fork_p50: f64) {
        let read_all = if has_read_all { ", all data read" } else { "" };
        let name = |what: &str| format!("L8 {pages} pages{read_all}: {what}");
        let stalls = Samples::of(&self.stalls);
        let limit = 5000.0 + 0.3 * f64::from(pages);
        report.keep(&name("stall"), &stalls);
        let what = format!("branch, {pages} pages being written{read_all}: vCPU stall");
        report.add(
            Row::new("L8", what, &stalls, Some(limit))
                .reaching("<= 5 ms + 0.3 us a dirty page", stalls.percentile(99) <= limit),
        );
        let bare_copy = Samples::of(&self.bare_copies);
        report.keep(&name("bare copy"), &bare_copy);
        for (at, stage) in ["of it: rest", "of it: capture", "of it: scan", "of it: instant", "then: copy"].iter().enumerate() {
            let samples = Samples::of(&self.stages.iter().map(|stages| stages[at]).collect::<Vec<_>>());
            report.keep(&name(stage), &samples);
            report.add(Row::new("L8", format!("  {stage}"), &samples, (at == 4).then(|| bare_copy.p50())));
        }
        let at_rest = Samples::of(&self.copies_at_rest);
        report.keep(&name("copy, parent at rest"), &at_rest);
        report.add(Row::new("L8", "  the same copy, parent at rest", &at_rest, Some(bare_copy.p50())));
        let firsts = Samples::of(&self.firsts);
        let allowed = Samples::of(&self.allowances).p50() + fork_p50;
        report.keep(&name("to the child's first instruction"), &firsts);
        report.keep(&name("stall and bare copy"), &Samples::of(&self.allowances));
        let what = format!("branch, {pages} pages{read_all}: call to the child's first exit");
        report.add(Row::new("L8", what, &firsts, Some(allowed)).reaching("<= stall + L1 + bare copy", firsts.p50() <= allowed));
        let (before, after) = (Samples::of(&self.rewrites), Samples::of(&self.rewrites_after));
        report.keep(&name("rewrite before"), &before);
        report.keep(&name("rewrite after"), &after);
        report.add(Row::new(
            "L8",
            format!("copy-on-write tail: rewriting {pages} pages{read_all} at once after a branch"),
            &after,
            Some(before.p50()),
        ));
    }
}
