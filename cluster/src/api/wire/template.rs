//! What goes over the wire about templates, and what Linux guests report.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Image;
use crate::node::guest::template::Stage;

/// What a template is to be built from. Files are those of the node's host, read by the node: only its own user and root may ask.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// Its name.
    pub name: String,
    /// Path of a `vmlinux` or `bzImage`.
    pub kernel: String,
    /// Path of the initial RAM disk that is farfork's agent.
    pub initrd: String,
    /// Path of an ext4 file system.
    pub rootfs: String,
    /// RAM, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs; 1.
    #[serde(default = "one")]
    #[schema(default = 1)]
    pub vcpus: u64,
    /// The disk, a multiple of 2 MiB; as large as the file system unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Whether it has a network card, which is plugged into the node's network of guests while it is warmed up.
    #[serde(default)]
    pub network: bool,
    /// Added to the kernel's command line.
    #[serde(default)]
    pub kernel_arguments: String,
    /// A command for the guest's shell that makes it warm: run to its end, or left running if `ready` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
    /// A command that is tried until it succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
    /// The main process, which answers requests in children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main: Option<String>,
    /// Whether it may be sealed with secrets that can be seen in it.
    #[serde(default)]
    pub allow_secrets: bool,
    /// Whether it may be sealed with established connections with others.
    #[serde(default)]
    pub allow_connections: bool,
    /// How long each stage in the guest may take; 10 minutes unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whose it is; `default` unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

fn one() -> u64 {
    1
}

/// A template.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// The image in memory that it points at; a saved template is loaded when it is forked.
    pub image: Option<Image>,
    /// Size of its file in the store.
    pub file_bytes: Option<u64>,
    /// What it is at, if it is being built.
    pub building: Option<BuildingNow>,
    /// How long each stage of building it took, if this node has built it since it was started.
    pub built: Vec<StageTook>,
}

/// A template that is being built.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BuildingNow {
    /// What it is at.
    pub stage: Stage,
    /// For how long.
    pub for_us: u64,
}

/// How long a stage of building a template took.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StageTook {
    /// Which.
    pub stage: Stage,
    /// How long.
    pub took_us: u64,
}

/// All templates.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TemplatesAnswer {
    /// By name.
    pub templates: Vec<Template>,
}

/// What a Linux guest reported when it was told who it is.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    /// From the call of the fork until it knew.
    pub after_us: u64,
    /// Whether nothing of users ran in it before: a branch of what runs cannot be held back.
    pub was_gated: bool,
    /// Its host name.
    pub hostname: String,
    /// Its address on the network of guests, if it was to have one.
    pub address: Option<String>,
    /// What it did to become itself.
    pub steps: Vec<StepTook>,
}

/// A step after a fork.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StepTook {
    /// Its name.
    pub name: String,
    /// How long it took, by the guest's clock.
    pub took_us: u64,
    /// Why there was nothing to do, if that is so.
    pub skipped: Option<String>,
}
