//! The cluster's state, rule by rule.

mod jobs;
mod places;
mod replace;
mod rules;
mod tasks;
mod users;

use std::collections::BTreeMap;
use std::time::Duration;

use control::command::{Answer, Command, Ended, Entry, Kept, Key, Refusal};
use control::state::{Holder, ImageFacts, ImageKey, JobId, JobSpec, NodeFacts, Outcome, Resources, State, Task};
use control::{Tick, apply};
use types::{CpuProfile, Digest, Epoch, Name, NodeId, Tenant};
use uuid::Uuid;

pub(crate) const MIB: u64 = 1 << 20;

/// A state, and the hands that change it.
#[derive(Default)]
pub(crate) struct Cluster {
    pub(crate) state: State,
    now: Tick,
}

pub(crate) fn node(number: u128) -> NodeId {
    NodeId::from_uuid(Uuid::from_u128(number))
}

pub(crate) fn job(number: u128) -> JobId {
    JobId(Uuid::from_u128(number))
}

pub(crate) fn key(number: u8) -> ImageKey {
    ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(&[number]) }
}

pub(crate) fn profile(model: u16) -> CpuProfile {
    CpuProfile { vendor: "GenuineIntel".into(), family: 6, model, cpuid: Digest::of(&[1]), tsc_khz: 2_000_000 }
}

pub(crate) fn image_facts() -> ImageFacts {
    ImageFacts { profile: profile(1), data_bytes: 100 * MIB, working_set_bytes: 10 * MIB, dirty_bytes: 10 * MIB }
}

pub(crate) fn machines(count: u64) -> Resources {
    Resources { memory_bytes: count * 10 * MIB, cpu_millis: count * 100, machines: count }
}

pub(crate) fn node_facts(number: u128, room: u64) -> NodeFacts {
    NodeFacts {
        name: Name::parse(&format!("node-{number}")).unwrap(),
        address: ([127, 0, 0, 1], 7117).into(),
        profile: profile(1),
        labels: BTreeMap::new(),
        capacity: Resources { memory_bytes: 100 * MIB + room * 10 * MIB, ..machines(room) },
    }
}

pub(crate) fn spec(count: u32) -> JobSpec {
    JobSpec::new(key(1), count, machines(1))
}

/// Tasks that ended, with outputs nowhere.
pub(crate) fn of(job: JobId, tasks: Vec<(u32, Epoch, Outcome)>) -> Ended {
    Ended { job, kept: Kept::Nowhere, tasks }
}

impl Cluster {
    /// Nodes 1 to `nodes` with room for so many machines each; image 1 on node 1, under a name.
    pub(crate) fn new(nodes: u128, room: u64) -> Self {
        let mut cluster = Self::default();
        for number in 1..=nodes {
            cluster.register(number, 1, room, &[]).unwrap();
        }
        cluster.add_image(1, 1).unwrap();
        let name = Name::parse("python").unwrap();
        cluster.run(Command::PutTemplate { tenant: Tenant::default_tenant(), name, digest: key(1).digest }).unwrap();
        cluster
    }

    pub(crate) fn entry(&mut self, key: Option<Key>, command: Command) -> Result<Answer, Refusal> {
        match apply(&mut self.state, &Entry { at: self.now, key, command }) {
            Answer::Refused(refusal) => Err(refusal),
            answer => Ok(answer),
        }
    }

    pub(crate) fn run(&mut self, command: Command) -> Result<Answer, Refusal> {
        self.entry(None, command)
    }

    /// The next entry will be so much later.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    pub(crate) fn wait(&mut self, time: Duration) {
        self.pass(time);
        self.run(Command::Note).unwrap();
    }

    pub(crate) fn now(&self) -> Tick {
        self.now
    }

    pub(crate) fn register(&mut self, number: u128, incarnation: u64, room: u64, images: &[u8]) -> Result<Answer, Refusal> {
        let images = images.iter().map(|image| (key(*image), image_facts())).collect();
        self.run(Command::Register { node: node(number), incarnation, facts: node_facts(number, room), images })
    }

    pub(crate) fn add_image(&mut self, image: u8, on: u128) -> Result<Answer, Refusal> {
        let incarnation = self.state.nodes[&node(on)].incarnation;
        self.run(Command::AddImage { key: key(image), facts: image_facts(), node: node(on), incarnation })
    }

    pub(crate) fn open(&mut self, on: u128, from: &[u128]) -> Result<Answer, Refusal> {
        let sources = from.iter().map(|from| node(*from)).collect();
        self.run(Command::Open { key: key(1), node: node(on), sources })
    }

    pub(crate) fn let_go(&mut self, on: u128) -> Result<Answer, Refusal> {
        self.run(Command::LetGo { key: key(1), node: node(on) })
    }

    pub(crate) fn holder(&self, on: u128) -> Option<&Holder> {
        self.state.images.get(&key(1))?.holders.get(&node(on))
    }

    /// The node has so much of image 1.
    pub(crate) fn has(&mut self, on: u128, percent: u8) {
        let epoch = self.holder(on).unwrap().epoch;
        self.report(on, vec![(key(1), epoch, percent)], vec![], vec![]).unwrap();
    }

    pub(crate) fn is_gone(&mut self, on: u128, epoch: Epoch) {
        self.report(on, vec![], vec![(key(1), epoch)], vec![]).unwrap();
    }

    pub(crate) fn report(
        &mut self,
        on: u128,
        progress: Vec<(ImageKey, Epoch, u8)>,
        gone: Vec<(ImageKey, Epoch)>,
        ended: Vec<Ended>,
    ) -> Result<Answer, Refusal> {
        let incarnation = self.state.nodes.get(&node(on)).map_or(1, |node| node.incarnation);
        self.run(Command::Report { node: node(on), incarnation, progress, gone, ended, local: None })
    }

    pub(crate) fn lose(&mut self, number: u128) {
        let incarnation = self.state.nodes[&node(number)].incarnation;
        self.run(Command::Suspect { node: node(number), incarnation }).unwrap();
        self.run(Command::GiveUp { node: node(number), incarnation }).unwrap();
    }

    pub(crate) fn submit(&mut self, spec: JobSpec) -> JobId {
        let id = job(self.state.jobs.len() as u128 + 1);
        self.run(Command::Submit { job: id, spec }).unwrap();
        id
    }

    pub(crate) fn place(&mut self, job: JobId, on: &[(u128, std::ops::Range<u32>)]) -> (u32, u32) {
        let on = on.iter().map(|(number, range)| (node(*number), range.clone())).collect();
        match self.run(Command::Place { job, opens: vec![], on }) {
            Ok(Answer::Placed { placed, left }) => (placed, left),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn task(&self, job: JobId, task: u32) -> Task {
        self.state.jobs[&job].tasks.get(task).unwrap()
    }

    pub(crate) fn ends(&mut self, on: u128, job: JobId, task: u32, outcome: Outcome) {
        let Task::Placed { epoch, .. } = self.task(job, task) else { panic!("{:?}", self.task(job, task)) };
        self.report(on, vec![], vec![], vec![of(job, vec![(task, epoch, outcome)])]).unwrap();
    }
}
