//! What goes over the wire about other nodes: what of an image is here, who runs children elsewhere, who is trusted.

use serde::{Deserialize, Serialize};
use types::NodeId;
use utoipa::ToSchema;

use crate::node::engine::SourceState;
use crate::node::trust::Role;

/// An image that other nodes hold.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteSource {
    /// Its digest: 64 hex digits.
    #[schema(pattern = "^[0-9a-f]{64}$")]
    pub image: String,
    /// Nodes that hold it, wholly or in part, as `host:port`; 1 to 16.
    pub holders: Vec<String>,
}

/// Another node that runs children.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OtherNode {
    /// Who it is.
    #[schema(value_type = String, format = "uuid")]
    pub node: NodeId,
    /// Where it listens.
    pub address: String,
}

/// What of an image is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Residency {
    /// How much of it is here, in percent: 100 only once it is settled.
    #[schema(maximum = 100)]
    pub settled_percent: u8,
    /// Whether all of it is here and checked.
    pub is_settled: bool,
    /// From opening it until that was so. None of an image that was made or loaded here.
    pub settled_after_us: Option<u64>,
    /// Its memory that is not zero.
    pub data_bytes: u64,
    /// How much of that is here.
    pub resident_bytes: u64,
    /// How much of that is only on other nodes.
    pub remote_bytes: u64,
    /// Faults of children on memory that was not here yet.
    pub faults: u64,
    /// Bytes of extents that came over the wire.
    pub wire_bytes: u64,
    /// Machines that were forked from it here and run.
    pub children: u32,
    /// Where it comes from.
    pub sources: Vec<Source>,
    /// Why its children can no longer be given what they lack, if that is so.
    pub failed: Option<Failed>,
}

/// A node that an image's memory is read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Source {
    /// Where it listens.
    pub address: String,
    /// Who it is, once it has been reached.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub node: Option<NodeId>,
    /// Whether it is asked.
    pub state: SourceState,
    /// Extents of 64 KiB that came from it.
    pub extents: u64,
    /// Their bytes on the wire.
    pub bytes: u64,
    /// Requests that it did not answer as asked.
    pub failures: u64,
}

/// Why an image failed its children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failed {
    /// From the closed list, for programs.
    pub reason: String,
    /// The numbers.
    pub detail: String,
}

/// A node's certificate.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Certificate {
    /// Whose.
    #[schema(value_type = String, format = "uuid")]
    pub node: NodeId,
    /// What that node is in a cluster.
    pub role: Role,
    /// BLAKE3 of the certificate in DER, in hex.
    pub fingerprint: String,
    /// Until when it is valid.
    pub not_after_unix_ms: u64,
    /// The certificate in PEM.
    pub pem: String,
}

/// A node that is trusted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrustedNode {
    /// What it shows.
    pub certificate: Certificate,
    /// Whose images it may read here and have forked here.
    pub tenants: Vec<String>,
}

/// Nodes that are trusted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TrustAnswer {
    /// By id.
    pub nodes: Vec<TrustedNode>,
}

/// Which node to trust.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrustRequest {
    /// Its certificate in PEM; at most 16 KiB.
    pub certificate: String,
    /// Whose images it may read here and have forked here; `default` unless given.
    #[serde(default = "default_tenant")]
    pub tenants: Vec<String>,
}

/// A node's place among others.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NetworkAnswer {
    /// Where it listens for other nodes, if it does.
    pub listening: Option<String>,
    /// How others reach it, if that was given.
    pub advertise: Option<String>,
}

impl Residency {
    /// For people: `yes`, `no: PAGE_SOURCE_LOST`, or how much in percent.
    #[must_use]
    pub fn in_short(&self) -> String {
        match &self.failed {
            Some(Failed { reason, .. }) => format!("no: {reason}"),
            None => settled_in_short(Some(self.settled_percent)),
        }
    }
}

/// For people: `yes`, how much in percent, or `-` if it is not known.
#[must_use]
pub fn settled_in_short(percent: Option<u8>) -> String {
    match percent {
        Some(100) => "yes".to_owned(),
        Some(percent) => format!("{percent} %"),
        None => "-".to_owned(),
    }
}

fn default_tenant() -> Vec<String> {
    vec![types::Tenant::default_tenant().into()]
}
