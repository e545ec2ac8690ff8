//! Where faults are injected: a node that has an image, one that forks from it, and between them a relay that can be told to
//! spoil what it carries.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chaos::relay::{Config, Direction, Impairment, Rate, Relay};
use rustix::process::Signal;
use serde_json::Value;

use crate::between::{introduce, listening, warm};
use crate::support::{Node, Said, eventually};

/// How long after a fault forks may still fail of it: five times the longest pause before a lost connection is made anew.
const LONGEST_RECOVERY: Duration = Duration::from_secs(10);

/// Of the nodes' flags: how long a child waits for a page.
pub(super) const PAGE_DEADLINE: Duration = Duration::from_secs(2);
/// Small enough to be quick, and yet some hundred milliseconds on the wire. A quarter of it is written.
const MEMORY: &str = "16MiB";
const PAGES: u64 = 1024;
/// Bytes of an image that travel.
pub(super) const IMAGE_BYTES: u64 = PAGES * 4096;
/// What the relay carries in a second, so that there is a middle to inject something in.
const BYTES_PER_SECOND: u64 = 8 << 20;
/// The relay's own delays come to nothing against this.
const LONGEST_ANSWER: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Stage {
    /// `None` only while it is being replaced.
    source: Option<Node>,
    source_address: SocketAddr,
    destination: Option<Node>,
    relay: Relay,
    seed: u64,
    flags: Vec<String>,
    /// Open files of the destination when nothing was open there.
    descriptors: usize,
}

impl Stage {
    /// Two nodes that trust each other. The destination is started with these flags more, and without these guards.
    pub(super) fn new(seed: u64, flags: &[&str], without: &str) -> Self {
        let (source, address) = listening(tempfile::tempdir().unwrap(), &[], "");
        let flags = [&["--page-deadline", "2s"], flags].concat();
        let (destination, _) = listening(tempfile::tempdir().unwrap(), &flags, without);
        introduce(&[&source, &destination]);
        let source_address = address.parse().unwrap();
        let relay = relay(source_address, seed);
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut stage =
            Self { source: Some(source), source_address, destination: Some(destination), relay, seed, flags, descriptors: 0 };
        // Pools are full, and caches warm, once it has gone well once.
        let digest = stage.warm();
        stage.forks_well(&digest);
        stage.clear();
        stage.descriptors = stage.destination().descriptors();
        stage
    }

    pub(super) fn source(&self) -> &Node {
        self.source.as_ref().unwrap()
    }

    pub(super) fn destination(&self) -> &Node {
        self.destination.as_ref().unwrap()
    }

    /// Where the source is, without the relay between.
    pub(super) fn source_address(&self) -> SocketAddr {
        self.source_address
    }

    /// Where the source is for the destination.
    pub(super) fn holder(&self) -> String {
        self.relay.address().to_string()
    }

    /// An image that only the source has.
    pub(super) fn warm(&self) -> String {
        warm(self.source(), MEMORY).1
    }

    /// Asks the destination for children of an image, each to verify all of its memory.
    pub(super) fn ask(&self, digest: &str, children: u64, holders: &[&str]) -> Asked {
        let count = children.to_string();
        let mut arguments = vec!["fork", digest, "-n", &count, "--verify"];
        holders.iter().for_each(|holder| arguments.extend(["--from", holder]));
        let carried = self.relay.counters().to_client.delivered_bytes;
        Asked { carried, ..Asked::start(self.destination(), &arguments, children) }
    }

    /// Waits until so many bytes of the answer have come through the relay, or it is over.
    pub(super) fn wait_until(&self, asked: &mut Asked, bytes: u64) {
        let carried = || self.relay.counters().to_client.delivered_bytes - asked.carried;
        while carried() < bytes && asked.process.try_wait().unwrap().is_none() && asked.began.elapsed() < LONGEST_ANSWER {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the relay does from now on, one way or both.
    pub(super) fn impair(&self, directions: &[Direction], impairment: Impairment) {
        for direction in directions {
            self.relay.set(*direction, impairment);
        }
    }

    /// As it was at first.
    pub(super) fn repair(&self) {
        self.impair(&[Direction::ToUpstream], Impairment::default());
        self.impair(&[Direction::ToClient], paced());
    }

    /// Forks from the image, and has that succeed.
    pub(super) fn forks_well(&self, digest: &str) {
        let asked = self.ask(digest, 1, &[&self.holder()]);
        assert_eq!(asked.outcomes(), ["complete"]);
    }

    /// Forks from the image until that succeeds. A connection that is silent is replaced, and one that was lost made anew, but
    /// not at once; what is asked for until then may end for that reason and no other.
    pub(super) fn recovers(&self, digest: &str) {
        let began = Instant::now();
        loop {
            let outcomes = self.ask(digest, 1, &[&self.holder()]).outcomes();
            if outcomes == ["complete"] {
                return;
            }
            assert!(outcomes == ["PAGE_SOURCE_LOST"] || outcomes == ["UNREACHABLE"], "{outcomes:?}");
            assert!(began.elapsed() < LONGEST_RECOVERY, "{outcomes:?} long after all was well again");
        }
    }

    /// The source is dead: another one takes its place, with its name and without its images.
    pub(super) fn replace_source(&mut self) {
        let directory = self.source.take().unwrap().crash();
        let (source, address) = listening(directory, &[], "");
        (self.source, self.source_address) = (Some(source), address.parse().unwrap());
        self.seed += 1;
        self.relay = relay(self.source_address, self.seed);
    }

    /// The destination dies, and another one takes its place: nothing of the first may be left.
    pub(super) fn replace_destination(&mut self) {
        let node = self.destination.take().unwrap();
        let before = family(node.pid().as_raw_pid());
        let directory = node.crash();
        eventually("every process of the node is gone", || before.is_disjoint(&pids()));
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        self.destination = Some(listening(directory, &flags, "").0);
        assert!(self.destination().machines().is_empty());
    }

    /// Takes machines and images away everywhere, after which nothing is left of them.
    pub(super) fn clear(&self) {
        for node in [self.source(), self.destination()] {
            if !node.machines().is_empty() {
                assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
            }
            for image in crate::support::ids(&node.json(&["image", "ls"])["images"]) {
                assert_eq!(node.cli(&["image", "rm", &image]).code, Some(0));
            }
        }
        if self.descriptors > 0 {
            let most = self.descriptors + DESCRIPTORS_SLACK;
            eventually("what children and images had open is closed", || self.destination().descriptors() <= most);
        }
    }

    /// Stops both nodes as a user would, after which no process is left.
    pub(super) fn end(mut self) {
        for mut node in [self.source.take().unwrap(), self.destination.take().unwrap()] {
            let before = family(node.pid().as_raw_pid());
            node.signal(Signal::TERM);
            assert_eq!(node.wait().code(), Some(0));
            eventually("every process of the node is gone", || before.is_disjoint(&pids()));
        }
    }
}

/// Shells come and go, and so do connections; an image and its child have more.
const DESCRIPTORS_SLACK: usize = 24;

/// A request that the destination is at.
pub(super) struct Asked {
    process: Child,
    children: u64,
    began: Instant,
    /// What the relay had carried before.
    carried: u64,
}

impl Asked {
    fn start(node: &Node, arguments: &[&str], children: u64) -> Self {
        let mut command = node.command(&[arguments, &["--output", "json"]].concat());
        let process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { process, children, began: Instant::now(), carried: 0 }
    }

    /// What the command line says in the end, which is not late.
    fn answer(mut self) -> Said {
        while self.process.try_wait().unwrap().is_none() {
            assert!(self.began.elapsed() < LONGEST_ANSWER, "no answer within {LONGEST_ANSWER:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Said::of(self.process.wait_with_output().unwrap())
    }

    /// What became of each child, from a list that is closed: `complete`, the reason of its end, or the code of a refusal.
    pub(super) fn outcomes(self) -> Vec<String> {
        let children = usize::try_from(self.children).unwrap();
        let said = self.answer();
        if matches!(said.code, Some(3 | 4)) {
            println!("{}", said.err.trim_end());
            let error: Value = serde_json::from_str(&said.err).unwrap();
            let reason = error["error"]["reason"].as_str().map_or_else(|| said.error_code(), str::to_owned);
            return vec![reason; children];
        }
        let report: Value = serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"));
        let verified = report["children"].as_array().unwrap().iter().map(|child| {
            assert_eq!(child["verified_pages"].as_u64(), Some(PAGES), "{report}");
            "complete".to_owned()
        });
        let failures = report["failures"].as_array().unwrap();
        // The reason of its end, or why it was refused.
        let failed = failures.iter().map(|failure| failure["reason"].as_str().or(failure["code"].as_str()).unwrap().to_owned());
        let outcomes: Vec<_> = verified.chain(failed).collect();
        assert_eq!(outcomes.len(), children, "{report}");
        outcomes
    }
}

/// What became of each child that these arguments ask a node for, as [`Asked::outcomes`] says it.
pub(super) fn answer_of(node: &Node, arguments: &[&str], children: u64) -> Vec<String> {
    Asked::start(node, arguments, children).outcomes()
}

/// How often what came of which fault.
#[derive(Default)]
pub(super) struct Tally(BTreeMap<String, (u64, BTreeMap<String, u64>)>);

impl Tally {
    pub(super) fn note(&mut self, fault: impl std::fmt::Debug, outcomes: Vec<String>) {
        let (injections, counts) = self.0.entry(format!("{fault:?}")).or_default();
        *injections += 1;
        outcomes.into_iter().for_each(|outcome| *counts.entry(outcome).or_default() += 1);
    }

    pub(super) fn injections(&self) -> u64 {
        self.0.values().map(|(injections, _)| injections).sum()
    }

    pub(super) fn print(&self) {
        for (fault, (injections, counts)) in &self.0 {
            let counts: Vec<String> = counts.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
            println!("{injections:>5} x {fault:<40} children: {}", counts.join(", "));
        }
    }
}

/// A process and all below it.
pub(super) fn family(pid: i32) -> BTreeSet<i32> {
    crate::real::family(pid)
}

fn pids() -> BTreeSet<i32> {
    crate::real::pids()
}

fn relay(source: SocketAddr, seed: u64) -> Relay {
    Relay::start(Config { seed, to_client: paced(), ..Config::to(source) }).unwrap()
}

/// What the link carries when nothing is wrong with it.
pub(super) fn paced() -> Impairment {
    Impairment { rate: Some(Rate::new(BYTES_PER_SECOND)), ..Impairment::default() }
}
