//! Which extent of a host image is asked for next, of whom, and who is told when it is there. Events in, commands out: no I/O, no
//! clock, no randomness of its own. Time is a `Duration` since any fixed start and never goes back; dice come from a seed.
//!
//! One [`Transfer`] is one image being fetched on one host. The pager drives it: it sends what [`Transfer::poll`] says, verifies
//! and publishes what arrives, reports it, wakes and gives up whom it is told to. An extent goes through
//!
//! ```text
//!            demand: at once        a source's Send          Published, by any request or otherwise
//!  ┌───────▶ replay: in order ─────────────────────▶ under ──────────────────────────────────────────▶ present
//!  │         stream: by address                       way                                                │
//! absent                                               │                                                 │
//!  ▲ ▲                                                 │                                                 │
//!  │ └── Absent, Wrong, ended without it, stalled, ────┘                                                 │
//!  │     source gone: asked for elsewhere                                                                │
//!  └──────────────────────── evicted: then only by demand and replay, until streaming is turned on again ┘
//! ```
//!
//! - **Single flight.** It is under way in at most one replay or stream request, and as a demand at most once per source: a
//!   second time only when a hedge is due, or when it sits behind others in a replay or stream request.
//! - **Demand before replay before stream.** Nothing is streamed while a demand is under way and [`Config::quiet`] longer; the
//!   replay goes on, since it is what would be demanded next.
//! - **Every waiter is told once**: woken, or given up [`Config::deadline`] after it came. Never both, never neither.
//! - **A source that lies is not asked again**, one that fails is asked last, one that does not have an extent is asked for it
//!   again when the others have been and a while has passed.
//!
//! An event costs O(log n); memory is a few bits per extent, and what is under way.
//!
//! | file | holds |
//! |---|---|
//! | `demands` | extents that children wait for: hedging, deadlines |
//! | `bulk` | replay and stream |
//! | `requests` | what is under way, and what has stalled |
//! | `sources`, `pacing`, `latency` | what is known of each holder |
//! | `set` | sets of extents |

mod bulk;
mod command;
mod config;
mod demands;
mod latency;
mod pacing;
mod requests;
mod set;
mod sources;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

use types::ExtentIndex;

use bulk::{Replay, Stream};
pub use command::{Arrival, Command, ExtentId, RequestId, SourceId, SourceStats, Stats, Taken, Urgency, Waiter};
pub use config::{Config, ConfigError};
use demands::Demand;
use latency::Latencies;
use requests::{Question, Requests};
use set::Extents;
use sources::Sources;

/// A region of the image, as this host has it at first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its size.
    pub extents: u32,
    /// What is to be fetched: data that is not here yet. Within the region; whatever else is in it is present.
    pub absent: Vec<Range<u32>>,
}

/// The fetching of one image. See the [module](self).
#[derive(Clone, Debug)]
pub struct Transfer {
    config: Config,
    now: Duration,
    random: fastrand::Rng,
    absent: Extents,
    /// Absent, and not to be streamed.
    evicted: Extents,
    /// What the stream may take next: absent, not evicted, not under way, not demanded.
    streamable: Extents,
    demands: BTreeMap<ExtentId, Demand>,
    /// Under way as replay or stream.
    bulk: BTreeMap<ExtentId, RequestId>,
    replay: Replay,
    stream: Stream,
    requests: Requests,
    sources: Sources,
    latencies: Latencies,
    timers: BTreeSet<(Duration, Timer)>,
    bulk_wake: Option<Duration>,
    /// Nothing is streamed before.
    quiet_until: Duration,
    commands: VecDeque<Command>,
    has_told_settled: bool,
    stats: Stats,
}

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Demand(ExtentId),
    Request(RequestId),
}

impl Transfer {
    /// Nothing is fetched before there is a source, and a demand, a replay or the stream. `seed` is for the choice of sources.
    ///
    /// # Errors
    /// [`ConfigError`] names the knob that cannot be so.
    ///
    /// # Panics
    /// If there are more than 256 regions.
    pub fn new(config: Config, regions: &[Region], seed: u64) -> Result<Self, ConfigError> {
        config.check()?;
        assert!(regions.len() <= 256, "a region's number is a byte");
        let counts: Vec<u32> = regions.iter().map(|region| region.extents).collect();
        let mut absent = Extents::new(&counts);
        for (number, region) in (0..=u8::MAX).zip(regions) {
            for extent in region.absent.iter().cloned().flatten() {
                absent.insert(ExtentId { region: number, extent: ExtentIndex(extent) });
            }
        }
        Ok(Self {
            config,
            now: Duration::ZERO,
            random: fastrand::Rng::with_seed(seed),
            evicted: absent.none_of(),
            streamable: absent.clone(),
            demands: BTreeMap::new(),
            bulk: BTreeMap::new(),
            replay: Replay::new(absent.none_of()),
            stream: Stream::new(),
            absent,
            requests: Requests::default(),
            sources: Sources::default(),
            latencies: Latencies::new(),
            timers: BTreeSet::new(),
            bulk_wake: None,
            quiet_until: Duration::ZERO,
            commands: VecDeque::new(),
            has_told_settled: false,
            stats: Stats::default(),
        })
    }

    /// What to do next. To be called until there is nothing, after each event or after some: replay and stream are decided last.
    pub fn poll(&mut self) -> Option<Command> {
        if self.commands.is_empty() {
            self.pump();
        }
        let is_settled = self.commands.is_empty() && self.absent.is_empty() && !self.has_told_settled;
        self.has_told_settled |= is_settled;
        if is_settled { Some(Command::Settled) } else { self.commands.pop_front() }
    }

    /// When [`tick`](Self::tick) is due, once [`poll`](Self::poll) had nothing more; `None` for not before another event.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        let timer = self.timers.first().map(|(due, _)| *due);
        timer.into_iter().chain(self.bulk_wake).min()
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) {
        self.advance(now);
        while let Some((_, timer)) = self.timers.first().copied().filter(|(due, _)| *due <= self.now) {
            self.timers.pop_first();
            match timer {
                Timer::Demand(extent) => self.check_demand(extent),
                Timer::Request(request) => self.check_stalled(request),
            }
        }
    }

    /// There is a holder that can be asked. Returns whether it will be: one that was quarantined is not, and one that is known
    /// already is no news.
    pub fn add_source(&mut self, now: Duration, source: SourceId) -> bool {
        self.advance(now);
        let is_new = self.sources.add(source, &self.config);
        if is_new {
            self.ask_for_all();
        }
        is_new
    }

    /// A holder is gone: the connection, the lease, or what it had. It may be added again.
    pub fn remove_source(&mut self, now: Duration, source: SourceId) {
        self.advance(now);
        if self.sources.remove(source).is_some() {
            self.cancel_all_of(source);
        }
    }

    /// A child waits for `extent`: it will be woken or given up. The same waiter may ask again and waits no longer for it.
    ///
    /// It is woken at once if the extent is present, and given up at once if the image has no such extent.
    pub fn demand(&mut self, now: Duration, extent: ExtentId, waiter: Waiter) {
        self.advance(now);
        if self.absent.contains(extent) {
            self.wait_for(extent, waiter);
        } else if self.absent.is_within(extent) {
            self.commands.push_back(Command::Wake { extent, waiters: vec![waiter] });
        } else {
            self.commands.push_back(Command::GiveUp { extent, waiters: vec![waiter], waited: Duration::ZERO });
        }
    }

    /// The child is gone: it waits for nothing any more.
    pub fn forget_waiter(&mut self, now: Duration, waiter: Waiter) {
        self.advance(now);
        self.forget(waiter);
    }

    /// These were touched early by other children, in this order. They follow whatever is still to be replayed; those that are
    /// present are left out.
    pub fn replay(&mut self, now: Duration, extents: impl IntoIterator<Item = ExtentId>) {
        self.advance(now);
        for extent in extents {
            if self.absent.contains(extent) {
                self.replay.push(extent);
            }
        }
    }

    /// Turns streaming of everything absent on or off. Turning it on, also again, includes what was evicted before.
    pub fn stream(&mut self, now: Duration, is_on: bool) {
        self.advance(now);
        self.stream.is_on = is_on;
        while is_on && let Some(extent) = self.evicted.pop() {
            self.restream(extent);
        }
    }

    /// An answer came, and was verified and published if it could be.
    pub fn arrived(&mut self, now: Duration, request: RequestId, extent: ExtentId, arrival: Arrival) -> Taken {
        self.advance(now);
        let question = self.question(request, extent);
        if let Some(question) = &question {
            self.judge(question, extent, arrival);
            self.take(request, extent);
        } else {
            self.stats.stale += 1;
        }
        match (arrival, &question) {
            (Arrival::Published { .. }, _) => self.publish(extent),
            (Arrival::Absent, Some(question)) => self.release(request, extent, question.urgency),
            (Arrival::Wrong, Some(question)) => {
                self.quarantine(question.source, extent);
                self.release(request, extent, question.urgency);
            }
            (Arrival::Absent | Arrival::Wrong, None) => {}
        }
        if question.is_some() { Taken::Expected } else { Taken::Stale }
    }

    /// The stream of `request` ended, however: by itself, broken, refused. What it did not answer is asked for elsewhere, and is
    /// held against its source. One that has all its answers is over already.
    pub fn ended(&mut self, now: Duration, request: RequestId) {
        self.advance(now);
        self.fail(request, true);
    }

    /// It was evicted. Fetched again on demand and replay; by the stream only after that is turned on again.
    pub fn is_absent_again(&mut self, now: Duration, extent: ExtentId) {
        self.advance(now);
        if self.absent.insert(extent) {
            self.evicted.insert(extent);
            self.stats.evicted += 1;
            self.has_told_settled = false;
        }
    }

    /// It was found elsewhere: in another image, or it is zero.
    pub fn published_otherwise(&mut self, now: Duration, extent: ExtentId) {
        self.advance(now);
        self.publish(extent);
    }

    /// Whether `extent` is there, as far as was reported.
    #[must_use]
    pub fn is_present(&self, extent: ExtentId) -> bool {
        self.absent.is_within(extent) && !self.absent.contains(extent)
    }

    /// Counters and gauges.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            absent: self.absent.len(),
            demands_now: self.demands.len() as u64,
            requests_now: self.requests.len(),
            hedge_after: self.hedge_after(),
            ..self.stats
        }
    }

    /// What is known of each source that may be asked.
    pub fn sources(&self) -> impl Iterator<Item = (SourceId, SourceStats)> {
        self.sources.iter().map(|(id, source)| (id, source.stats(self.now, &self.config)))
    }

    fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    /// What an answer says about its source.
    fn judge(&mut self, question: &Question, extent: ExtentId, arrival: Arrival) {
        let Some(source) = self.sources.get_mut(question.source) else { return };
        source.progress = self.now;
        match arrival {
            Arrival::Published { wire_bytes } => {
                source.was_good(wire_bytes);
                if question.urgency == Urgency::Demand {
                    source.has_taken(question.age);
                    self.latencies.add(question.age);
                } else {
                    let round_trip = question.is_first.then_some(question.age);
                    source.pace.arrived(self.now, wire_bytes, round_trip, question.urgency);
                }
            }
            Arrival::Absent => {
                self.stats.absent_answers += 1;
                if question.is_first && question.urgency != Urgency::Demand {
                    source.pace.has_measured_nothing(self.now);
                }
                source.does_not_have(extent, question.urgency, &self.absent, self.now, &self.config);
            }
            Arrival::Wrong => {}
        }
    }

    fn publish(&mut self, extent: ExtentId) {
        if !self.absent.remove(extent) {
            return;
        }
        self.stats.published += 1;
        self.evicted.remove(extent);
        self.wake(extent);
        if let Some(request) = self.bulk.remove(&extent) {
            self.let_go(request, extent);
        }
        self.restream(extent);
    }

    fn quarantine(&mut self, source: SourceId, extent: ExtentId) {
        self.sources.quarantine(source);
        self.stats.quarantined += 1;
        self.commands.push_back(Command::Quarantine { source, extent });
        self.cancel_all_of(source);
    }

    fn cancel_all_of(&mut self, source: SourceId) {
        for request in self.requests.of_source(source) {
            self.cancel(request, false);
        }
    }

    /// A request will not bring `extent`: it is to be had elsewhere.
    fn release(&mut self, request: RequestId, extent: ExtentId, urgency: Urgency) {
        match urgency {
            Urgency::Demand => self.release_demand(request, extent),
            Urgency::Replay | Urgency::Stream => self.release_bulk(request, extent, urgency),
        }
    }
}
