//! One worker, as the pool sees it: its channel, and a box in which its answers are found.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use types::{MachineId, Reason};

use super::{PATIENCE, PoolError};
use crate::class::Class;
use crate::jail::cgroup::WorkerGroup;
use crate::machine::Ended;
use crate::probe::Reply;
use crate::worker::channel::Channel;
use crate::worker::protocol::{Exit, Failure, FromWorker, ToWorker, WireFrozen};

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) number: u64,
    pub(super) class: Class,
    pub(super) channel: Channel,
    pub(super) group: Mutex<Option<WorkerGroup>>,
    mail: Mutex<Mail>,
    changed: Condvar,
}

/// What has come from the worker, or about it.
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
    #[cfg(feature = "testing")]
    pub(super) attempted: Option<i32>,
    /// What the worker said of the end of its machine.
    said_end: Option<Ended>,
    was_killed: bool,
    /// What it was in truth; the worker is gone.
    pub(super) ended: Option<Ended>,
}

/// When a child ran, on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) received_ns: u64,
    pub(super) first_ns: u64,
    pub(super) map_ns: u64,
    pub(super) restore_ns: u64,
}

impl Worker {
    pub(super) fn new(number: u64, class: Class, channel: Channel) -> Self {
        Self { number, class, channel, group: Mutex::new(None), mail: Mutex::new(Mail::default()), changed: Condvar::new() }
    }

    pub(super) fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the mail, and wakes whoever waits for it.
    pub(super) fn deliver(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail());
        self.changed.notify_all();
    }

    /// Takes what `look` finds as soon as it finds something. The end of the worker ends the wait, and the end of patience the
    /// worker.
    pub(super) fn wait<T>(&self, mut look: impl FnMut(&mut Mail) -> Option<T>) -> Result<T, PoolError> {
        self.wait_for(PATIENCE, &mut look)
    }

    pub(super) fn wait_for<T>(&self, patience: Duration, look: &mut dyn FnMut(&mut Mail) -> Option<T>) -> Result<T, PoolError> {
        let deadline = Instant::now() + patience;
        let mut mail = self.mail();
        loop {
            if let Some(found) = look(&mut mail) {
                return Ok(found);
            }
            if let Some(failure) = mail.failed.clone() {
                return Err(PoolError::Failed(failure));
            }
            if let Some(ended) = mail.ended.clone() {
                return Err(PoolError::Ended(ended));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(mail);
                self.kill();
                return Err(PoolError::Stuck(patience));
            }
            mail = self.changed.wait_timeout(mail, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn send(&self, order: &ToWorker, descriptors: &[BorrowedFd<'_>]) -> Result<(), PoolError> {
        self.sent(self.channel.send(order, descriptors))
    }

    /// A worker that is gone says why before it says EPIPE.
    pub(super) fn sent(&self, sent: io::Result<()>) -> Result<(), PoolError> {
        match sent {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => self.wait(|_| None::<()>),
            sent => sent.map_err(|source| PoolError::Step { step: "sending to a worker", source }),
        }
    }

    /// Ends it, whatever it does. It is gone when its mail says so.
    pub(super) fn kill(&self) {
        let mut mail = self.mail();
        mail.was_killed = true;
        match &mail.pidfd {
            // ESRCH: it is gone already.
            Some(pidfd) => rustix::process::pidfd_send_signal(pidfd, Signal::KILL).unwrap_or_default(),
            // It has not been born yet, and will find nobody at the other end.
            None => self.channel.shut_down(),
        }
    }

    /// Takes a message that the worker sent.
    pub(super) fn take(&self, message: FromWorker) {
        let mut has_ended = false;
        self.deliver(|mail| match message {
            FromWorker::Built { took_ns } => mail.built = Some(took_ns),
            FromWorker::Running { received_ns, first_ns, map_ns, restore_ns } => {
                mail.running = Some(Running { received_ns, first_ns, map_ns, restore_ns });
            }
            FromWorker::Failed(failure) => mail.failed = Some(failure),
            FromWorker::Frozen(frozen) => mail.frozen = Some(Ok(frozen)),
            FromWorker::NotFrozen(failure) => mail.frozen = Some(Err(failure)),
            FromWorker::Done => mail.is_done = true,
            FromWorker::Answer { vcpu, answer } => {
                if let Some(slot) = mail.answers.get_mut(usize::from(vcpu)) {
                    *slot = Some(answer);
                }
            }
            FromWorker::Console { bytes, dropped } => mail.console = Some((bytes, dropped)),
            FromWorker::Ended { reason, detail, console } => {
                mail.said_end.get_or_insert(Ended { reason, detail });
                mail.console.get_or_insert((console, 0));
                has_ended = true;
            }
            #[cfg(feature = "testing")]
            FromWorker::Attempted(errno) => mail.attempted = Some(errno),
        });
        if has_ended {
            // What is left of it is of no use, and takes memory.
            if let Some(pidfd) = &self.mail().pidfd {
                rustix::process::pidfd_send_signal(pidfd, Signal::KILL).unwrap_or_default();
            }
        }
    }

    /// The worker is gone. Says what that means, and whether anybody had asked for it.
    pub(super) fn has_exited(&self, how: Option<Exit>) -> (Option<MachineId>, Ended, bool) {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner).take();
        let oom_kills = group.as_ref().map_or(0, WorkerGroup::oom_kills);
        let mut mail = self.mail();
        let was_killed = mail.was_killed;
        let ended = match (mail.said_end.take(), how) {
            (Some(said), _) => said,
            (None, Some(Exit::Signal(libc::SIGKILL))) if oom_kills > 0 => {
                Ended { reason: Reason::Oom, detail: "it went over its memory limit, and the kernel killed it".to_owned() }
            }
            (None, _) if was_killed => Ended { reason: Reason::Killed, detail: "somebody asked for it".to_owned() },
            (None, Some(Exit::Signal(libc::SIGSYS))) => Ended {
                reason: Reason::JailViolation,
                detail: "its worker made a system call that it may not make; the kernel's audit log names it".to_owned(),
            },
            (None, Some(Exit::Signal(signal))) => {
                Ended { reason: Reason::WorkerCrashed, detail: format!("its worker was ended by signal {signal}") }
            }
            (None, Some(Exit::Status(status))) => {
                Ended { reason: Reason::WorkerCrashed, detail: format!("its worker ended with status {status}") }
            }
            (None, None) => {
                Ended { reason: Reason::WorkerCrashed, detail: "its zygote ended, and its worker with it".to_owned() }
            }
        };
        mail.ended = Some(ended.clone());
        mail.pidfd = None;
        let machine = mail.machine;
        drop(mail);
        self.changed.notify_all();
        // Back where it is removed, once the kernel has let go of its last process.
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
        (machine, ended, was_killed)
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
