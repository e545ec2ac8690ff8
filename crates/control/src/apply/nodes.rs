//! Rules about nodes.

use std::time::Duration;

use types::{Digest, Epoch, Name, NodeId, Reason};

use super::{Flaws, Outcomes, TOKEN_TERM, images, jobs};
use crate::command::{Answer, Refusal};
use crate::state::{
    CapacityLease, Hold, Holder, ImageFacts, ImageKey, Life, Node, NodeFacts, Replaced, Resources, Role, State, Task, Token,
};

/// The longest that a node may start machines without asking.
const LEASE_MAX: Duration = Duration::from_secs(60 * 60);

pub(super) fn register(
    state: &mut State,
    id: NodeId,
    incarnation: u64,
    facts: &NodeFacts,
    images: &[(ImageKey, ImageFacts)],
) -> Outcomes {
    if state.revoked.contains(&id) {
        return Err(Refusal::Revoked(id));
    }
    if let Some(last) = state.removed.get(&id).filter(|last| incarnation <= **last) {
        return Err(Refusal::OldStart { node: id, given: incarnation, current: *last });
    }
    let before = state.nodes.get(&id);
    if let Some(node) = before {
        match incarnation.cmp(&node.incarnation) {
            std::cmp::Ordering::Less => {
                return Err(Refusal::OldStart { node: id, given: incarnation, current: node.incarnation });
            }
            // Said twice.
            std::cmp::Ordering::Equal if node.life != Life::Lost => return Ok(Answer::Done),
            std::cmp::Ordering::Equal => return Err(Refusal::GivenUp(id)),
            std::cmp::Ordering::Greater => {}
        }
    }
    check_name(state, &facts.name, id)?;
    let before = state.nodes.get(&id);
    let role = before.map_or(Role::Learner, |node| node.role);
    // One that was forgotten since begins anew.
    let lost = state.replaced.values().find(|lost| lost.by == id && !state.removed.contains_key(&id));
    let lost = lost.map_or((false, false), |lost| (lost.is_cordoned, lost.is_draining));
    let (is_cordoned, is_draining) = before.map_or(lost, |node| (node.is_cordoned, node.is_draining));
    lose(state, id);
    state.removed.remove(&id);
    let (facts, registered) = (facts.clone(), state.time);
    let node = Node {
        facts,
        life: Life::Up,
        incarnation,
        registered,
        role,
        is_cordoned,
        is_draining,
        lease: None,
        local: Resources::default(),
    };
    state.nodes.insert(id, node);
    for (key, facts) in images {
        let epoch = state.draw_epoch();
        // What the cluster has forgotten meanwhile is not taken up again: the node is told to let go of it.
        if let Some(image) = state.images.get_mut(key).filter(|image| image.facts == *facts) {
            image.holders.insert(id, Holder { epoch, percent: 100, sources: Vec::new(), hold: Hold::Kept });
        }
    }
    Ok(Answer::Done)
}

fn check_name(state: &State, name: &Name, id: NodeId) -> Result<(), Refusal> {
    let is_taken = state.nodes.iter().any(|(other, node)| *other != id && node.facts.name == *name);
    if is_taken { Err(Refusal::NameTaken(name.clone())) } else { Ok(()) }
}

pub(super) fn add_token(state: &mut State, token: Digest, name: &Name, role: Role) -> Outcomes {
    if state.nodes.values().any(|node| node.facts.name == *name) {
        return Err(Refusal::NameTaken(name.clone()));
    }
    let until = state.time + TOKEN_TERM;
    state.tokens.entry(token).or_insert(Token { name: name.clone(), role, until, used_by: None });
    Ok(Answer::Done)
}

pub(super) fn use_token(state: &mut State, token: Digest, (id, proven): (NodeId, Digest), name: &Name) -> Outcomes {
    check_new(state, id)?;
    check_name(state, name, id)?;
    let token = state.tokens.get_mut(&token).filter(|token| token.used_by.is_none_or(|by| by == (id, proven)));
    let token = token.ok_or(Refusal::BadToken)?;
    if token.name != *name {
        return Err(Refusal::OtherName(token.name.clone()));
    }
    token.used_by = Some((id, proven));
    Ok(Answer::Admitted(token.role))
}

/// Ids are drawn by whoever asks: none gets another's.
fn check_new(state: &State, id: NodeId) -> Result<(), Refusal> {
    if state.revoked.contains(&id) {
        return Err(Refusal::Revoked(id));
    }
    let is_promised = state.replaced.values().any(|lost| lost.by == id);
    if is_promised || state.nodes.contains_key(&id) || state.removed.contains_key(&id) {
        return Err(Refusal::NodeExists(id));
    }
    Ok(())
}

pub(super) fn heard(state: &mut State, id: NodeId, incarnation: u64) -> Outcomes {
    let node = check_start(state, id, incarnation)?;
    node.life = Life::Up;
    Ok(Answer::Done)
}

pub(super) fn suspect(state: &mut State, id: NodeId, incarnation: u64) -> Outcomes {
    let node = check_start(state, id, incarnation)?;
    node.life = Life::Suspect;
    Ok(Answer::Done)
}

pub(super) fn give_up(state: &mut State, id: NodeId, incarnation: u64) -> Outcomes {
    let node = check_start(state, id, incarnation)?;
    // It was heard again after the leader made up its mind.
    if node.life == Life::Suspect {
        node.life = Life::Lost;
        lose(state, id);
    }
    Ok(Answer::Done)
}

pub(super) fn change(state: &mut State, id: NodeId, change: impl FnOnce(&mut Node)) -> Outcomes {
    change(state.nodes.get_mut(&id).ok_or(Refusal::UnknownNode(id))?);
    Ok(Answer::Done)
}

pub(super) fn revoke(state: &mut State, id: NodeId) -> Outcomes {
    // Also one that is not known: it may be about to join.
    state.revoked.insert(id);
    lose(state, id);
    state.nodes.remove(&id);
    // What it was allowed to read carried epochs up to this one.
    state.draw_epoch();
    Ok(Answer::Done)
}

/// Whether a node that has lost its log may come back as another one, with this key, and as what. It may ask again.
///
/// # Errors
/// [`Refusal`].
pub fn check_replace(state: &State, old: NodeId, (new, proven): (NodeId, Digest)) -> Result<Role, Refusal> {
    if let Some(lost) = state.replaced.get(&old) {
        if (lost.by, lost.proven) != (new, proven) {
            return Err(Refusal::Replaced { node: old, by: lost.by });
        }
        return match (state.revoked.contains(&new), state.removed.contains_key(&new)) {
            (true, _) => Err(Refusal::Revoked(new)),
            (_, true) => Err(Refusal::UnknownNode(new)),
            _ => Ok(lost.role),
        };
    }
    if state.revoked.contains(&old) {
        return Err(Refusal::Revoked(old));
    }
    let node = state.nodes.get(&old).ok_or(Refusal::UnknownNode(old))?;
    check_new(state, new)?;
    // Also one that a token has let in under that id, and that has not registered yet.
    if state.tokens.values().any(|token| token.used_by.is_some_and(|(by, _)| by == new)) {
        return Err(Refusal::NodeExists(new));
    }
    let is_other_voter = |(id, node): (&NodeId, &Node)| *id != old && node.role == Role::Voter;
    if node.role == Role::Voter && !state.nodes.iter().any(is_other_voter) {
        return Err(Refusal::LastVoter(old));
    }
    Ok(node.role)
}

pub(super) fn replace(state: &mut State, old: NodeId, (new, proven): (NodeId, Digest)) -> Outcomes {
    let role = check_replace(state, old, (new, proven))?;
    if let Some(&Node { is_cordoned, is_draining, .. }) = state.nodes.get(&old) {
        state.replaced.insert(old, Replaced { by: new, proven, role, is_cordoned, is_draining });
        // It may have voted, and does not know how: nothing under that id counts any more.
        revoke(state, old)?;
    }
    Ok(Answer::Admitted(role))
}

pub(super) fn remove(state: &mut State, id: NodeId) -> Outcomes {
    let node = state.nodes.get(&id).ok_or(Refusal::UnknownNode(id))?;
    let has_images = state.images.values().any(|image| image.holders.contains_key(&id));
    let has_tasks = state.jobs.values().any(|job| jobs::has_tasks_on(job, id));
    let has_machines = node.local.machines > 0;
    if node.life != Life::Lost && (has_images || has_tasks || has_machines || node.lease.is_some()) {
        return Err(Refusal::Busy(id));
    }
    let last = node.incarnation;
    state.nodes.remove(&id);
    state.removed.insert(id, last);
    Ok(Answer::Done)
}

pub(super) fn grant(state: &mut State, id: NodeId, incarnation: u64, all: Resources, lasts_ms: u64, flaws: Flaws) -> Outcomes {
    let node = check_start(state, id, incarnation)?;
    if !node.is_open() {
        return Err(Refusal::Closed(id));
    }
    // By the time that this is agreed on more may have been told of than who asked had seen.
    let resources = all.less(node.local);
    let before = node.lease.take();
    let free = state.free(id, &state.usage());
    if !resources.fits(free) && !flaws.leases_what_is_taken {
        state.nodes.get_mut(&id).expect("just seen").lease = before;
        return Err(Refusal::Full(id));
    }
    let (epoch, until) = (state.draw_epoch(), state.time + Duration::from_millis(lasts_ms).min(LEASE_MAX));
    let node = state.nodes.get_mut(&id).expect("just seen");
    node.lease = Some(CapacityLease { epoch, resources, base: node.local, until });
    Ok(Answer::Granted(epoch))
}

pub(super) fn give_back(state: &mut State, id: NodeId, epoch: Epoch) -> Outcomes {
    let node = state.nodes.get_mut(&id).ok_or(Refusal::UnknownNode(id))?;
    node.lease = node.lease.filter(|lease| lease.epoch != epoch);
    Ok(Answer::Done)
}

/// A node of which this is the start that counts.
pub(super) fn check_start(state: &mut State, id: NodeId, incarnation: u64) -> Result<&mut Node, Refusal> {
    let node = state.nodes.get_mut(&id).ok_or(Refusal::UnknownNode(id))?;
    if node.incarnation != incarnation {
        return Err(Refusal::OldStart { node: id, given: incarnation, current: node.incarnation });
    }
    if node.life == Life::Lost {
        return Err(Refusal::GivenUp(id));
    }
    Ok(node)
}

/// Whatever was on a node is not there any more.
fn lose(state: &mut State, id: NodeId) {
    if let Some(node) = state.nodes.get_mut(&id) {
        node.lease = None;
    }
    state.images.values_mut().for_each(|image| images::forget_holder(image, id));
    for job in state.jobs.values_mut().filter(|job| job.ended.is_none()) {
        let retries = job.spec.retries;
        job.tasks.change(0..job.spec.count, |task| match task {
            Task::Placed { node, .. } if node == id => jobs::tried(task, Reason::NodeLost.into(), None, retries),
            other => other,
        });
    }
}
