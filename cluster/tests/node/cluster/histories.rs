//! Histories of real nodes: clients ask all of them, while leaders are killed, stand still and are cut off, and note when each call
//! began and what it was told. Afterwards there has to be an order in which all of it can have happened, one call after the other.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chaos::linearizable::{Call, What, check};
use fastrand::Rng;
use rustix::process::Signal;
use serde_json::Value;
use vm::harness::{count, held, seed};

use super::stage::Cluster;
use crate::support::eventually;

const NODES: usize = 3;
const NAMES: [&str; 2] = ["red", "blue"];
/// Clients of registers, two of each node.
const CLIENTS: usize = 2 * NODES;
/// How long a client waits for an answer; afterwards it does not know.
const PATIENCE: Duration = Duration::from_secs(10);

/// What clients change and read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Register {
    /// Whether a node is cordoned.
    Cordon(usize),
    /// Which image a name points at, if any.
    Template(&'static str),
}

/// How often something of a kind was done, certainly not done, and perhaps done.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    done: u64,
    refused: u64,
    unknown: u64,
}

type Calls = BTreeMap<Register, Vec<Call<String>>>;

/// All that was called.
#[derive(Default)]
struct History {
    clock: AtomicU64,
    calls: Mutex<Calls>,
    counts: Mutex<BTreeMap<&'static str, Counts>>,
}

/// What came of a request.
enum Outcome {
    Answer {
        status: u16,
        body: Value,
    },
    /// It was not sent: it is not done, and never will be.
    NotSent,
    /// It may have been heard.
    NotHeard,
}

impl Outcome {
    fn code(&self) -> &str {
        match self {
            Self::Answer { body, .. } => body["error"]["code"].as_str().unwrap_or_default(),
            _ => "",
        }
    }

    fn done(&self) -> Option<&Value> {
        match self {
            Self::Answer { status: 200, body } => Some(body),
            _ => None,
        }
    }
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn note(&self, register: Register, what: What<String>, began: u64, ended: Option<u64>) {
        self.calls.lock().unwrap().entry(register).or_default().push(Call { what, began, ended });
    }

    fn count(&self, kind: &'static str, add: impl FnOnce(&mut Counts)) {
        add(self.counts.lock().unwrap().entry(kind).or_default());
    }

    fn done(&self, kind: &'static str) -> u64 {
        self.counts.lock().unwrap().get(kind).map_or(0, |counts| counts.done)
    }

    /// A write. `refusals`: codes that say that it was not done and never will be.
    fn write(&self, kind: &'static str, register: Register, value: String, refusals: &[&str], ask: impl FnOnce() -> Outcome) {
        let began = self.now();
        let outcome = ask();
        if outcome.done().is_some() {
            self.note(register, What::Write(value), began, Some(self.now()));
            self.count(kind, |counts| counts.done += 1);
        } else if matches!(outcome, Outcome::NotSent) || refusals.contains(&outcome.code()) {
            self.count(kind, |counts| counts.refused += 1);
        } else {
            self.note(register, What::Write(value), began, None);
            self.count(kind, |counts| counts.unknown += 1);
        }
    }

    /// A read. One without an answer says nothing.
    fn read(&self, kind: &'static str, ask: impl FnOnce() -> Outcome, seen: impl FnOnce(&Outcome) -> Vec<(Register, String)>) {
        let began = self.now();
        let outcome = ask();
        let seen = seen(&outcome);
        let ended = Some(self.now());
        self.count(kind, |counts| if seen.is_empty() { counts.refused += 1 } else { counts.done += 1 });
        seen.into_iter().for_each(|(register, value)| self.note(register, What::Read(value), began, ended));
    }
}

fn nothing(register: &Register) -> String {
    match register {
        Register::Cordon(_) => "false".to_owned(),
        Register::Template(_) => "none".to_owned(),
    }
}

/// Asks a node that may be killed meanwhile.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Outcome {
    let Ok(mut stream) = UnixStream::connect(socket) else { return Outcome::NotSent };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    if stream.write_all(format!("{head}{body}").as_bytes()).is_err() {
        return Outcome::NotHeard;
    }
    let mut all = Vec::new();
    let whole = stream.read_to_end(&mut all).is_ok();
    let text = String::from_utf8_lossy(&all);
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = text.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
    match (status, body) {
        (Some(status), Some(body)) if whole => Outcome::Answer { status, body },
        _ => Outcome::NotHeard,
    }
}

/// Calls of one client of one node, of kinds that the dice choose.
struct Client<'a> {
    socket: PathBuf,
    history: &'a History,
    dice: Rng,
}

impl Client<'_> {
    fn ask(&self, method: &str, path: &str, body: &str) -> Outcome {
        ask(&self.socket, method, path, body)
    }

    fn call(&mut self) {
        let name = NAMES[self.dice.usize(..NAMES.len())];
        match self.dice.u8(..10) {
            0..=2 => self.cordon(),
            3 => self.put(name),
            4 => self.remove(name),
            5..=6 => self.read_name(name),
            _ => self.read_nodes(),
        }
        // As somebody does who thinks between two calls.
        std::thread::sleep(Duration::from_millis(self.dice.u64(..60)));
    }

    fn cordon(&mut self) {
        let (node, is_cordoned) = (self.dice.usize(..NODES), self.dice.bool());
        let (kind, verb) = if is_cordoned { ("cordon", "cordon") } else { ("uncordon", "uncordon") };
        let path = format!("/v1/nodes/node-{node}/{verb}");
        let ask = || self.ask("POST", &path, "");
        self.history.write(kind, Register::Cordon(node), is_cordoned.to_string(), &["NO_QUORUM"], ask);
    }

    /// Points a name at an image of its own.
    fn put(&self, name: &'static str) {
        let made = self.ask("POST", "/v1/forks", r#"{"from":{"guest":"probe"},"memory_bytes":16777216}"#);
        let Some(made) = made.done() else { return };
        let image = made["image"]["id"].as_str().unwrap();
        let hashed = self.ask("POST", &format!("/v1/images/{image}/digest"), "");
        self.ask("DELETE", &format!("/v1/machines/{}", made["children"][0]["id"].as_str().unwrap()), "");
        let Some(digest) = hashed.done().and_then(|image| image["digest"].as_str()) else { return };
        let (path, body) = (format!("/v1/images/{image}/save"), format!(r#"{{"name":"{name}"}}"#));
        let ask = || self.ask("POST", &path, &body);
        self.history.write("put", Register::Template(name), digest.to_owned(), &["NAME_TAKEN", "NO_QUORUM"], ask);
    }

    fn remove(&self, name: &'static str) {
        let path = format!("/v1/templates/{name}");
        let ask = || self.ask("DELETE", &path, "");
        // That there was none is no refusal: then there is none, as was asked for.
        let ask = || match ask() {
            Outcome::Answer { status: 404, body } if body["error"]["code"] == "UNKNOWN_TEMPLATE" => {
                Outcome::Answer { status: 200, body }
            }
            other => other,
        };
        let register = Register::Template(name);
        let none = nothing(&register);
        self.history.write("remove", register, none, &["NO_QUORUM"], ask);
    }

    fn read_name(&self, name: &'static str) {
        let register = Register::Template(name);
        let seen = |outcome: &Outcome| match (outcome.done(), outcome.code()) {
            (Some(body), _) => vec![(register, body["image"].as_str().unwrap().to_owned())],
            (None, "UNKNOWN_TEMPLATE") => vec![(register.clone(), nothing(&register))],
            _ => Vec::new(),
        };
        self.history.read("read a name", || self.ask("GET", &format!("/v1/explain/{name}"), ""), seen);
    }

    fn read_nodes(&self) {
        let row = |node: &Value| {
            let number = node["name"].as_str()?.strip_prefix("node-")?.parse().ok()?;
            Some((Register::Cordon(number), node["is_cordoned"].as_bool()?.to_string()))
        };
        let seen = |outcome: &Outcome| {
            outcome.done().and_then(|body| body["nodes"].as_array()).into_iter().flatten().filter_map(row).collect()
        };
        self.history.read("read nodes", || self.ask("GET", "/v1/cluster", ""), seen);
    }
}

/// What befalls nodes, each for a while.
#[derive(Clone, Copy, Debug)]
enum Fault {
    LeaderKilled,
    LeaderStandsStill,
    FollowerStandsStill,
    LeaderCutOff,
    LeaderUnheard,
    LeaderDeaf,
}

impl Fault {
    const ALL: [Self; 6] = [
        Self::LeaderKilled,
        Self::LeaderStandsStill,
        Self::FollowerStandsStill,
        Self::LeaderCutOff,
        Self::LeaderUnheard,
        Self::LeaderDeaf,
    ];
    /// Those that take no network of their own.
    const EVERYWHERE: usize = 3;

    /// `false`: nobody leads at the moment.
    fn befall(self, cluster: &mut Cluster, dice: &mut Rng) -> bool {
        let Some(leader) = cluster.leader(dice.usize(..NODES)) else { return false };
        let other = (leader + dice.usize(1..NODES)) % NODES;
        let lasts = Duration::from_millis(dice.u64(500..4_000));
        println!("{self:?}: leader {leader}, other {other}, {lasts:?}");
        match self {
            Self::LeaderKilled => {
                cluster.crash(leader);
                std::thread::sleep(lasts);
                cluster.start(leader);
            }
            Self::LeaderStandsStill | Self::FollowerStandsStill => {
                let who = if matches!(self, Self::LeaderStandsStill) { leader } else { other };
                cluster.signal(who, Signal::STOP);
                std::thread::sleep(lasts);
                cluster.signal(who, Signal::CONT);
            }
            Self::LeaderCutOff => {
                cluster.set_link(leader, false);
                std::thread::sleep(lasts);
                cluster.set_link(leader, true);
            }
            Self::LeaderUnheard | Self::LeaderDeaf => {
                let ways = (0..NODES).filter(|node| *node != leader).map(|node| match self {
                    Self::LeaderUnheard => (leader, node),
                    _ => (node, leader),
                });
                ways.clone().for_each(|(from, to)| cluster.set_one_way(from, to, false));
                std::thread::sleep(lasts);
                ways.for_each(|(from, to)| cluster.set_one_way(from, to, true));
            }
        }
        true
    }
}

fn record(dice: &mut Rng) -> History {
    let mut cluster = Cluster::new("histories", NODES, NODES);
    // Each once, and the first two of those once more.
    let mut faults = if cluster.is_isolated() { Fault::ALL.to_vec() } else { Fault::ALL[..Fault::EVERYWHERE].to_vec() };
    dice.shuffle(&mut faults);
    faults.extend_from_within(..2);
    let sockets: Vec<PathBuf> = (0..NODES).map(|node| cluster.node(node).socket.clone()).collect();
    let (history, is_over) = (History::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let mut client =
                Client { socket: sockets[number % NODES].clone(), history: &history, dice: Rng::with_seed(dice.u64(..)) };
            let is_over = &is_over;
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    client.call();
                }
            });
        }
        let goes_on = |more: u64| {
            let before = history.done("read nodes");
            let began = Instant::now();
            // Short of the deadline of a test: it is told what was recorded.
            while history.done("read nodes") < before + more && began.elapsed() < Duration::from_secs(30) {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        goes_on(30);
        for fault in faults {
            while !fault.befall(&mut cluster, dice) {
                println!("nobody leads");
                goes_on(1);
            }
            goes_on(15);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    cluster.settles(NODES, NODES);
    // What every node says at last.
    for socket in sockets {
        let client = Client { socket, history: &history, dice: Rng::with_seed(0) };
        let before = history.done("read nodes");
        eventually("it says what has become of all", || {
            client.read_nodes();
            history.done("read nodes") > before
        });
        NAMES.iter().for_each(|name| client.read_name(name));
    }
    history
}

/// The test of the test: in what was recorded one answer after another is another one, until that is found out.
fn a_wrong_answer_is_found_out(register: &Register, calls: &[Call<String>]) -> bool {
    let values: Vec<&String> = calls
        .iter()
        .map(|call| match &call.what {
            What::Write(value) | What::Read(value) => value,
        })
        .collect();
    let reads = (0..calls.len()).filter(|index| matches!(calls[*index].what, What::Read(_)) && calls[*index].ended.is_some());
    reads.take(100).any(|index| {
        let Some(other) = values.iter().find(|value| *value != &values[index]) else { return false };
        let mut wrong = calls.to_vec();
        wrong[index].what = What::Read((*other).clone());
        check(&nothing(register), &wrong).is_err()
    })
}

#[test]
fn histories_of_nodes_that_fail_have_an_order() {
    let mut dice = Rng::with_seed(seed());
    let (mut done, rounds) = (0, count(1, 5));
    for _ in 0..rounds {
        let history = record(&mut dice);
        let counts = history.counts.into_inner().unwrap();
        for (kind, Counts { done, refused, unknown }) in &counts {
            println!("{kind}: {done} done, {refused} not done, {unknown} unknown");
            assert!(*done >= 5, "too few to say anything: {kind}");
        }
        assert!(counts["read nodes"].done >= 50 && counts.len() == 6, "too few to say anything: {counts:?}");
        done += counts.values().map(|counts| counts.done).sum::<u64>();
        let calls = history.calls.into_inner().unwrap();
        assert_eq!(calls.len(), NODES + NAMES.len());
        for (register, calls) in &calls {
            check(&nothing(register), calls).unwrap_or_else(|wrong| panic!("{register:?}: {wrong}"));
            assert!(a_wrong_answer_is_found_out(register, calls), "{register:?}: any answer would do");
        }
    }
    held("calls of clients of nodes that fail, in an order that explains what they were told", done);
}
