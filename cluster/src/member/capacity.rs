//! What this node may start without asking: its capacity lease. Forks that no leader has placed spend it, so that they wait for nobody;
//! placement counts all of it as taken.
//!
//! ```text
//!  one child of an image that is here in whole ──▶ within the lease? ──▶ goes on     no message
//!                      ┌───────────────────────────────────── │ no
//!                      ▼
//!           the cluster places it ──▶ elsewhere
//!                      │ here
//!                      ▼
//!  fork here ──▶ within the lease? ──▶ goes on                                       no message
//!                      │ no
//!                      ▼
//!                GrantCapacity ──▶ granted: what is needed, and some more ──▶ goes on
//!                      │             full: only what is needed; or NO_PLACE
//!                      ▼
//!                nobody decides: goes on. What is cut off is given nothing by the others either
//! ```
//!
//! While it is spent it is renewed; then it runs out. A node that is closed gives it back.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control::State;
use control::command::{Answer, Command, Refusal};
use control::state::Resources;
use types::Epoch;

use super::{ClusterError, EACH_CPU_MILLIS, Membership};

/// How long a lease lasts.
const TERM: Duration = Duration::from_secs(60);
/// What is left of it when it is renewed, if it was spent since.
const RENEW_AT: Duration = Duration::from_secs(40);
/// How long the answer may take: a fork waits for it.
const GRANT_WITHIN: Duration = Duration::from_secs(1);
/// With what is asked for, this share of the node's capacity, so that the next forks find it.
const SPARE_SHARE: u64 = 8;

/// What this node has been given, and what is about to take some of it.
#[derive(Default)]
pub(super) struct Purse {
    inner: Mutex<Inner>,
    /// Locked while more is asked for: two that ask at once would each be given the same.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Inner {
    /// This node's start: a lease is of one.
    incarnation: u64,
    lease: Option<Lease>,
    /// Of forks under way, which nothing else counts yet.
    in_flight: Resources,
}

#[derive(Clone, Copy)]
struct Lease {
    epoch: Epoch,
    /// What machines that are no tasks may take of this node in all.
    allowed: Resources,
    until: Instant,
    is_spent: bool,
}

/// Room for machines that are about to start, until it is dropped: then they are counted where they run.
pub(crate) struct Room<'a> {
    purse: &'a Purse,
    room: Resources,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let mut inner = self.purse.lock();
        inner.in_flight = inner.in_flight.less(self.room);
    }
}

impl Inner {
    /// The lease, if it has so much room beside what runs.
    fn lease_with(&mut self, taken: Resources, room: Resources, now: Instant) -> Option<&mut Lease> {
        let mut wanted = taken;
        wanted += self.in_flight;
        wanted += room;
        self.lease.as_mut().filter(|lease| lease.until > now && wanted.fits(lease.allowed))
    }
}

impl Purse {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This node says of itself that it has started anew: what it had been given is gone.
    pub(super) fn empty(&self, incarnation: u64) {
        let mut inner = self.lock();
        (inner.incarnation, inner.lease) = (incarnation, None);
    }

    /// Takes room if the lease has it. What runs is counted while nobody else takes or leaves a room: what has just begun to run is
    /// counted twice rather than not at all.
    fn take(&self, taken: impl Fn() -> Resources, room: Resources, now: Instant) -> Option<Room<'_>> {
        let mut inner = self.lock();
        inner.lease_with(taken(), room, now)?.is_spent = true;
        inner.in_flight += room;
        Some(Room { purse: self, room })
    }

    /// Whether the lease has room now.
    fn has(&self, taken: impl Fn() -> Resources, room: Resources, now: Instant) -> bool {
        self.lock().lease_with(taken(), room, now).is_some()
    }

    /// What runs, and what is about to.
    fn wanted(&self, taken: impl Fn() -> Resources) -> Resources {
        let inner = self.lock();
        let mut wanted = taken();
        wanted += inner.in_flight;
        wanted
    }

    /// Takes room, whatever there is.
    fn take_anyhow(&self, room: Resources) -> Room<'_> {
        self.lock().in_flight += room;
        Room { purse: self, room }
    }
}

impl Membership {
    /// Takes room for machines of what this node has been leased, if it has some.
    pub(crate) fn room_leased(&self, count: u64, each_bytes: u64, taken: impl Fn() -> Resources) -> Option<Room<'_>> {
        self.purse.take(taken, each(each_bytes).times(count), Instant::now())
    }

    /// Whether it is worth a turn of the engine's to find out how much memory so many machines want.
    pub(crate) fn may_have_room(&self, count: u64, taken: impl Fn() -> Resources) -> bool {
        self.purse.has(taken, each(0).times(count), Instant::now())
    }

    /// Takes room for machines that nobody has placed. `taken` says what those take that run here.
    ///
    /// # Errors
    /// [`ClusterError`] if the cluster has given the room to others, or wants nothing new here.
    pub(crate) async fn room_here(
        &self,
        count: u64,
        each_bytes: u64,
        taken: impl Fn() -> Resources,
    ) -> Result<Room<'_>, ClusterError> {
        let room = each(each_bytes).times(count);
        if let Some(room) = self.purse.take(&taken, room, Instant::now()) {
            return Ok(room);
        }
        let _one_at_a_time = self.purse.asking.lock().await;
        // Who was before may have asked for enough.
        if let Some(room) = self.purse.take(&taken, room, Instant::now()) {
            return Ok(room);
        }
        let held = self.purse.take_anyhow(room);
        match self.ask_for(self.purse.wanted(&taken)).await {
            Ok(()) => Ok(held),
            Err(ClusterError::Refused(Refusal::Full(_))) => {
                let why = format!("{} has given the rest to others", self.name);
                Err(ClusterError::NoPlace { count, left: count, why })
            }
            Err(error @ ClusterError::Refused(Refusal::Closed(_))) => Err(error),
            // Not known there yet, or given up: nothing is placed here meanwhile, and what runs here is told when it is back.
            Err(error) => {
                tracing::debug!(%error, "forked without a lease");
                Ok(held)
            }
        }
    }

    /// Has machines that are no tasks be allowed so much in all, and some more if there is.
    async fn ask_for(&self, needed: Resources) -> Result<(), ClusterError> {
        let state = self.consensus.stale();
        let incarnation = self.purse.lock().incarnation;
        // What the cluster says of an earlier start is out of date.
        let node = state.nodes.get(&self.node).filter(|node| node.incarnation == incarnation);
        let node = node.ok_or(Refusal::UnknownNode(self.node))?;
        let capacity = node.facts.capacity;
        let share = |of: u64| of / SPARE_SHARE;
        let mut generous = needed;
        generous += Resources {
            memory_bytes: share(capacity.memory_bytes),
            cpu_millis: share(capacity.cpu_millis),
            machines: share(capacity.machines),
        };
        let mut last = Refusal::Full(self.node);
        for wanted in [generous, needed] {
            let command = Command::GrantCapacity {
                node: self.node,
                incarnation,
                resources: wanted,
                lasts_ms: u64::try_from(TERM.as_millis()).expect("a minute"),
            };
            // Counted from before it was asked for: it ends here no later than there.
            let until = Instant::now() + TERM;
            match self.consensus.propose(None, command, GRANT_WITHIN).await? {
                Answer::Granted(epoch) => {
                    let mut inner = self.purse.lock();
                    if inner.incarnation == incarnation {
                        inner.lease = Some(Lease { epoch, allowed: wanted, until, is_spent: true });
                    }
                    return Ok(());
                }
                Answer::Refused(refusal @ Refusal::Full(_)) => last = refusal,
                Answer::Refused(refusal) => return Err(refusal.into()),
                // Who leads answers another question: nothing was granted.
                answer => {
                    tracing::warn!(?answer, "no answer to a request for a lease");
                    return Err(Refusal::UnknownNode(self.node).into());
                }
            }
        }
        Err(last.into())
    }

    /// Renews the lease if it is spent, and gives it back if nothing new is wanted here. `taken`: what runs here.
    pub(super) async fn tend_lease(&self, state: &State, taken: Resources) {
        let now = Instant::now();
        let Some(lease) = self.purse.lock().lease else { return };
        let is_open = state.nodes.get(&self.node).is_some_and(control::state::Node::is_open);
        if !is_open || lease.until <= now {
            self.purse.lock().lease = None;
            let command = Command::ReturnCapacity { node: self.node, epoch: lease.epoch };
            if !is_open && let Err(error) = self.consensus.propose(None, command, GRANT_WITHIN).await {
                tracing::debug!(%error, "a lease is not given back: it runs out");
            }
        } else if lease.is_spent && lease.until - now < RENEW_AT {
            let _one_at_a_time = self.purse.asking.lock().await;
            if let Err(error) = self.ask_for(self.purse.wanted(|| taken)).await {
                tracing::debug!(%error, "a lease is not renewed");
            }
            // The next one is renewed if something is forked until then.
            if let Some(lease) = &mut self.purse.lock().lease {
                lease.is_spent = false;
            }
        }
    }
}

/// What one machine is counted as.
pub(super) fn each(memory_bytes: u64) -> Resources {
    Resources { memory_bytes, cpu_millis: EACH_CPU_MILLIS, machines: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines(count: u64) -> Resources {
        Resources { memory_bytes: 1 << 20, cpu_millis: EACH_CPU_MILLIS, machines: 1 }.times(count)
    }

    #[test]
    fn forks_at_once_do_not_spend_a_lease_twice_and_none_is_spent_after_its_end() {
        let purse = Purse::default();
        let now = Instant::now();
        assert!(purse.take(|| machines(0), machines(1), now).is_none(), "there is none");
        assert!(!purse.has(|| machines(0), machines(0), now));
        let lease = Lease { epoch: Epoch(1), allowed: machines(10), until: now + TERM, is_spent: false };
        purse.lock().lease = Some(lease);
        assert!(purse.has(|| machines(4), machines(6), now) && !purse.lock().lease.unwrap().is_spent, "nothing is taken");
        let first = purse.take(|| machines(4), machines(3), now).unwrap();
        assert!(purse.take(|| machines(4), machines(4), now).is_none(), "three are on their way");
        let second = purse.take(|| machines(4), machines(3), now).unwrap();
        assert!(purse.take(|| machines(4), machines(1), now).is_none());
        drop((first, second));
        assert!(purse.take(|| machines(10), machines(1), now).is_none(), "they run, and are counted by who asks");
        assert!(purse.take(|| machines(4), machines(6), now + TERM - Duration::from_millis(1)).is_some());
        assert!(purse.take(|| machines(0), machines(1), now + TERM).is_none());
        assert!(purse.lock().lease.unwrap().is_spent);
    }
}
