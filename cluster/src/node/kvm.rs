//! The engine on KVM.

use std::sync::Arc;

use super::data::DataDirectory;
use super::engine::{Engine, EngineError, ErrorKind};

/// Opens the engine of this host, with its store in `data`.
///
/// # Errors
/// [`EngineError`] of kind [`ErrorKind::Host`] if this host cannot run machines.
pub fn open(_data: &DataDirectory) -> Result<Arc<dyn Engine>, EngineError> {
    Err(EngineError {
        kind: ErrorKind::Host,
        message: "this build has no engine for KVM".to_owned(),
        remedy: "use a build that has one".to_owned(),
    })
}
