//! What has come from a worker, or about it. A worker whose guest has taken it over may say anything at any time: what nobody has
//! asked for is not kept, and is the end of that worker.

use std::os::fd::OwnedFd;

use types::MachineId;
use types::manifest::WorkingSetRun;

use crate::machine::Ended;
use crate::probe::Reply;
use crate::worker::protocol::{Failure, FromWorker, WireFrozen};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Mail {
    pub(super) pid: Option<i32>,
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) machine: Option<MachineId>,
    pub(super) built: Option<u64>,
    pub(super) running: Option<Running>,
    pub(super) failed: Option<Failure>,
    pub(super) frozen: Option<Result<Box<WireFrozen>, Failure>>,
    pub(super) is_done: bool,
    pub(super) answers: [Option<Result<Reply, Failure>>; 8],
    pub(super) console: Option<(Vec<u8>, u64)>,
    pub(super) touched: Option<Vec<WorkingSetRun>>,
    #[cfg(feature = "testing")]
    pub(super) attempted: Option<i32>,
    awaits: Awaited,
    /// What the worker said of the end of its machine.
    pub(super) said_end: Option<Ended>,
    /// Why the pool has ended it.
    pub(super) verdict: Option<Ended>,
    pub(super) was_killed: bool,
    /// Somebody else killed the worker, before its machine ran.
    pub(super) never_ran: bool,
    /// What it was in truth; the worker is gone.
    pub(super) ended: Option<Ended>,
}

/// Answers that the worker owes.
#[derive(Debug, Default)]
struct Awaited {
    answers: [bool; 8],
    frozen: bool,
    console: bool,
    touched: bool,
    done: bool,
    #[cfg(feature = "testing")]
    attempted: bool,
}

/// When a child ran, on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) received_ns: u64,
    pub(super) first_ns: u64,
    pub(super) map_ns: u64,
    pub(super) restore_ns: u64,
}

/// The longest text of a worker's that is kept.
const TEXT_MAX: usize = 512;

impl Mail {
    /// Puts a message into its place. Says whether it was due.
    pub(super) fn take(&mut self, message: FromWorker) -> bool {
        match message {
            FromWorker::Built { took_ns } => self.built.replace(took_ns).is_none(),
            FromWorker::Running { received_ns, first_ns, map_ns, restore_ns } => {
                let running = Running { received_ns, first_ns, map_ns, restore_ns };
                self.running.replace(running).is_none() && self.machine.is_some()
            }
            FromWorker::Failed(failure) => {
                self.failed.get_or_insert(bounded(failure));
                true
            }
            FromWorker::Frozen(frozen) => {
                let is_due = std::mem::take(&mut self.awaits.frozen);
                self.frozen = is_due.then_some(Ok(frozen));
                is_due
            }
            FromWorker::NotFrozen(failure) => {
                let is_due = std::mem::take(&mut self.awaits.frozen);
                self.frozen = is_due.then(|| Err(bounded(failure)));
                is_due
            }
            FromWorker::Done => {
                self.is_done = true;
                std::mem::take(&mut self.awaits.done)
            }
            FromWorker::Answer { vcpu, answer } => {
                let is_due = self.awaits.answers.get_mut(usize::from(vcpu)).is_some_and(std::mem::take);
                if is_due {
                    self.answers[usize::from(vcpu)] = Some(answer.map_err(bounded));
                }
                is_due
            }
            FromWorker::Console { bytes, dropped } => {
                let is_due = std::mem::take(&mut self.awaits.console);
                self.console = is_due.then_some((bytes, dropped));
                is_due
            }
            FromWorker::Touched(runs) => {
                let is_due = std::mem::take(&mut self.awaits.touched);
                self.touched = is_due.then_some(runs);
                is_due
            }
            FromWorker::Ended { reason, detail, console } => {
                self.said_end.get_or_insert(Ended { reason, detail: shortened(detail) });
                self.console.get_or_insert((console, 0));
                true
            }
            // Taken by the worker itself, if they were due.
            FromWorker::Watched { .. } | FromWorker::HasLetGo => false,
            #[cfg(feature = "testing")]
            FromWorker::Attempted(errno) => {
                self.attempted = Some(errno);
                std::mem::take(&mut self.awaits.attempted)
            }
        }
    }

    /// An image is about to be asked for.
    pub(super) fn await_frozen(&mut self) {
        (self.frozen, self.awaits.frozen) = (None, true);
    }

    /// An answer of this vCPU's probe is about to be asked for.
    pub(super) fn await_answer(&mut self, vcpu: u8) {
        let vcpu = usize::from(vcpu);
        if let (Some(slot), Some(awaited)) = (self.answers.get_mut(vcpu), self.awaits.answers.get_mut(vcpu)) {
            (*slot, *awaited) = (None, true);
        }
    }

    /// Whether such an answer is due.
    pub(super) fn awaits_answer(&self, vcpu: u8) -> bool {
        self.awaits.answers.get(usize::from(vcpu)).is_some_and(|awaited| *awaited)
    }

    /// What was printed is about to be asked for.
    pub(super) fn await_console(&mut self) {
        (self.console, self.awaits.console) = (None, true);
    }

    /// What was touched is about to be asked for.
    pub(super) fn await_touched(&mut self) {
        (self.touched, self.awaits.touched) = (None, true);
    }

    /// A pause or its end is about to be asked for.
    pub(super) fn await_done(&mut self) {
        (self.is_done, self.awaits.done) = (false, true);
    }

    /// An attempt is about to be ordered.
    #[cfg(feature = "testing")]
    pub(super) fn await_attempted(&mut self) {
        (self.attempted, self.awaits.attempted) = (None, true);
    }
}

fn bounded(failure: Failure) -> Failure {
    Failure { message: shortened(failure.message), remedy: shortened(failure.remedy), errno: failure.errno }
}

/// A worker's text, no longer than it has to be.
fn shortened(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate((0..=TEXT_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
        text.shrink_to_fit();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::Reason;

    #[test]
    fn what_nobody_has_asked_for_is_not_kept() {
        let mut mail = Mail::default();
        let console = || FromWorker::Console { bytes: vec![0; 1000], dropped: 0 };
        let answer = || FromWorker::Answer { vcpu: 0, answer: Ok([0; 4]) };
        assert!(!mail.take(console()) && mail.console.is_none());
        assert!(!mail.take(answer()) && mail.answers[0].is_none());
        assert!(!mail.take(FromWorker::Answer { vcpu: 200, answer: Ok([0; 4]) }));
        assert!(!mail.take(FromWorker::Done));
        mail.await_console();
        mail.await_answer(0);
        assert!(mail.take(console()) && mail.take(answer()));
        // Once.
        assert!(!mail.take(console()) && mail.console.is_none());
        assert!(!mail.take(answer()));
        assert!(mail.take(FromWorker::Built { took_ns: 1 }) && !mail.take(FromWorker::Built { took_ns: 1 }));
    }

    #[test]
    fn texts_are_short_and_stay_text() {
        let mut mail = Mail::default();
        let detail = "ä".repeat(60_000);
        assert!(mail.take(FromWorker::Ended { reason: Reason::Killed, detail, console: Vec::new() }));
        assert_eq!(mail.said_end.unwrap().detail, "ä".repeat(256));
    }
}
