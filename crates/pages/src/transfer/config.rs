//! The knobs of a transfer.

use std::time::Duration;

use thiserror::Error;

/// How a [`Transfer`](super::Transfer) behaves. The default is for machines that wait for 30 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// How long a waiter waits before it is given up. 30 s. The machine behind it is killed then, so less than what holders
    /// need to come back after a short failure costs children.
    pub deadline: Duration,
    /// The shortest time after which a demand that has no answer goes to another source too. 5 ms. Less, and every hiccup is
    /// paid for twice.
    pub hedge_min: Duration,
    /// The same, as long as too few demands have been answered to know what is usual. 20 ms.
    pub hedge_first: Duration,
    /// The same, as a multiple of the 99th percentile of recent demands. 3.
    pub hedge_factor: u32,
    /// How long a source may send nothing at all while it has been asked. 2 s. What was asked of it then goes elsewhere.
    pub stall: Duration,
    /// How long one request may get nothing while its source answers others. 10 s. A link of 1 Mbit/s takes 8 s for a batch
    /// of 16 extents: below that, slow links never end.
    pub patience: Duration,
    /// How long it is remembered which extents a source did not have, from the first of them on. 250 ms. Then all is forgotten
    /// and asked for again: it may have fetched them itself.
    pub absent_pause: Duration,
    /// How long nothing is streamed after the last demand. 3 ms. A child that faults once faults again: what is streamed in between
    /// is in the way of its next page. Less, and children wait behind the stream; much more, and images settle late.
    pub quiet: Duration,
    /// Failures in a row that make a source suspect: it is asked last. 3.
    pub suspect_after: u32,
    /// How long it stays suspect without another failure or a good answer. 5 s.
    pub suspect_for: Duration,
    /// The most bytes of replay and stream that a source may owe. 8 MiB. More hides what a link can do, and a demand waits
    /// behind it.
    pub window_max_bytes: u64,
    /// One demand in so many goes to another source than the fastest, so that one that became fast is found out; 0 for none.
    /// 64.
    pub explore_one_in: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            hedge_min: Duration::from_millis(5),
            hedge_first: Duration::from_millis(20),
            hedge_factor: 3,
            stall: Duration::from_secs(2),
            patience: Duration::from_secs(10),
            absent_pause: Duration::from_millis(250),
            quiet: Duration::from_millis(3),
            suspect_after: 3,
            suspect_for: Duration::from_secs(5),
            window_max_bytes: 8 << 20,
            explore_one_in: 64,
        }
    }
}

impl Config {
    /// The default with another deadline, and the other times no longer than fits into it.
    #[must_use]
    pub fn with_deadline(deadline: Duration) -> Self {
        let usual = Self::default();
        Self {
            deadline,
            stall: usual.stall.min(deadline / 5),
            patience: usual.patience.min(deadline / 2),
            absent_pause: usual.absent_pause.min(deadline / 10),
            suspect_for: usual.suspect_for.min(deadline),
            ..usual
        }
    }

    /// Checks every knob.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let least_one = [
            ("deadline", self.deadline.is_zero()),
            ("hedge_min", self.hedge_min.is_zero()),
            ("hedge_first", self.hedge_first.is_zero()),
            ("hedge_factor", self.hedge_factor == 0),
            ("stall", self.stall.is_zero()),
            ("patience", self.patience.is_zero()),
            ("absent_pause", self.absent_pause.is_zero()),
            ("suspect_after", self.suspect_after == 0),
            ("window_max_bytes", self.window_max_bytes == 0),
        ];
        if let Some((knob, _)) = least_one.into_iter().find(|(_, is_zero)| *is_zero) {
            return Err(ConfigError::Zero { knob });
        }
        Ok(())
    }
}

/// Why a transfer cannot be run like that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// With 0 it would never ask, or ask for ever.
    #[error("{knob} is 0")]
    Zero {
        /// The field of [`Config`].
        knob: &'static str,
    },
}

impl ConfigError {
    /// What to do about it, in one line.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Zero { .. } => "set it to more than 0, or leave it at its default",
        }
    }
}
