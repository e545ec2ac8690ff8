//! `bench scale`: one job on 10 to 10,000 nodes, for docs/scaling.md. Every decision and every log entry is the product's own
//! (`crates/control`), and what they take is measured; links, tasks and the agreement between voters are a model, which says so.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use control::Tick;
use control::command::{Command, Kept};
use control::leader::{Heard, tend};
use control::reconcile::{Action, Observed, Run, Seen, reconcile};
use control::state::{JobId, JobSpec, Outcome, Spread, State};
use types::NodeId;
use uuid::Uuid;

use crate::cluster::{IMAGE_BYTES, LINK_BYTES_A_SECOND, Written, cluster, each, key, node};
use crate::floor;
use crate::report::{Report, Row, Samples, announce};

/// Tasks for each node, all of which have a place at once.
const TASKS: u32 = 10;
/// Each takes that long once its child has what it touches.
const TASK: Duration = Duration::from_secs(1);
/// Row R1: from the order until a child elsewhere runs.
const OPEN: Duration = Duration::from_millis(6);
/// How often a leader and its nodes look.
const LOOK: Duration = Duration::from_millis(250);
/// Nodes say that they are alive twice a second.
const ALIVE_A_SECOND: u32 = 2;
/// Row R9: after which a reader turns to another source.
const SWITCHES: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(600);
/// One in so many bytes of the image is touched by a child.
const SHARE_TOUCHED: f64 = 40.0;
const MIB: f64 = 1048576.0;
#[expect(clippy::cast_precision_loss, reason = "a power of two")]
const IMAGE: f64 = IMAGE_BYTES as f64;

pub(crate) fn run(json: Option<&Path>, quick: bool) -> Result<()> {
    let mut report = Report::new(&floor::open_host()?, quick);
    let sizes: &[u32] = if quick { &[10, 100, 1000] } else { &[10, 30, 100, 300, 1000, 3000, 10_000] };
    for nodes in sizes {
        announce(&format!("a job on {nodes} nodes"));
        let whole = Simulated::of(*nodes).run(false)?;
        let broken = Simulated::of(*nodes).run(true)?;
        self::report(&mut report, *nodes, whole, broken)?;
    }
    report.note(format!(
        "The image has {IMAGE_BYTES} bytes, of which a child touches one in {SHARE_TOUCHED}; one node has it at first. Links carry 10 Gbit/s \
         each way, which a holder's readers share; what a reader has it passes on at once. {TASKS} tasks a node, {TASK:?} each from when what \
         they touch is there. A holder that dies is the one besides the first that most read from, when it has a tenth; its readers turn to \
         their next source after {SWITCHES:?}. Time passes in steps of {LOOK:?}. Choosing and applying are measured, on one core of this \
         machine; agreement takes no time."
    ));
    report.finish(json)
}

/// A node of the simulation.
struct Agent {
    id: NodeId,
    observed: Observed,
    /// Of the image, that are here.
    bytes: f64,
    /// It reads from then on.
    reads_from: Tick,
    /// Tasks whose children wait for what they touch.
    waiting: Vec<u32>,
    ends: BTreeMap<u32, Tick>,
    died: Option<Tick>,
}

struct Simulated {
    state: State,
    agents: Vec<Agent>,
    indices: BTreeMap<NodeId, usize>,
    written: Written,
    heard: Heard,
    now: Tick,
    /// Looks of the leader that chose something, and entries that were applied.
    chosen: Vec<Duration>,
    applied: Vec<Duration>,
    /// Of the image, by the first holder.
    given_bytes: f64,
}

/// What became of it.
struct Became {
    makespan: Duration,
    settled: Duration,
    /// The most, while it was read.
    hops: u32,
    simulated: Simulated,
}

impl Simulated {
    fn of(nodes: u32) -> Self {
        let now = Tick(1000);
        let agent = |index| {
            let seen = Seen { percent: 100, sources: Vec::new() };
            let images = (index == 0).then(|| (key(), seen)).into_iter().collect();
            let observed = Observed { incarnation: 1, images, ..Observed::default() };
            let bytes = if index == 0 { IMAGE } else { 0.0 };
            Agent { id: node(index), observed, bytes, reads_from: now, waiting: Vec::new(), ends: BTreeMap::new(), died: None }
        };
        let agents: Vec<Agent> = (0..nodes).map(agent).collect();
        Self {
            state: cluster(nodes, u64::from(TASKS), 1),
            indices: agents.iter().enumerate().map(|(index, agent)| (agent.id, index)).collect(),
            agents,
            written: Written::default(),
            heard: Heard::since(now),
            now,
            chosen: Vec::new(),
            applied: Vec::new(),
            given_bytes: 0.0,
        }
    }

    fn propose(&mut self, command: Command) -> Result<()> {
        let began = Instant::now();
        self.written.apply(&mut self.state, self.now, command)?;
        self.applied.push(began.elapsed());
        Ok(())
    }

    /// Until every task has ended and every node that lives has all of the image. `dies`: one of those that others read from does,
    /// early on.
    fn run(mut self, dies: bool) -> Result<Became> {
        let (job, began) = (JobId(Uuid::from_u128(1)), self.now);
        let count = u32::try_from(self.agents.len())? * TASKS;
        self.propose(Command::Submit {
            job,
            spec: JobSpec { spread: Spread::Spread, replicas: 16, ..JobSpec::new(key(), count, each()) },
        })?;
        let (mut makespan, mut settled, mut hops) = (None, None, 0);
        while makespan.is_none() || settled.is_none() {
            ensure!(self.now - began < PATIENCE, "the job does not end: {:?}", self.state.jobs[&job].tasks.counts());
            self.lead()?;
            if hops == 0 {
                hops = (0..self.agents.len()).map(|index| self.hops(index)).max().unwrap_or(0);
            }
            self.stream();
            for index in 0..self.agents.len() {
                self.act(index)?;
            }
            if dies
                && self.agents.iter().all(|agent| agent.died.is_none())
                && let Some(victim) = self.busiest_inner().filter(|victim| self.agents[*victim].bytes >= IMAGE / 10.0)
            {
                self.agents[victim].died = Some(self.now);
            }
            if makespan.is_none() && self.state.jobs[&job].ended.is_some() {
                makespan = Some(self.now - began);
            }
            let holders = &self.state.images[&key()].holders;
            let reads = |agent: &Agent| agent.died.is_none() && holders.contains_key(&agent.id);
            if settled.is_none()
                && holders.len() > 1
                && self.agents.iter().filter(|agent| reads(agent)).all(|agent| agent.bytes >= IMAGE)
            {
                settled = Some(self.now - began);
            }
            self.now = self.now + LOOK;
        }
        let (Some(makespan), Some(settled)) = (makespan, settled) else { bail!("it has ended") };
        Ok(Became { makespan, settled, hops, simulated: self })
    }

    /// What the leader does at one look.
    fn lead(&mut self) -> Result<()> {
        for agent in self.agents.iter().filter(|agent| agent.died.is_none()) {
            self.heard.hear(agent.id, self.now);
        }
        let began = Instant::now();
        let commands = tend(&self.state, &self.heard, self.now);
        if !commands.is_empty() {
            self.chosen.push(began.elapsed());
        }
        commands.into_iter().try_for_each(|command| self.propose(command))
    }

    /// Whom a node reads from now: the first of its sources that lives. That the one before is dead takes a page's deadline to show.
    fn source_of(&self, index: usize) -> Option<usize> {
        let agent = &self.agents[index];
        let seen = agent.observed.images.get(&key())?;
        if agent.died.is_some() || agent.bytes >= IMAGE || agent.reads_from > self.now {
            return None;
        }
        for source in seen.sources.iter().filter_map(|source| self.indices.get(source)) {
            match self.agents[*source].died {
                None => return Some(*source),
                Some(died) if self.now - died < SWITCHES => return None,
                Some(_) => {}
            }
        }
        None
    }

    /// Images arrive: a link is shared by who reads over it, and nobody can be given more than its source has.
    fn stream(&mut self) {
        let sources: Vec<Option<usize>> = (0..self.agents.len()).map(|index| self.source_of(index)).collect();
        let mut readers: BTreeMap<usize, u32> = BTreeMap::new();
        sources.iter().flatten().for_each(|source| *readers.entry(*source).or_default() += 1);
        let depth = |mut at: usize| {
            let mut depth = 0;
            while let Some(source) = sources[at].filter(|_| depth < self.agents.len()) {
                (at, depth) = (source, depth + 1);
            }
            depth
        };
        // Sources before those that read from them: what comes is passed on at once.
        let mut order: Vec<(usize, usize)> = (0..self.agents.len()).map(|index| (depth(index), index)).collect();
        order.sort_unstable();
        for (_, index) in order {
            let Some(source) = sources[index] else { continue };
            let most = LINK_BYTES_A_SECOND / f64::from(readers[&source]) * LOOK.as_secs_f64();
            let before = self.agents[index].bytes;
            let after = (before + most).min(self.agents[source].bytes).max(before);
            self.agents[index].bytes = after;
            if source == 0 {
                self.given_bytes += after - before;
            }
        }
    }

    /// What a node does at one look.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    fn act(&mut self, index: usize) -> Result<()> {
        let (now, job) = (self.now, JobId(Uuid::from_u128(1)));
        let agent = &mut self.agents[index];
        if agent.died.is_some() {
            return Ok(());
        }
        if let Some(seen) = agent.observed.images.get_mut(&key()) {
            seen.percent = (agent.bytes / IMAGE * 100.0) as u8;
        }
        if agent.bytes >= IMAGE / SHARE_TOUCHED {
            agent.ends.extend(agent.waiting.drain(..).map(|task| (task, now + TASK)));
        }
        for (task, _) in agent.ends.iter().filter(|(_, end)| **end <= now) {
            agent.observed.tasks.get_mut(&(job, *task)).expect("it runs").ended =
                Some((Outcome::Exited(0), Kept::HereAnd(agent.id)));
        }
        for action in reconcile(&self.state, agent.id, &agent.observed) {
            let hops = self.hops(index);
            let agent = &mut self.agents[index];
            match action {
                // Whom it reads from has to have opened it before.
                Action::Open { key, sources, .. } => {
                    if agent.observed.images.insert(key, Seen { percent: 0, sources }).is_none() {
                        agent.reads_from = now + OPEN * hops;
                    }
                }
                Action::Start { job, task, epoch } => {
                    agent.observed.tasks.insert((job, task), Run { epoch, ended: None });
                    agent.waiting.push(task);
                }
                Action::Forget { job, task } | Action::End { job, task } => {
                    agent.observed.tasks.remove(&(job, task));
                    agent.ends.remove(&task);
                }
                Action::Report(report) => self.propose(*report)?,
                other => bail!("nothing else is to be done: {other:?}"),
            }
        }
        Ok(())
    }

    /// How many nodes it is from one that has all of it.
    fn hops(&self, index: usize) -> u32 {
        let holders = &self.state.images[&key()].holders;
        let first = |id: &NodeId| holders.get(id).and_then(|holder| holder.sources.first());
        u32::try_from(std::iter::successors(first(&self.agents[index].id), |id| first(id)).count()).expect("not so many")
    }

    /// The node, besides the one that had it first, from which most read.
    fn busiest_inner(&self) -> Option<usize> {
        let mut readers: BTreeMap<NodeId, usize> = BTreeMap::new();
        for source in self.state.images[&key()].holders.values().filter_map(|holder| holder.sources.first()) {
            *readers.entry(*source).or_default() += 1;
        }
        readers.remove(&self.agents[0].id);
        let (busiest, _) = readers.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(*id)))?;
        self.indices.get(&busiest).copied()
    }
}

/// What one size came to.
fn report(report: &mut Report, nodes: u32, whole: Became, broken: Became) -> Result<()> {
    let mut add = |what: &str, samples: Samples, unit: &str| {
        report.keep(&format!("scale {what}, nodes: {nodes}"), &samples);
        report.add(Row::new("scale", format!("{nodes} nodes: {what}"), &samples, None).in_unit(unit));
    };
    let one = |value: f64| Samples::from_us(vec![value]);
    let Simulated { state, written, chosen, applied, given_bytes, .. } = whole.simulated;
    let longest = |times: &[Duration]| Samples::of(times).percentile(100);
    add("choosing, the longest look", one(longest(&chosen)), "us");
    add("applying, the longest entry", one(longest(&applied)), "us");
    add("applying, all entries", one(applied.iter().sum::<Duration>().as_secs_f64() * 1e6), "us");
    add("until the last task has ended (model)", one(whole.makespan.as_secs_f64()), "s");
    add("until all have all of the image (model)", one(whole.settled.as_secs_f64()), "s");
    add("the first holder gives (model)", one(given_bytes / MIB), "MiB");
    add("nodes from the first holder to the last reader", one(f64::from(whole.hops)), "");
    add("entries of the log", one(f64::from(written.entries)), "");
    add("bytes of them", one(f64::from(written.bytes) / 1024.0), "KiB");
    let seconds = whole.makespan.max(whole.settled).as_secs_f64();
    let a_second = f64::from(written.bytes) * f64::from(nodes - 1) / seconds / MIB;
    add("the leader sends of them to all others, a second", one(a_second), "MiB");
    add("nodes say that they are alive, a second", one(f64::from(nodes * ALIVE_A_SECOND)), "");
    let state_bytes = u32::try_from(postcard::to_stdvec(&state)?.len())?;
    add("the state, as a node that was away is sent it", one(f64::from(state_bytes) / 1024.0), "KiB");
    add("a holder dies: until the last task has ended (model)", one(broken.makespan.as_secs_f64()), "s");
    add("a holder dies: until all have all of the image (model)", one(broken.settled.as_secs_f64()), "s");
    Ok(())
}
