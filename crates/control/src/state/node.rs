//! Nodes.

use core::net::SocketAddr;
use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::{Deserialize, Serialize};
use types::{CpuProfile, Digest, Epoch, Name, NodeId};

use crate::clock::Tick;

/// One host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// What it says of itself.
    pub facts: NodeFacts,
    /// Whether it is thought to run.
    pub life: Life,
    /// Its start: what an earlier one reports is refused.
    pub incarnation: u64,
    /// When that was.
    pub registered: Tick,
    /// Its part in the consensus.
    pub role: Role,
    /// Nothing new is placed on it.
    pub is_cordoned: bool,
    /// The same, and what is on it is to go elsewhere.
    pub is_draining: bool,
    /// What it may start without asking.
    pub lease: Option<CapacityLease>,
    /// What machines take there that are no tasks, as it said last.
    pub local: Resources,
}

/// What a node says of itself when it joins or starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// For people.
    pub name: Name,
    /// Where the others reach it.
    pub address: SocketAddr,
    /// What images it can run.
    pub profile: CpuProfile,
    /// For placement: `zone`, and whatever the administrator says.
    pub labels: BTreeMap<String, String>,
    /// What machines may use of it.
    pub capacity: Resources,
}

/// Whether a node is thought to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// It is heard.
    Up,
    /// It was not heard for some seconds: nothing new is placed on it.
    Suspect,
    /// It is given up: what it did is done again, and what it still does does not count.
    Lost,
}

/// A node's part in the consensus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Its vote counts.
    Voter,
    /// It follows.
    Learner,
}

/// What lets a node in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The node's name.
    pub name: Name,
    /// What it is to be.
    pub role: Role,
    /// Until when.
    pub until: Tick,
    /// Who has shown it, and the digest of its key. It may ask again.
    pub used_by: Option<(NodeId, Digest)>,
}

/// Who a node is that has lost its log and was let in again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// Its new id.
    pub by: NodeId,
    /// The digest of its key. It may ask again.
    pub proven: Digest,
    /// What it was, and is again.
    pub role: Role,
    /// Whether it was kept free, as it is again when it registers.
    pub is_cordoned: bool,
    /// The same, and whether what was on it was to go elsewhere.
    pub is_draining: bool,
}

/// A right to start machines without asking, until a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapacityLease {
    /// Its number: it ends with this one, and not with an earlier one's.
    pub epoch: Epoch,
    /// How much.
    pub resources: Resources,
    /// What machines that are no tasks took there when it was granted: what they take from then on is part of it.
    pub base: Resources,
    /// Until when.
    pub until: Tick,
}

/// What machines take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Resources {
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Machines.
    pub machines: u64,
}

impl Resources {
    /// So many times as much.
    #[must_use]
    pub fn times(self, count: u64) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_mul(count),
            cpu_millis: self.cpu_millis.saturating_mul(count),
            machines: self.machines.saturating_mul(count),
        }
    }

    /// What is left when `taken` is taken away.
    #[must_use]
    pub fn less(self, taken: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_sub(taken.memory_bytes),
            cpu_millis: self.cpu_millis.saturating_sub(taken.cpu_millis),
            machines: self.machines.saturating_sub(taken.machines),
        }
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            cpu_millis: self.cpu_millis.max(other.cpu_millis),
            machines: self.machines.max(other.machines),
        }
    }

    /// Whether all of it is within `other`.
    #[must_use]
    pub fn fits(self, other: Self) -> bool {
        self.memory_bytes <= other.memory_bytes && self.cpu_millis <= other.cpu_millis && self.machines <= other.machines
    }

    /// How many times `each` goes into it.
    #[must_use]
    pub fn holds(self, each: Self) -> u64 {
        let of = |all: u64, one: u64| all.checked_div(one).unwrap_or(u64::MAX);
        of(self.memory_bytes, each.memory_bytes).min(of(self.cpu_millis, each.cpu_millis)).min(of(self.machines, each.machines))
    }
}

impl AddAssign for Resources {
    fn add_assign(&mut self, more: Self) {
        self.memory_bytes = self.memory_bytes.saturating_add(more.memory_bytes);
        self.cpu_millis = self.cpu_millis.saturating_add(more.cpu_millis);
        self.machines = self.machines.saturating_add(more.machines);
    }
}

impl Node {
    /// What its lease gives it.
    #[must_use]
    pub fn leased(&self) -> Resources {
        self.lease.map_or(Resources::default(), |lease| lease.resources)
    }

    /// What machines that are no tasks may take of it: what is there, or what it may start without asking on top of what was.
    #[must_use]
    pub fn own(&self) -> Resources {
        let mut leased = self.lease.map_or(Resources::default(), |lease| lease.base);
        leased += self.leased();
        self.local.max(leased)
    }

    /// Whether something new may be placed on it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.life == Life::Up && !self.is_cordoned && !self.is_draining
    }
}
