//! What goes over the wire. Requests refuse fields that they do not know; answers may gain fields, so readers skip those that
//! they do not know. Times are milliseconds since 1970, durations microseconds, sizes bytes.

mod cluster;
mod jobs;
mod machine;
mod remote;
mod template;
mod users;

pub use cluster::{
    ClusterAnswer, ExplainAnswer, ExplainQuery, Explained, HostImageCounts, ImageHere, NodeFactsAnswer, NodeRow, Room,
    TokenAnswer, TokenRequest,
};
pub use jobs::{
    Inputs, JobAnswer, JobHere, JobOnNode, JobRequest, JobRow, JobSpread, JobsAnswer, LogQuery, ResultsQuery, TaskAnswer,
    TaskCounts, TaskFrom, TaskLog, TaskOf, TaskResult, TaskRun, Work,
};
pub use machine::{EndedBecause, Listed, Machine, MachineAnswer, MachinesAnswer, MachinesQuery, State};
pub use remote::{
    Certificate, Failed, NetworkAnswer, OtherNode, RemoteSource, Residency, Source, TrustAnswer, TrustRequest, TrustedNode,
    settled_in_short,
};
use serde::{Deserialize, Serialize};
pub use template::{BuildRequest, BuildingNow, Ready, StageTook, StepTook, Template, TemplatesAnswer};
use types::{ImageId, MachineId, NodeId};
pub use users::{UserAnswer, UserRequest, UserRow, UsersAnswer, WhoAnswer};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::node::engine::Guest;

/// What to fork, and how.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// From what.
    pub from: ForkSource,
    /// How many children, 1 to 10,000.
    #[serde(default = "one")]
    #[schema(default = 1, minimum = 1, maximum = 10_000)]
    pub count: u64,
    /// RAM of a guest, a multiple of 2 MiB; 64 MiB unless given. Only with a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Virtual CPUs of a guest, 1 to 8; 1 unless given. Only with a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u64>,
    /// The most memory of its own that each child may have; all of its RAM unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    /// Whether each child has to prove its memory and identity.
    #[serde(default)]
    pub verify: bool,
    /// Whether each child is plugged into the network of guests of the node that it runs on.
    #[serde(default)]
    pub network: bool,
    /// Whose the image is. Of one that is made or opened for this: `default` unless given. Of another it is only checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The node that the children are to run on, as `host:port`; this one unless given. Not with `remote`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
}

/// What a fork starts from. Ids are full, or their last 4 and more hex digits.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkSource {
    /// A guest that is part of farfork: it is started, warmed up and frozen first.
    Guest(Guest),
    /// An image in memory, by its id or its digest.
    Image(String),
    /// A template, by its name.
    Template(String),
    /// A running machine: it is frozen first, and goes on.
    Machine(String),
    /// An image that other nodes hold: its children run before its memory is here.
    Remote(RemoteSource),
}

/// How to branch a machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BranchRequest {
    /// How many children, 1 to 10,000.
    #[serde(default = "one")]
    #[schema(default = 1, minimum = 1, maximum = 10_000)]
    pub count: u64,
    /// The most memory of its own that each child may have; all of its RAM unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    /// Whether each child is plugged into the network of guests.
    #[serde(default)]
    pub network: bool,
}

/// What was forked.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForkAnswer {
    /// What the children were forked from.
    pub image: Image,
    /// The node that the children run on, if it is another one. They are not among this node's machines.
    pub on: Option<OtherNode>,
    /// What it cost the parent, if a machine was frozen.
    pub freeze: Option<Freeze>,
    /// Children that run.
    pub children: Vec<Child>,
    /// Children that do not. If none runs the answer is the error of the first instead.
    pub failures: Vec<Failure>,
    /// From the request to the answer.
    pub wall_us: u64,
}

/// A child that runs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Child {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: MachineId,
    /// From the call of the engine until its first instruction was observed.
    pub first_us: u64,
    /// How that time was spent.
    pub stages_us: Stages,
    /// Whether a shell was ready for it.
    pub had_shell: bool,
    /// Pages that it has proved to be its image's, if it was asked.
    pub verified_pages: Option<u64>,
    /// From the call of the fork until it knew who it is: a Linux guest.
    pub ready_us: Option<u64>,
    /// Its address on the network of guests, if it was to have one.
    pub address: Option<String>,
    /// The node that it runs on, if the cluster placed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = "uuid")]
    pub node: Option<NodeId>,
}

/// The stages of a fork, in order.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Stages {
    /// Until a shell was there.
    pub shell: u64,
    /// Until its worker had the image and its identity.
    pub send: u64,
    /// Mapping the image.
    pub map: u64,
    /// Restoring registers and devices.
    pub restore: u64,
    /// Until the first exit of the guest.
    pub run: u64,
}

/// What a freeze cost.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Freeze {
    /// The machine was kept from running for so long.
    pub stall_us: u64,
    /// Until the image was complete, after that.
    pub copy_us: u64,
    /// Pages that were written since the fork.
    pub dirty_pages: u64,
    /// Extents of 64 KiB that were copied.
    pub copied_extents: u64,
}

/// Something that was not done, of several.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// The child or machine.
    pub id: String,
    /// For programs.
    pub code: String,
    /// For people: what.
    pub message: String,
    /// For people: what to do.
    pub remedy: String,
    /// For programs: why the machine ended, if that is what happened.
    pub reason: Option<String>,
}

/// An image in memory.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its id on this node.
    #[schema(value_type = String, format = "uuid")]
    pub id: ImageId,
    /// Its name everywhere, once it has been hashed: BLAKE3 in hex.
    pub digest: Option<String>,
    /// Whose it is.
    pub tenant: String,
    /// RAM of its children.
    pub memory_bytes: u64,
    /// Virtual CPUs of its children.
    pub vcpus: u8,
    /// Disk of its children, if they have one.
    pub disk_bytes: Option<u64>,
    /// Branches between it and the first parent.
    pub depth: u32,
    /// Memory made for it.
    pub own_bytes: u64,
    /// Memory of all that it consists of, shared with other images.
    pub stored_bytes: u64,
    /// Whether its children can prove their memory.
    pub verifiable: bool,
    /// Where it comes from: guest, template, machine, store, or remote for one that other nodes hold.
    pub origin: String,
    /// The machine that it was frozen from.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub parent: Option<MachineId>,
    /// Its name in the store.
    pub name: Option<String>,
    /// When it was made, loaded or opened.
    pub created_unix_ms: u64,
    /// What of it is here, if that can be had.
    pub residency: Option<Residency>,
}

/// Images in memory and in the store.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImagesAnswer {
    /// In memory, oldest first.
    pub images: Vec<Image>,
    /// In the store, by name.
    pub stored: Vec<Stored>,
}

/// A saved image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// The size of its file.
    pub file_bytes: u64,
}

/// A name of a saved image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NameRequest {
    /// 1 to 64 of a-z 0-9 . _ - that begin with a letter or digit.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,63}$")]
    pub name: String,
}

/// What was removed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemovedAnswer {
    /// The full id of an image in memory, or `name:` and a name in the store.
    pub removed: String,
}

/// What a machine costs, as the kernel says at this moment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Its share of all memory that it maps.
    pub pss_bytes: u64,
    /// Memory that it alone maps.
    pub private_bytes: u64,
    /// Its page tables.
    pub page_table_bytes: u64,
    /// CPU time so far.
    pub cpu_us: u64,
    /// Times that it touched memory of its image that was not here, so far.
    pub faults: u64,
}

/// What a machine printed on its serial port.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Console {
    /// The newest 64 KiB (4 KiB of a machine that has ended); what is no UTF-8 is replaced.
    pub tail: String,
    /// Bytes printed before that.
    pub dropped_bytes: u64,
}

/// Which machines to end: either ids or all.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KillRequest {
    /// Full ids, or their last 4 and more hex digits; at most 10,000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    /// All that run.
    #[serde(default)]
    pub all: bool,
}

/// Which machines ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct KillAnswer {
    /// Those that are gone.
    #[schema(value_type = Vec<String>)]
    pub killed: Vec<MachineId>,
    /// Those that could not be ended. If none could, the answer is the error of the first instead.
    pub failures: Vec<Failure>,
}

/// The node.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NodeAnswer {
    /// Its id, which it keeps in its data directory.
    #[schema(value_type = String, format = "uuid")]
    pub node: Uuid,
    /// Of farfork.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since it started.
    pub uptime_ms: u64,
    /// Who asks.
    pub caller: String,
    /// Its place among other nodes, if it has one.
    pub network: Option<NetworkAnswer>,
    /// The host's memory.
    pub memory: Memory,
    /// Shells that wait, by class.
    pub pool: Vec<Pool>,
    /// How many machines and images there are.
    pub counts: CountsAnswer,
}

/// The host's memory.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Memory {
    /// All.
    pub total_bytes: u64,
    /// What can be had without swapping, by the kernel's estimate.
    pub available_bytes: Option<u64>,
}

/// Shells of one class.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// RAM of the class.
    pub memory_bytes: u64,
    /// Virtual CPUs of the class.
    pub vcpus: u8,
    /// How many wait.
    pub ready: u32,
    /// How many are being built.
    pub building: u32,
    /// How many are wanted.
    pub wanted: u32,
}

/// How many there are.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountsAnswer {
    /// Machines that run.
    pub running: u64,
    /// Machines that ended and are remembered.
    pub ended: u64,
    /// Images in memory.
    pub images: u64,
}

/// What a client gets instead of an answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorAnswer {
    /// The error.
    pub error: ErrorBody,
}

/// Why not.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// For programs. Codes never change their meaning.
    pub code: String,
    /// For people: what and where.
    pub message: String,
    /// For people: what to do.
    pub remedy: String,
    /// Why a machine ended, if that is what stands in the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl ErrorBody {
    /// The same, of one of several things.
    #[must_use]
    pub fn of(self, id: String) -> Failure {
        let Self { code, message, remedy, reason } = self;
        Failure { id, code, message, remedy, reason }
    }
}

fn one() -> u64 {
    1
}
