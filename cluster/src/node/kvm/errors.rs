//! What the layers below say, as the engine says it.

use rustix::io::Errno;
use types::{FullName, ImageId, MachineId};
use vm::host_image::AwaitError;
use vm::image::load::LoadErrorKind;
use vm::image::{LoadError, SaveError};
use vm::pool::PoolError;

use super::super::engine::{Ended, EngineError, ErrorKind};

pub(super) fn of_ended(ended: vm::Ended) -> Ended {
    Ended { reason: ended.reason, detail: ended.detail }
}

pub(super) fn of_pool(error: PoolError) -> EngineError {
    let kind = match &error {
        PoolError::Ended(ended) | PoolError::NeverRan(ended) => ErrorKind::Ended(ended.reason),
        PoolError::Stopping => ErrorKind::Stopping,
        PoolError::Limit { .. } => ErrorKind::Unfit,
        PoolError::Absent(AwaitError::Failed(ended)) => ErrorKind::Ended(ended.reason),
        PoolError::Absent(AwaitError::TimedOut { .. }) => ErrorKind::SourceLost,
        _ => match error.errno().map(Errno::from_raw_os_error) {
            Some(Errno::NOMEM | Errno::NOSPC | Errno::MFILE | Errno::NFILE | Errno::AGAIN) => ErrorKind::Exhausted,
            _ => ErrorKind::Internal,
        },
    };
    EngineError { kind, message: error.to_string(), remedy: error.remedy().to_owned() }
}

pub(super) fn of_store(step: &str, error: Errno) -> EngineError {
    let message = format!("{step} failed: {error}");
    EngineError { kind: ErrorKind::Store, message, remedy: "check the disk that holds the node's data directory".to_owned() }
}

pub(super) fn of_save(error: &SaveError) -> EngineError {
    let kind = match error {
        SaveError::Full { .. } => ErrorKind::StoreFull,
        SaveError::Io { .. } => ErrorKind::Store,
        SaveError::Memory { .. } => ErrorKind::Exhausted,
        SaveError::Unsettled => ErrorKind::NotSettled,
        _ => ErrorKind::BadImage,
    };
    EngineError { kind, message: error.to_string(), remedy: error.remedy().to_owned() }
}

pub(super) fn of_load(error: &LoadError, name: &FullName) -> EngineError {
    let kind = match error.kind.as_ref() {
        LoadErrorKind::Open(source) if source.kind() == std::io::ErrorKind::NotFound => return unknown_name(name),
        LoadErrorKind::Open(_) | LoadErrorKind::Read(_) => ErrorKind::Store,
        LoadErrorKind::Memory(_) | LoadErrorKind::NoRoom { .. } => ErrorKind::Exhausted,
        _ => ErrorKind::BadImage,
    };
    EngineError { kind, message: error.to_string(), remedy: error.remedy().to_owned() }
}

pub(super) fn wrong_proof(message: String) -> EngineError {
    EngineError {
        kind: ErrorKind::WrongProof,
        message,
        remedy: "report this: a child is not what it was forked from".to_owned(),
    }
}

pub(super) fn unknown_machine(machine: MachineId) -> EngineError {
    let message = format!("there is no machine {machine} on this node");
    EngineError { kind: ErrorKind::UnknownMachine, message, remedy: "farfork ls lists them".to_owned() }
}

pub(super) fn unknown_image(image: ImageId) -> EngineError {
    let message = format!("there is no image {image} on this node");
    EngineError { kind: ErrorKind::UnknownImage, message, remedy: "farfork image ls lists them".to_owned() }
}

pub(super) fn unknown_name(name: &FullName) -> EngineError {
    let message = format!("the store has no image called {name}");
    EngineError { kind: ErrorKind::UnknownImage, message, remedy: "farfork image ls lists them".to_owned() }
}
