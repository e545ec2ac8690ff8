//! What is said of machines.

use serde::{Deserialize, Serialize};
use types::{ImageId, MachineId, NodeId};
use utoipa::{IntoParams, ToSchema};

use super::{Console, Ready, Residency, Stages, TaskOf, Usage};

/// A machine that runs or ran here.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: MachineId,
    /// The image that it was forked from.
    #[schema(value_type = String, format = "uuid")]
    pub image: ImageId,
    /// That image's name everywhere, once it has been hashed, as long as it is in memory.
    #[serde(default)]
    pub image_digest: Option<String>,
    /// Whose it is.
    pub tenant: String,
    /// The machine that the image was frozen from.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub parent: Option<MachineId>,
    /// Whether it runs.
    pub state: State,
    /// Why it ended, if it has.
    pub ended: Option<EndedBecause>,
    /// When it was forked.
    pub created_unix_ms: u64,
    /// From the call of the engine until its first instruction was observed.
    pub first_us: u64,
    /// How that time was spent.
    pub stages_us: Stages,
    /// Whether a shell was ready for it.
    pub had_shell: bool,
    /// Pages that it has proved to be its image's, if it was asked.
    pub verified_pages: Option<u64>,
    /// The most memory of its own that it may have, if it was given a limit.
    pub limit_bytes: Option<u64>,
    /// What it reported when it was told who it is: a Linux guest.
    pub ready: Option<Ready>,
    /// How much of its image is here, in percent, if it runs: 100 only once the image is settled.
    pub settled_percent: Option<u8>,
    /// The task of a job that it runs, if it runs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskOf>,
    /// The node that it is on, in a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = "uuid")]
    pub node: Option<NodeId>,
}

/// Whether a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As far as is known.
    Running,
    /// It is gone.
    Ended,
}

/// Why and when a machine ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EndedBecause {
    /// From the closed list, for programs.
    pub reason: String,
    /// The numbers.
    pub detail: String,
    /// When.
    pub unix_ms: u64,
}

/// Which machines to list.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct MachinesQuery {
    /// Running ones unless given.
    #[serde(default)]
    #[param(inline)]
    pub state: Listed,
}

/// Which machines to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Listed {
    /// Those that run.
    #[default]
    Running,
    /// Those that have ended; the newest 10,000 are remembered.
    Ended,
    /// Both.
    All,
}

/// Machines.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MachinesAnswer {
    /// Oldest first. In a cluster those of all nodes.
    pub machines: Vec<Machine>,
    /// Nodes of the cluster that did not answer: what they run is missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub unheard: Vec<NodeId>,
}

/// A machine with what it costs and prints.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MachineAnswer {
    /// The machine.
    pub machine: Machine,
    /// What it costs now, if it runs.
    pub usage: Option<Usage>,
    /// What of its image is here, if it runs.
    pub residency: Option<Residency>,
    /// The last that it printed.
    pub console: Console,
}
