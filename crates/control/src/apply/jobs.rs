//! Rules about jobs and their tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use types::{NodeId, Reason, Tenant};

use super::{Flaws, Outcomes, images};
use crate::clock::Tick;
use crate::command::{Answer, Ended, Kept, Refusal};
use crate::state::{Holder, Job, JobId, JobSpec, Outcome, Output, Resources, State, Task, Tasks};

/// The most tasks of one job.
pub const TASKS_MAX: u32 = 1_000_000;
/// The most jobs at a time. For a new one those that have ended are forgotten: the oldest of the tenant with the most.
pub const JOBS_MAX: usize = 20_000;
/// The most tasks of all of them: each may take some tens of bytes of the state, which nodes send one another in one piece.
pub const TASKS_IN_ALL_MAX: u64 = 4_000_000;

impl From<Reason> for Outcome {
    fn from(reason: Reason) -> Self {
        Self::Failed(reason)
    }
}

pub(super) fn submit(state: &mut State, id: JobId, spec: &JobSpec) -> Outcomes {
    // Sent again by who does not know what became of it.
    if let Some(job) = state.jobs.get(&id) {
        return if job.spec.request == spec.request { Ok(Answer::Done) } else { Err(Refusal::JobExists(id)) };
    }
    if !(1..=TASKS_MAX).contains(&spec.count) {
        return Err(Refusal::BadCount { count: spec.count, max: TASKS_MAX });
    }
    let Resources { memory_bytes, cpu_millis, machines } = spec.each;
    if memory_bytes == 0 || cpu_millis == 0 || machines != 1 {
        return Err(Refusal::BadResources);
    }
    let image = state.images.get(&spec.image).filter(|image| image.holders.values().any(Holder::is_kept));
    image.ok_or_else(|| Refusal::UnknownImage(spec.image.clone()))?;
    make_room(state, &spec.image.tenant, spec.count)?;
    let tasks = Tasks::new(spec.count);
    let deadline = spec.lasts_ms.map(|ms| state.time + Duration::from_millis(ms));
    state.jobs.insert(id, Job { spec: spec.clone(), submitted: state.time, deadline, tasks, failed: None, ended: None });
    Ok(Answer::Done)
}

/// What a tenant has of jobs.
#[derive(Default)]
struct Held {
    /// Of what there is for all: a job takes as much as the tasks that each of as many jobs as there may be has on average.
    takes: u64,
    /// The oldest first.
    ended: BTreeSet<(Tick, JobId)>,
}

/// Forgets jobs that have ended until there is room for another one of this tenant: of the tenant who has most of all the oldest first.
/// Nobody's results go because somebody who has more submits more.
fn make_room(state: &mut State, tenant: &Tenant, count: u32) -> Result<(), Refusal> {
    const JOB_TAKES: u64 = TASKS_IN_ALL_MAX / JOBS_MAX as u64;
    let too_many = Refusal::TooManyJobs { max: JOBS_MAX, tasks: TASKS_IN_ALL_MAX };
    let mut jobs = state.jobs.len();
    let mut tasks: u64 = state.jobs.values().map(|job| u64::from(job.spec.count)).sum();
    let is_room = |jobs: usize, tasks: u64| jobs < JOBS_MAX && tasks + u64::from(count) <= TASKS_IN_ALL_MAX;
    if is_room(jobs, tasks) {
        return Ok(());
    }
    let mut held: BTreeMap<&Tenant, Held> = BTreeMap::new();
    held.entry(tenant).or_default().takes += u64::from(count) + JOB_TAKES;
    for (id, job) in &state.jobs {
        let held = held.entry(&job.spec.image.tenant).or_default();
        held.takes += u64::from(job.spec.count) + JOB_TAKES;
        held.ended.extend(job.ended.map(|at| (at, *id)));
    }
    let own = held[tenant].takes;
    let mut forgotten = Vec::new();
    while !is_room(jobs, tasks) {
        // Two that have as much: the one whose name comes last.
        let most = held.iter_mut().filter(|(_, held)| !held.ended.is_empty()).max_by_key(|(_, held)| held.takes);
        let (whose, most) = most.ok_or_else(|| too_many.clone())?;
        if *whose != tenant && most.takes < own {
            return Err(too_many);
        }
        let (_, oldest) = most.ended.pop_first().expect("it is not empty");
        let its = u64::from(state.jobs[&oldest].spec.count);
        most.takes -= its + JOB_TAKES;
        (jobs, tasks) = (jobs - 1, tasks - its);
        forgotten.push(oldest);
    }
    for id in forgotten {
        state.jobs.remove(&id);
    }
    Ok(())
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
    let mut usage = state.usage();
    for (node, sources) in opens {
        let has_it = state.images.get(&key).is_some_and(|image| image.holders.get(node).is_some_and(Holder::is_kept));
        if !has_it {
            // What cannot be opened any more leaves the tasks that were meant for there waiting.
            images::open(state, &mut usage, &key, *node, sources, flaws).map(drop).unwrap_or_default();
        }
    }
    let epoch = state.draw_epoch();
    let (mut placed, mut left) = (0u32, 0u32);
    let mut at_a_time = state.jobs[&id].may_place();
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
            let some = u32::try_from(room.min(u64::from(len.min(at_a_time)))).expect("at most a u32");
            at_a_time -= some;
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

/// A node says that tasks have ended. It counts if a task is that node's by the same order, and only once.
pub(super) fn ended(state: &mut State, id: NodeId, ended: &Ended, flaws: Flaws) {
    let now = state.time;
    let Some(job) = state.jobs.get_mut(&ended.job) else { return };
    for (task, of, outcome) in &ended.tasks {
        let (task, outcome) = (*task, *outcome);
        let output = |copy| Some(Output { epoch: *of, node: id, copy });
        let output = match ended.kept {
            Kept::Nowhere => None,
            Kept::Here => output(None),
            Kept::HereAnd(other) => output(Some(other)),
        };
        match job.tasks.get(task) {
            Some(Task::Placed { node, epoch, .. }) if flaws.ignores_fences || (node == id && epoch == *of) => {
                let retries = job.spec.retries;
                job.tasks.change(task..task + 1, |task| tried(task, outcome, output, retries));
                if matches!(job.tasks.get(task), Some(Task::Waiting { not_on: Some(_), .. })) {
                    job.failed = Some(now);
                }
            }
            Some(_) if flaws.ignores_fences => job.tasks.change(task..task + 1, |_| Task::Done { outcome, output }),
            _ => {}
        }
    }
}

/// What becomes of a task of which a try has ended so.
pub(super) fn tried(task: Task, outcome: Outcome, output: Option<Output>, retries: u32) -> Task {
    match task {
        Task::Placed { node, attempt, .. } if outcome.may_be_tried_again() && attempt < retries => {
            // A node that was away, or whose source was, may be as good as any other.
            let is_of_node = !matches!(outcome, Outcome::Failed(Reason::NodeLost | Reason::PageSourceLost));
            Task::Waiting { attempt: attempt + 1, not_on: is_of_node.then_some(node) }
        }
        _ => Task::Done { outcome, output },
    }
}

/// What becomes of a task that is ended from outside: nothing, if it has ended.
pub(super) fn ended_by(task: Task, reason: Reason) -> Task {
    match task {
        Task::Done { .. } => task,
        Task::Waiting { .. } | Task::Placed { .. } => Task::ended(reason.into()),
    }
}

impl Job {
    /// How many more of its tasks may be placed.
    #[must_use]
    pub fn may_place(&self) -> u32 {
        let Some(max) = self.spec.max_parallel else { return u32::MAX };
        max.saturating_sub(self.tasks.counts().placed)
    }
}

pub(super) fn has_tasks_on(job: &Job, id: NodeId) -> bool {
    job.tasks.iter().any(|(_, task)| matches!(task, Task::Placed { node, .. } if node == id))
}
