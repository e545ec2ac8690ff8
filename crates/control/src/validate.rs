//! What is true of every state. Looked at after each entry in debug builds and in the simulation.

use thiserror::Error;
use types::NodeId;

use crate::apply::REMEMBERED;
use crate::state::{ImageKey, JobId, Life, State, Task};

/// What is not true of a state.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum Invalid {
    #[error("node {node} was asked for more than it has")]
    Overfull { node: NodeId },
    #[error("node {node} was revoked or removed, and is a member")]
    Revoked { node: NodeId },
    #[error("node {node} holds image {key}, and is gone")]
    HolderGone { node: NodeId, key: ImageKey },
    #[error("node {node} has {percent} % of image {key}, and {sources} sources")]
    Sources { node: NodeId, key: ImageKey, percent: u8, sources: usize },
    #[error("node {node} reads image {key} from {source_node}, which does not keep it")]
    SourceGone { node: NodeId, key: ImageKey, source_node: NodeId },
    #[error("node {node} reads image {key} in a circle")]
    Circle { node: NodeId, key: ImageKey },
    #[error("an order about image {key} has an epoch that was never drawn")]
    Epoch { key: ImageKey },
    #[error("the lease of node {node} has an epoch that was never drawn, or has run out")]
    Lease { node: NodeId },
    #[error("image {key} is said to be stranded, or unneeded, and is not, or the other way round")]
    Since { key: ImageKey },
    #[error("nobody holds image {key}, and nothing needs it")]
    Nobodys { key: ImageKey },
    #[error("a template points at image {key}, which is not known")]
    Dangling { key: ImageKey },
    #[error("the tasks of job {job} are not what they should be")]
    Tasks { job: JobId },
    #[error("job {job} has a task on node {node}, which is gone, or does not have its image")]
    TaskNowhere { job: JobId, node: NodeId },
    #[error("job {job} has ended, and its tasks have not, or the other way round")]
    End { job: JobId },
    #[error("an answer is remembered for longer than it should be")]
    Keys,
    #[error("node {node} was replaced, and is not revoked, or by itself")]
    Replaced { node: NodeId },
}

/// Checks all of it.
///
/// # Errors
/// The first thing that is not true.
pub fn validate(state: &State) -> Result<(), Invalid> {
    let (claims, needed) = (state.claims(), state.needed());
    for (id, node) in &state.nodes {
        if node.lease.is_some_and(|lease| lease.epoch > state.epoch || lease.until <= state.time) {
            return Err(Invalid::Lease { node: *id });
        }
        if state.revoked.contains(id) || state.removed.contains_key(id) {
            return Err(Invalid::Revoked { node: *id });
        }
        if !claims.get(id).copied().unwrap_or_default().fits(node.facts.capacity) && node.life != Life::Lost {
            return Err(Invalid::Overfull { node: *id });
        }
    }
    let is_there = |node: &NodeId| state.nodes.get(node).is_some_and(|node| node.life != Life::Lost);
    for (key, image) in &state.images {
        if image.holders.is_empty() && !needed.contains(key) {
            return Err(Invalid::Nobodys { key: key.clone() });
        }
        let is_right =
            image.stranded.is_some() == image.settled().next().is_none() && image.unneeded.is_some() != needed.contains(key);
        if !is_right {
            return Err(Invalid::Since { key: key.clone() });
        }
        for (id, holder) in &image.holders {
            if !is_there(id) {
                return Err(Invalid::HolderGone { node: *id, key: key.clone() });
            }
            let sources = holder.sources.len();
            if sources > 0 && (holder.is_settled() || !holder.is_kept()) || holder.percent > 100 {
                return Err(Invalid::Sources { node: *id, key: key.clone(), percent: holder.percent, sources });
            }
            if holder.epoch > state.epoch {
                return Err(Invalid::Epoch { key: key.clone() });
            }
            let keeps = |source: &&NodeId| image.holders.get(source).is_some_and(|source| source.is_kept());
            if let Some(source) = holder.sources.iter().find(|source| !keeps(source)) {
                return Err(Invalid::SourceGone { node: *id, key: key.clone(), source_node: *source });
            }
            // Somewhere the way ends: at one that has all of it, or at one whose sources are gone.
            let mut at = *id;
            for step in 0..=image.holders.len() {
                let Some(next) = image.holders.get(&at).and_then(|holder| holder.sources.first()) else { break };
                if step == image.holders.len() {
                    return Err(Invalid::Circle { node: *id, key: key.clone() });
                }
                at = *next;
            }
        }
    }
    for ((tenant, _), digest) in &state.templates {
        let key = ImageKey { tenant: tenant.clone(), digest: *digest };
        if !state.images.contains_key(&key) {
            return Err(Invalid::Dangling { key });
        }
    }
    for (id, job) in &state.jobs {
        if !job.tasks.is_well_formed() || job.tasks.count() != job.spec.count {
            return Err(Invalid::Tasks { job: *id });
        }
        if job.ended.is_some() != job.tasks.are_done() {
            return Err(Invalid::End { job: *id });
        }
        for (_, task) in job.tasks.iter() {
            if let Task::Placed { node, epoch, .. } = task {
                let has_image = state.images.get(&job.spec.image).is_some_and(|image| image.holders.contains_key(&node));
                if !is_there(&node) || !has_image || epoch > state.epoch {
                    return Err(Invalid::TaskNowhere { job: *id, node });
                }
            }
        }
    }
    if let Some((node, _)) = state.replaced.iter().find(|(old, new)| !state.revoked.contains(old) || new.by == **old) {
        return Err(Invalid::Replaced { node: *node });
    }
    if state.keys.values().any(|remembered| state.time - remembered.at >= REMEMBERED) {
        return Err(Invalid::Keys);
    }
    Ok(())
}
