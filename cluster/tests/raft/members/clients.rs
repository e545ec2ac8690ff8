//! Who asks members, and what they were told.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chaos::linearizable::{Call, What, check};
use control::State;
use control::command::{Answer, Command, Key};
use control::state::{ImageFacts, ImageKey, JobId, JobSpec, Life, Node, Resources};
use farfork::raft::{Consensus, ConsensusError};
use types::{CpuProfile, Digest, Name, NodeId, Tenant};
use uuid::Uuid;

use super::world::Seat;

const WITHIN: Duration = Duration::from_secs(3);
/// How often a call is made again with its key.
const TRIES: usize = 3;

/// What is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// Disks say that they have synced, and have not.
    LostFsync,
    /// Reads are of what the member has.
    StaleRead,
    /// What is asked again is done again.
    KeyDropped,
}

/// A register: each kind of thing that clients change is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Register {
    /// Which image a name points at.
    Template(u8),
    /// Whether a node is cordoned.
    Cordon(NodeId),
    /// What a start of a node may start without asking.
    Lease(NodeId, u64),
    /// Whether a job is there.
    Job(Uuid),
}

/// All that was called.
#[derive(Default)]
pub(super) struct History {
    clock: AtomicU64,
    calls: Mutex<BTreeMap<Register, Vec<Call<u64>>>>,
    leaders: Mutex<BTreeSet<NodeId>>,
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    fn begin(&self, register: &Register, what: What<u64>) -> usize {
        let mut calls = self.calls.lock().unwrap();
        let calls = calls.entry(register.clone()).or_default();
        calls.push(Call { what, began: self.now(), ended: None });
        calls.len() - 1
    }

    fn end(&self, register: &Register, index: usize, what: What<u64>) {
        let ended = Some(self.now());
        let mut calls = self.calls.lock().unwrap();
        let call = &mut calls.get_mut(register).unwrap()[index];
        (call.what, call.ended) = (what, ended);
    }

    /// What was refused was not done.
    fn refused(&self, register: &Register, index: usize) {
        let mut calls = self.calls.lock().unwrap();
        // As a write that nobody ever sees.
        calls.get_mut(register).unwrap()[index].what = What::Write(u64::MAX);
    }

    pub(super) fn judge(&self) -> Result<(), String> {
        let calls = self.calls.lock().unwrap();
        calls.iter().try_for_each(|(register, calls)| check(&0, calls).map_err(|wrong| format!("{register:?}: {wrong}")))
    }

    /// Calls, those of them without an answer, and nodes that led.
    pub(super) fn sums(&self) -> (u64, u64, u64) {
        let calls = self.calls.lock().unwrap();
        let all = || calls.values().flatten();
        let unanswered = all().filter(|call| call.ended.is_none()).count();
        (all().count() as u64, unanswered as u64, self.leaders.lock().unwrap().len() as u64)
    }
}

/// A client of one member.
pub(super) struct Caller {
    consensus: Consensus,
    seat: Rc<Seat>,
    flaw: Option<Flaw>,
    history: Arc<History>,
    dice: Mutex<fastrand::Rng>,
}

fn image(number: u64) -> ImageKey {
    ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(&number.to_le_bytes()) }
}

pub(super) fn cpu() -> CpuProfile {
    CpuProfile { vendor: "test".to_owned(), family: 0, model: 0, cpuid: Digest::of(b"cpu"), tsc_khz: 1 }
}

fn facts() -> ImageFacts {
    ImageFacts { profile: cpu(), data_bytes: 1, working_set_bytes: 1, dirty_bytes: 1 }
}

fn template(number: u8) -> Name {
    Name::parse(&format!("template-{number}")).unwrap()
}

const EACH: Resources = Resources { memory_bytes: 1, cpu_millis: 1, machines: 1 };

impl Caller {
    pub(super) fn new(consensus: Consensus, seat: Rc<Seat>, flaw: Option<Flaw>, history: Arc<History>, seed: u64) -> Self {
        Self { consensus, seat, flaw, history, dice: Mutex::new(fastrand::Rng::with_seed(seed)) }
    }

    fn dice<T>(&self, throw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        throw(&mut self.dice.lock().unwrap())
    }

    /// One call, of a kind that the dice choose.
    pub(super) async fn call(&self) {
        tokio::time::sleep(Duration::from_millis(self.dice(|dice| dice.u64(50..600)))).await;
        if let Some(leader) = self.consensus.leader() {
            self.history.leaders.lock().unwrap().insert(leader);
        }
        let (node, incarnation) = (self.seat.node(), self.seat.incarnation());
        let unique = || self.dice(|dice| dice.u64(1..1 << 39));
        let (register, value, command) = match self.dice(|dice| dice.u8(0..12)) {
            0..=2 => {
                let (number, value) = (self.dice(|dice| dice.u8(0..2)), unique());
                let command = Command::PutTemplate {
                    tenant: Tenant::default_tenant(),
                    name: template(number),
                    digest: image(value).digest,
                };
                // Its image first.
                let add = Command::AddImage { key: image(value), facts: facts(), node, incarnation };
                if !matches!(self.consensus.propose(None, add, WITHIN).await, Ok(Answer::Done)) {
                    return;
                }
                (Register::Template(number), value, command)
            }
            3 => {
                let is_cordoned = self.dice(fastrand::Rng::bool);
                (Register::Cordon(node), u64::from(is_cordoned), Command::Cordon { node, is_cordoned })
            }
            4 => {
                let value = unique();
                let resources = Resources { machines: value, ..EACH };
                let command = Command::GrantCapacity { node, incarnation, resources, lasts_ms: 3_000_000 };
                (Register::Lease(node, incarnation), value, command)
            }
            5..=6 => {
                let (number, id) = (unique(), Uuid::from_u128(self.dice(|dice| dice.u128(..))));
                let add = Command::AddImage { key: image(number), facts: facts(), node, incarnation };
                if !matches!(self.consensus.propose(None, add, WITHIN).await, Ok(Answer::Done)) {
                    return;
                }
                let spec = JobSpec::new(image(number), 3, EACH);
                (Register::Job(id), 1, Command::Submit { job: JobId(id), spec })
            }
            _ => return self.look().await,
        };
        let index = self.history.begin(&register, What::Write(value));
        let key = (self.flaw != Some(Flaw::KeyDropped)).then(|| Key(Uuid::from_u128(self.dice(|dice| dice.u128(..)))));
        for _ in 0..TRIES {
            match self.consensus.propose(key, command.clone(), WITHIN).await {
                Ok(Answer::Refused(_)) => return self.history.refused(&register, index),
                Ok(_) => return self.history.end(&register, index, What::Write(value)),
                Err(ConsensusError::NoQuorum { .. } | ConsensusError::Unknown { .. }) => {}
                Err(_) => return,
            }
        }
    }

    /// Reads one register, or all jobs.
    async fn look(&self) {
        let number = self.dice(|dice| dice.u8(0..2));
        let registers: Vec<Register> = match self.dice(|dice| dice.u8(0..4)) {
            0..=1 => vec![Register::Template(number)],
            2 => vec![Register::Cordon(self.seat.node()), Register::Lease(self.seat.node(), self.seat.incarnation())],
            _ => self.jobs(),
        };
        self.look_at(registers).await;
    }

    async fn look_at(&self, registers: Vec<Register>) -> bool {
        let begin = |register| (self.history.begin(&register, What::Read(0)), register);
        let began: Vec<_> = registers.into_iter().map(begin).collect();
        let state = match self.flaw {
            Some(Flaw::StaleRead) => self.consensus.stale(),
            _ => match self.consensus.read(WITHIN).await {
                Ok(state) => state,
                Err(_) => return false,
            },
        };
        for (index, register) in began {
            if let Some(value) = self.value(&state, &register) {
                self.history.end(&register, index, What::Read(value));
            }
        }
        true
    }

    fn jobs(&self) -> Vec<Register> {
        let calls = self.history.calls.lock().unwrap();
        calls.keys().filter(|register| matches!(register, Register::Job(_))).cloned().collect()
    }

    /// In the quiet: everything, once more. Says whether it could be read.
    pub(super) async fn see_all(&self) -> bool {
        let registers = self.history.calls.lock().unwrap().keys().cloned().collect();
        self.look_at(registers).await
    }

    /// `None`: what the register was about is over.
    fn value(&self, state: &State, register: &Register) -> Option<u64> {
        Some(match register {
            Register::Template(number) => {
                let digest = state.templates.get(&(Tenant::default_tenant(), template(*number)));
                digest.map_or(0, |digest| self.number_of(register, *digest))
            }
            Register::Cordon(node) => u64::from(state.nodes.get(node).is_some_and(|node| node.is_cordoned)),
            Register::Lease(node, incarnation) => {
                let is_that = |node: &&Node| node.incarnation == *incarnation && node.life != Life::Lost;
                let lease = state.nodes.get(node).filter(is_that)?.lease;
                lease.map_or(0, |lease| lease.resources.machines)
            }
            Register::Job(id) => u64::from(state.jobs.contains_key(&JobId(*id))),
        })
    }

    /// Which value a digest stands for.
    fn number_of(&self, register: &Register, digest: Digest) -> u64 {
        let calls = self.history.calls.lock().unwrap();
        let values = calls[register].iter().filter_map(|call| match call.what {
            What::Write(value) => Some(value),
            What::Read(_) => None,
        });
        values.into_iter().find(|value| image(*value).digest == digest).expect("somebody wrote it")
    }
}
