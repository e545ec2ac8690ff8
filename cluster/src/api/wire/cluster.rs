//! What is said of a cluster.

use serde::{Deserialize, Serialize};
use types::NodeId;
use utoipa::{IntoParams, ToSchema};

use super::Memory;

use crate::node::trust::Role;

/// A cluster, as one of its nodes knows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ClusterAnswer {
    /// The node that answers.
    #[schema(value_type = String, format = "uuid")]
    pub node: NodeId,
    /// The node that leads, if one is known.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub leader: Option<NodeId>,
    /// Nodes, by id.
    pub nodes: Vec<NodeRow>,
    /// The last entry of the log that is in this answer.
    pub applied: Option<u64>,
    /// Milliseconds of the cluster's time.
    pub time_ms: u64,
    /// Whether this is what the node has, which may be behind.
    pub is_stale: bool,
}

/// A node of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NodeRow {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where others reach it.
    pub address: String,
    /// `up`, `suspect` or `lost`.
    pub life: String,
    /// Whether it has a vote.
    pub role: Role,
    /// Whether its vote counts now: a voter gets it once it has the log.
    pub votes: bool,
    /// Nothing new is placed on it.
    pub is_cordoned: bool,
    /// What is on it goes elsewhere.
    pub is_draining: bool,
    /// Of its machines: what it has.
    pub capacity: Room,
    /// And what of that is taken, images included.
    pub taken: Room,
    /// Images of which it has all, or some.
    pub images: u64,
}

/// What a node says of itself at this moment, and what it has done since it started.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NodeFactsAnswer {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub node: NodeId,
    /// Its name, if it is of a cluster.
    pub name: Option<String>,
    /// Of farfork.
    pub version: String,
    /// Since it started. What is counted begins anew with it.
    pub uptime_ms: u64,
    /// Machines that run there, of all tenants.
    pub running: u64,
    /// Children that it has forked.
    pub forks: u64,
    /// Bytes of images' memory that came from other nodes.
    pub wire_bytes: u64,
    /// Bytes of images' memory that it gave to other nodes.
    pub served_bytes: u64,
    /// Images that it opened from other nodes.
    pub host_images: HostImageCounts,
    /// Its host's memory.
    pub memory: Memory,
    /// Images in its memory, of those whose caller may see them.
    pub images: Vec<ImageHere>,
}

/// Images that were opened from other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostImageCounts {
    /// Some of their memory is elsewhere.
    pub arriving: u64,
    /// All of it is here.
    pub settled: u64,
    /// Some of it cannot be had any more.
    pub failed: u64,
}

/// What a node has of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageHere {
    /// Its digest, or its id on the node while it has none.
    pub image: String,
    /// Whose it is.
    pub tenant: String,
    /// Its name on that node, if it has one.
    pub name: Option<String>,
    /// How much of it is there, in percent, if that can be told.
    pub settled_percent: Option<u8>,
    /// Machines that run there and were forked from it.
    pub running: u64,
}

/// Room for machines.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Room {
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Machines.
    pub machines: u64,
}

/// Whom a token is for.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// What the node is to be called.
    pub name: String,
    /// Whether it gets a vote; it does not unless said.
    #[serde(default = "learner")]
    pub role: Role,
}

/// A token that lets a node in, once.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenAnswer {
    /// Shown here and nowhere else.
    pub token: String,
    /// How long it is good.
    pub expires_in_s: u64,
}

/// How many machines to place in thought.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ExplainQuery {
    /// How many; 1 unless given.
    #[serde(default = "one")]
    pub count: u64,
    /// The most memory of its own that each may have.
    pub limit_bytes: Option<u64>,
}

/// Where machines of a template would run now, and why.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExplainAnswer {
    /// The image that the template points at.
    pub image: String,
    /// The node that the machine runs on that was asked about, if one was.
    pub runs_on: Option<String>,
    /// How many find no place.
    pub left: u64,
    /// What was thought of each node.
    pub nodes: Vec<Explained>,
}

/// What was thought of a node.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    /// Its name.
    pub name: String,
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: NodeId,
    /// How many it gets.
    pub count: u64,
    /// Why, in words.
    pub why: String,
    /// How much of the image is there, in percent, if it is a holder.
    pub settled_percent: Option<u8>,
    /// Whom it reads the image from, or would, the first one first.
    pub sources: Vec<String>,
}

fn learner() -> Role {
    Role::Learner
}

fn one() -> u64 {
    1
}
