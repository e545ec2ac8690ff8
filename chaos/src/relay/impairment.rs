//! What may go wrong with a datagram on its way, and in which direction.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

/// Which way a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From a client to the server.
    ToUpstream,
    /// From the server to a client.
    ToClient,
}

/// What is done to the datagrams of one direction. The default does nothing.
///
/// Chances are drawn for each datagram, independently of one another; a datagram that is lost is not duplicated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Impairment {
    /// How long each datagram takes.
    pub delay: Duration,
    /// At most how much longer it takes, drawn uniformly. Datagrams that are nearer to each other than this overtake one another.
    pub jitter: Duration,
    /// Lost.
    pub loss: Probability,
    /// Delivered twice. The second copy is intact, and draws its own jitter.
    pub duplicate: Probability,
    /// Held back for `hold_back`, so that those that come after it overtake it.
    pub reorder: Probability,
    /// For how long, besides what others take. Default: 1 ms.
    pub hold_back: Duration,
    /// Delivered with one bit flipped.
    pub corrupt: Probability,
    /// How many bytes a second go through; shared by all flows of the direction, like a cable.
    pub rate: Option<Rate>,
    /// Nothing comes through. What is on its way already does.
    pub is_blocked: bool,
}

impl Default for Impairment {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: Probability::NEVER,
            duplicate: Probability::NEVER,
            reorder: Probability::NEVER,
            hold_back: Duration::from_millis(1),
            corrupt: Probability::NEVER,
            rate: None,
            is_blocked: false,
        }
    }
}

impl Impairment {
    /// A direction that is cut.
    #[must_use]
    pub fn blocked() -> Self {
        Self { is_blocked: true, ..Self::default() }
    }
}

/// How often something happens: from 0, never, to 1, always.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probability(f64);

impl Probability {
    /// Happens to none.
    pub const NEVER: Self = Self(0.0);
    /// Happens to each.
    pub const ALWAYS: Self = Self(1.0);

    /// # Errors
    /// [`ProbabilityError`] if `chance` is not between 0 and 1.
    pub fn new(chance: f64) -> Result<Self, ProbabilityError> {
        if (0.0..=1.0).contains(&chance) { Ok(Self(chance)) } else { Err(ProbabilityError(chance.to_string())) }
    }

    /// From 0 to 1.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }

    /// Whether it happens, for a `draw` from [0, 1).
    pub(super) fn happens(self, draw: f64) -> bool {
        draw < self.0
    }
}

impl FromStr for Probability {
    type Err = ProbabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let chance = text.parse().map_err(|_| ProbabilityError(text.to_owned()))?;
        Self::new(chance)
    }
}

impl fmt::Display for Probability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// No probability.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0} is no probability: it must be from 0 (never) to 1 (always)")]
pub struct ProbabilityError(String);

/// A token bucket with a bounded queue before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many bytes go through in a second; payload of UDP, without headers. At least one does.
    pub bytes_per_second: u64,
    /// How many bytes go at once after a pause.
    pub burst_bytes: u64,
    /// How many bytes wait; what comes when they do not fit is dropped.
    pub queue_bytes: u64,
}

impl Rate {
    /// This rate, with a burst of 16 KiB and a queue of 50 ms or 64 KiB, whichever is more.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, burst_bytes: 16 << 10, queue_bytes: (bytes_per_second / 20).max(64 << 10) }
    }
}
