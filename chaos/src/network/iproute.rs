//! The programs of iproute2.

use std::process::{Command, Stdio};

use super::NetworkError;
use super::names::Name;

/// One of its programs, and where it works.
pub(super) struct Tool {
    program: &'static str,
    leading: Vec<String>,
}

impl Tool {
    /// `ip netns`.
    pub(super) fn netns() -> Self {
        Self { program: "ip", leading: vec!["netns".into()] }
    }

    /// `ip` within a namespace.
    pub(super) fn ip(namespace: &Name) -> Self {
        Self { program: "ip", leading: vec!["-netns".into(), namespace.to_string()] }
    }

    /// `tc` within a namespace.
    pub(super) fn tc(namespace: &Name) -> Self {
        Self { program: "tc", leading: vec!["-netns".into(), namespace.to_string()] }
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Result<(), NetworkError> {
        let mut command = Command::new(self.program);
        command.args(&self.leading).args(arguments).stdin(Stdio::null());
        let failed = |message: String| {
            let words: Vec<_> = self.leading.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
            NetworkError::Tool { command: format!("{} {}", self.program, words.join(" ")), message }
        };
        let output = command.output().map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(format!("{} ({})", String::from_utf8_lossy(&output.stderr).trim(), output.status)))
    }
}
