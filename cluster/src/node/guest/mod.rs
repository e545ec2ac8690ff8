//! Linux guests, as a node deals with them: templates are built, children are told who they are.
//!
//! | file | holds |
//! |---|---|
//! | [`talk`] | a conversation with the agent of a guest: one request, by a thread that waits |
//! | [`words`] | a conversation of many requests, by a task |
//! | [`identity`] | what a child is told before code of users runs in it, and what it reports |
//! | [`network`] | the addresses that guests are given |
//! | [`template`] | what a template is built from, and how that went |

pub mod identity;
pub mod network;
pub mod talk;
pub mod template;
pub mod words;

use types::Reason;

use super::engine::{EngineError, ErrorKind};
use talk::TalkError;

/// How much of what a guest printed stands in an error.
const CONSOLE_TAIL_LINES: usize = 12;

/// A guest that did not do as it should: what it was, and the last that it printed.
pub(super) fn guest_error(step: &str, error: &TalkError, console: &[u8]) -> EngineError {
    let remedy = error.remedy().to_owned();
    EngineError { kind: ErrorKind::Guest, message: format!("{step}: {error}{}", last_lines(console)), remedy }
}

/// A guest that ended where it should have gone on.
pub(super) fn ended_error(step: &str, reason: Reason, detail: &str, console: &[u8]) -> EngineError {
    let message = format!("{step}: the machine ended ({reason}: {detail}){}", last_lines(console));
    let remedy = "look at what it printed; docs/guests.md lists what kernels and images must have".to_owned();
    EngineError { kind: ErrorKind::Guest, message, remedy }
}

/// The last lines of a console, to stand behind a message.
fn last_lines(console: &[u8]) -> String {
    let text = String::from_utf8_lossy(console);
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return "; it has printed nothing".to_owned();
    }
    let last = &lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..];
    format!("; the last that it printed:\n  {}", last.join("\n  "))
}
