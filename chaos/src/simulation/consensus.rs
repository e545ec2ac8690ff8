//! What consensus promises, without how: one order of entries; an entry that is committed stays; one that is not may vanish with
//! its leader; answers may be late or lost. Leaders that are cut off do not know it for a while.

use std::rc::Rc;

use control::apply::{Flaws, apply_with};
use control::leader::{Heard, tend};
use control::validate::validate;
use control::{Answer, Command, Entry, Key, State, Tick};

use super::{Flaw, World};

/// How often a leader sees to things.
const TEND_EVERY_MS: u64 = 250;

/// See the module.
pub(super) struct Consensus {
    voters: usize,
    flaws: Flaws,
    answers_early: bool,
    entries: Vec<Entry>,
    answers: Vec<Answer>,
    /// After so many entries.
    states: Vec<Rc<State>>,
    /// What each node has applied.
    pub(super) applied: Vec<usize>,
    leader: Option<Leader>,
    /// Since when nobody who could leads, and until when that stays so.
    election: Option<Tick>,
    pending: Vec<Pending>,
    mail: Vec<Mail>,
    /// What is wrong with a state, if something is.
    pub(super) invalid: Option<String>,
}

struct Leader {
    node: usize,
    heard: Heard,
    next_tend: Tick,
}

/// Proposed to the leader, not committed yet.
struct Pending {
    entry: Entry,
    from: Option<(usize, u64)>,
    commits_at: Tick,
    /// Sent twice by the network.
    again: bool,
}

/// An answer on its way.
struct Mail {
    to: usize,
    ticket: u64,
    answer: Answer,
    arrives: Tick,
}

impl Consensus {
    pub(super) fn new(voters: usize, flaws: Flaws, answers_early: bool) -> Self {
        Self {
            voters,
            flaws,
            answers_early,
            entries: Vec::new(),
            answers: Vec::new(),
            states: vec![Rc::new(State::default())],
            applied: vec![0; voters],
            leader: None,
            election: None,
            pending: Vec::new(),
            mail: Vec::new(),
            invalid: None,
        }
    }

    /// The latest.
    pub(super) fn state(&self) -> &State {
        self.states.last().expect("at least the first")
    }

    pub(super) fn state_after(&self, entries: usize) -> Rc<State> {
        Rc::clone(&self.states[entries])
    }

    pub(super) fn entry(&self, index: usize) -> (&Entry, &Answer) {
        (&self.entries[index], &self.answers[index])
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// What the node sees: as far as it has applied.
    pub(super) fn seen_by(&self, node: usize) -> Rc<State> {
        self.state_after(self.applied[node])
    }

    pub(super) fn leader(&self) -> Option<usize> {
        self.leader.as_ref().map(|leader| leader.node)
    }

    /// A node that is not the leader's passes it on. Nothing says that it has arrived but an answer. `ticket` is for that.
    pub(super) fn propose(&mut self, world: &mut World, from: usize, key: Option<Key>, command: Command, ticket: u64) {
        let Some(leader) = self.leader().filter(|leader| world.reaches(from, *leader) && world.runs(*leader)) else { return };
        if world.dice.u8(..) < 5 {
            return;
        }
        let delay = world.dice.u64(5..80);
        let entry = Entry { at: Tick(0), key, command };
        // A request may be sent twice by who passes it on, and may be slow.
        let again = world.dice.u8(..) < 8;
        let slow = if world.dice.u8(..) < 4 { world.dice.u64(0..20_000) } else { 0 };
        let commits_at = Tick(world.now.0 + delay + slow);
        if self.answers_early {
            // As it is about to be.
            let mut ahead = State::clone(self.state());
            let answer = apply_with(&mut ahead, &Entry { at: world.now, ..entry.clone() }, self.flaws);
            self.answer(world, leader, (from, ticket), answer);
        }
        self.pending.push(Pending { entry, from: Some((from, ticket)), commits_at, again });
    }

    /// Answers that have come.
    pub(super) fn collect(&mut self, world: &World) -> Vec<(u64, Answer)> {
        let (come, left): (Vec<Mail>, Vec<Mail>) =
            std::mem::take(&mut self.mail).into_iter().partition(|mail| mail.arrives <= world.now);
        self.mail = left;
        // A node that is down hears nothing.
        come.into_iter().filter(|mail| world.runs(mail.to)).map(|mail| (mail.ticket, mail.answer)).collect()
    }

    /// A linearizable read from a node: how many entries it has seen. `None` if no leader can say.
    pub(super) fn read(&self, world: &World, from: usize) -> Option<usize> {
        if world.flaw == Some(Flaw::StaleRead) {
            return Some(self.applied[from]);
        }
        let leader = self.leader().filter(|leader| world.runs(*leader) && world.reach_each_other(from, *leader))?;
        self.has_majority(world, leader).then_some(self.len())
    }

    pub(super) fn hear(&mut self, world: &World, from: usize) {
        if let Some(leader) = self.leader.as_mut().filter(|leader| world.reaches(from, leader.node)) {
            leader.heard.hear(world.agents[from].id, world.time_of(leader.node));
        }
    }

    pub(super) fn step(&mut self, world: &mut World) {
        self.elect(world);
        self.commit(world);
        self.replicate(world);
        self.tend(world);
    }

    fn has_majority(&self, world: &World, leader: usize) -> bool {
        let with = (0..self.voters).filter(|voter| world.runs(*voter) && world.reach_each_other(leader, *voter));
        with.count() * 2 > self.voters
    }

    fn elect(&mut self, world: &mut World) {
        let is_good = self.leader().is_some_and(|leader| world.runs(leader) && self.has_majority(world, leader));
        if is_good {
            self.election = None;
            return;
        }
        let now = world.now;
        let until = *self.election.get_or_insert_with(|| Tick(now.0 + world.dice.u64(1500..4000)));
        if until > now {
            return;
        }
        self.election = None;
        let able: Vec<usize> = (0..self.voters).filter(|node| world.runs(*node) && self.has_majority(world, *node)).collect();
        let Some(leader) = (!able.is_empty()).then(|| able[world.dice.usize(..able.len())]) else { return };
        // What the one before had not committed is there on the new one, or is not.
        let kept: Vec<Pending> = std::mem::take(&mut self.pending).into_iter().filter(|_| world.dice.bool()).collect();
        self.pending = kept.into_iter().map(|pending| Pending { from: None, commits_at: now, ..pending }).collect();
        // It has applied everything that was committed before it leads.
        self.applied[leader] = self.len();
        self.leader = Some(Leader { node: leader, heard: Heard::since(world.time_of(leader)), next_tend: now });
    }

    fn commit(&mut self, world: &mut World) {
        let Some(leader) = self.leader().filter(|leader| world.runs(*leader) && self.has_majority(world, *leader)) else {
            return;
        };
        let (due, left) = std::mem::take(&mut self.pending).into_iter().partition(|pending| pending.commits_at <= world.now);
        self.pending = left;
        let due: Vec<Pending> = due;
        for Pending { mut entry, from, again, .. } in due {
            // By the clock of whoever leads, when it was proposed.
            entry.at = Tick(world.time_of(leader).0.saturating_sub(world.dice.u64(0..300)));
            for _ in 0..=usize::from(again) {
                let answer = self.append(&entry);
                if let Some(from) = from.filter(|_| !self.answers_early) {
                    self.answer(world, leader, from, answer);
                }
            }
        }
        self.applied[leader] = self.len();
    }

    fn append(&mut self, entry: &Entry) -> Answer {
        let mut state = State::clone(self.state());
        let answer = apply_with(&mut state, entry, self.flaws);
        if let Err(invalid) = validate(&state) {
            self.invalid.get_or_insert_with(|| format!("after {entry}: {invalid}"));
        }
        self.entries.push(entry.clone());
        self.answers.push(answer.clone());
        self.states.push(Rc::new(state));
        answer
    }

    fn answer(&mut self, world: &mut World, leader: usize, (to, ticket): (usize, u64), answer: Answer) {
        // Not over a way that is cut, and sometimes not at all, or late.
        if ticket != 0 && world.reaches(leader, to) && world.dice.u8(..) > 8 {
            let late = if world.dice.u8(..) < 10 { world.dice.u64(0..10_000) } else { 0 };
            let arrives = Tick(world.now.0 + world.dice.u64(1..50) + late);
            self.mail.push(Mail { to, ticket, answer, arrives });
        }
    }

    fn replicate(&mut self, world: &mut World) {
        let Some(leader) = self.leader() else { return };
        for node in 0..self.voters {
            let is_reached = world.runs(node) && world.runs(leader) && world.reach_each_other(leader, node);
            if is_reached && world.dice.u8(..) < 150 {
                let behind = self.len() - self.applied[node];
                self.applied[node] += world.dice.usize(0..=behind);
            }
        }
    }

    fn tend(&mut self, world: &mut World) {
        let now = world.now;
        let Some(leader) = self.leader.as_mut().filter(|leader| world.runs(leader.node) && leader.next_tend <= now) else {
            return;
        };
        leader.next_tend = Tick(now.0 + TEND_EVERY_MS);
        let (node, heard) = (leader.node, leader.heard.clone());
        // What is on its way is not proposed a second time.
        if self.pending.iter().any(|pending| pending.from.is_none()) {
            return;
        }
        let time = world.time_of(node);
        for command in tend(&self.seen_by(node), &heard, time) {
            let commits_at = Tick(now.0 + world.dice.u64(5..80));
            let entry = Entry { at: time, key: None, command };
            self.pending.push(Pending { entry, from: None, commits_at, again: false });
        }
    }

    /// Whether the same entries make the same state again, also from a state in the middle that was written and read.
    pub(super) fn check_replay(&self) -> Result<(), String> {
        let middle = self.len() / 2;
        let bytes = postcard::to_stdvec(&*self.states[middle]).map_err(|error| error.to_string())?;
        let mut state: State = postcard::from_bytes(&bytes).map_err(|error| error.to_string())?;
        for (entry, answer) in self.entries[middle..].iter().zip(&self.answers[middle..]) {
            let again = apply_with(&mut state, entry, self.flaws);
            if again != *answer {
                return Err(format!("replaying {entry} was answered {again:?}, and {answer:?} the first time"));
            }
        }
        if state.hash() == self.state().hash() { Ok(()) } else { Err("the same entries made another state".to_owned()) }
    }

    pub(super) fn last_entries(&self, count: usize) -> Vec<String> {
        let from = self.len().saturating_sub(count);
        let lines = (from..self.len()).map(|index| format!("{index}: {} -> {:?}", self.entries[index], self.answers[index]));
        lines.collect()
    }
}
