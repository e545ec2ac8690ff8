//! How fast a source is asked for what no child waits for: as fast as nothing piles up on its way.
//!
//! ```text
//! round trip ── no longer than the shortest and a little ──▶ window: half an extent more a round trip; doubled at first
//!            ── longer: something waits on the way ────────▶ window: as much less as it was longer, a round trip
//! ```
//!
//! What piles up is what a demand has to wait for, so round trips count, not the rate: that is measured by when a thread has
//! looked at what arrived, and comes out too high as easily as too low. A share of a rate that is too high fills every queue.

use std::time::Duration;

use types::EXTENT_SIZE;

use super::{Config, Urgency};

/// Most extents in a request.
const BATCH_MAX: u64 = 16;
/// How much longer than the shortest a round trip may take before something waits on the way. Less is how late threads run.
const QUEUE: Duration = Duration::from_micros(500);
/// The same for what is replayed, which children will wait for. A holder that is still fetching it itself takes that much longer.
const QUEUE_REPLAY: Duration = Duration::from_millis(10);
/// The shortest round trip is found anew after so long, since routes change; with one request outstanding, so that nothing of
/// this source's own is in the way.
const ROUND_TRIP_AGE: Duration = Duration::from_secs(5);
/// An interval is at least so long...
const INTERVAL: Duration = Duration::from_millis(20);
/// ... or has so many bytes.
const INTERVAL_BYTES: u64 = 1 << 20;
/// But never shorter than this, below which the time at which a thread runs is measured, and not the link.
const INTERVAL_MIN: Duration = Duration::from_millis(4);
/// What may be outstanding at first.
const WINDOW_FIRST: u64 = 8 * EXTENT_SIZE;
const SAMPLES: usize = 8;
/// What is compressed comes sooner: round trips are compared with those of extents that took about as much on the wire.
const SIZES: usize = 8;

/// The pace of one source.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    window_max_bytes: u64,
    outstanding_bytes: u64,
    window_bytes: u64,
    /// Nothing has ever waited on the way.
    is_starting: bool,
    /// When the round trip began whose requests are being looked at, and how much longer than the shortest the luckiest took.
    round: Duration,
    luckiest: Duration,
    /// The shortest time from a request to its first extent, by its size on the wire.
    round_trips: [Option<Duration>; SIZES],
    /// When they were found anew, and since when they are being found anew again.
    measured: Duration,
    measuring_since: Option<Duration>,
    /// Since when something has been outstanding, or the last of it arrived.
    busy: Duration,
    interval: (u64, Duration),
    samples: [u64; SAMPLES],
    taken: usize,
}

impl Pace {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            window_max_bytes: config.window_max_bytes,
            outstanding_bytes: 0,
            window_bytes: WINDOW_FIRST.min(config.window_max_bytes),
            is_starting: true,
            round: Duration::ZERO,
            luckiest: Duration::MAX,
            round_trips: [None; SIZES],
            measured: Duration::ZERO,
            measuring_since: None,
            busy: Duration::ZERO,
            interval: (0, Duration::ZERO),
            samples: [0; SAMPLES],
            taken: 0,
        }
    }

    /// What the link carries, in bytes a second, once it is known.
    pub(super) fn link_bytes_per_second(&self) -> Option<u64> {
        (self.taken > 0).then(|| self.samples.into_iter().max().unwrap_or(0).max(1))
    }

    pub(super) const fn outstanding_bytes(&self) -> u64 {
        self.outstanding_bytes
    }

    /// How many extents the next request may have. Up to half of the window, so that the next answer is under way when one has come;
    /// few of a large one, since what is asked for at once queues up at once.
    pub(super) fn batch(&self) -> u64 {
        let window = self.window_bytes / EXTENT_SIZE;
        (window / 2).min((window / 8).max(4)).clamp(1, BATCH_MAX)
    }

    /// Whether a batch may be sent.
    pub(super) fn has_room(&self) -> bool {
        let window_bytes = if self.measuring_since.is_some() { 0 } else { self.window_bytes };
        self.outstanding_bytes == 0 || self.outstanding_bytes + self.batch() * EXTENT_SIZE <= window_bytes
    }

    /// A request for so many extents was sent.
    pub(super) fn sent(&mut self, now: Duration, extents: u64) {
        if self.outstanding_bytes == 0 {
            self.busy = now;
        }
        self.outstanding_bytes += extents * EXTENT_SIZE;
    }

    /// An extent arrived; `round_trip` if it is the first of its request.
    pub(super) fn arrived(&mut self, now: Duration, wire_bytes: u32, round_trip: Option<Duration>, urgency: Urgency) {
        // While the window is what limits, a long way looks like a slow link; but not with more outstanding than what arrives.
        if self.outstanding_bytes > EXTENT_SIZE || self.window_bytes == EXTENT_SIZE {
            self.interval.0 += u64::from(wire_bytes);
            self.interval.1 += now.saturating_sub(self.busy);
        }
        self.busy = now;
        let (bytes, time) = self.interval;
        if time >= INTERVAL || (bytes >= INTERVAL_BYTES && time >= INTERVAL_MIN) {
            let rate = u128::from(bytes) * 1_000_000_000 / time.as_nanos();
            self.samples[self.taken % SAMPLES] = u64::try_from(rate).unwrap_or(u64::MAX);
            self.taken += 1;
            self.interval = (0, Duration::ZERO);
        }
        if let Some(time) = round_trip {
            self.adapt(now, time, wire_bytes, if urgency == Urgency::Stream { QUEUE } else { QUEUE_REPLAY });
        }
    }

    /// A request's first answer was that the source does not have it: that measures nothing.
    pub(super) fn has_measured_nothing(&mut self, now: Duration) {
        if self.measuring_since.take().is_some() {
            self.measured = now;
        }
    }

    /// So many extents are not awaited any more, for whatever reason.
    pub(super) fn left(&mut self, extents: u64) {
        self.outstanding_bytes -= extents * EXTENT_SIZE;
    }

    /// What a round trip says about the way.
    fn adapt(&mut self, now: Duration, time: Duration, wire_bytes: u32, queue: Duration) {
        let sent = now.saturating_sub(time);
        if self.measuring_since.is_some_and(|since| sent >= since) {
            // What was asked for alone says what it is now.
            (self.round_trips, self.measured, self.measuring_since) = ([None; SIZES], now, None);
        } else if self.measuring_since.is_none() && now.saturating_sub(self.measured) > ROUND_TRIP_AGE {
            self.measuring_since = Some(now);
        }
        let eighth = EXTENT_SIZE / SIZES as u64;
        let size = usize::try_from(u64::from(wire_bytes) / eighth).unwrap_or(SIZES).min(SIZES - 1);
        let shortest = &mut self.round_trips[size];
        let shortest = *shortest.insert(shortest.map_or(time, |shortest| shortest.min(time)));
        // Of the requests of one round trip some wait for others that were sent at the same time. What even the luckiest waits for
        // has piled up.
        self.luckiest = self.luckiest.min(time - shortest);
        let is_round = sent >= self.round;
        if !is_round {
            return;
        }
        let luckiest = std::mem::replace(&mut self.luckiest, Duration::MAX);
        self.round = now;
        if luckiest > queue {
            self.is_starting = false;
            let longest = (shortest + luckiest).as_nanos();
            let fitting = u128::from(self.window_bytes) * (shortest + queue).as_nanos() / longest;
            let fitting = u64::try_from(fitting).expect("less than it was");
            self.window_bytes = fitting.max(self.window_bytes / 2).max(EXTENT_SIZE);
        } else if self.outstanding_bytes + 2 * self.batch() * EXTENT_SIZE >= self.window_bytes {
            let more = if self.is_starting { self.window_bytes } else { EXTENT_SIZE / 2 };
            self.window_bytes = (self.window_bytes + more).min(self.window_max_bytes);
        }
    }
}
