//! What a node does to become what the state says. It looks at the state that it has applied itself, which may be behind; orders
//! and reports carry epochs, so that what is out of date is passed over on either side.

use std::collections::{BTreeMap, BTreeSet};

use types::{Epoch, NodeId};

use crate::command::{Command, Ended, Kept};
use crate::state::{Hold, Holder, ImageKey, JobId, Life, Outcome, Resources, State, Task};

/// Progress is told when so much of it is new.
const PROGRESS_STEP: u8 = 10;
/// The most results of one report: some bytes each.
pub const RESULTS_MAX: usize = 1000;

/// What is on a node, as it knows itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Its start.
    pub incarnation: u64,
    /// Images that it has, or reads, by order of the cluster or told to it.
    pub images: BTreeMap<ImageKey, Seen>,
    /// Orders to have an image that could not be carried out.
    pub failed: BTreeSet<(ImageKey, Epoch)>,
    /// Tasks that run, or have ended and were not taken note of yet.
    pub tasks: BTreeMap<(JobId, u32), Run>,
    /// What machines take that are no tasks.
    pub local: Resources,
}

/// An image on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How much of it is there.
    pub percent: u8,
    /// Whom it is read from.
    pub sources: Vec<NodeId>,
}

/// A task on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Of the order.
    pub epoch: Epoch,
    /// How it ended, and where its output is, if it has.
    pub ended: Option<(Outcome, Kept)>,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The state does not know this start of the node, or gave it up: end what runs, take a new number, and register.
    Register {
        /// The number has to be higher than this.
        above: u64,
    },
    /// This node is out: end what runs, let go of everything, ask for nothing. One that was removed may join again with its next start.
    Leave,
    /// Have an image, or read it from others than before.
    Open {
        /// Which.
        key: ImageKey,
        /// Of the order: for a report that it cannot be done.
        epoch: Epoch,
        /// From whom, the first one first.
        sources: Vec<NodeId>,
    },
    /// Let go of an image.
    Drop {
        /// Which.
        key: ImageKey,
    },
    /// Fork a child for a task.
    Start {
        /// Of which job.
        job: JobId,
        /// Which.
        task: u32,
        /// Of the order.
        epoch: Epoch,
    },
    /// End a task's child: it is another's, or nobody's any more. What it came to does not count.
    End {
        /// Of which job.
        job: JobId,
        /// Which.
        task: u32,
    },
    /// Forget how a task ended: it was taken note of.
    Forget {
        /// Of which job.
        job: JobId,
        /// Which.
        task: u32,
    },
    /// Propose this.
    Report(Box<Command>),
}

/// What the node is to do now.
#[must_use]
pub fn reconcile(state: &State, id: NodeId, observed: &Observed) -> Vec<Action> {
    let known = state.nodes.get(&id).filter(|node| node.life != Life::Lost && node.incarnation == observed.incarnation);
    if known.is_none() {
        if state.revoked.contains(&id) || state.removed.get(&id).is_some_and(|last| observed.incarnation <= *last) {
            return vec![Action::Leave];
        }
        let above = state.nodes.get(&id).map_or(0, |node| node.incarnation);
        return vec![Action::Register { above }];
    }
    let mut actions = Vec::new();
    let (mut progress, mut gone) = (Vec::new(), Vec::new());
    for (key, image) in &state.images {
        let Some(holder) = image.holders.get(&id) else { continue };
        let seen = observed.images.get(key);
        match (holder.hold, seen) {
            (Hold::LetGo, Some(_)) => actions.push(Action::Drop { key: key.clone() }),
            (Hold::LetGo, None) => gone.push((key.clone(), holder.epoch)),
            (Hold::Kept, _) if observed.failed.contains(&(key.clone(), holder.epoch)) => gone.push((key.clone(), holder.epoch)),
            // What it is said to have all of is not there.
            (Hold::Kept, Some(Seen { percent: ..100, .. }) | None) if holder.is_settled() => {
                gone.push((key.clone(), holder.epoch))
            }
            (Hold::Kept, seen) => {
                let percent = seen.map_or(0, |seen| seen.percent);
                let is_news = percent > holder.percent && (percent == 100 || percent - holder.percent >= PROGRESS_STEP);
                if is_news {
                    progress.push((key.clone(), holder.epoch, percent));
                }
                let reads_from_others = percent < 100 && seen.is_none_or(|seen| seen.sources != holder.sources);
                if reads_from_others && !holder.sources.is_empty() {
                    actions.push(Action::Open { key: key.clone(), epoch: holder.epoch, sources: holder.sources.clone() });
                }
            }
        }
    }
    let is_ours = |key: &ImageKey| state.images.get(key).is_some_and(|image| image.holders.contains_key(&id));
    actions.extend(observed.images.keys().filter(|key| !is_ours(key)).map(|key| Action::Drop { key: key.clone() }));
    let ended = tasks(state, id, observed, &mut actions);
    let local = known.is_some_and(|node| node.local != observed.local).then_some(observed.local);
    if !progress.is_empty() || !gone.is_empty() || !ended.is_empty() || local.is_some() {
        let incarnation = observed.incarnation;
        let report = Command::Report { node: id, incarnation, progress, gone, ended, local };
        actions.push(Action::Report(Box::new(report)));
    }
    actions
}

/// Adds what is to be done about tasks; says which ended and are to be reported.
fn tasks(state: &State, id: NodeId, observed: &Observed, actions: &mut Vec<Action>) -> Vec<Ended> {
    let mut ended: BTreeMap<(JobId, Kept), Ended> = BTreeMap::new();
    let mut results = 0;
    let order_of = |job: JobId, task: u32| match state.jobs.get(&job).and_then(|job| job.tasks.get(task)) {
        Some(Task::Placed { node, epoch, .. }) if node == id => Some(epoch),
        _ => None,
    };
    for ((job, task), run) in &observed.tasks {
        let (job, task) = (*job, *task);
        match (order_of(job, task) == Some(run.epoch), run.ended) {
            (true, Some((outcome, kept))) if results < RESULTS_MAX => {
                results += 1;
                let of_job = ended.entry((job, kept)).or_insert_with(|| Ended { job, kept, tasks: Vec::new() });
                of_job.tasks.push((task, run.epoch, outcome));
            }
            (true, _) => {}
            (false, Some(_)) => actions.push(Action::Forget { job, task }),
            (false, None) => actions.push(Action::End { job, task }),
        }
    }
    for (job_id, job) in state.jobs.iter().filter(|(_, job)| job.ended.is_none()) {
        // Children need the image, if only its first pages.
        let holder = state.images.get(&job.spec.image).and_then(|image| image.holders.get(&id));
        if !observed.images.contains_key(&job.spec.image) || !holder.is_some_and(Holder::is_kept) {
            continue;
        }
        let ours = job.tasks.iter().filter_map(|(range, task)| match task {
            Task::Placed { node, epoch, .. } if node == id => Some((range, epoch)),
            _ => None,
        });
        for (task, epoch) in ours.flat_map(|(range, epoch)| range.map(move |task| (task, epoch))) {
            if !observed.tasks.contains_key(&(*job_id, task)) {
                actions.push(Action::Start { job: *job_id, task, epoch });
            }
        }
    }
    ended.into_values().collect()
}
