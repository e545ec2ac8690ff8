//! `make demo`: a warm parent is frozen, 100 children are forked from it in this process, and each proves with its own
//! instructions that every page that the guest has for work is as it was, while the parent writes over its own without pause
//! and each sibling has written over its.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use types::{ExitCode as Code, MachineId, MemorySize, PAGE_SIZE, PageIndex};
use uuid::Uuid;
use vm::probe::{self, Command, PATIENCE, Probe};
use vm::{Class, Host, Machine, Shell};

const CHILDREN: usize = 100;
const MEMORY_MIB: u64 = 64;
const PARENT_EPOCH: u64 = 1;

fn main() -> ExitCode {
    match run() {
        Ok(()) => Code::Ok.into(),
        Err((error, remedy)) => {
            eprintln!("error: {error}\nremedy: {remedy}");
            Code::Refused.into()
        }
    }
}

/// A cause and what to do about it.
type Failure = (String, String);

macro_rules! or_fail {
    ($result:expr) => {
        $result.map_err(|error| (error.to_string(), error.remedy().to_owned()))?
    };
}

fn run() -> Result<(), Failure> {
    let broken = |error: probe::ProbeError| (error.to_string(), "run it again; if it persists, report it as a bug".to_owned());
    let host = or_fail!(Host::open());
    println!("host      {}", host.cpu());
    let memory = MemorySize::from_mib(MEMORY_MIB).map_err(|error| (error.to_string(), "ask for another size".to_owned()))?;
    let class = or_fail!(Class::new(memory, 1));

    let started = Instant::now();
    let mut parent = or_fail!(probe::boot(&host, class, new_id()));
    parent.resume();
    let (first, pages) = (probe::first_work_page(), 4096);
    let untouched = PageIndex(first.0 + pages);
    let untouched_count = probe::work_pages(memory) - pages;
    Probe::of(&parent).fill(first, pages, PARENT_EPOCH).map_err(broken)?;
    println!("parent    {memory}, {} MiB of it written, booted in {}", pages >> 8, ms(started.elapsed()));

    let frozen = or_fail!(parent.freeze(&host));
    let image = frozen.image;
    println!("freeze    image {} in {}, nothing copied", image.id(), ms(frozen.report.stall));

    let started = Instant::now();
    let mut shells = Vec::with_capacity(CHILDREN);
    for done in 0..CHILDREN {
        progress("shells", done);
        shells.push(or_fail!(Shell::build(&host, class)));
    }
    println!("shells    {CHILDREN} built ahead in {}", ms(started.elapsed()));

    // From here on the parent writes over everything that its children inherit, over and over.
    let writing = Probe::of(&parent).post(Command::Epochs { first, count: pages }).map_err(broken)?;
    let mut children: Vec<Machine> = Vec::with_capacity(CHILDREN);
    let mut stages = Stages::default();
    let all = Instant::now();
    for shell in shells {
        let started = Instant::now();
        let mut child = or_fail!(shell.fork(&image, new_id()));
        child.resume();
        let first_exit = child.wait_for_first_exit(PATIENCE).ok_or_else(|| no_first_instruction(&child))?;
        stages.map.push(child.stages().map);
        stages.restore.push(child.stages().restore);
        stages.first.push(first_exit - started);
        children.push(child);
    }
    println!("fork      {CHILDREN} children, each with its first instruction run, in {}", ms(all.elapsed()));
    println!("          stage               p50        p99");
    println!("          map memory     {}", stages.row(|stages| &mut stages.map));
    println!("          restore state  {}", stages.row(|stages| &mut stages.restore));
    println!("          fork to first  {}", stages.row(|stages| &mut stages.first));

    let zero_sum = probe::checksum(&vec![0; usize::try_from(untouched_count * PAGE_SIZE).unwrap_or(0)]);
    let mut identities = std::collections::BTreeSet::new();
    for (done, child) in children.iter().enumerate() {
        progress("verify", done);
        let probe = Probe::of(child);
        if let Some((count, page)) = probe.verify(first, pages, PARENT_EPOCH).map_err(broken)? {
            return Err((
                format!("{count} pages of child {done} differ, the first is {page:?}"),
                "report it as a bug".to_owned(),
            ));
        }
        let zeros = Command::Checksum { first: untouched, count: untouched_count };
        if probe.call(zeros).map_err(broken)?[0] != zero_sum {
            return Err((
                format!("a page of child {done} that was never written is not zero"),
                "report it as a bug".to_owned(),
            ));
        }
        // Writes over part of it, so that whoever comes next would see it if anything were shared.
        probe.fill(first, pages / 16, 2000 + done as u64).map_err(broken)?;
        probe.fill(untouched, 16, 3000 + done as u64).map_err(broken)?;
        identities.insert(probe.who().map_err(broken)?);
    }
    let all_pages = pages + untouched_count;
    println!("verify    {CHILDREN} children have all {all_pages} pages as at the freeze, and {} identities", identities.len());
    let [last, ..] = Probe::of(&parent).stop(writing).map_err(broken)?;
    // It counts on from what was in its first word.
    let epochs = last.wrapping_sub(probe::page_word(first, PARENT_EPOCH, 0));
    println!("parent    has written over its memory {epochs} times meanwhile");

    let started = Instant::now();
    let branched = or_fail!(children[0].freeze(&host));
    let own = branched.image.own_bytes().map_err(|error| (error.to_string(), "look into the kernel log".to_owned()))?;
    println!(
        "branch    of a child: stalled for {}, image of {} KiB for {} dirty pages, complete in {}",
        ms(branched.report.stall),
        own >> 10,
        branched.report.dirty_pages,
        ms(started.elapsed())
    );
    Ok(())
}

#[derive(Default)]
struct Stages {
    map: Vec<Duration>,
    restore: Vec<Duration>,
    first: Vec<Duration>,
}

impl Stages {
    fn row(&mut self, of: impl Fn(&mut Self) -> &mut Vec<Duration>) -> String {
        let samples = of(self);
        samples.sort_unstable();
        let at = |percent: usize| format!("{:>7.0} us", samples[(samples.len() - 1) * percent / 100].as_secs_f64() * 1e6);
        format!("{} {}", at(50), at(99))
    }
}

fn no_first_instruction(child: &Machine) -> Failure {
    let cause = child.ended().map_or_else(|| "it is stuck".to_owned(), |ended| ended.to_string());
    (format!("a child ran no instruction: {cause}"), "report it as a bug".to_owned())
}

fn progress(what: &str, done: usize) {
    if std::io::stderr().is_terminal() {
        eprint!("\r{what} {done}/{CHILDREN}\r");
        std::io::stderr().flush().unwrap_or_default();
    }
}

fn ms(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn new_id() -> MachineId {
    MachineId::from_uuid(Uuid::now_v7())
}
