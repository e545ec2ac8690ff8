//! What is known of a job while it goes on, from answers in which nodes may be missing, and nodes that begin to count anew.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use types::NodeId;

use crate::api::wire::{JobAnswer, JobHere, TaskCounts};

/// Over how long forks a second are counted.
const WINDOW: Duration = Duration::from_secs(3);

/// All that was heard.
#[derive(Debug, Default)]
pub(super) struct Tally {
    nodes: BTreeMap<NodeId, OnNode>,
    counts: TaskCounts,
    /// How many had been forked when.
    forked: VecDeque<(Duration, u64)>,
}

/// One node's part.
#[derive(Debug, Default)]
pub(super) struct OnNode {
    pub(super) name: String,
    pub(super) placed: u32,
    pub(super) succeeded: u32,
    pub(super) failed: u32,
    /// What it did until it was restarted.
    before: JobHere,
    /// What it said last.
    last: JobHere,
}

impl Tally {
    /// Takes an answer in, which came after so much time.
    pub(super) fn take(&mut self, answer: &JobAnswer, at: Duration) {
        self.counts = answer.job.counts;
        for said in &answer.nodes {
            let node = self.nodes.entry(said.node).or_default();
            node.name.clone_from(&said.name);
            (node.placed, node.succeeded, node.failed) = (said.placed, said.succeeded, said.failed);
            match said.here {
                // What it counts only grows, but for a restart.
                Some(here) if here.forked < node.last.forked || here.wire_bytes < node.last.wire_bytes => {
                    node.before = sum(&node.before, &node.last);
                    node.last = here;
                }
                Some(here) => node.last = here,
                // It did not answer: what it said before still holds.
                None => {}
            }
        }
        let forked = self.all().forked;
        self.forked.push_back((at, forked));
        while self.forked.len() > 2 && self.forked.get(1).is_some_and(|(then, _)| at.saturating_sub(*then) >= WINDOW) {
            self.forked.pop_front();
        }
    }

    pub(super) fn counts(&self) -> TaskCounts {
        self.counts
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = &OnNode> {
        self.nodes.values()
    }

    /// Of all nodes.
    pub(super) fn all(&self) -> JobHere {
        self.nodes.values().fold(JobHere::default(), |all, node| sum(&all, &node.here()))
    }

    /// Forks of late.
    pub(super) fn forks_a_second(&self) -> u64 {
        let (Some((first, few)), Some((last, many))) = (self.forked.front(), self.forked.back()) else { return 0 };
        let ms = u64::try_from(last.saturating_sub(*first).as_millis()).unwrap_or(u64::MAX);
        many.saturating_sub(*few).saturating_mul(1_000).checked_div(ms).unwrap_or(0)
    }

    /// What whole copies of the image would have cost: one for each node that it was not on.
    pub(super) fn whole_copies(&self) -> (usize, u64) {
        let copies = self.nodes.values().map(OnNode::here).filter(|here| here.remote + here.settled > 0);
        copies.fold((0, 0), |(count, bytes), here| (count + 1, bytes + here.image_bytes))
    }
}

impl OnNode {
    /// What it did, also before it was restarted.
    pub(super) fn here(&self) -> JobHere {
        let all = sum(&self.before, &self.last);
        // These are no counts.
        let image_bytes = self.last.image_bytes.max(self.before.image_bytes);
        JobHere { running: self.last.running, image_bytes, ..all }
    }
}

fn sum(one: &JobHere, other: &JobHere) -> JobHere {
    JobHere {
        running: one.running.saturating_add(other.running),
        forked: one.forked.saturating_add(other.forked),
        local: one.local.saturating_add(other.local),
        remote: one.remote.saturating_add(other.remote),
        settled: one.settled.saturating_add(other.settled),
        wire_bytes: one.wire_bytes.saturating_add(other.wire_bytes),
        image_bytes: one.image_bytes.max(other.image_bytes),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::api::wire::JobOnNode;
    use crate::cli::job::samples;

    fn here(forked: u64, remote: u64, wire_bytes: u64) -> Option<JobHere> {
        Some(JobHere { forked, remote, wire_bytes, running: 1, image_bytes: 100, local: forked - remote, ..JobHere::default() })
    }

    fn answer(nodes: &[(u128, Option<JobHere>)]) -> JobAnswer {
        let on = |(id, here): &(u128, Option<JobHere>)| JobOnNode {
            node: NodeId::from_uuid(Uuid::from_u128(*id)),
            name: format!("node-{id}"),
            placed: 1,
            succeeded: 2,
            failed: 0,
            here: *here,
        };
        JobAnswer { nodes: nodes.iter().map(on).collect(), ..samples::job(10, 4, 0) }
    }

    #[test]
    fn a_node_that_does_not_answer_counts_as_before() {
        let mut tally = Tally::default();
        tally.take(&answer(&[(1, here(5, 0, 0)), (2, here(3, 3, 40))]), Duration::ZERO);
        tally.take(&answer(&[(1, here(6, 0, 0)), (2, None)]), Duration::from_secs(1));
        let all = tally.all();
        assert_eq!((all.forked, all.local, all.remote, all.wire_bytes, all.running), (9, 6, 3, 40, 2));
        assert_eq!(tally.whole_copies(), (1, 100));
        tally.take(&answer(&[(2, None)]), Duration::from_secs(2));
        assert_eq!(tally.all().forked, 9, "also one that is not listed");
    }

    #[test]
    fn a_node_that_was_restarted_counts_on() {
        let mut tally = Tally::default();
        for (second, forked) in [(0, 5), (1, 7), (2, 2), (3, 4), (4, 1)] {
            tally.take(&answer(&[(2, here(forked, forked, forked * 10))]), Duration::from_secs(second));
        }
        let all = tally.all();
        assert_eq!((all.forked, all.remote, all.wire_bytes), (7 + 4 + 1, 12, 120));
        assert_eq!((all.running, all.image_bytes), (1, 100), "what is no count is as it was said last");
    }

    #[test]
    fn forks_a_second_are_those_of_late() {
        let mut tally = Tally::default();
        assert_eq!(tally.forks_a_second(), 0);
        for (ms, forked) in [(0, 0), (500, 50), (1_000, 100)] {
            tally.take(&answer(&[(1, here(forked, 0, 0))]), Duration::from_millis(ms));
        }
        assert_eq!(tally.forks_a_second(), 100);
        for second in 2..10 {
            tally.take(&answer(&[(1, here(100, 0, 0))]), Duration::from_secs(second));
        }
        assert_eq!(tally.forks_a_second(), 0);
    }
}
