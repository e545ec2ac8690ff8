//! Those who ask for something: each request has a key, and is sent again, by whatever node, until it is answered.

use std::collections::BTreeMap;

use control::command::{Answer, Command, Key, Refusal};
use control::state::{ImageKey, JobId, JobSpec, Resources, Spread};
use control::{State, Tick};
use types::{Name, Tenant};
use uuid::Uuid;

use super::consensus::Consensus;
use super::{MIB, World, image, node_id};

/// How long an answer is waited for before the request is sent again.
const PATIENCE_MS: u64 = 3000;
/// How many of them there are in a run.
const REQUESTS: u64 = 60;
const IMAGES: u8 = 3;

/// See the module.
#[derive(Default)]
pub(super) struct Clients {
    drawn: u64,
    waiting: BTreeMap<u64, Request>,
    answered: Vec<(Command, Answer)>,
    /// Nodes that were cordoned or drained, and are to be used again in the end.
    next: Option<Tick>,
}

struct Request {
    key: Key,
    command: Command,
    send_at: Tick,
}

impl Clients {
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn answered(&self) -> u64 {
        self.answered.len() as u64
    }

    /// Nobody waits any more for nodes to be kept free.
    pub(super) fn forget_cordons(&mut self) {
        self.waiting.retain(|_, request| !matches!(request.command, Command::Cordon { .. } | Command::Drain { .. }));
    }

    /// Asks for something, from then on.
    pub(super) fn ask(&mut self, at: Tick, command: Command) {
        self.drawn += 1;
        let key = Key(Uuid::from_u128(u128::from(self.drawn) << 64 | 1));
        self.waiting.insert(self.drawn, Request { key, command, send_at: at });
    }

    pub(super) fn step(&mut self, world: &mut World, consensus: &mut Consensus, asks: bool) -> Result<(), String> {
        let now = world.now;
        for (ticket, answer) in consensus.collect(world) {
            if let Some(Request { command, .. }) = self.waiting.remove(&ticket) {
                if let Answer::Refused(refusal @ (Refusal::JobExists(_) | Refusal::KeyReused(_))) = &answer {
                    return Err(format!("the request `{command}` was made once, and was answered: {refusal}"));
                }
                self.answered.push((command, answer));
            }
        }
        let due: Vec<u64> =
            self.waiting.iter().filter(|(_, request)| request.send_at <= now).map(|(ticket, _)| *ticket).collect();
        for ticket in due {
            let from = world.dice.usize(..world.agents.len());
            let request = self.waiting.get_mut(&ticket).expect("just seen");
            request.send_at = Tick(now.0 + PATIENCE_MS);
            if world.runs(from) {
                let (key, command) = (request.key, request.command.clone());
                consensus.propose(world, from, Some(key), command, ticket);
            }
        }
        if asks && self.drawn < REQUESTS && self.next.is_none_or(|next| next <= now) {
            self.next = Some(Tick(now.0 + world.dice.u64(100..1800)));
            self.ask_something(world, consensus.state());
        }
        self.read(world, consensus)
    }

    /// What was committed when it is asked for is seen by who asks.
    fn read(&mut self, world: &mut World, consensus: &Consensus) -> Result<(), String> {
        if world.dice.u8(..) > 20 {
            return Ok(());
        }
        let from = world.dice.usize(..world.agents.len());
        match consensus.read(world, from).filter(|_| world.runs(from)) {
            Some(seen) if seen < consensus.len() => {
                Err(format!("a read saw {seen} entries when {} were committed", consensus.len()))
            }
            _ => Ok(()),
        }
    }

    fn ask_something(&mut self, world: &mut World, state: &State) {
        let dice = &mut world.dice;
        let number = dice.u8(0..IMAGES);
        let (key, facts) = image(number);
        let node = dice.usize(..world.agents.len());
        let (id, incarnation) = (node_id(node), world.agents[node].observed.incarnation);
        let some_job = || state.jobs.keys().next_back().copied().unwrap_or(JobId(Uuid::nil()));
        let name = Name::parse(&format!("t{}", self.drawn / 6)).expect("a name");
        let tenant = Tenant::default_tenant();
        let command = match dice.u8(0..20) {
            0..=3 => {
                if world.runs(node) {
                    world.agents[node].make(key.clone(), facts.clone());
                }
                Command::AddImage { key, facts, node: id, incarnation }
            }
            4..=5 => Command::PutTemplate { tenant, name, digest: key.digest },
            6 => Command::RemoveTemplate { tenant, name },
            7 => Command::Cancel { job: some_job() },
            8 => Command::Forget { job: state.jobs.keys().next().copied().unwrap_or(JobId(Uuid::nil())) },
            9 => Command::GrantCapacity { node: id, incarnation, resources: resources(2), lasts_ms: dice.u64(500..20_000) },
            10 => Command::ReturnCapacity { node: id, epoch: state.epoch },
            11 => Command::Cordon { node: id, is_cordoned: dice.bool() },
            12 => Command::Drain { node: id, is_draining: dice.bool() },
            _ => Command::Submit { job: JobId(Uuid::from_u128(u128::from(self.drawn) + 1)), spec: spec(key, dice) },
        };
        self.ask(world.now, command);
    }

    /// What was answered is so.
    pub(super) fn check(&self, consensus: &Consensus) -> Result<(), String> {
        let state = consensus.state();
        let forgotten: Vec<JobId> = self
            .answered
            .iter()
            .filter_map(|(command, answer)| match (command, answer) {
                (Command::Forget { job }, Answer::Done) => Some(*job),
                _ => None,
            })
            .collect();
        for (command, answer) in &self.answered {
            if let (Command::Submit { job, .. }, Answer::Done) = (command, answer)
                && !state.jobs.contains_key(job)
                && !forgotten.contains(job)
            {
                return Err(format!("job {job} was acknowledged, and is not known"));
            }
        }
        Ok(())
    }
}

fn resources(machines: u64) -> Resources {
    Resources { memory_bytes: machines * 10 * MIB, cpu_millis: machines * 100, machines }
}

fn spec(image: ImageKey, dice: &mut fastrand::Rng) -> JobSpec {
    JobSpec {
        spread: if dice.bool() { Spread::Spread } else { Spread::Pack },
        replicas: dice.u8(1..4),
        lasts_ms: (dice.u8(..) < 100).then(|| dice.u64(500..60_000)),
        max_parallel: (dice.u8(..) < 60).then(|| dice.u32(1..10)),
        ..JobSpec::new(image, dice.u32(1..25), resources(1))
    }
}
