//! All that a cluster agrees on. It changes by [`apply`](crate::apply::apply) alone, the same way on every node.

pub mod image;
pub mod job;
pub mod node;
pub mod tasks;
pub mod user;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use types::{Digest, Epoch, Name, NodeId, Tenant};

use crate::clock::Tick;
use crate::command::{Answer, Key};
pub use image::{Hold, Holder, Image, ImageFacts, ImageKey};
pub use job::{About, Job, JobId, JobSpec, Spread, Work};
pub use node::{CapacityLease, Life, Node, NodeFacts, Replaced, Resources, Role, Token};
pub use tasks::{Counts, Outcome, Output, Task, Tasks};
pub use user::{Level, Rights, User};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The latest time that an entry carried.
    pub time: Tick,
    /// The last epoch that was drawn. Every order to a node carries one of its own.
    pub epoch: Epoch,
    /// Members, lost ones too, until they are removed.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Nodes that were removed, with their last start: only a later one joins again.
    pub removed: BTreeMap<NodeId, u64>,
    /// Nodes that may never come back.
    pub revoked: BTreeSet<NodeId>,
    /// What lets a node in, by the digest of its secret, until it is out of date.
    pub tokens: BTreeMap<Digest, Token>,
    /// Images that somebody holds, or that a template or job refers to.
    pub images: BTreeMap<ImageKey, Image>,
    /// Names that point at images.
    pub templates: BTreeMap<(Tenant, Name), Digest>,
    /// Jobs, ended ones too, for a day.
    pub jobs: BTreeMap<JobId, Job>,
    /// What was answered to requests that carried a key, for a day.
    pub keys: BTreeMap<Key, Remembered>,
    /// Nodes that were revoked since they lost their logs, and who each is now.
    pub replaced: BTreeMap<NodeId, Replaced>,
    /// Who may ask over HTTPS.
    pub users: BTreeMap<Name, User>,
}

/// The answer to a request that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// When.
    pub at: Tick,
    /// Which request it was: the same key must not come with another.
    pub request: Digest,
    /// What was answered.
    pub answer: Answer,
}

impl State {
    /// A digest of all of it: the same on every node that has applied the same entries.
    ///
    /// # Panics
    /// Never: states are plain data.
    #[must_use]
    pub fn hash(&self) -> Digest {
        Digest::of(&postcard::to_stdvec(self).expect("states are plain data"))
    }

    /// What of each node was given away: to tasks and capacity leases.
    #[must_use]
    pub fn claims(&self) -> BTreeMap<NodeId, Resources> {
        let mut usage: BTreeMap<NodeId, Resources> = BTreeMap::new();
        for job in self.jobs.values().filter(|job| job.ended.is_none()) {
            for (range, task) in job.tasks.iter() {
                if let Task::Placed { node, .. } = task {
                    let tasks = u64::from(range.end - range.start);
                    *usage.entry(node).or_default() += job.spec.each.times(tasks);
                }
            }
        }
        for (id, node) in &self.nodes {
            *usage.entry(*id).or_default() += node.leased();
        }
        usage
    }

    /// What is taken of each node: what was given away, what else runs there, and the memory of images that are there.
    #[must_use]
    pub fn usage(&self) -> BTreeMap<NodeId, Resources> {
        let mut usage = self.claims();
        for (id, node) in &self.nodes {
            *usage.entry(*id).or_default() += node.own().less(node.leased());
        }
        for image in self.images.values() {
            for node in image.holders.keys() {
                let taken = usage.entry(*node).or_default();
                taken.memory_bytes = taken.memory_bytes.saturating_add(image.facts.data_bytes);
            }
        }
        usage
    }

    /// What is left of a node, given what is taken of it.
    #[must_use]
    pub fn free(&self, node: NodeId, usage: &BTreeMap<NodeId, Resources>) -> Resources {
        let capacity = self.nodes.get(&node).map_or(Resources::default(), |node| node.facts.capacity);
        capacity.less(usage.get(&node).copied().unwrap_or_default())
    }

    /// Images that something refers to: a template, or a job that goes on.
    #[must_use]
    pub fn needed(&self) -> BTreeSet<ImageKey> {
        let by_name = self.templates.iter().map(|((tenant, _), digest)| ImageKey { tenant: tenant.clone(), digest: *digest });
        let by_job = self.jobs.values().filter(|job| job.ended.is_none()).map(|job| job.spec.image.clone());
        by_name.chain(by_job).collect()
    }

    /// Nodes that have all of an image, keep it, and are heard.
    pub fn settled_and_up<'a>(&'a self, image: &'a Image) -> impl Iterator<Item = NodeId> + 'a {
        image.settled().filter(|id| self.nodes.get(id).is_some_and(|node| node.life == Life::Up))
    }

    pub(crate) fn draw_epoch(&mut self) -> Epoch {
        self.epoch.0 += 1;
        self.epoch
    }
}
