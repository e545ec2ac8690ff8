//! The holders that can be asked.
//!
//! ```text
//!        add                 failures in a row                    a good answer, or time
//! unknown ──▶ good ────────────────────────────────▶ suspect ──────────────────────────────▶ good
//!              │ └──────────── remove ───────────────── │ ──▶ unknown
//!              └──────────── bytes did not verify ──────┴──▶ quarantined, for good
//! ```
//!
//! A suspect is asked when no good source can be, so it has a way back. Whoever fails again and again is asked ever more rarely,
//! so that a source that refuses at once keeps nobody busy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::pacing::Pace;
use super::set::Extents;
use super::{Config, ExtentId, SourceId, SourceStats, Urgency};

/// After the second failure in a row, doubled with each further one.
const BACK_OFF_FIRST: Duration = Duration::from_millis(10);
const BACK_OFF_DOUBLINGS_MAX: u32 = 6;

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources {
    known: BTreeMap<SourceId, Source>,
    quarantined: BTreeSet<SourceId>,
}

impl Sources {
    /// Returns whether it is new and may be asked.
    pub(super) fn add(&mut self, id: SourceId, config: &Config) -> bool {
        let is_new = !self.quarantined.contains(&id) && !self.known.contains_key(&id);
        if is_new {
            self.known.insert(id, Source::new(config));
        }
        is_new
    }

    pub(super) fn remove(&mut self, id: SourceId) -> Option<Source> {
        self.known.remove(&id)
    }

    pub(super) fn quarantine(&mut self, id: SourceId) {
        self.known.remove(&id);
        self.quarantined.insert(id);
    }

    pub(super) fn get(&self, id: SourceId) -> Option<&Source> {
        self.known.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: SourceId) -> Option<&mut Source> {
        self.known.get_mut(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SourceId, &Source)> {
        self.known.iter().map(|(id, source)| (*id, source))
    }
}

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// Asked first if unknown, since nothing else makes it known.
    latency: Option<Duration>,
    failures_in_a_row: u32,
    failed_at: Duration,
    /// When anything came from it.
    pub(super) progress: Duration,
    /// What it said that it does not have, and until when that is believed.
    lacks: Option<(Extents, Duration)>,
    /// Of that, what it said when somebody waited. What a holder has not got yet itself it fetches for those, but not for a
    /// stream, so what it does not have for the stream is still asked of it when somebody waits.
    lacks_for_all: BTreeSet<ExtentId>,
    pub(super) pace: Pace,
    pub(super) extents: u64,
    pub(super) wire_bytes: u64,
    failures: u64,
    absent_answers: u64,
}

impl Source {
    fn new(config: &Config) -> Self {
        Self {
            latency: None,
            failures_in_a_row: 0,
            failed_at: Duration::ZERO,
            progress: Duration::ZERO,
            lacks: None,
            lacks_for_all: BTreeSet::new(),
            pace: Pace::new(config),
            extents: 0,
            wire_bytes: 0,
            failures: 0,
            absent_answers: 0,
        }
    }

    /// An extent of it was published.
    pub(super) fn was_good(&mut self, wire_bytes: u32) {
        self.failures_in_a_row = 0;
        self.extents += 1;
        self.wire_bytes += u64::from(wire_bytes);
    }

    /// A request of that time failed. All that are under way when a connection breaks are one failure.
    pub(super) fn has_failed(&mut self, now: Duration, sent: Duration) {
        self.failures += 1;
        if self.failures_in_a_row == 0 || sent >= self.failed_at {
            self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
            self.failed_at = now;
        }
    }

    /// It answered a demand within `latency`.
    pub(super) fn has_taken(&mut self, latency: Duration) {
        self.latency = Some(self.latency.map_or(latency, |mean| (mean * 7 + latency) / 8));
    }

    /// It has not answered a demand within `latency`.
    pub(super) fn takes_longer_than(&mut self, latency: Duration) {
        if self.latency.is_none_or(|mean| mean < latency) {
            self.has_taken(latency);
        }
    }

    /// It does not have `extent`, not even for those who wait if it was asked for them. `all` is any set of the image's extents.
    pub(super) fn does_not_have(&mut self, extent: ExtentId, urgency: Urgency, all: &Extents, now: Duration, config: &Config) {
        self.absent_answers += 1;
        self.forget_old(now);
        let (lacks, _) = self.lacks.get_or_insert_with(|| (all.none_of(), now + config.absent_pause));
        lacks.insert(extent);
        if urgency != Urgency::Stream {
            self.lacks_for_all.insert(extent);
        }
    }

    /// What it is not to be asked for while nobody waits.
    pub(super) fn lacks(&self) -> Option<&Extents> {
        self.lacks.as_ref().map(|(lacks, _)| lacks)
    }

    /// Until when it is not to be asked for `extent`, even if somebody waits.
    pub(super) fn lacks_until(&self, extent: ExtentId) -> Duration {
        self.lacks.as_ref().filter(|_| self.lacks_for_all.contains(&extent)).map_or(Duration::ZERO, |(_, until)| *until)
    }

    /// When it is next to be asked again for something that it did not have.
    pub(super) fn lacks_any_until(&self) -> Option<Duration> {
        self.lacks.as_ref().map(|(_, until)| *until)
    }

    /// It may have got since what it did not have.
    pub(super) fn forget_old(&mut self, now: Duration) {
        if self.lacks.take_if(|(_, until)| *until <= now).is_some() {
            self.lacks_for_all.clear();
        }
    }

    /// Not before then, for whatever it is.
    pub(super) fn ready_at(&self) -> Duration {
        match self.failures_in_a_row {
            0 | 1 => Duration::ZERO,
            more => self.failed_at + BACK_OFF_FIRST * (1 << (more - 2).min(BACK_OFF_DOUBLINGS_MAX)),
        }
    }

    /// Until when it is asked last.
    pub(super) fn suspect_until(&self, config: &Config) -> Duration {
        if self.failures_in_a_row < config.suspect_after { Duration::ZERO } else { self.failed_at + config.suspect_for }
    }

    /// What to choose by, the least first.
    pub(super) fn rank(&self, now: Duration, config: &Config) -> (bool, Duration) {
        (now < self.suspect_until(config), self.latency.unwrap_or(Duration::ZERO))
    }

    pub(super) fn stats(&self, now: Duration, config: &Config) -> SourceStats {
        SourceStats {
            extents: self.extents,
            wire_bytes: self.wire_bytes,
            failures: self.failures,
            absent_answers: self.absent_answers,
            latency: self.latency,
            link_bytes_per_second: self.pace.link_bytes_per_second(),
            outstanding_bytes: self.pace.outstanding_bytes(),
            is_suspect: now < self.suspect_until(config),
        }
    }
}
