//! What a member does while it leads: it proposes what the state needs (see [`control::leader`]), and has the members of the
//! consensus follow the state: nodes that registered are told the log, those that may vote get a vote once they have it, and those
//! that were removed or revoked lose both. One change at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{PoisonError, Weak};
use std::time::Duration;

use control::command::{Command, Refusal};
use control::leader::{Heard, tend};
use control::state::{Life, Role, State};
use control::{Answer, Tick};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{BasicNode, ChangeMembers, RaftMetrics};
use tokio::time::Instant;
use types::NodeId;

use super::consensus::{Inner, Peer};
use super::wire::{Response, Standing};
use super::{Member, Types};

/// How often who leads looks at everything.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Between two looks, however much happens.
const LOOK_AT_MOST_EVERY: Duration = Duration::from_millis(50);
/// How long one look may wait for what it proposes.
const PROPOSE_WITHIN: Duration = Duration::from_secs(3);
/// How long a change of members may take.
const CHANGE_WITHIN: Duration = Duration::from_secs(10);
/// A node whose log is behind by no more gets its vote.
const CAUGHT_UP: u64 = 100;

/// What a leader knows that is not in the state.
pub(super) struct Leading {
    term: u64,
    heard: Heard,
    /// Whether each node may vote, as its certificate says.
    may_vote: BTreeMap<NodeId, bool>,
}

impl Leading {
    fn since(term: u64, now: Tick) -> Self {
        Self { term, heard: Heard::since(now), may_vote: BTreeMap::new() }
    }

    /// A node does what it should. What an earlier start of it says does not count.
    pub(super) fn hear(&mut self, peer: &Peer, incarnation: u64, state: &State, now: Tick) -> Standing {
        self.may_vote.insert(peer.node, peer.is_voter);
        let is_out = state.removed.get(&peer.node).is_some_and(|last| incarnation <= *last);
        match state.nodes.get(&peer.node) {
            Some(node) if node.incarnation == incarnation && node.life != Life::Lost => {
                self.heard.hear(peer.node, now);
                Standing::Known
            }
            Some(node) => Standing::Unknown { above: node.incarnation },
            None if is_out || state.revoked.contains(&peer.node) => Standing::Out,
            None => Standing::Unknown { above: state.removed.get(&peer.node).copied().unwrap_or(0) },
        }
    }
}

/// Looks at everything, for as long as there is a member.
pub(super) async fn run(member: Weak<Inner>) {
    loop {
        tokio::time::sleep(LOOK_AT_MOST_EVERY).await;
        let Some(mut metrics) = member.upgrade().map(|inner| inner.raft.metrics()) else { return };
        // What is agreed on may have made room, or something to place.
        let applied = |metrics: &RaftMetrics<Types>| metrics.last_applied;
        let before = applied(&metrics.borrow_watched());
        let news = async { while applied(&metrics.borrow_watched()) == before && metrics.changed().await.is_ok() {} };
        let _ = tokio::time::timeout(LOOK_EVERY - LOOK_AT_MOST_EVERY, news).await;
        let Some(inner) = member.upgrade() else { return };
        inner.look().await;
    }
}

impl Inner {
    async fn look(&self) {
        let now = self.now();
        let metrics = self.raft.metrics().borrow_watched().clone();
        if metrics.running_state.is_err() || metrics.current_leader != Some(self.me) || !metrics.state.is_leader() {
            *self.leading.lock().unwrap_or_else(PoisonError::into_inner) = None;
            return;
        }
        if self.begin_term(metrics.current_term, now).await.is_none() {
            return;
        }
        let (heard, may_vote) = match &*self.leading.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(leading) => (leading.heard.clone(), leading.may_vote.clone()),
            None => return,
        };
        let state = self.machine.state();
        let roles = may_vote.iter().filter_map(|(id, may_vote)| {
            let role = if *may_vote { Role::Voter } else { Role::Learner };
            (state.nodes.get(id)?.role != role).then_some(Command::SetRole { node: *id, role })
        });
        let commands: Vec<Command> = roles.chain(tend(&state, &heard, now)).collect();
        let deadline = Instant::now() + PROPOSE_WITHIN;
        let proposed = commands.into_iter().map(|command| async move {
            let said = command.to_string();
            match self.write(None, command, deadline).await {
                Response::Answered(Answer::Refused(refusal)) => log_refusal(&said, &refusal),
                Response::Answered(_) => tracing::info!(command = said, "agreed on"),
                // Another one leads by now, or it is looked at again.
                _ => {}
            }
        });
        futures_util::future::join_all(proposed).await;
        self.align(&state, &metrics, &may_vote).await;
    }

    /// The first look of a term comes when everything has been applied that was agreed on before it.
    async fn begin_term(&self, term: u64, now: Tick) -> Option<()> {
        let is_new =
            self.leading.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(|leading| leading.term != term);
        if is_new {
            let linearizable = self.raft.ensure_linearizable(openraft::raft::ReadPolicy::ReadIndex);
            tokio::time::timeout(PROPOSE_WITHIN, linearizable).await.ok()?.ok()?;
            tracing::info!(term, "this node leads");
            *self.leading.lock().unwrap_or_else(PoisonError::into_inner) = Some(Leading::since(term, now));
        }
        Some(())
    }

    async fn align(&self, state: &State, metrics: &RaftMetrics<Types>, may_vote: &BTreeMap<NodeId, bool>) {
        let Some((change, keeps_node)) = wanted(state, metrics, may_vote) else { return };
        tracing::info!(?change, "members of the consensus change");
        let changed = tokio::time::timeout(CHANGE_WITHIN, self.raft.change_membership(change, keeps_node)).await;
        match changed {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the members did not change"),
            Err(_) => tracing::warn!("the members did not change in time"),
        }
    }
}

/// The next change of members, and whether who loses its vote is still told the log.
fn wanted(
    state: &State,
    metrics: &RaftMetrics<Types>,
    may_vote: &BTreeMap<NodeId, bool>,
) -> Option<(ChangeMembers<Member, BasicNode>, bool)> {
    let stored = &metrics.membership_config;
    let membership = stored.membership();
    let voters: BTreeSet<Member> = membership.voter_ids().collect();
    let behind = |member: &Member| {
        let matched = metrics.replication.as_ref()?.get(member)?.as_ref()?.index;
        Some(metrics.last_log_index.unwrap_or(0).saturating_sub(matched))
    };
    for (member, _) in membership.nodes() {
        if !state.nodes.contains_key(&member.0) && !is_registering(state, *member, metrics) {
            let who = BTreeSet::from([*member]);
            // The last vote is not taken away: nobody could ever decide anything again.
            return match voters.contains(member) {
                true if voters.len() > 1 => Some((ChangeMembers::RemoveVoters(who), false)),
                true => None,
                false => Some((ChangeMembers::RemoveNodes(who), false)),
            };
        }
    }
    for (id, node) in &state.nodes {
        let (member, address) = (Member(*id), node.facts.address.to_string());
        let known = membership.get_node(&member);
        if known.is_none() {
            return Some((ChangeMembers::AddNodes(BTreeMap::from([(member, BasicNode::new(address))])), true));
        }
        if known.is_some_and(|known| known.addr != address) {
            return Some((ChangeMembers::SetNodes(BTreeMap::from([(member, BasicNode::new(address))])), true));
        }
        let is_caught_up = behind(&member).is_some_and(|behind| behind <= CAUGHT_UP);
        match may_vote.get(id) {
            Some(true) if !voters.contains(&member) && node.life == Life::Up && is_caught_up => {
                return Some((ChangeMembers::AddVoterIds(BTreeSet::from([member])), true));
            }
            Some(false) if voters.contains(&member) && voters.len() > 1 => {
                return Some((ChangeMembers::RemoveVoters(BTreeSet::from([member])), true));
            }
            _ => {}
        }
    }
    None
}

/// Who began the cluster is a member before it is in the state.
fn is_registering(state: &State, member: Member, metrics: &RaftMetrics<Types>) -> bool {
    member == metrics.id && !state.revoked.contains(&member.0) && !state.removed.contains_key(&member.0)
}

fn log_refusal(command: &str, refusal: &Refusal) {
    tracing::debug!(command, %refusal, "not agreed on");
}
