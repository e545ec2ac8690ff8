//! What is wrong with a job, before it is submitted and after that.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use types::ExitCode;
use uuid::Uuid;

use super::limits::{FILES_MAX, INPUT_MAX, REQUEST_MAX, TASKS_MAX};
use crate::cli::client::ClientError;
use crate::cli::size;

/// Of `farfork run` and `farfork job`.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum JobError {
    #[error("{}, line {line}: {field}: {why}", file.display())]
    File { file: PathBuf, line: usize, field: String, why: String },
    #[error("{field}: {why}")]
    Field { field: &'static str, why: String },
    #[error("the job file says {field}, and {flag} says something else")]
    Contradiction { field: String, flag: &'static str },
    #[error("{from}, line {line}: {why}")]
    Line { from: String, line: usize, why: String },
    #[error("input {number} has {bytes} bytes; one has at most {INPUT_MAX}")]
    InputTooLong { number: usize, bytes: usize },
    #[error("{from} has no inputs")]
    NoInputs { from: String },
    #[error("{count} inputs; a job has at most {TASKS_MAX} tasks")]
    TooManyInputs { count: u64 },
    #[error("{from} has more than {}; that is the most that a request may have", size::bytes(REQUEST_MAX as u64))]
    InputsTooLarge { from: String },
    #[error("the files for the children have {} in all; at most {} can be sent", size::bytes(*bytes), size::bytes(FILES_MAX))]
    FilesTooLarge { bytes: u64 },
    #[error("{} is neither a file, a directory nor a symbolic link", path.display())]
    NoFile { path: PathBuf },
    #[error("two files for the children are called {path}")]
    SameTarget { path: String },
    #[error("the request has {}; one has at most {}", size::bytes(*bytes), size::bytes(REQUEST_MAX as u64))]
    RequestTooLarge { bytes: u64 },
    #[error("it is not known whether the job was taken: within {} s {source}", within.as_secs())]
    Unknown { key: String, within: Duration, source: ClientError },
    #[error("nothing was heard of job {job} for {} s: {source}", within.as_secs())]
    Unheard { job: Uuid, within: Duration, source: ClientError },
    #[error("what the node says of job {job} makes no sense: {why}")]
    Nonsense { job: Uuid, why: String },
    #[error("job {job} has ended, and the results of {missing} tasks do not come")]
    Missing { job: Uuid, missing: u32 },
    #[error("{} cannot be written: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl JobError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::File { .. } => "correct the job file; docs/jobs.md has every field".to_owned(),
            Self::Field { .. } => "`farfork run --help` shows what is understood".to_owned(),
            Self::Contradiction { flag, .. } => format!("leave out {flag}, or take it out of the job file"),
            Self::Line { .. } | Self::InputTooLong { .. } => {
                "correct it; what is larger is better a file (--file) that the input names".to_owned()
            }
            Self::NoInputs { .. } => "give one input for each task, or their number with -n".to_owned(),
            Self::TooManyInputs { .. } | Self::InputsTooLarge { .. } | Self::RequestTooLarge { .. } => {
                "make several jobs of it, or let an input stand for more work".to_owned()
            }
            Self::FilesTooLarge { .. } => {
                "build what all children need into their template (farfork template build)".to_owned()
            }
            Self::NoFile { .. } => "name what is a file or a directory, and has nothing else in it".to_owned(),
            Self::SameTarget { .. } => "give each another place".to_owned(),
            Self::Unknown { key, .. } => {
                format!("run it again with --key {key}: if it was taken it is the same job; `farfork job ls` lists it")
            }
            Self::Unheard { job, .. } => format!("the job goes on without you; come back with `farfork job attach {job}`"),
            Self::Nonsense { .. } => "use the same version of farfork as the node".to_owned(),
            Self::Missing { job, .. } => format!("`farfork job results {job}` asks again; `farfork job show {job}` says more"),
            Self::Write { .. } => "name a place that this user may write, with room".to_owned(),
        }
    }

    /// What it is in JSON.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::File { .. } => "BAD_JOB_FILE",
            Self::Unknown { .. } => "OUTCOME_UNKNOWN",
            Self::Unheard { .. } => "NODE_LOST",
            Self::Nonsense { .. } => "BAD_ANSWER",
            Self::Missing { .. } => "RESULTS_MISSING",
            Self::Write { .. } => "OUTPUT",
            _ => "USAGE",
        }
    }

    /// What the program exits with.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unknown { .. } | Self::Unheard { .. } => ExitCode::Unreachable,
            Self::Nonsense { .. } | Self::Write { .. } => ExitCode::Refused,
            Self::Missing { .. } => ExitCode::Partial,
            _ => ExitCode::Usage,
        }
    }
}
