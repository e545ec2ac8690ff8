//! Rules about jobs and their tasks.

use std::ops::Range;

use types::{Epoch, NodeId, Reason};

use super::{Flaws, Outcomes, images};
use crate::command::{Answer, Refusal};
use crate::state::{Holder, Job, JobId, JobSpec, Outcome, Resources, State, Task, Tasks};

/// The most tasks of one job.
pub(super) const TASKS_MAX: u32 = 1_000_000;

impl From<Reason> for Outcome {
    fn from(reason: Reason) -> Self {
        Self::Failed(reason)
    }
}

pub(super) fn submit(state: &mut State, id: JobId, spec: &JobSpec) -> Outcomes {
    if !(1..=TASKS_MAX).contains(&spec.count) {
        return Err(Refusal::BadCount { count: spec.count, max: TASKS_MAX });
    }
    let Resources { memory_bytes, cpu_millis, machines } = spec.each;
    if memory_bytes == 0 || cpu_millis == 0 || machines != 1 {
        return Err(Refusal::BadResources);
    }
    if state.jobs.contains_key(&id) {
        return Err(Refusal::JobExists(id));
    }
    let image = state.images.get(&spec.image).filter(|image| image.holders.values().any(Holder::is_kept));
    image.ok_or_else(|| Refusal::UnknownImage(spec.image.clone()))?;
    let tasks = Tasks::new(spec.count);
    state.jobs.insert(id, Job { spec: spec.clone(), submitted: state.time, tasks, ended: None });
    Ok(Answer::Done)
}

pub(super) fn place(
    state: &mut State,
    id: JobId,
    opens: &[(NodeId, Vec<NodeId>)],
    on: &[(NodeId, Range<u32>)],
    flaws: Flaws,
) -> Outcomes {
    let job = state.jobs.get(&id).ok_or(Refusal::UnknownJob(id))?;
    if job.ended.is_some() {
        return Ok(Answer::Placed { placed: 0, left: 0 });
    }
    let key = job.spec.image.clone();
    for (node, sources) in opens {
        let has_it = state.images.get(&key).is_some_and(|image| image.holders.get(node).is_some_and(Holder::is_kept));
        if !has_it {
            // What cannot be opened any more leaves the tasks that were meant for there waiting.
            images::open(state, &key, *node, sources, flaws).map(drop).unwrap_or_default();
        }
    }
    let epoch = state.draw_epoch();
    let mut usage = state.usage();
    let (mut placed, mut left) = (0u32, 0u32);
    for (node, range) in on {
        let is_held = state.images.get(&key).is_some_and(|image| image.holders.get(node).is_some_and(Holder::is_kept));
        let is_open = state.nodes.get(node).is_some_and(crate::state::Node::is_open);
        let mut room = if is_held && is_open { u64::MAX } else { 0 };
        if !flaws.counts_no_capacity {
            room = room.min(state.free(*node, &usage).holds(state.jobs[&id].spec.each));
        }
        let job = state.jobs.get_mut(&id).expect("just seen");
        for (part, task) in job.tasks.within(range.clone()) {
            let Task::Waiting { attempt, .. } = task else { continue };
            let len = part.end - part.start;
            let some = u32::try_from(room.min(u64::from(len))).expect("at most a u32");
            job.tasks.change(part.start..part.start + some, |_| Task::Placed { node: *node, attempt, epoch });
            room -= u64::from(some);
            (placed, left) = (placed.saturating_add(some), left.saturating_add(len - some));
            let taken: Resources = job.spec.each.times(u64::from(some));
            *usage.entry(*node).or_default() += taken;
        }
    }
    Ok(Answer::Placed { placed, left })
}

pub(super) fn cancel(state: &mut State, id: JobId) -> Outcomes {
    let job = state.jobs.get_mut(&id).ok_or(Refusal::UnknownJob(id))?;
    job.tasks.change(0..job.spec.count, |task| ended_by(task, Reason::Killed));
    Ok(Answer::Done)
}

pub(super) fn forget(state: &mut State, id: JobId) -> Outcomes {
    let job = state.jobs.get(&id).ok_or(Refusal::UnknownJob(id))?;
    if job.ended.is_none() {
        return Err(Refusal::JobRuns(id));
    }
    state.jobs.remove(&id);
    Ok(Answer::Done)
}

/// A node says that a task has ended. It counts if the task is that node's by the same order, and only once.
pub(super) fn ended(state: &mut State, id: NodeId, job: JobId, task: u32, of: Epoch, outcome: Outcome, flaws: Flaws) {
    let Some(job) = state.jobs.get_mut(&job) else { return };
    let Some(Task::Placed { node, epoch, .. }) = job.tasks.get(task) else {
        if flaws.ignores_fences && task < job.spec.count {
            job.tasks.change(task..task + 1, |_| Task::Done(outcome));
        }
        return;
    };
    if flaws.ignores_fences || (node == id && epoch == of) {
        let retries = job.spec.retries;
        job.tasks.change(task..task + 1, |task| tried(task, outcome, retries));
    }
}

/// What becomes of a task of which a try has ended so.
pub(super) fn tried(task: Task, outcome: Outcome, retries: u32) -> Task {
    match task {
        Task::Placed { node, attempt, .. } if outcome.may_be_tried_again() && attempt < retries => {
            Task::Waiting { attempt: attempt + 1, not_on: Some(node) }
        }
        _ => Task::Done(outcome),
    }
}

/// What becomes of a task that is ended from outside: nothing, if it has ended.
pub(super) fn ended_by(task: Task, reason: Reason) -> Task {
    match task {
        Task::Done(_) => task,
        Task::Waiting { .. } | Task::Placed { .. } => Task::Done(reason.into()),
    }
}

pub(super) fn has_tasks_on(job: &Job, id: NodeId) -> bool {
    job.tasks.iter().any(|(_, task)| matches!(task, Task::Placed { node, .. } if node == id))
}
