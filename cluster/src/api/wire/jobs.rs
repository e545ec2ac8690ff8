//! What is said of jobs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use types::{MachineId, NodeId};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

/// A fan-out job: one child of a template for each task, and what they do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// What its children are forked from: a template's name.
    pub template: String,
    /// What each task is given, which says how many there are.
    pub inputs: Inputs,
    /// What each task does.
    pub work: Work,
    /// Sent again with the same key, a request is the same job; another request under it is refused. At most 128 bytes. Drawn
    /// unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// For people; at most 64 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Added to the environment of each task's program.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Where its program starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// As whom: `name`, `uid`, or either with `:group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A tar archive, in base64, that is unpacked at the root of each child before its work begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<String>,
    /// Files and directories of the child that are kept when its work is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// The most that is kept of a task's output and, again, of its files; 1 MiB unless given, at most 16 MiB. Output beyond is cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit_bytes: Option<u64>,
    /// The most memory of its own that each child may have, which placement counts with; what its template is expected to need
    /// unless given. Twice the limit of output is counted on top.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What placement counts each child as, in thousandths of a processor; 10 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_millis: Option<u64>,
    /// Whether nodes that suit equally each get some, or as few as possible all.
    #[serde(default)]
    pub spread: JobSpread,
    /// Labels that a node has to have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// On how many nodes the template's image is to be while the job goes on, 1 to 16.
    #[serde(default = "one")]
    #[schema(default = 1, minimum = 1, maximum = 16)]
    pub replicas: u8,
    /// How often a task is tried again after a failure that is not its own: a lost node, no room. At most 100.
    #[serde(default = "two")]
    #[schema(default = 2, maximum = 100)]
    pub retries: u32,
    /// After so long what has not ended is ended with `DEADLINE_EXCEEDED`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// The same for each try of a task, counted from when its child knows who it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_deadline_ms: Option<u64>,
    /// The most tasks that are placed at a time; as many as there is room for unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
}

/// What each task is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Inputs {
    /// Nothing but its number: so many tasks, 1 to 1,000,000.
    Count(u32),
    /// One text each, of at most 32 KiB.
    List(Vec<String>),
}

/// What each task does. In both, and in the values of `env`, `{index}` stands for the task's number, `{input}` for its input, and
/// `{input.NAME}` for a field of that, if it is a JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Runs a program: its path or name, and its arguments.
    Exec(Vec<String>),
    /// Asks the template's main process, which is warm, to evaluate this.
    Eval(String),
}

/// How tasks are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobSpread {
    /// Over all nodes that suit equally.
    #[default]
    Spread,
    /// On as few as possible.
    Pack,
}

fn one() -> u8 {
    1
}

fn two() -> u32 {
    2
}

/// Jobs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobsAnswer {
    /// The oldest first; those that ended within a day too.
    pub jobs: Vec<JobRow>,
}

/// A job.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobRow {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: Uuid,
    /// For people, if it was given one.
    pub name: Option<String>,
    /// As it was asked for.
    pub template: String,
    /// The digest of its image.
    pub image: String,
    /// Whose it is.
    pub tenant: String,
    /// Who submitted it.
    pub submitted_by: String,
    /// What its tasks do, in short.
    pub about: String,
    /// How long ago it was submitted.
    pub age_ms: u64,
    /// How long it has been going on, or took.
    pub for_ms: u64,
    /// Whether all of its tasks are at their end.
    pub is_ended: bool,
    /// How many tasks it has.
    pub tasks: u32,
    /// Where they are.
    pub counts: TaskCounts,
}

/// Where the tasks of a job are. They add up to all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskCounts {
    /// To be placed.
    pub waiting: u32,
    /// On a node, which forks or runs them.
    pub placed: u32,
    /// Ended with status 0.
    pub succeeded: u32,
    /// Ended otherwise.
    pub failed: u32,
}

/// A job with its parts.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobAnswer {
    /// The job.
    pub job: JobRow,
    /// Of those that failed: how many by each reason; `EXIT` if their program said so.
    pub reasons: BTreeMap<String, u32>,
    /// What of it each node has, had or did.
    pub nodes: Vec<JobOnNode>,
    /// Why tasks that wait are not placed, node by node; empty if none waits.
    pub why_waiting: Vec<String>,
}

/// What of a job one node has, had or did.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobOnNode {
    /// Which.
    #[schema(value_type = String, format = "uuid")]
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Tasks that are placed there.
    pub placed: u32,
    /// Tasks that succeeded there.
    pub succeeded: u32,
    /// Tasks that failed there.
    pub failed: u32,
    /// What the node says itself; `null` if it did not answer in time, or has done nothing for the job since it started.
    pub here: Option<JobHere>,
}

/// What a node has done for a job since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobHere {
    /// Children that run its tasks.
    pub running: u64,
    /// Children that it has forked.
    pub forked: u64,
    /// Of those: while all of the image was here, made or loaded here.
    pub local: u64,
    /// Of those: while some of it was elsewhere.
    pub remote: u64,
    /// Of those: after it had settled here.
    pub settled: u64,
    /// Bytes of the image's memory that have come from other nodes.
    pub wire_bytes: u64,
    /// All bytes of the image that are not zero.
    pub image_bytes: u64,
}

/// How a task ended. Results are a JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskResult {
    /// Its number.
    pub task: u32,
    /// What it was given, if that was a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// Whether its program ended with status 0, or its code was evaluated.
    pub is_success: bool,
    /// The status that its program ended with; 128 and the number of the signal if one ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<i32>,
    /// Why it has none: of the closed list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// More about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What it wrote to standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    /// The same, in base64, if it is no UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// What it wrote to standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    /// The same, in base64, if it is no UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// What its code came to, as text: of `eval`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Bytes of output and files that were beyond the limit and are not kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut_bytes: u64,
    /// Bytes of the archive of files that were kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub files_bytes: u64,
    /// Whether its output is on no node that answers.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_output_lost: bool,
    /// How it was run, if its output says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<TaskRun>,
}

/// How a task was run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskRun {
    /// How often it was tried before.
    pub attempt: u32,
    /// The name of the node.
    pub node: String,
    /// The child, if there was one.
    #[schema(value_type = Option<String>, format = "uuid")]
    pub machine: Option<MachineId>,
    /// How its memory came to it.
    pub from: Option<TaskFrom>,
    /// From the node's order to fork until the first instruction.
    pub first_us: Option<u64>,
    /// The same, until the child knew who it is.
    pub ready_us: Option<u64>,
    /// The same, until the work was done.
    pub done_us: Option<u64>,
    /// When the order came, by the node's clock.
    pub began_ms: u64,
}

/// How the memory of a child came to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TaskFrom {
    /// Its image was made or loaded on its node.
    Local,
    /// Some of its image was on other nodes when it was forked.
    Remote,
    /// Its image had come from other nodes, all of it, before it was forked.
    Settled,
}

/// A task that a machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskOf {
    /// Of which job.
    #[schema(value_type = String, format = "uuid")]
    pub job: Uuid,
    /// Its number.
    pub task: u32,
}

/// One task.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskAnswer {
    /// Its number.
    pub task: u32,
    /// `waiting`, `placed` or `ended`.
    pub state: String,
    /// How often it was tried before, while it has not ended.
    pub attempt: Option<u32>,
    /// The name of the node that has it, or had it.
    pub node: Option<String>,
    /// The name of the other node that keeps its output.
    pub copy: Option<String>,
    /// The status that its program ended with.
    pub status: Option<i32>,
    /// Why it has none.
    pub reason: Option<String>,
    /// Of one that waits: what was thought of each node.
    pub why_waiting: Vec<String>,
}

/// What a task has printed so far.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskLog {
    /// Standard output from where it was asked for, in base64.
    pub stdout: String,
    /// Standard error from where it was asked for, in base64.
    pub stderr: String,
    /// Where to ask from next.
    pub next_stdout: u64,
    /// The same.
    pub next_stderr: u64,
    /// Whether no more will come.
    pub is_all: bool,
}

/// From where a task's output is asked for.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// Bytes of standard output that are known.
    #[serde(default)]
    pub stdout: u64,
    /// Bytes of standard error that are known.
    #[serde(default)]
    pub stderr: u64,
}

/// Which results are asked for.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ResultsQuery {
    /// Go on until all tasks are at their end, each result as it comes; otherwise those that are there, in the order of tasks.
    #[serde(default)]
    pub follow: bool,
    /// From this task on.
    #[serde(default)]
    pub from: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's interface")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's interface")]
fn is_false(is: &bool) -> bool {
    !*is
}
