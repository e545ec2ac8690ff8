//! Why a verb did not do what it was asked, what that is for people and scripts, and the exit code.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use thiserror::Error;
use types::ExitCode as Code;

use super::client::ClientError;
use super::contexts::ContextError;
use super::guest::{GuestError, OWN_FAILURE};
use super::job::JobError;
use super::output::{Output, printable};
use super::paths::PathError;
use super::rootfs::RootfsError;
use super::up::UpError;
use crate::api::SocketError;
use crate::api::wire::{ErrorAnswer, ErrorBody};
use crate::jobs::store::StoreError;
use crate::member;
use crate::member::files::PlaceError;
use crate::node::audit::AuditError;
use crate::node::engine::{EngineError, ErrorKind};
use crate::node::quic::JoinError;
use crate::node::{DataError, NodeError, TrustError};

/// Of every verb.
#[derive(Debug, Error)]
pub enum CliError {
    /// The node could not be asked, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// There is no default for a path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The node's data directory.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The node's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The node's engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The node's certificate, or its port.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The node's part in a cluster.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It was not let in.
    #[error(transparent)]
    NotLetIn(#[from] member::join::JoinError),
    /// The node's place among others.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Where to ask.
    #[error(transparent)]
    Context(#[from] ContextError),
    /// Who asked a node for what.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// Outputs of jobs cannot be kept.
    #[error(transparent)]
    Outputs(#[from] StoreError),
    /// The local cluster did not come up, or down.
    #[error(transparent)]
    Up(#[from] UpError),
    /// Arguments that make no sense together.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do about it.
        remedy: String,
    },
    /// A file that the command line names.
    #[error("{} cannot be read: {source}", file.display())]
    Input {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No root file system could be made of what was named.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A job cannot be as it was asked for, or was not followed to its end.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A guest did not do as it was asked.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The image that was watched will not settle.
    #[error("image {image} lost what it needs: {reason}: {detail}")]
    Lost {
        /// Which, as it was asked for.
        image: String,
        /// From the closed list.
        reason: String,
        /// The numbers.
        detail: String,
    },
    /// What was watched has ended or was forgotten.
    #[error("{id} is not there any more")]
    Gone {
        /// As it was asked for.
        id: String,
    },
    /// The time that the command line allows has passed.
    #[error("{id} has not settled within {} ms: {settled_percent} % is here", deadline.as_millis())]
    Late {
        /// As it was asked for.
        id: String,
        /// What it was given.
        deadline: Duration,
        /// How far it got.
        settled_percent: u8,
    },
    /// Threads, timers or signals could not be had.
    #[error("the process cannot be set up: {0}")]
    Runtime(io::Error),
    /// Nobody reads stdout any more.
    #[error("stdout is closed")]
    Closed,
    /// Stdout cannot be written.
    #[error("stdout cannot be written: {0}")]
    Print(io::Error),
}

impl From<TrustError> for CliError {
    fn from(error: TrustError) -> Self {
        Self::Node(error.into())
    }
}

impl CliError {
    /// Says what went wrong on stderr, and returns the exit code.
    pub(crate) fn report(&self, output: Output) -> ExitCode {
        if matches!(self, Self::Closed) {
            // `farfork ls | head` is no failure.
            return Code::Ok.into();
        }
        let body = self.body();
        match output {
            Output::Table => eprintln!("{}", printable(&format!("error: {}\n  try: {}", body.message, body.remedy))),
            Output::Json => {
                let answer = ErrorAnswer { error: body };
                eprintln!("{}", serde_json::to_string(&answer).unwrap_or_else(|_| self.to_string()));
            }
        }
        self.code().into()
    }

    /// [`CliError::report`] of a verb whose exit code is the guest's, if it gets that far.
    pub(crate) fn report_beside_guests(&self, output: Output) -> ExitCode {
        let code = self.report(output);
        match self {
            Self::Closed => code,
            Self::Guest(error) => ExitCode::from(error.exit_status()),
            _ => ExitCode::from(OWN_FAILURE),
        }
    }

    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::Up(error) => error.exit_code(),
            Self::Job(error) => error.exit_code(),
            Self::Path(_) => Code::Usage,
            Self::NotLetIn(member::join::JoinError::Refused { .. } | member::join::JoinError::Clocks { .. }) => Code::Refused,
            Self::NotLetIn(_) => Code::Unreachable,
            Self::Engine(EngineError { kind: ErrorKind::Host, .. }) => Code::Unreachable,
            Self::Closed => Code::Ok,
            Self::Input { .. } | Self::Usage { .. } | Self::Rootfs(_) | Self::Context(_) => Code::Usage,
            Self::Data(_)
            | Self::Socket(_)
            | Self::Engine(_)
            | Self::Join(_)
            | Self::Place(_)
            | Self::Node(_)
            | Self::Audit(_)
            | Self::Outputs(_)
            | Self::Runtime(_)
            | Self::Print(_) => Code::Refused,
            Self::Guest(_) | Self::Lost { .. } | Self::Gone { .. } | Self::Late { .. } => Code::Refused,
        }
    }

    /// The same shape as the API's, so that scripts read one.
    fn body(&self) -> ErrorBody {
        let mut of = None;
        let (code, remedy) = match self {
            Self::Client(error) => return error.body(),
            Self::Path(error) => ("NO_PATH", error.remedy().to_owned()),
            Self::Data(error) => ("DATA_DIRECTORY", error.remedy().to_owned()),
            Self::Socket(error) => ("SOCKET", error.remedy().to_owned()),
            Self::Engine(error) => ("ENGINE", error.remedy.clone()),
            Self::Join(error) => ("NETWORK", error.remedy()),
            Self::Place(error) => ("CLUSTER", error.remedy().to_owned()),
            Self::NotLetIn(error) => (error.code(), error.remedy()),
            Self::Node(error) => (error.code(), error.remedy()),
            Self::Context(error) => ("CONTEXT", error.remedy()),
            Self::Audit(error) => ("AUDIT", error.remedy().to_owned()),
            Self::Outputs(error) => ("OUTPUTS", error.remedy().to_owned()),
            Self::Up(error) => (error.code(), error.remedy()),
            Self::Job(error) => (error.code(), error.remedy()),
            Self::Usage { remedy, .. } => ("USAGE", remedy.clone()),
            Self::Input { .. } => ("INPUT", "name a file that this user may read, or - for stdin".to_owned()),
            Self::Rootfs(error) => ("ROOTFS", error.remedy().to_owned()),
            Self::Guest(error) => ("GUEST", error.remedy().to_owned()),
            Self::Lost { reason, .. } => {
                of = Some(reason.clone());
                ("LOST", "fork it again from a node that has all of it".to_owned())
            }
            Self::Gone { .. } => ("GONE", "`farfork ls --all` says why a machine ended".to_owned()),
            Self::Late { .. } => {
                ("DEADLINE_EXCEEDED", "watch it again, it goes on; `farfork show` names its sources".to_owned())
            }
            Self::Runtime(_) => ("RUNTIME", "look at the limits of processes and descriptors (`farfork doctor`)".to_owned()),
            Self::Closed | Self::Print(_) => ("STDOUT", "make room where stdout leads to".to_owned()),
        };
        ErrorBody { code: code.to_owned(), message: self.to_string(), remedy, reason: of }
    }
}
