//! Shells: how many there should be, and the threads that build them.
//!
//! For each class in use as many wait as were asked for in the busiest second of the last minute, within what memory allows: a
//! shell costs its process, and kernel tables in proportion to its slot. A class that nobody has asked for in ten minutes has
//! none.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::worker::Worker;
use super::{Inner, PoolError, State, Zygote};
use crate::class::Class;
use crate::host::available_memory;
use crate::jail::apply::{THREADS_MAX, uid_of_worker};
use crate::jail::cgroup::{CgroupError, WorkerGroup};
use crate::worker::channel::Channel;
use crate::worker::protocol::{Failure, ToWorker, ToZygote};

const BUCKET: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(60);
const IDLE: Duration = Duration::from_secs(600);
/// After a build that failed, before the next one that nobody waits for.
const BACK_OFF: Duration = Duration::from_secs(1);
/// After a fork, before its shell is made up for: its answer is on its way, and may be to another host.
const AFTER_FORK: Duration = Duration::from_millis(2);
/// For so long after the first of several forks, with no more than that between them, no shells are built ahead.
const FORKS_FIRST: Duration = Duration::from_millis(250);
/// How often a control group is tried again that the kernel has not let go of.
pub(super) const GROUPS_ROUND: Duration = Duration::from_millis(5);
/// How often a builder with nothing to do looks whether demand has gone down.
const ROUND: Duration = Duration::from_secs(5);

/// The shells of one class.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    pub(super) ready: Vec<Arc<Worker>>,
    pub(super) building: u32,
    /// Forks that wait for a shell.
    waiting: u32,
    /// How many were asked for, by the second, newest last.
    demand: VecDeque<(Instant, u32)>,
    last_demand: Option<Instant>,
    /// Builds that failed, each for one of those who wait.
    failures: Vec<Failure>,
    /// When the last build failed.
    last_failure: Option<Instant>,
}

impl Shelf {
    pub(super) fn ready_count(&self) -> u32 {
        u32::try_from(self.ready.len()).unwrap_or(u32::MAX)
    }

    /// So many were asked for.
    pub(super) fn note_demand(&mut self, now: Instant, count: u32) {
        self.last_demand = Some(now);
        match self.demand.back_mut() {
            Some((since, sum)) if now - *since < BUCKET => *sum = sum.saturating_add(count),
            _ => self.demand.push_back((now, count)),
        }
        while self.demand.front().is_some_and(|(since, _)| now - *since > WINDOW) {
            self.demand.pop_front();
        }
    }

    /// How many should wait, memory aside.
    fn wanted(&self, now: Instant, min: u32, max: u32) -> u32 {
        if self.last_demand.is_none_or(|last| now - last > IDLE) {
            return 0;
        }
        let recent = self.demand.iter().filter(|(since, _)| now - *since <= WINDOW);
        recent.map(|(_, count)| *count).max().unwrap_or(0).clamp(min.min(max), max)
    }

    /// Takes all that wait off the shelf: the pool stops.
    pub(super) fn take_all(&mut self) {
        self.ready.clear();
    }

    pub(super) fn forget(&mut self, worker: &Arc<Worker>) {
        self.ready.retain(|ready| !Arc::ptr_eq(ready, worker));
    }
}

/// What one idle machine costs, in bytes: its process, and kernel tables (measured: docs/specification.md, L5).
#[must_use]
pub fn machine_cost_bytes(class: Class) -> u64 {
    (1 << 20) + class.memory().bytes() / 400
}

/// How much more memory than its own pages a worker may have: its process, KVM's tables for its slots, its page tables.
pub(super) fn overhead_bytes(class: Class) -> u64 {
    (32 << 20) + class.region_bytes() / 64
}

/// How many shells of each class should wait.
pub(super) fn wanted(inner: &Inner, state: &State, now: Instant) -> HashMap<Class, u32> {
    let settings = &inner.settings;
    let mut wanted: HashMap<Class, u32> = state
        .shelves
        .iter()
        .map(|(class, shelf)| (*class, shelf.wanted(now, settings.shells_min, settings.shells_max)))
        .collect();
    let cost: u64 = wanted.iter().map(|(class, count)| machine_cost_bytes(*class) * u64::from(*count)).sum();
    let budget = available_memory().unwrap_or(0) / settings.memory_share.max(1);
    if cost > budget {
        for count in wanted.values_mut() {
            let fitting = u128::from(*count) * u128::from(budget) / u128::from(cost.max(1));
            *count = u32::try_from(fitting).unwrap_or(u32::MAX);
        }
    }
    wanted
}

/// A number of shells that somebody is about to take: as many builders work for it. What has not been taken when it is dropped
/// is not waited for any more.
pub(super) struct Demand<'a> {
    inner: &'a Inner,
    class: Class,
    left: u32,
    asked: Instant,
    deadline: Instant,
}

impl<'a> Demand<'a> {
    pub(super) fn of(inner: &'a Inner, class: Class, count: usize) -> Self {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let asked = Instant::now();
        // For all of them together; a thousand take seconds.
        let deadline = asked + super::PATIENCE + Duration::from_millis(20) * count;
        let mut state = inner.lock();
        if state.forks == 0 && asked - state.fork_ended >= AFTER_FORK {
            state.forks_since = asked;
        }
        state.forks += 1;
        let shelf = state.shelves.entry(class).or_default();
        shelf.note_demand(asked, count);
        shelf.waiting += count;
        let is_short = shelf.ready_count() < shelf.waiting;
        drop(state);
        if is_short {
            inner.changed.notify_all();
        }
        Self { inner, class, left: count, asked, deadline }
    }

    /// Takes one, or waits for one that is built for it. Says whether one was ready.
    pub(super) fn take(&mut self) -> Result<(Arc<Worker>, bool), PoolError> {
        self.left = self.left.saturating_sub(1);
        take_shell(self.inner, self.class, self.asked, self.deadline)
    }
}

impl Drop for Demand<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        state.forks = state.forks.saturating_sub(1);
        state.fork_ended = Instant::now();
        if let Some(shelf) = state.shelves.get_mut(&self.class) {
            shelf.waiting = shelf.waiting.saturating_sub(self.left);
            if shelf.waiting == 0 {
                shelf.failures.clear();
            }
        }
        drop(state);
        self.inner.changed.notify_all();
    }
}

fn take_shell(inner: &Inner, class: Class, asked: Instant, deadline: Instant) -> Result<(Arc<Worker>, bool), PoolError> {
    let mut state = inner.lock();
    let mut has_waited = false;
    loop {
        let zygote_failed = match &state.zygote {
            Zygote::Failed(failure) => Some(failure.clone()),
            Zygote::Starting | Zygote::Ready(_) => None,
        };
        let is_stopping = state.is_stopping;
        let shelf = state.shelves.entry(class).or_default();
        let outcome = if is_stopping {
            Some(Err(PoolError::Stopping))
        } else if let Some(worker) = shelf.ready.pop() {
            Some(Ok((worker, !has_waited)))
        } else if let Some(failure) = shelf.failures.pop() {
            Some(Err(PoolError::Failed(failure)))
        } else {
            let left = deadline.saturating_duration_since(Instant::now());
            (left.is_zero()).then(|| Err(zygote_failed.map_or(PoolError::Stuck(deadline - asked), PoolError::Failed)))
        };
        if let Some(outcome) = outcome {
            shelf.waiting = shelf.waiting.saturating_sub(1);
            return outcome;
        }
        has_waited = true;
        let left = deadline.saturating_duration_since(Instant::now());
        state = inner.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// The life of a thread that builds shells, and takes down those that are too many.
pub(super) fn build_shells(inner: Arc<Inner>) {
    loop {
        let mut state = inner.lock();
        let (class, is_awaited) = loop {
            if state.is_stopping {
                return;
            }
            match next_class(&inner, &mut state) {
                Next::Build(class, is_awaited) => break (class, is_awaited),
                Next::TakeDown(worker) => {
                    drop(state);
                    worker.kill();
                    state = inner.lock();
                }
                Next::Later(pause) => {
                    state = inner.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
                }
                Next::Nothing if state.groups_left.is_empty() => {
                    state = inner.changed.wait_timeout(state, ROUND).unwrap_or_else(PoisonError::into_inner).0;
                }
                Next::Nothing => {
                    drop(state);
                    if !remove_groups(&inner) {
                        std::thread::sleep(GROUPS_ROUND);
                    }
                    state = inner.lock();
                }
            }
        };
        state.shelves.entry(class).or_default().building += 1;
        drop(state);
        let built = build(&inner, class, is_awaited);
        let mut state = inner.lock();
        let is_stopping = state.is_stopping;
        let shelf = state.shelves.entry(class).or_default();
        shelf.building = shelf.building.saturating_sub(1);
        match built {
            Ok(worker) if is_stopping || worker.mail().ended.is_some() => worker.kill(),
            Ok(worker) => shelf.ready.push(worker),
            Err(error) => {
                let failure = match error {
                    PoolError::Failed(failure) => failure,
                    other => {
                        let errno = other.errno().unwrap_or(0);
                        Failure { message: other.to_string(), remedy: other.remedy().to_owned(), errno }
                    }
                };
                shelf.last_failure = Some(Instant::now());
                if is_awaited {
                    shelf.failures.push(failure);
                }
            }
        }
        drop(state);
        inner.changed.notify_all();
    }
}

/// Tries to remove the control groups that are left. Says whether none is.
pub(super) fn remove_groups(inner: &Inner) -> bool {
    let mut left = std::mem::take(&mut inner.lock().groups_left);
    left.retain_mut(|group| !group.remove());
    let is_done = left.is_empty();
    inner.lock().groups_left.extend(left);
    is_done
}

enum Next {
    /// A shell of this class; whether a fork waits for it.
    Build(Class, bool),
    TakeDown(Arc<Worker>),
    /// Not before so long.
    Later(Duration),
    Nothing,
}

fn next_class(inner: &Inner, state: &mut State) -> Next {
    let starved = state.shelves.iter().find(|(_, shelf)| shelf.waiting > shelf.building + shelf.ready_count());
    if let Some((class, _)) = starved {
        return Next::Build(*class, true);
    }
    let now = Instant::now();
    // Building takes CPU time that a fork under way wants; but forks without end must not keep shells from being built.
    let forks_left = FORKS_FIRST.saturating_sub(now - state.forks_since);
    let after_fork = if state.forks > 0 { FORKS_FIRST } else { AFTER_FORK.saturating_sub(now - state.fork_ended) };
    let pause = forks_left.min(after_fork);
    if !pause.is_zero() {
        return Next::Later(pause);
    }
    let has_failed = |shelf: &Shelf| shelf.last_failure.is_some_and(|at| now - at < BACK_OFF);
    let wanted = wanted(inner, state, now);
    for (class, shelf) in &mut state.shelves {
        let wanted = wanted.get(class).copied().unwrap_or(0);
        if shelf.ready_count() + shelf.building < wanted && !has_failed(shelf) {
            return Next::Build(*class, false);
        }
        if shelf.ready_count() > wanted
            && shelf.waiting == 0
            && let Some(worker) = shelf.ready.pop()
        {
            return Next::TakeDown(worker);
        }
    }
    Next::Nothing
}

/// Has a worker forked, and built into a shell.
fn build(inner: &Inner, class: Class, is_awaited: bool) -> Result<Arc<Worker>, PoolError> {
    let step = |step| move |source| PoolError::Step { step, source };
    let (ours, theirs) = Channel::pair().map_err(step("socketpair"))?;
    let number = inner.next_worker();
    let worker = Arc::new(Worker::new(number, class, ours));
    let zygote = {
        let mut state = inner.lock();
        if state.is_stopping {
            return Err(PoolError::Stopping);
        }
        let zygote = match &state.zygote {
            Zygote::Ready(channel) => Arc::clone(channel),
            Zygote::Failed(failure) => return Err(PoolError::Failed(failure.clone())),
            Zygote::Starting => return Err(PoolError::Stopping),
        };
        // At the same time: should this zygote end, it is among those that end with it.
        state.workers.insert(number, Arc::clone(&worker));
        zygote
    };
    let born = bear(inner, &zygote, &worker, theirs, is_awaited);
    if born.is_err() {
        worker.kill();
        if worker.mail().pid.is_none() {
            // Nobody will say that it has exited.
            inner.lock().workers.remove(&number);
            inner.changed.notify_all();
        }
    }
    born.map(|()| worker)
}

fn bear(inner: &Inner, zygote: &Channel, worker: &Arc<Worker>, theirs: Channel, is_awaited: bool) -> Result<(), PoolError> {
    use rustix::event::epoll;
    let step = |step| move |source| PoolError::Step { step, source };
    failpoint!("pool.bear", |source| PoolError::Step { step: "asking for a worker", source });
    let events = epoll::add(&inner.events, worker.as_fd(), epoll::EventData::new_u64(worker.number), epoll::EventFlags::IN);
    events.map_err(|error| PoolError::Step { step: "epoll_ctl", source: error.into() })?;
    let uid = uid_of_worker(inner.number, worker.number);
    let memory = worker.class.region_bytes() + overhead_bytes(worker.class);
    let group = inner.groups.as_ref().map(|groups| groups.worker(worker.number, memory, THREADS_MAX)).transpose();
    let group = group.map_err(of_groups)?;
    let entrances = group.as_ref().map_or(Ok(Vec::new()), WorkerGroup::entrances).map_err(of_groups)?;
    *worker.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
    let descriptors: Vec<BorrowedFd<'_>> = [theirs.as_fd()].into_iter().chain(entrances.iter().map(AsFd::as_fd)).collect();
    let spawn = ToZygote::Spawn { worker: worker.number, uid };
    zygote.send(&spawn, &descriptors).map_err(step("asking for a worker"))?;
    drop(descriptors);
    drop(theirs);
    worker.wait(|mail| mail.pid)?;
    worker.send(&ToWorker::Build { class: worker.class.into(), is_awaited }, &[])?;
    worker.wait(|mail| mail.built.map(drop))
}

fn of_groups(error: CgroupError) -> PoolError {
    PoolError::Failed(Failure::of(&error, error.remedy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shells_follow_demand() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut shelf = Shelf::default();
        assert_eq!(shelf.wanted(at(0), 4, 100), 0);
        shelf.note_demand(at(0), 1);
        assert_eq!(shelf.wanted(at(0), 4, 100), 4);
        shelf.note_demand(at(10), 30);
        shelf.note_demand(at(10), 20);
        assert_eq!(shelf.wanted(at(11), 4, 100), 50);
        assert_eq!(shelf.wanted(at(11), 4, 40), 40);
        shelf.note_demand(at(69), 6);
        assert_eq!(shelf.wanted(at(69), 4, 100), 50);
        assert_eq!(shelf.wanted(at(71), 4, 100), 6);
        assert_eq!(shelf.wanted(at(600), 4, 100), 4);
        assert_eq!(shelf.wanted(at(670), 4, 100), 0);
    }
}
