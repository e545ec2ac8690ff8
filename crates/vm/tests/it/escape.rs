//! The escape harness: what each attempt to break out comes to, with and without the mechanism that refuses it.
//! `docs/security.md` lists the cases.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use types::Reason;
use vm::harness::attempts::{self, Case, Order, Refusal, Thread};
use vm::harness::{class, held, host, new_id};
use vm::jail::{Jail, Mechanism};
use vm::pool::{ForkOptions, Jailed, PoolError, Settings};
use vm::{Image, Pool};

/// Cases that a host's own settings refuse, if the number in the file is above the one here.
const REFUSED_BY_HOST: [(&str, &str, i64); 5] = [
    ("perf_event_open", "/proc/sys/kernel/perf_event_paranoid", 2),
    ("io_uring_setup", "/proc/sys/kernel/io_uring_disabled", 0),
    ("io_uring", "/proc/sys/kernel/io_uring_disabled", 0),
    ("execveat", "/proc/sys/vm/memfd_noexec", 1),
    ("new user namespace", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns", 0),
];

fn refused_by_host(case: &Case) -> Option<&'static str> {
    let refuses = |path: &str, most: i64| {
        let setting = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i64>().ok());
        setting.is_some_and(|setting| setting > most)
    };
    REFUSED_BY_HOST.iter().find(|(name, path, most)| *name == case.name && refuses(path, *most)).map(|(_, path, _)| *path)
}

/// What an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Answered(i32),
    Ended(Reason),
    /// The kernel does not have what was tried.
    Unknown,
}

/// Pools by what is left out of their jails, opened when they are needed.
struct Prisons {
    pools: BTreeMap<(BTreeSet<Mechanism>, bool), Pool>,
    image: Option<Arc<Image>>,
    directory: tempfile::TempDir,
}

fn settings(left_out: &BTreeSet<Mechanism>, groups: Option<String>) -> Settings {
    Settings {
        jail: Jail::without(left_out.iter().copied()),
        groups,
        shells_min: 1,
        shells_max: 1,
        builders: 1,
        ..Settings::new(env!("CARGO_BIN_EXE_zygote"), [])
    }
}

impl Prisons {
    fn new() -> Self {
        Self { pools: BTreeMap::new(), image: None, directory: tempfile::tempdir().unwrap() }
    }

    /// A machine in a jail with these holes.
    fn machine(&mut self, left_out: &BTreeSet<Mechanism>, with_groups: bool) -> Result<Arc<Jailed>, String> {
        let count = self.pools.len();
        let key = (left_out.clone(), with_groups);
        if !self.pools.contains_key(&key) {
            let groups = with_groups.then(|| format!("escape-{}-{count}", std::process::id()));
            let pool = Pool::open(host(), settings(left_out, groups)).map_err(|error| format!("a pool: {error}"))?;
            self.pools.insert(key.clone(), pool);
        }
        let pool = &self.pools[&key];
        if self.image.is_none() {
            let parent = pool.boot_probe(class(64, 1), new_id()).map_err(|error| format!("a parent: {error}"))?;
            self.image = Some(parent.freeze().map_err(|error| format!("an image: {error}"))?.image);
        }
        let image = self.image.as_ref().unwrap();
        let forked = pool.fork(image, &[new_id()], ForkOptions::default()).pop().unwrap();
        forked.map(|(machine, _)| Arc::new(machine)).map_err(|error| format!("a fork: {error}"))
    }

    /// Lets a machine in a jail with these holes try.
    fn judge(&mut self, number: u16, case: &Case, thread: Thread, left_out: &BTreeSet<Mechanism>) -> Result<Verdict, String> {
        let with_groups = case.refused_by == Mechanism::ControlGroup;
        let machine = self.machine(left_out, with_groups)?;
        let sibling = self.machine(left_out, with_groups)?;
        let gift = match case.given.make(self.directory.path(), Some(&sibling)) {
            Ok(gift) => gift,
            Err(error) => {
                println!("skipped: {}: {:?}: {error}", case.name, case.given);
                return Ok(Verdict::Unknown);
            }
        };
        let given: Vec<_> = gift.descriptors.iter().map(std::os::fd::AsFd::as_fd).collect();
        let answer = machine.attempt(Order { number, thread, about: gift.about }, &given);
        let verdict = match answer {
            Ok(libc::ENOSYS | libc::EAFNOSUPPORT) => {
                println!("skipped: {}: this kernel has it not", case.name);
                Verdict::Unknown
            }
            Ok(0) if !gift.took_effect() => Verdict::Answered(Refusal::NoEffect.answer().unwrap()),
            Ok(errno) => Verdict::Answered(errno),
            Err(PoolError::Ended(ended)) => Verdict::Ended(ended.reason),
            Err(error) => return Err(error.to_string()),
        };
        machine.kill();
        Ok(verdict)
    }
}

fn refused(refusal: Refusal) -> Verdict {
    match refusal {
        Refusal::Killed => Verdict::Ended(Reason::JailViolation),
        Refusal::OutOfMemory => Verdict::Ended(Reason::Oom),
        Refusal::Errno(errno) => Verdict::Answered(errno),
        Refusal::NoEffect => Verdict::Answered(refusal.answer().unwrap()),
    }
}

/// One run of a case: what is left out, who tries, and what must come of it.
struct Run {
    left_out: BTreeSet<Mechanism>,
    thread: Thread,
    due: Due,
}

#[derive(Clone, Copy, Debug)]
enum Due {
    Exactly(Verdict),
    AnyRefusal,
}

impl Due {
    fn is(self, verdict: Verdict) -> bool {
        match self {
            Self::Exactly(due) => verdict == due,
            Self::AnyRefusal => verdict != Verdict::Answered(0),
        }
    }
}

/// The three runs of a case, as `docs/security.md` has them.
fn runs(case: &Case) -> Vec<Run> {
    let run = |left_out, thread, due| Run { left_out, thread, due: Due::Exactly(due) };
    let behind: BTreeSet<Mechanism> = case.behind.iter().copied().collect();
    let in_whole = if behind.contains(&Mechanism::Seccomp) { Refusal::Killed } else { case.refusal };
    let mut runs = vec![run(BTreeSet::new(), case.thread, refused(in_whole))];
    if !behind.is_empty() {
        runs.push(run(behind.clone(), case.thread, refused(case.refusal)));
    }
    let mut without = behind;
    without.insert(case.refused_by);
    runs.push(run(without, case.thread, Verdict::Answered(0)));
    if case.thread == Thread::Vcpu {
        runs.push(run(BTreeSet::new(), Thread::Control, Verdict::Answered(0)));
    }
    runs
}

/// Judges the cases of one kind.
fn judge_all(kind: &str, is_of_kind: impl Fn(&Case) -> bool, runs: impl Fn(&Case) -> Vec<Run>) -> usize {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: {kind}: only root can leave a mechanism out without losing others");
        return 0;
    }
    attempts::own_hostname().unwrap();
    // As many descriptors as may be, so that it is the worker's own limit that refuses more.
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let mut prisons = Prisons::new();
    let (mut judged, mut wrong) = (0, Vec::new());
    for (number, case) in (0..).zip(attempts::cases()).filter(|(_, case)| is_of_kind(case)) {
        if let Some(setting) = refused_by_host(case) {
            println!("skipped: {}: this host refuses it by {setting}", case.name);
            continue;
        }
        let mut is_known = true;
        for Run { left_out, thread, due } in runs(case) {
            match prisons.judge(number, case, thread, &left_out) {
                Ok(Verdict::Unknown) => is_known = false,
                Ok(verdict) if due.is(verdict) => {}
                other => wrong.push(format!("{} on {thread:?} without {left_out:?}: {other:?}, not {due:?}", case.name)),
            }
        }
        judged += usize::from(is_known);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    held(&format!("attempts of {kind} that came to what they must"), judged as u64);
    judged
}

#[test]
fn what_only_the_filters_refuse() {
    let judged =
        judge_all("the control thread", |case| case.refused_by == Mechanism::Seccomp && case.thread == Thread::Control, runs);
    assert!(judged >= 40 || !rustix::process::geteuid().is_root(), "{judged} cases could be judged");
}

#[test]
fn what_a_vcpus_thread_may_not_and_the_control_thread_may() {
    let judged = judge_all("a vCPU's thread", |case| case.thread == Thread::Vcpu, runs);
    assert!(judged >= 5 || !rustix::process::geteuid().is_root(), "{judged} cases could be judged");
}

#[test]
fn what_the_layers_behind_the_filters_refuse() {
    judge_all("the layers", |case| !matches!(case.refused_by, Mechanism::Seccomp | Mechanism::ControlGroup), runs);
}

#[test]
fn what_the_control_group_refuses() {
    let has_groups = vm::jail::cgroup::Groups::open(&format!("escape-{}", std::process::id()));
    match has_groups {
        Ok(groups) => groups.close(),
        Err(error) => return println!("skipped: there are no control groups here: {error}"),
    }
    judge_all("the control group", |case| case.refused_by == Mechanism::ControlGroup, runs);
}

/// Nothing is said to stand in front that does not: each of these refuses when all the others are off.
#[test]
fn what_stands_in_front_of_a_mechanism_refuses_by_itself() {
    let is_layered = |case: &Case| case.behind.len() > 1;
    judge_all("the layers in front", is_layered, |case| {
        let all: BTreeSet<Mechanism> = case.behind.iter().copied().chain([case.refused_by]).collect();
        let alone = |mechanism: &Mechanism| {
            let mut left_out = all.clone();
            left_out.remove(mechanism);
            Run { left_out, thread: case.thread, due: Due::AnyRefusal }
        };
        case.behind.iter().map(alone).collect()
    });
}

#[test]
fn every_mechanism_has_a_case_and_every_case_its_name() {
    let names: BTreeSet<_> = attempts::cases().map(|case| case.name).collect();
    assert_eq!(names.len(), attempts::cases().count(), "two cases have one name");
    for mechanism in Mechanism::ALL {
        assert!(attempts::cases().any(|case| case.refused_by == mechanism), "{mechanism:?} refuses nothing");
    }
    for case in attempts::cases() {
        assert!(!case.behind.contains(&case.refused_by), "{}", case.name);
    }
}

/// A worker whose machine has ended by itself is gone soon; those of a jail with holes as well.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_machine_runs_in_a_jail_without_any_one_mechanism() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root can leave a mechanism out without losing others");
    }
    let mut prisons = Prisons::new();
    for mechanism in Mechanism::ALL {
        let machine =
            prisons.machine(&BTreeSet::from([mechanism]), false).unwrap_or_else(|error| panic!("{mechanism:?}: {error}"));
        machine.kill();
        assert!(machine.wait_for_end(PATIENCE).is_some());
    }
}

/// What stands between the marks `<!-- name -->` and `<!-- end of name -->` of a page.
fn replace_part(page: &str, name: &str, part: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->\n"));
    let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("docs/security.md has no mark {name}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("docs/security.md does not end {name}"));
    format!("{before}{begin}{part}\n{end}{after}")
}

#[test]
fn the_page_on_security_lists_every_system_call_and_every_case() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/security.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let with_syscalls = replace_part(&page, "system calls", &attempts::render_syscalls());
    let due = replace_part(&with_syscalls, "cases", &attempts::render_cases());
    if std::env::var("FARFORK_UPDATE").as_deref() == Ok("1") {
        return std::fs::write(&path, due).unwrap();
    }
    assert!(page == due, "docs/security.md is not what the code says; FARFORK_UPDATE=1 rewrites it");
}
