//! People and programs that ask over HTTPS.

use serde::{Deserialize, Serialize};
use types::{Digest, Tenant};

use crate::clock::Tick;

/// Somebody who may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Of the token, or of the key of the certificate, that shows who it is. Neither is kept itself.
    pub credential: Digest,
    /// What it may ask for.
    pub rights: Rights,
    /// Until when; `None`: until it is removed.
    pub until: Option<Tick>,
}

/// What somebody may ask for, and of whose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// What.
    pub level: Level,
    /// Whose machines and images; `None`: all tenants', and the cluster itself.
    pub tenant: Option<Tenant>,
}

/// What somebody may do. Each may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Look.
    Read,
    /// Fork, run, end machines.
    Submit,
    /// Build and remove templates and images too.
    Admin,
}

impl Rights {
    /// Of who runs a node.
    pub const ALL: Self = Self { level: Level::Admin, tenant: None };

    /// Whether what is of this tenant concerns them.
    #[must_use]
    pub fn covers(&self, tenant: &Tenant) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant)
    }
}
