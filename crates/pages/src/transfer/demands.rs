//! Extents that children wait for.
//!
//! ```text
//!                    next in a request           hedge time
//! demand ──┬── that is under way for it ──▶ awaited ───────▶ asked ──hedge time, doubled each time──▶ asked elsewhere too ...
//!          └── otherwise ─────────────────────────────────────▲          each source once, then another round
//!
//! awaited, asked ──┬── published (by whomever) ──▶ all waiters woken, other requests for it cancelled
//!                  ├── absent, failed, wrong ──▶ asked elsewhere at once; if nobody can be: when one can, or is added
//!                  └── a waiter's deadline ──▶ that waiter given up; with the last one the demand ends
//! ```

use std::time::Duration;

use types::ExtentIndex;

use super::{Command, ExtentId, RequestId, SourceId, Timer, Transfer, Urgency, Waiter};

/// The hedge time is doubled at most so often.
const DOUBLINGS_MAX: u32 = 8;

/// Not before something else happens.
const NEVER: Duration = Duration::MAX;

/// An extent that somebody waits for.
#[derive(Clone, Debug, Default)]
pub(super) struct Demand {
    /// Never empty; in the order of their coming.
    waiters: Vec<(Waiter, Duration)>,
    /// Demand requests under way for it, no two to one source.
    requests: Vec<RequestId>,
    /// Whom this round has asked.
    tried: Vec<SourceId>,
    asked: u32,
    next_ask: Duration,
    timer: Duration,
}

/// Who may be asked.
struct Candidates {
    best_first: Vec<SourceId>,
    is_new_round: bool,
    /// When another may be.
    retry_at: Duration,
}

impl Transfer {
    /// Somebody waits for `extent`, which is absent.
    pub(super) fn wait_for(&mut self, extent: ExtentId, waiter: Waiter) {
        let is_new = !self.demands.contains_key(&extent);
        let demand = self.demands.entry(extent).or_default();
        if demand.waiters.iter().any(|(other, _)| *other == waiter) {
            return;
        }
        demand.waiters.push((waiter, self.now));
        self.stats.waited += 1;
        if !is_new {
            return;
        }
        self.stats.demanded += 1;
        self.stream.cursor = ExtentId { extent: ExtentIndex(extent.extent.0.saturating_add(1)), ..extent };
        self.restream(extent);
        let Some(request) = self.bulk.get(&extent).copied() else { return self.ask(extent) };
        self.stats.promoted += 1;
        if !self.requests.is_next(request, extent) {
            return self.ask(extent);
        }
        // It may be on the wire already. Should it not come soon, another source is to be preferred.
        let (source, hedge_after) = (self.requests.source_of(request), self.hedge_after());
        if let Some(demand) = self.demands.get_mut(&extent) {
            demand.tried.extend(source);
            demand.next_ask = self.now + hedge_after;
        }
        self.arm(extent);
    }

    /// Asks the best source that may be asked now; if there is none, later.
    pub(super) fn ask(&mut self, extent: ExtentId) {
        let Some(demand) = self.demands.get(&extent) else { return };
        let candidates = self.candidates(extent, demand);
        let chosen =
            self.explore(candidates.best_first.len()).and_then(|position| candidates.best_first.get(position).copied());
        let asked = chosen.map(|source| (source, self.send(source, vec![extent], Urgency::Demand)));
        let hedge_after = self.hedge_after();
        let Some(demand) = self.demands.get_mut(&extent) else { return };
        demand.next_ask = candidates.retry_at;
        if let Some((source, request)) = asked {
            if candidates.is_new_round {
                demand.tried.clear();
            }
            self.stats.hedged += u64::from(!demand.requests.is_empty());
            demand.tried.push(source);
            demand.requests.push(request);
            demand.next_ask = self.now + hedge_after * (1 << demand.asked.min(DOUBLINGS_MAX));
            demand.asked = demand.asked.saturating_add(1);
        }
        self.arm(extent);
    }

    /// A source was added: what all others have been asked for in vain, or could not be asked for, is asked of it.
    pub(super) fn ask_for_all(&mut self) {
        let is_wanted = |(extent, demand): &(&ExtentId, &Demand)| {
            demand.next_ask == NEVER || (demand.requests.is_empty() && !self.bulk.contains_key(extent))
        };
        let wanted: Vec<ExtentId> = self.demands.iter().filter(is_wanted).map(|(extent, _)| *extent).collect();
        for extent in wanted {
            self.ask(extent);
        }
    }

    /// Asks if nothing is under way for `extent`.
    pub(super) fn ask_if_idle(&mut self, extent: ExtentId) {
        if self.demands.get(&extent).is_some_and(|demand| demand.requests.is_empty()) && !self.bulk.contains_key(&extent) {
            self.ask(extent);
        }
    }

    /// A demand request will not bring `extent`.
    pub(super) fn release_demand(&mut self, request: RequestId, extent: ExtentId) {
        if let Some(demand) = self.demands.get_mut(&extent) {
            demand.requests.retain(|other| *other != request);
            self.ask(extent);
        }
    }

    /// `extent` was published: its waiters go on.
    pub(super) fn wake(&mut self, extent: ExtentId) {
        let Some(demand) = self.demands.get_mut(&extent) else { return };
        let waiters: Vec<Waiter> = demand.waiters.drain(..).map(|(waiter, _)| waiter).collect();
        self.stats.woken += waiters.len() as u64;
        self.commands.push_back(Command::Wake { extent, waiters });
        self.end_demand(extent);
    }

    /// The waiter is gone, whatever it waits for.
    pub(super) fn forget(&mut self, waiter: Waiter) {
        let mut ended = Vec::new();
        for (extent, demand) in &mut self.demands {
            demand.waiters.retain(|(other, _)| *other != waiter);
            if demand.waiters.is_empty() {
                ended.push(*extent);
            }
        }
        for extent in ended {
            self.end_demand(extent);
            self.restream(extent);
        }
    }

    /// The demand's timer fired.
    pub(super) fn check_demand(&mut self, extent: ExtentId) {
        let (now, deadline) = (self.now, self.config.deadline);
        let Some(demand) = self.demands.get_mut(&extent) else { return };
        let due = demand.waiters.partition_point(|(_, since)| *since + deadline <= now);
        if let Some((_, first)) = demand.waiters.first().filter(|_| due > 0) {
            let waited = now.saturating_sub(*first);
            let waiters: Vec<Waiter> = demand.waiters.drain(..due).map(|(waiter, _)| waiter).collect();
            self.stats.given_up += waiters.len() as u64;
            self.commands.push_back(Command::GiveUp { extent, waiters, waited });
        }
        if demand.waiters.is_empty() {
            self.end_demand(extent);
            self.restream(extent);
        } else if demand.next_ask <= now {
            self.ask(extent);
        } else {
            self.arm(extent);
        }
    }

    /// How long a demand may be without answer before another source is asked too.
    pub(super) fn hedge_after(&self) -> Duration {
        let usual = self.latencies.p99().map_or(self.config.hedge_first, |p99| p99 * self.config.hedge_factor);
        // One that takes a fourth of the deadline is not waited for, however usual that is.
        usual.min(self.config.deadline / 4).max(self.config.hedge_min)
    }

    /// Whether a child waits for something that is under way. One that nobody can be asked for now is none: replay and stream
    /// take nothing from it.
    pub(super) fn is_demand_under_way(&self) -> bool {
        // The first is nearly always one.
        self.demands.iter().any(|(extent, demand)| !demand.requests.is_empty() || self.bulk.contains_key(extent))
    }

    /// Who may be asked for `extent` now: those that this round has not asked, or, if it has asked all of them, all.
    fn candidates(&self, extent: ExtentId, demand: &Demand) -> Candidates {
        let under_way: Vec<SourceId> = demand.requests.iter().filter_map(|id| self.requests.source_of(*id)).collect();
        let (mut ranked, mut retry_at) = (Vec::new(), NEVER);
        for (id, source) in self.sources.iter().filter(|(id, _)| !under_way.contains(id)) {
            match source.ready_at().max(source.lacks_until(extent)) {
                at if at > self.now => retry_at = retry_at.min(at),
                _ => ranked.push((source.rank(self.now, &self.config), id)),
            }
        }
        let is_fresh = |(_, id): &(_, SourceId)| !demand.tried.contains(id);
        let is_new_round = !ranked.iter().any(is_fresh);
        if !is_new_round {
            ranked.retain(is_fresh);
        }
        ranked.sort_unstable();
        Candidates { best_first: ranked.into_iter().map(|(_, id)| id).collect(), is_new_round, retry_at }
    }

    /// Nobody waits for `extent` any more. What is under way for it as a demand is cancelled.
    fn end_demand(&mut self, extent: ExtentId) {
        let Some(demand) = self.demands.remove(&extent) else { return };
        self.timers.remove(&(demand.timer, Timer::Demand(extent)));
        for request in &demand.requests {
            if let Some(question) = self.let_go(*request, extent)
                && let Some(source) = self.sources.get_mut(question.source)
            {
                source.takes_longer_than(question.age);
            }
        }
    }

    /// Sets the timer to what comes first: the next question, or the oldest waiter's deadline.
    fn arm(&mut self, extent: ExtentId) {
        let Some(demand) = self.demands.get_mut(&extent) else { return };
        let Some((_, since)) = demand.waiters.first() else { return };
        self.timers.remove(&(demand.timer, Timer::Demand(extent)));
        demand.timer = demand.next_ask.min(*since + self.config.deadline);
        self.timers.insert((demand.timer, Timer::Demand(extent)));
    }

    /// Which of so many candidates, best first: the first, but for one time in some.
    fn explore(&mut self, candidates: usize) -> Option<usize> {
        let is_due = candidates > 1 && self.config.explore_one_in > 0 && self.random.u32(..self.config.explore_one_in) == 0;
        (candidates > 0).then(|| if is_due { self.random.usize(1..candidates) } else { 0 })
    }
}
