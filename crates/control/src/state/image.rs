//! Images, and who holds them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use types::{CpuProfile, Digest, Epoch, NodeId, Tenant};

use crate::clock::Tick;

/// An image of a tenant: the same bytes of two tenants are two images, which share nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageKey {
    /// Whose.
    pub tenant: Tenant,
    /// Its name everywhere.
    pub digest: Digest,
}

/// What is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What never changes.
    pub facts: ImageFacts,
    /// Who has it, wholly or in part.
    pub holders: BTreeMap<NodeId, Holder>,
    /// Since when nobody has all of it.
    pub stranded: Option<Tick>,
    /// Since when no template and no job refers to it.
    pub unneeded: Option<Tick>,
}

/// What of an image never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// The CPU that it was made on.
    pub profile: CpuProfile,
    /// Its memory that is not zero, in bytes: what a host needs to hold it.
    pub data_bytes: u64,
    /// What a child touches first, in bytes.
    pub working_set_bytes: u64,
    /// What a child is expected to write, in bytes: what it is admitted by unless its job says otherwise.
    pub dirty_bytes: u64,
}

/// A node that has an image, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Of the order to have it, or to let it go: what is reported of another order does not count.
    pub epoch: Epoch,
    /// How much of it is there; 100 once it is settled.
    pub percent: u8,
    /// Whom it reads from while it is not settled, the first one first.
    pub sources: Vec<NodeId>,
    /// Whether it keeps it.
    pub hold: Hold,
}

/// A holder's promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// It has to keep it.
    Kept,
    /// It may let go of it, and says when it has. Nothing new relies on it.
    LetGo,
}

impl Holder {
    /// Whether all of it is there.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.percent == 100
    }

    /// Whether something new may rely on it.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.hold == Hold::Kept
    }
}

impl Image {
    /// Nodes that have all of it, and keep it.
    pub fn settled(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.holders.iter().filter(|(_, holder)| holder.is_settled() && holder.is_kept()).map(|(node, _)| *node)
    }

    /// Nodes that read it from this one, or may have to.
    pub fn readers_of(&self, source: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        self.holders.iter().filter(move |(_, holder)| holder.sources.contains(&source)).map(|(node, _)| *node)
    }
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = self.digest.to_string();
        write!(f, "{}/{}", self.tenant, &digest[..12])
    }
}
