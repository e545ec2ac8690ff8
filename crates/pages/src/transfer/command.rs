//! What a transfer is told and what it says: ids, answers, commands, counters. `Display` of a command is a line of the protocol.

use std::fmt;
use std::time::Duration;

pub use crate::wire::{ExtentId, Urgency};

/// A holder that can be asked; numbered by the caller, who never gives a number to another holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub u32);

/// One request to one source; numbered by the transfer, in the order of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Who waits for an extent: a child, or a thread of one; numbered by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Waiter(pub u64);

/// What became of an extent that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It verified and is in memory.
    Published {
        /// What it took on the wire, compressed as it was.
        wire_bytes: u32,
    },
    /// It did not verify.
    Wrong,
    /// That source does not have it.
    Absent,
}

/// Whether an answer was one to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Taken {
    /// It was.
    Expected,
    /// That request is over or never was, or did not ask for that extent, or has had it. Counted in [`Stats::stale`]; bytes
    /// that were published count as published nevertheless.
    Stale,
}

/// What the pager is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ask `source` for `extents`.
    Send {
        /// Name for the answers.
        request: RequestId,
        /// Whom.
        source: SourceId,
        /// 1 to 16 of one region, in the order in which they are wanted.
        extents: Vec<ExtentId>,
        /// Why.
        urgency: Urgency,
    },
    /// Stop the stream of `request`: whatever it would still answer is not wanted.
    Cancel {
        /// Which.
        request: RequestId,
    },
    /// Wake whoever faulted on `extent`: it is in memory.
    Wake {
        /// Which.
        extent: ExtentId,
        /// In the order in which they came.
        waiters: Vec<Waiter>,
    },
    /// `extent` could not be had within the deadline: `waiters` are not woken, whoever owns them ends them.
    GiveUp {
        /// Which.
        extent: ExtentId,
        /// In the order in which they came.
        waiters: Vec<Waiter>,
        /// How long the first of them has waited.
        waited: Duration,
    },
    /// `source` sent bytes that did not verify: it is not asked for anything of this image again.
    Quarantine {
        /// Which.
        source: SourceId,
        /// What it lied about.
        extent: ExtentId,
    },
    /// No extent is absent.
    Settled,
}

/// Counters since the start, and what is outstanding now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Waiters that had to wait.
    pub waited: u64,
    /// Waiters woken; those that found their extent present are not counted in `waited`.
    pub woken: u64,
    /// Waiters given up.
    pub given_up: u64,
    /// Extents demanded while absent.
    pub demanded: u64,
    /// Of these, those that a replay or stream request was under way for.
    pub promoted: u64,
    /// Demand requests sent while another for the same extent was without answer.
    pub hedged: u64,
    /// Extents asked for as replay.
    pub replayed: u64,
    /// Extents asked for as stream.
    pub streamed: u64,
    /// Extents published, whencesoever.
    pub published: u64,
    /// Extents that became absent again.
    pub evicted: u64,
    /// Answers to no question.
    pub stale: u64,
    /// Answers "do not have it".
    pub absent_answers: u64,
    /// Requests that failed, stalled, or ended without all answers.
    pub failures: u64,
    /// Sources set aside for good.
    pub quarantined: u64,
    /// Extents absent now.
    pub absent: u64,
    /// Extents with waiters now.
    pub demands_now: u64,
    /// Requests without an end now.
    pub requests_now: u64,
    /// When a demand without answer would be hedged now.
    pub hedge_after: Duration,
}

/// What is known of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceStats {
    /// Extents that it sent and that were published.
    pub extents: u64,
    /// What these took on the wire.
    pub wire_bytes: u64,
    /// Its part of [`Stats::failures`].
    pub failures: u64,
    /// Its part of [`Stats::absent_answers`].
    pub absent_answers: u64,
    /// Recent latency of its demands; `None` before the first.
    pub latency: Option<Duration>,
    /// What its link carries, in bytes a second; `None` before it is known.
    pub link_bytes_per_second: Option<u64>,
    /// Bytes of replay and stream that it owes.
    pub outstanding_bytes: u64,
    /// Whether it failed so often lately that it is asked last.
    pub is_suspect: bool,
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

impl fmt::Display for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send { request, source, extents, urgency } => {
                write!(f, "send {request} to {source}: {urgency}")?;
                list(f, extents)
            }
            Self::Cancel { request } => write!(f, "cancel {request}"),
            Self::Wake { extent, waiters } => {
                write!(f, "wake at {extent}:")?;
                list(f, waiters)
            }
            Self::GiveUp { extent, waiters, waited } => {
                write!(f, "give up {extent} after {waited:?}:")?;
                list(f, waiters)
            }
            Self::Quarantine { source, extent } => write!(f, "quarantine {source}: {extent} did not verify"),
            Self::Settled => f.write_str("settled"),
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, items: &[impl fmt::Display]) -> fmt::Result {
    items.iter().try_for_each(|item| write!(f, " {item}"))
}
