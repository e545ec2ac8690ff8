//! What a leader sees to. It proposes; what is then true is what the log says. A new leader knows nothing but the state, and gives
//! everybody time to be heard.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use types::NodeId;

use crate::clock::Tick;
use crate::command::Command;
use crate::place::{BACK_AFTER, Verdict, home, is_cut_off, place_all, plan, rescue, wanted};
use crate::state::{Image, ImageKey, Job, Life, Resources, State, Task};

/// A node that was not heard for so long is suspected,
pub const SUSPECT_AFTER: Duration = Duration::from_secs(5);
/// and given up after so long.
pub const LOST_AFTER: Duration = Duration::from_secs(15);
/// How often time is noted while something waits for it.
pub const NOTE_EVERY: Duration = Duration::from_secs(5);
/// How long an image is kept that nothing refers to: a name may be on its way.
pub const UNNEEDED_AFTER: Duration = Duration::from_secs(60);

/// When each node was heard last, as its leader knows it.
#[derive(Clone, Debug)]
pub struct Heard {
    began: Tick,
    nodes: BTreeMap<NodeId, Tick>,
}

impl Heard {
    /// Of a leader that begins.
    #[must_use]
    pub fn since(began: Tick) -> Self {
        Self { began, nodes: BTreeMap::new() }
    }

    /// A node is heard.
    pub fn hear(&mut self, node: NodeId, now: Tick) {
        self.nodes.insert(node, now);
    }

    fn silence(&self, node: NodeId, registered: Tick, now: Tick) -> Duration {
        now - self.nodes.get(&node).copied().unwrap_or(self.began).max(self.began).max(registered)
    }
}

/// What is to be proposed now.
#[must_use]
pub fn tend(state: &State, heard: &Heard, now: Tick) -> Vec<Command> {
    let mut commands = nodes(state, heard, now);
    let needed = state.needed();
    for (key, image) in &state.images {
        images(state, key, image, needed.contains(key), now, &mut commands);
    }
    let (placed, left) = place_all(state);
    commands.extend(placed);
    for command in left.iter().filter_map(|id| make_room(state, &state.jobs[id])) {
        if !commands.contains(&command) {
            commands.push(command);
        }
    }
    let is_over = state.users.values().any(|user| user.until.is_some_and(|until| until <= now))
        || state.jobs.values().any(|job| job.ended.is_none() && job.deadline.is_some_and(|deadline| deadline <= now));
    if commands.is_empty() && (is_over || now - state.time >= NOTE_EVERY && waits_for_time(state)) {
        commands.push(Command::Note);
    }
    commands
}

fn nodes(state: &State, heard: &Heard, now: Tick) -> Vec<Command> {
    let of_node = |(id, node): (&NodeId, &crate::state::Node)| {
        let (node_id, incarnation, silence) = (*id, node.incarnation, heard.silence(*id, node.registered, now));
        match node.life {
            Life::Up if silence >= SUSPECT_AFTER => Some(Command::Suspect { node: node_id, incarnation }),
            Life::Suspect if silence >= LOST_AFTER => Some(Command::GiveUp { node: node_id, incarnation }),
            Life::Suspect if silence < SUSPECT_AFTER && heard.nodes.contains_key(id) => {
                Some(Command::Heard { node: node_id, incarnation })
            }
            _ => None,
        }
    };
    state.nodes.iter().filter_map(of_node).collect()
}

fn images(state: &State, key: &ImageKey, image: &Image, is_needed: bool, now: Tick, commands: &mut Vec<Command>) {
    let is_draining = |id: &NodeId| state.nodes.get(id).is_some_and(|node| node.is_draining);
    // Those that have lost whom they read from.
    let cut_off = image.holders.iter().filter(|(_, holder)| is_cut_off(holder));
    for (node, sources) in cut_off.filter_map(|(id, _)| Some((*id, rescue(state, image, *id)?))) {
        commands.push(Command::Open { key: key.clone(), node, sources });
    }
    // Those that may let go: of what nothing needs, and of what is to be elsewhere.
    let stays = |id: &NodeId| !is_draining(id) && image.holders[id].is_kept();
    let settled_elsewhere = state.settled_and_up(image).filter(|id| !is_draining(id)).count();
    let is_forgotten = image.unneeded.is_some_and(|since| now - since >= UNNEEDED_AFTER);
    for (id, holder) in image.holders.iter().filter(|(_, holder)| holder.is_kept()) {
        let is_to_go = is_forgotten || is_draining(id) && (!holder.is_settled() || !is_needed || settled_elsewhere > 0);
        // Whether tasks are there is asked last: that takes a walk over them.
        if is_to_go && image.readers_of(*id).next().is_none() && !has_tasks(state, key, *id) {
            commands.push(Command::LetGo { key: key.clone(), node: *id });
        }
    }
    // What only nodes have that are being drained goes to another; and to as many as its jobs say.
    let on_their_way = image.holders.keys().filter(|id| stays(id) && crate::apply::leads_to_all(image, **id)).count();
    let is_on_drained = image.settled().any(|id| is_draining(&id));
    if is_needed
        && on_their_way < replicas(state, key).max(usize::from(is_on_drained))
        && let Some((node, sources)) = home(state, key)
    {
        commands.push(Command::Open { key: key.clone(), node, sources });
    }
}

/// For tasks that find no place: a copy of another image that can be spared.
fn make_room(state: &State, job: &Job) -> Option<Command> {
    let is_waiting = |(range, task): (Range<u32>, Task)| matches!(task, Task::Waiting { .. }).then_some(range);
    let waiting: u64 = job.tasks.iter().filter_map(is_waiting).map(|range| u64::from(range.end - range.start)).sum();
    if waiting == 0 {
        return None;
    }
    let plan = plan(state, &wanted(job, waiting, None));
    let others = || state.images.iter().filter(|(key, _)| **key != job.spec.image);
    plan.verdicts.iter().find_map(|(id, verdict)| {
        let Verdict::Full { free, needed } = verdict else { return None };
        let can_be_spared = |(key, image): &(&ImageKey, &Image)| {
            image.holders.get(id).is_some_and(|holder| holder.is_kept() && holder.is_settled())
                && image.readers_of(*id).next().is_none()
                && state.settled_and_up(image).filter(|other| other != id).count() >= replicas(state, key).max(1)
                && !has_tasks(state, key, *id)
                && needed.fits(Resources { memory_bytes: free.memory_bytes.saturating_add(image.facts.data_bytes), ..*free })
        };
        others().find(can_be_spared).map(|(key, _)| Command::LetGo { key: key.clone(), node: *id })
    })
}

/// Jobs of an image that go on.
fn running<'a>(state: &'a State, key: &'a ImageKey) -> impl Iterator<Item = &'a Job> {
    state.jobs.values().filter(move |job| job.ended.is_none() && job.spec.image == *key)
}

/// On how many nodes an image is to be for its jobs.
fn replicas(state: &State, key: &ImageKey) -> usize {
    running(state, key).map(|job| usize::from(job.spec.replicas)).max().unwrap_or(0)
}

fn has_tasks(state: &State, key: &ImageKey, id: NodeId) -> bool {
    running(state, key)
        .flat_map(|job| job.tasks.iter())
        .any(|(_, task)| matches!(task, Task::Placed { node, .. } if node == id))
}

/// Whether something happens in time that nothing else would bring about.
fn waits_for_time(state: &State) -> bool {
    let has_deadline = state.jobs.values().any(|job| job.ended.is_none() && job.deadline.is_some());
    let is_stranded = state.images.values().any(|image| image.stranded.is_some() && !image.holders.is_empty());
    let is_waited_for = state
        .jobs
        .values()
        .any(|job| job.ended.is_none() && state.images.get(&job.spec.image).is_none_or(|image| image.stranded.is_some()));
    let is_kept_back = state
        .jobs
        .values()
        .filter(|job| job.ended.is_none())
        .any(|job| job.failed.is_some_and(|at| state.time - at < BACK_AFTER) && job.tasks.counts().waiting > 0);
    has_deadline || is_kept_back || is_stranded || is_waited_for || state.nodes.values().any(|node| node.lease.is_some())
}
