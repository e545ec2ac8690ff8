//! A node: what it has and runs, by an engine that only pretends. It does what `reconcile` says of the state that it has applied,
//! and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use control::command::{Command, Kept};
use control::reconcile::{Action, Observed, Run, Seen, reconcile};
use control::state::{ImageFacts, ImageKey, JobId, NodeFacts, Outcome, Resources};
use control::{State, Tick};
use types::{Epoch, NodeId, Reason};

use super::consensus::Consensus;
use super::{World, node_id};

/// See the module.
pub(super) struct Agent {
    pub(super) id: NodeId,
    facts: NodeFacts,
    pub(super) observed: Observed,
    /// Of each image that it has, or has had.
    images: BTreeMap<ImageKey, ImageFacts>,
    /// Images that were made here, which the cluster may not know of yet.
    made: BTreeSet<ImageKey>,
    /// When each task ends, and how.
    ends: BTreeMap<(JobId, u32), (Tick, Outcome)>,
    /// It does nothing until then: it is off, or stopped.
    still_until: Tick,
    next_look: Tick,
    next_piece: Tick,
}

impl Agent {
    pub(super) fn new(index: usize, facts: NodeFacts) -> Self {
        Self {
            id: node_id(index),
            facts,
            observed: Observed { incarnation: 1, ..Observed::default() },
            images: BTreeMap::new(),
            made: BTreeSet::new(),
            ends: BTreeMap::new(),
            still_until: Tick(0),
            next_look: Tick(0),
            next_piece: Tick(0),
        }
    }

    pub(super) fn runs(&self, now: Tick) -> bool {
        now >= self.still_until
    }

    pub(super) fn is_idle(&self) -> bool {
        self.observed.tasks.is_empty()
    }

    /// It stands still, and goes on as if nothing had been.
    pub(super) fn stop_until(&mut self, until: Tick) {
        self.still_until = until;
    }

    /// It is killed, and starts again: what it had saved is there, everything else is not.
    pub(super) fn crash_until(&mut self, until: Tick) {
        self.still_until = until;
        self.start_anew(self.observed.incarnation + 1);
    }

    pub(super) fn go_on(&mut self) {
        self.still_until = Tick(0);
    }

    /// Somebody builds an image here. It stays, whatever an older order says of it.
    pub(super) fn make(&mut self, key: ImageKey, facts: ImageFacts) {
        self.observed.images.remove(&key);
        self.images.insert(key.clone(), facts);
        self.made.insert(key);
    }

    /// How much of an image is here.
    fn percent_of(&self, key: &ImageKey) -> u8 {
        if self.made.contains(key) { 100 } else { self.observed.images.get(key).map_or(0, |seen| seen.percent) }
    }

    /// Where this node and the state do not say the same, in words.
    pub(super) fn differs_from(&self, state: &State) -> Option<String> {
        let said =
            |key: &ImageKey| state.images.get(key).and_then(|image| image.holders.get(&self.id)).map(|holder| holder.percent);
        let keys = state.images.keys().chain(self.observed.images.keys());
        let wrong = keys.into_iter().find(|key| said(key).unwrap_or(0) != self.percent_of(key) && !self.made.contains(*key));
        wrong.map(|key| format!("image {key} on node {}: {:?} is said, {} is so", self.id, said(key), self.percent_of(key)))
    }

    /// What was made here is the cluster's from when the cluster knows of it: what the state says of an earlier start, or of the same
    /// image as one that is being read, may be over before the cluster does.
    fn hand_over(&mut self, state: &State) {
        if state.nodes.get(&self.id).is_none_or(|node| node.incarnation != self.observed.incarnation) {
            return;
        }
        let holder = |key: &ImageKey| state.images.get(key).and_then(|image| image.holders.get(&self.id));
        let known: Vec<(ImageKey, bool)> = {
            let kept = self.made.iter().filter_map(|key| Some((key, holder(key).filter(|holder| holder.is_kept())?)));
            kept.map(|(key, holder)| (key.clone(), holder.is_settled())).collect()
        };
        for (key, is_settled) in known {
            if is_settled {
                self.made.remove(&key);
            }
            self.observed.images.insert(key, Seen { percent: 100, sources: Vec::new() });
        }
    }

    fn start_anew(&mut self, incarnation: u64) {
        self.observed.images.retain(|_, seen| seen.percent == 100);
        self.observed = Observed { incarnation, images: std::mem::take(&mut self.observed.images), ..Observed::default() };
        self.ends.clear();
    }
}

/// How the program of a task ends, by order: so that it shows whose result counted.
pub(super) fn status(job: JobId, task: u32, epoch: Epoch) -> i32 {
    let seed = job.0.as_u64_pair().1 ^ u64::from(task).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ epoch.0.rotate_left(40);
    i32::from(fastrand::Rng::with_seed(seed).u16(..))
}

pub(super) fn step(world: &mut World, node: usize, consensus: &mut Consensus) -> Result<(), String> {
    if !world.runs(node) {
        return Ok(());
    }
    consensus.hear(world, node);
    let now = world.now;
    if world.agents[node].next_piece <= now {
        world.agents[node].next_piece = Tick(now.0 + 200);
        read_on(world, node);
    }
    let agent = &mut world.agents[node];
    for (task, (_, outcome)) in agent.ends.iter().filter(|(_, (end, _))| *end <= now) {
        if let Some(run) = agent.observed.tasks.get_mut(task) {
            run.ended = Some((*outcome, Kept::Here));
        }
    }
    if agent.next_look <= now {
        agent.next_look = Tick(now.0 + world.dice.u64(150..500));
        if world.dice.u8(..) < 4 {
            // Somebody has machines there that are no tasks.
            let machines = world.dice.u64(0..4);
            agent.observed.local = Resources { memory_bytes: machines << 20, cpu_millis: machines * 100, machines };
        }
        look(world, node, consensus)?;
    }
    Ok(())
}

/// Images arrive, as long as somebody gives them.
fn read_on(world: &mut World, node: usize) {
    let reading: Vec<(ImageKey, Seen)> = {
        let images = world.agents[node].observed.images.iter();
        images.filter(|(_, seen)| seen.percent < 100).map(|(key, seen)| (key.clone(), seen.clone())).collect()
    };
    for (key, seen) in reading {
        let mut most = 0;
        for source in seen.sources.iter().filter_map(|source| world.index_of(*source)) {
            if !world.runs(source) || !world.reach_each_other(node, source) {
                continue;
            }
            most = most.max(world.agents[source].percent_of(&key));
        }
        let piece = world.dice.u8(5..40);
        if let Some(seen) = world.agents[node].observed.images.get_mut(&key) {
            seen.percent = seen.percent.saturating_add(piece).min(most).max(seen.percent);
        }
    }
}

fn look(world: &mut World, node: usize, consensus: &mut Consensus) -> Result<(), String> {
    let (state, now) = (consensus.seen_by(node), world.now);
    let id = world.agents[node].id;
    world.agents[node].hand_over(&state);
    let orders = &state.images;
    let is_in_force = |(key, epoch): &(ImageKey, Epoch)| {
        orders.get(key).and_then(|image| image.holders.get(&id)).is_some_and(|holder| holder.epoch == *epoch)
    };
    world.agents[node].observed.failed.retain(is_in_force);
    for action in reconcile(&state, id, &world.agents[node].observed) {
        match action {
            Action::Register { above } => {
                let agent = &mut world.agents[node];
                if agent.observed.incarnation <= above {
                    agent.start_anew(above + 1);
                }
                let whole = agent.observed.images.iter().filter(|(_, seen)| seen.percent == 100).map(|(key, _)| key);
                let images = whole.map(|key| (key.clone(), agent.images[key].clone())).collect();
                let (incarnation, facts) = (agent.observed.incarnation, agent.facts.clone());
                consensus.propose(world, node, None, Command::Register { node: id, incarnation, facts, images }, 0);
            }
            Action::Leave => {
                let agent = &mut world.agents[node];
                agent.start_anew(agent.observed.incarnation);
                agent.observed.images.clear();
            }
            Action::Open { key, epoch, sources } => {
                let fails = world.dice.u8(..) < 6;
                let agent = &mut world.agents[node];
                match agent.observed.images.get_mut(&key) {
                    Some(seen) => seen.sources = sources,
                    None if fails => drop(agent.observed.failed.insert((key, epoch))),
                    None => {
                        agent.images.insert(key.clone(), state.images[&key].facts.clone());
                        agent.observed.images.insert(key, Seen { percent: 0, sources });
                    }
                }
            }
            Action::Drop { key } => {
                let latest = consensus.state();
                let is_this_start =
                    latest.nodes.get(&id).is_some_and(|of| of.incarnation == world.agents[node].observed.incarnation);
                let readers = latest.images.get(&key).map_or(0, |image| image.readers_of(id).count());
                let stays = world.agents[node].made.contains(&key);
                if is_this_start && readers > 0 && !stays {
                    return Err(format!("node {id} lets go of image {key}, and {readers} read it from there"));
                }
                world.agents[node].observed.images.remove(&key);
            }
            Action::Start { job, task, epoch } => {
                let image = &state.jobs[&job].spec.image;
                if !world.agents[node].observed.images.contains_key(image) {
                    return Err(format!("node {id} is to start task {job}/{task} without image {image}"));
                }
                let crashes = world.dice.u8(..) < 12;
                let end = Tick(now.0 + world.dice.u64(100..4000));
                let outcome =
                    if crashes { Outcome::Failed(Reason::WorkerCrashed) } else { Outcome::Exited(status(job, task, epoch)) };
                let agent = &mut world.agents[node];
                agent.observed.tasks.insert((job, task), Run { epoch, ended: None });
                agent.ends.insert((job, task), (end, outcome));
            }
            Action::End { job, task } | Action::Forget { job, task } => {
                let agent = &mut world.agents[node];
                agent.observed.tasks.remove(&(job, task));
                agent.ends.remove(&(job, task));
            }
            Action::Report(report) => consensus.propose(world, node, None, *report, 0),
        }
    }
    Ok(())
}
