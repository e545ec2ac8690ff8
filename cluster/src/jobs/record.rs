//! What is kept of a task that has run: its output, and how it was run.

use control::state::{JobId, Outcome};
use serde::{Deserialize, Serialize};
use types::{Epoch, MachineId, NodeId};

use crate::api::wire::TaskFrom;

/// Which try of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Try {
    /// Of which job.
    pub job: JobId,
    /// Which task.
    pub task: u32,
    /// Of the order.
    pub epoch: Epoch,
    /// The node that ran it.
    pub node: NodeId,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// How it ended.
    pub outcome: Outcome,
    /// More about that.
    pub detail: Option<String>,
    /// How often it was tried before.
    pub attempt: u32,
    /// The child, if there was one.
    pub machine: Option<MachineId>,
    /// How its memory came to it.
    pub from: Option<TaskFrom>,
    /// From the node's order to fork, in microseconds: until the first instruction,
    pub first_us: Option<u64>,
    /// until the child knew who it is,
    pub ready_us: Option<u64>,
    /// and until its work was done.
    pub done_us: Option<u64>,
    /// When the order came: milliseconds since 1970.
    pub began_ms: u64,
    /// What was printed.
    pub printed: Printed,
    /// What its code came to.
    pub value: Option<String>,
    /// A tar archive of the files that were kept; empty if there are none, or they were not asked for.
    pub files: Vec<u8>,
    /// How many bytes that archive has.
    pub files_bytes: u64,
}

/// What is told of some tries: those that are there, from the first on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    /// What is kept of them.
    pub records: Vec<(Try, Record)>,
    /// Whether it was enough for one answer: nothing is said of those after the last.
    pub is_cut: bool,
}

/// What a task has printed, up to a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Printed {
    /// To standard output.
    pub stdout: Vec<u8>,
    /// To standard error.
    pub stderr: Vec<u8>,
    /// Bytes beyond the limit, of both and of files, that are not kept.
    pub cut_bytes: u64,
}

impl Printed {
    /// Adds a piece; what is beyond `limit` of both together is counted and dropped.
    pub fn add(&mut self, is_stderr: bool, piece: &[u8], limit: u64) {
        let kept = (self.stdout.len() + self.stderr.len()) as u64;
        let room = usize::try_from(limit.saturating_sub(kept)).unwrap_or(usize::MAX).min(piece.len());
        let stream = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        stream.extend_from_slice(&piece[..room]);
        self.cut_bytes += (piece.len() - room) as u64;
    }
}

impl Printed {
    /// What comes after so many bytes of each.
    #[must_use]
    pub fn from(&self, stdout: u64, stderr: u64) -> Self {
        let after = |bytes: &[u8], known: u64| bytes[usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len())..].to_vec();
        Self { stdout: after(&self.stdout, stdout), stderr: after(&self.stderr, stderr), cut_bytes: self.cut_bytes }
    }
}

impl Record {
    /// One that has nothing but its end.
    #[must_use]
    pub fn ended(outcome: Outcome, detail: Option<String>, attempt: u32, began_ms: u64) -> Self {
        Self {
            outcome,
            detail,
            attempt,
            machine: None,
            from: None,
            first_us: None,
            ready_us: None,
            done_us: None,
            began_ms,
            printed: Printed::default(),
            value: None,
            files: Vec::new(),
            files_bytes: 0,
        }
    }

    /// About how many bytes it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let texts = self.value.as_ref().map_or(0, String::len) + self.detail.as_ref().map_or(0, String::len);
        128 + texts + self.printed.stdout.len() + self.printed.stderr.len() + self.files.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_its_limit_and_the_rest_is_counted() {
        let mut printed = Printed::default();
        printed.add(false, b"abc", 8);
        printed.add(true, b"defg", 8);
        printed.add(false, b"hi", 8);
        printed.add(true, b"j", 8);
        assert_eq!((&printed.stdout[..], &printed.stderr[..], printed.cut_bytes), (&b"abch"[..], &b"defg"[..], 2));
    }
}
