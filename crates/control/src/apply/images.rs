//! Rules about images, templates and holds.

use std::collections::BTreeMap;

use types::{Digest, Epoch, Name, NodeId, Reason, Tenant};

use super::{Flaws, Outcomes, jobs, nodes};
use crate::command::{Answer, Refusal};
use crate::state::{Hold, Holder, Image, ImageFacts, ImageKey, Resources, State, Task};

pub(super) fn add(state: &mut State, key: &ImageKey, facts: &ImageFacts, id: NodeId, incarnation: u64) -> Outcomes {
    nodes::check_start(state, id, incarnation)?;
    // Drawn before it is known whether it is needed: the image is borrowed from here on.
    let epoch = state.draw_epoch();
    let (holders, now) = (BTreeMap::new(), state.time);
    let new = || Image { facts: facts.clone(), holders, stranded: None, unneeded: Some(now) };
    let image = state.images.entry(key.clone()).or_insert_with(new);
    if image.facts != *facts {
        return Err(Refusal::OtherFacts(key.clone()));
    }
    match image.holders.get(&id) {
        // It may be gone already: a node that has it says so again when it knows that it was let go of.
        Some(holder) if !holder.is_kept() => return Err(Refusal::NotHeld { node: id, key: key.clone() }),
        Some(holder) if holder.is_settled() => {}
        _ => drop(image.holders.insert(id, Holder { epoch, percent: 100, sources: Vec::new(), hold: Hold::Kept })),
    }
    Ok(Answer::Done)
}

pub(super) fn put_template(state: &mut State, tenant: &Tenant, name: &Name, digest: Digest) -> Outcomes {
    let key = ImageKey { tenant: tenant.clone(), digest };
    let image = state.images.get(&key).ok_or_else(|| Refusal::UnknownImage(key.clone()))?;
    // One that is being let go of by all is as good as gone.
    if !image.holders.values().any(Holder::is_kept) {
        return Err(Refusal::UnknownImage(key));
    }
    state.templates.insert((tenant.clone(), name.clone()), digest);
    Ok(Answer::Done)
}

pub(super) fn remove_template(state: &mut State, tenant: &Tenant, name: &Name) -> Outcomes {
    let removed = state.templates.remove(&(tenant.clone(), name.clone()));
    removed.map(|_| Answer::Done).ok_or_else(|| Refusal::UnknownTemplate(name.clone()))
}

/// `usage`: what is taken of each node, which this adds to: of many that are opened at once it is not reckoned anew for each.
pub(super) fn open(
    state: &mut State,
    usage: &mut BTreeMap<NodeId, Resources>,
    key: &ImageKey,
    id: NodeId,
    sources: &[NodeId],
    flaws: Flaws,
) -> Outcomes {
    let image = state.images.get(key).ok_or_else(|| Refusal::UnknownImage(key.clone()))?;
    let node = state.nodes.get(&id).ok_or(Refusal::UnknownNode(id))?;
    let bad_sources = || Refusal::BadSources { key: key.clone() };
    let is_good = |source: &NodeId| *source != id && image.holders.get(source).is_some_and(Holder::is_kept);
    if sources.is_empty() || !sources.iter().all(is_good) {
        return Err(bad_sources());
    }
    match image.holders.get(&id) {
        Some(holder) if !holder.is_kept() => return Err(Refusal::NotHeld { node: id, key: key.clone() }),
        Some(holder) if holder.is_settled() => return Ok(Answer::Done),
        Some(_) => {
            // Others may read from this one: only who has all of it reads from nobody.
            if !sources.iter().all(|source| image.holders[source].is_settled()) {
                return Err(bad_sources());
            }
            let holder = state.images.get_mut(key).and_then(|image| image.holders.get_mut(&id)).expect("just seen");
            holder.sources = sources.to_vec();
        }
        None => {
            if !node.is_open() {
                return Err(Refusal::Closed(id));
            }
            if image.facts.profile.check_resumable_on(&node.facts.profile).is_err() {
                return Err(Refusal::ForeignCpu { node: id, key: key.clone() });
            }
            if !sources.iter().all(|source| leads_to_all(image, *source)) {
                return Err(bad_sources());
            }
            let data_bytes = image.facts.data_bytes;
            if data_bytes > state.free(id, usage).memory_bytes && !flaws.counts_no_capacity {
                return Err(Refusal::Full(id));
            }
            let taken = usage.entry(id).or_default();
            taken.memory_bytes = taken.memory_bytes.saturating_add(data_bytes);
            let epoch = state.draw_epoch();
            let holder = Holder { epoch, percent: 0, sources: sources.to_vec(), hold: Hold::Kept };
            state.images.get_mut(key).expect("just seen").holders.insert(id, holder);
        }
    }
    Ok(Answer::Done)
}

/// Whether who reads from this node gets all of it in the end: it has it, or reads itself from one of which the same is true.
pub(crate) fn leads_to_all(image: &Image, mut node: NodeId) -> bool {
    for _ in 0..=image.holders.len() {
        match image.holders.get(&node) {
            Some(holder) if holder.is_settled() => return true,
            Some(Holder { sources, .. }) if !sources.is_empty() => node = sources[0],
            _ => return false,
        }
    }
    false
}

pub(super) fn let_go(state: &mut State, key: &ImageKey, id: NodeId, flaws: Flaws) -> Outcomes {
    let image = state.images.get(key).ok_or_else(|| Refusal::UnknownImage(key.clone()))?;
    let holder = image.holders.get(&id).ok_or_else(|| Refusal::NotHeld { node: id, key: key.clone() })?;
    if !holder.is_kept() {
        return Ok(Answer::Done);
    }
    if !flaws.drops_holds {
        let readers = image.readers_of(id).count();
        if readers > 0 {
            return Err(Refusal::HasReaders { node: id, key: key.clone(), readers });
        }
        if state.jobs.values().any(|job| job.spec.image == *key && jobs::has_tasks_on(job, id)) {
            return Err(Refusal::Busy(id));
        }
        // One that is not heard may never be again.
        let is_last = holder.is_settled() && !state.settled_and_up(image).any(|other| other != id);
        if is_last && state.needed().contains(key) {
            return Err(Refusal::LastCopy { node: id, key: key.clone() });
        }
    }
    let epoch = state.draw_epoch();
    let holder = state.images.get_mut(key).and_then(|image| image.holders.get_mut(&id)).expect("just seen");
    (holder.epoch, holder.hold) = (epoch, Hold::LetGo);
    holder.sources.clear();
    Ok(Answer::Done)
}

pub(super) fn progress(state: &mut State, id: NodeId, key: &ImageKey, epoch: Epoch, percent: u8) {
    let holder = state.images.get_mut(key).and_then(|image| image.holders.get_mut(&id));
    let Some(holder) = holder.filter(|holder| holder.epoch == epoch && holder.is_kept()) else { return };
    holder.percent = holder.percent.max(percent.min(100));
    if holder.is_settled() {
        holder.sources.clear();
    }
}

pub(super) fn gone(state: &mut State, id: NodeId, key: &ImageKey, epoch: Epoch) {
    let Some(image) = state.images.get_mut(key) else { return };
    if image.holders.get(&id).is_none_or(|holder| holder.epoch != epoch) {
        return;
    }
    forget_holder(image, id);
    // What was to run there of it cannot.
    for job in state.jobs.values_mut().filter(|job| job.spec.image == *key && job.ended.is_none()) {
        let retries = job.spec.retries;
        job.tasks.change(0..job.spec.count, |task| match task {
            Task::Placed { node, .. } if node == id => jobs::tried(task, Reason::PageSourceLost.into(), None, retries),
            other => other,
        });
    }
}

/// A node does not have an image any more, so nobody reads it from there.
pub(super) fn forget_holder(image: &mut Image, id: NodeId) {
    image.holders.remove(&id);
    image.holders.values_mut().for_each(|holder| holder.sources.retain(|source| *source != id));
}
