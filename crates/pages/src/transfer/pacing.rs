//! How fast a source is asked for what no child waits for: a share of what its link was measured to carry.
//!
//! ```text
//!            what arrives while more is outstanding     best of 16 intervals
//! unknown ────────────────────────────────────────▶ link rate ──▶ 7 of 8 intervals at the share, 1 at 125 %
//! window doubles while all of it arrives                          window: twice what is under way at that rate
//! ```
//!
//! An interval adds up trains: arrivals of which each came while more was outstanding. So what a link was idle is not counted,
//! and a paced source does not look slow. Where pacing leaves gaps within a train (a long round trip), the interval at 125 %
//! shows whether the link carries more.

use std::time::Duration;

use types::EXTENT_SIZE;

use super::Config;

/// Most extents in a request.
pub(super) const BATCH_MAX: u64 = 16;
/// Fewest: one alone is no train, and would never be measured.
const BATCH_MIN: u64 = 2;
/// A batch is at most what the link carries in this time, since a demand may have to wait for it.
const BATCH_TIME: Duration = Duration::from_millis(2);
/// An interval is at least so long...
const INTERVAL: Duration = Duration::from_millis(20);
/// ... or has so many bytes.
const INTERVAL_BYTES: u64 = 1 << 20;
/// But never shorter than this, below which the time at which a thread runs is measured, and not the link.
const INTERVAL_MIN: Duration = Duration::from_millis(4);
/// What may be outstanding at first.
const WINDOW_FIRST: u64 = 8 * EXTENT_SIZE;
const SAMPLES: usize = 16;
const PROBE_EVERY: usize = 8;
const PROBE_PERCENT: u64 = 125;

/// The pace of one source.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    share_percent: u64,
    window_max_bytes: u64,
    outstanding_bytes: u64,
    /// What may be outstanding before the rate is known.
    first_window_bytes: u64,
    /// Not before.
    next_send: Duration,
    /// When the last of the running train arrived.
    train: Option<Duration>,
    interval: (u64, Duration),
    samples: [u64; SAMPLES],
    taken: usize,
    /// Shortest time from a request to its first extent, slowly forgotten.
    round_trip: Option<Duration>,
    /// What an extent takes on the wire: less than its size where it is compressed.
    mean_wire_bytes: u64,
}

impl Pace {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            share_percent: config.link_percent,
            window_max_bytes: config.window_max_bytes,
            outstanding_bytes: 0,
            first_window_bytes: WINDOW_FIRST.min(config.window_max_bytes),
            next_send: Duration::ZERO,
            train: None,
            interval: (0, Duration::ZERO),
            samples: [0; SAMPLES],
            taken: 0,
            round_trip: None,
            mean_wire_bytes: EXTENT_SIZE,
        }
    }

    /// What the link carries, in bytes a second, once it is known.
    pub(super) fn link_bytes_per_second(&self) -> Option<u64> {
        (self.taken > 0).then(|| self.samples.into_iter().max().unwrap_or(0).max(1))
    }

    pub(super) const fn outstanding_bytes(&self) -> u64 {
        self.outstanding_bytes
    }

    /// How many extents the next request may have.
    pub(super) fn batch(&self) -> u64 {
        let fits = match self.link_bytes_per_second() {
            Some(rate) => carried(rate, BATCH_TIME) / self.mean_wire_bytes,
            None => self.first_window_bytes / (2 * EXTENT_SIZE),
        };
        fits.clamp(BATCH_MIN, BATCH_MAX)
    }

    /// From when on a batch may be sent; `None` if too much is outstanding.
    pub(super) fn next_send(&self) -> Option<Duration> {
        let has_room =
            self.outstanding_bytes == 0 || self.outstanding_bytes + self.batch() * EXTENT_SIZE <= self.window_bytes();
        has_room.then_some(self.next_send)
    }

    /// A request for so many extents was sent.
    pub(super) fn sent(&mut self, now: Duration, extents: u64) {
        self.outstanding_bytes += extents * EXTENT_SIZE;
        if let Some(rate) = self.link_bytes_per_second() {
            let is_probe = self.taken % PROBE_EVERY == PROBE_EVERY - 1;
            let percent = if is_probe { PROBE_PERCENT } else { self.share_percent };
            let nanos = u128::from(extents * self.mean_wire_bytes) * 100_000_000_000 / u128::from(rate * percent);
            // Whoever was called late catches up, but not with more than a batch.
            let from = self.next_send.max(now.saturating_sub(BATCH_TIME));
            self.next_send = from + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }

    /// An extent arrived; `round_trip` if it is the first of its request.
    pub(super) fn arrived(&mut self, now: Duration, wire_bytes: u32, round_trip: Option<Duration>) {
        let bytes = u64::from(wire_bytes);
        self.mean_wire_bytes = ((self.mean_wire_bytes * 7 + bytes) / 8).max(1);
        if let Some(time) = round_trip {
            self.round_trip = Some(self.round_trip.map_or(time, |shortest| time.min(shortest + shortest / 32)));
        }
        if let Some(last) = self.train.replace(now) {
            self.interval.0 += bytes;
            self.interval.1 += now.saturating_sub(last);
            let (bytes, time) = self.interval;
            if time >= INTERVAL || (bytes >= INTERVAL_BYTES && time >= INTERVAL_MIN) {
                let rate = u128::from(bytes) * 1_000_000_000 / time.as_nanos();
                self.samples[self.taken % SAMPLES] = u64::try_from(rate).unwrap_or(u64::MAX);
                self.taken += 1;
                self.interval = (0, Duration::ZERO);
            }
        }
        self.first_window_bytes = (self.first_window_bytes + EXTENT_SIZE).min(self.window_max_bytes);
    }

    /// So many extents are not awaited any more, for whatever reason.
    pub(super) fn left(&mut self, extents: u64) {
        self.outstanding_bytes -= extents * EXTENT_SIZE;
        if self.outstanding_bytes == 0 {
            self.train = None;
        }
    }

    fn window_bytes(&self) -> u64 {
        let Some(rate) = self.link_bytes_per_second() else { return self.first_window_bytes };
        let under_way = carried(rate, self.round_trip.unwrap_or(BATCH_TIME));
        // Counted in whole extents, whatever they take on the wire.
        let scale = |bytes: u64| u128::from(bytes) * u128::from(EXTENT_SIZE) / u128::from(self.mean_wire_bytes);
        let window = u64::try_from(2 * scale(under_way)).unwrap_or(u64::MAX).saturating_add(2 * self.batch() * EXTENT_SIZE);
        window.min(self.window_max_bytes)
    }
}

/// The bytes that a link of `rate` bytes a second carries in `time`.
fn carried(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}
