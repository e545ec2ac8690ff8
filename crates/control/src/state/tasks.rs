//! The tasks of a job, by ranges: neighbours of which the same is true take one entry. A job of 100,000 tasks on 100 nodes is
//! some hundred of them.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use types::{Epoch, NodeId, Reason};

/// Where one task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// It is to be placed.
    Waiting {
        /// How often it was tried.
        attempt: u32,
        /// Where it failed last.
        not_on: Option<NodeId>,
    },
    /// It is a node's.
    Placed {
        /// Whose.
        node: NodeId,
        /// How often it was tried before.
        attempt: u32,
        /// Of the order: what is reported of another order does not count.
        epoch: Epoch,
    },
    /// It is at its end, and stays there.
    Done {
        /// How it ended.
        outcome: Outcome,
        /// Where what it has printed is, if it has run.
        output: Option<Output>,
    },
}

/// Where the output of a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Of the order that it is of: tries that did not count may have left others.
    pub epoch: Epoch,
    /// The node that ran it.
    pub node: NodeId,
    /// The other node that has it.
    pub copy: Option<NodeId>,
}

/// How many tasks of a job are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// To be placed.
    pub waiting: u32,
    /// A node's.
    pub placed: u32,
    /// Ended with status 0.
    pub succeeded: u32,
    /// Ended otherwise.
    pub failed: u32,
}

impl Task {
    /// One that ended so, without output.
    #[must_use]
    pub fn ended(outcome: Outcome) -> Self {
        Self::Done { outcome, output: None }
    }
}

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Its program ended, with this status.
    Exited(i32),
    /// It was ended, or could not be carried out.
    Failed(Reason),
}

impl Outcome {
    /// Whether another try may come out otherwise.
    #[must_use]
    pub fn may_be_tried_again(self) -> bool {
        match self {
            Self::Exited(_) => false,
            Self::Failed(reason) => !matches!(reason, Reason::Killed | Reason::DeadlineExceeded | Reason::Oom),
        }
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tasks {
    count: u32,
    /// By the first of each range; it reaches to the next.
    starts: BTreeMap<u32, Task>,
}

impl Tasks {
    /// All of them wait.
    #[must_use]
    pub fn new(count: u32) -> Self {
        let first = (count > 0).then_some((0, Task::Waiting { attempt: 0, not_on: None }));
        Self { count, starts: first.into_iter().collect() }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many entries they take.
    #[must_use]
    pub fn ranges(&self) -> usize {
        self.starts.len()
    }

    /// Where one is; `None` beyond the last.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<Task> {
        if index >= self.count { None } else { self.starts.range(..=index).next_back().map(|(_, task)| *task) }
    }

    /// All ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u32>, Task)> + '_ {
        let ends = self.starts.keys().copied().skip(1).chain([self.count]);
        self.starts.iter().zip(ends).map(|((start, task), end)| (*start..end, *task))
    }

    /// The parts of `range` in order.
    #[must_use]
    pub fn within(&self, range: Range<u32>) -> Vec<(Range<u32>, Task)> {
        let range = range.start.min(self.count)..range.end.min(self.count);
        let from = self.starts.range(..=range.start).next_back().map_or(0, |(start, _)| *start);
        let mut parts = Vec::new();
        let mut inside = self.starts.range(from..range.end.max(from)).peekable();
        while let Some((start, task)) = inside.next() {
            let end = inside.peek().map_or(range.end, |(next, _)| **next);
            let part = range.start.max(*start)..end.min(range.end);
            if !part.is_empty() {
                parts.push((part, *task));
            }
        }
        parts
    }

    /// Changes each part of `range`: `change` is given what it is and says what it becomes.
    pub fn change(&mut self, range: Range<u32>, mut change: impl FnMut(Task) -> Task) {
        for (part, task) in self.within(range) {
            let new = change(task);
            if new != task {
                self.set(part, new);
            }
        }
    }

    fn set(&mut self, range: Range<u32>, task: Task) {
        if range.end < self.count && !self.starts.contains_key(&range.end) {
            let after = self.get(range.end).expect("within");
            self.starts.insert(range.end, after);
        }
        let inside: Vec<u32> = self.starts.range(range.clone()).map(|(start, _)| *start).collect();
        for start in inside {
            self.starts.remove(&start);
        }
        let is_like_before = range.start.checked_sub(1).and_then(|before| self.get(before)) == Some(task);
        if !is_like_before {
            self.starts.insert(range.start, task);
        }
        if self.starts.get(&range.end) == Some(&task) {
            self.starts.remove(&range.end);
        }
    }

    /// How many are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (range, task) in self.iter() {
            let count = match task {
                Task::Waiting { .. } => &mut counts.waiting,
                Task::Placed { .. } => &mut counts.placed,
                Task::Done { outcome: Outcome::Exited(0), .. } => &mut counts.succeeded,
                Task::Done { .. } => &mut counts.failed,
            };
            *count += range.end - range.start;
        }
        counts
    }

    /// Whether all are at their end.
    #[must_use]
    pub fn are_done(&self) -> bool {
        self.starts.values().all(|task| matches!(task, Task::Done { .. }))
    }

    /// Whether it is as it should be: neighbours differ, and all are within.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        let ranges: Vec<_> = self.iter().collect();
        let is_whole = ranges.first().is_none_or(|(range, _)| range.start == 0) && ranges.is_empty() == (self.count == 0);
        is_whole
            && ranges.iter().all(|(range, _)| range.start < range.end)
            && ranges.windows(2).all(|pair| pair[0].1 != pair[1].1)
    }
}
