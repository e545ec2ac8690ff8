//! One worker, as the pool sees it: its channel, and a box in which its answers are found.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use types::{HostAddress, MachineId, Reason};

use super::mail::Mail;
use super::{PATIENCE, PoolError};
use crate::class::Class;
use crate::host_image::{HostImage, Keeper, Watched};
use crate::jail::apply::THREADS_MAX;
use crate::jail::cgroup::{CgroupError, WorkerGroup};
use crate::machine::Ended;
use crate::sys::uffd::Watch;
use crate::worker::channel::{Channel, Received};
use crate::worker::protocol::{Exit, FromWorker, ToWorker};

/// How often patience is had with a worker whose memory is still arriving.
const ROUNDS_WATCHED: u32 = 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) number: u64,
    pub(super) class: Class,
    pub(super) channel: Channel,
    pub(super) group: Mutex<Option<WorkerGroup>>,
    /// Held by whoever asks something whose answer does not say what it answers.
    asking: Mutex<()>,
    mail: Mutex<Mail>,
    changed: Condvar,
    watching: Mutex<Watching>,
    /// It was told to make no process any more, and cannot take that back.
    is_childless: AtomicBool,
}

/// Whether the machine's absent memory is watched.
#[derive(Debug, Default)]
enum Watching {
    #[default]
    No,
    /// The worker owes the descriptor.
    Due(Arc<HostImage>),
    Yes(Arc<Watched>),
    /// No longer: all of it has arrived, after so many faults. Nobody waits in one.
    Was(u64),
}

impl Worker {
    pub(super) fn new(number: u64, class: Class, channel: Channel) -> Self {
        let (group, asking, mail) = (Mutex::new(None), Mutex::new(()), Mutex::new(Mail::default()));
        Self {
            number,
            class,
            channel,
            group,
            asking,
            mail,
            changed: Condvar::new(),
            watching: Mutex::default(),
            is_childless: AtomicBool::new(false),
        }
    }

    pub(super) fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the mail, and wakes whoever waits for it.
    pub(super) fn deliver(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail());
        self.changed.notify_all();
    }

    /// The right to ask the worker something, one at a time.
    pub(super) fn ask(&self) -> MutexGuard<'_, ()> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what `look` finds as soon as it finds something. The end of the worker ends the wait, and the end of patience the
    /// worker.
    pub(super) fn wait<T>(&self, mut look: impl FnMut(&mut Mail) -> Option<T>) -> Result<T, PoolError> {
        let mut waited = self.look_for(PATIENCE, &mut look);
        // It may wait for pages, again and again: whoever fetches them ends it if one does not come.
        for _ in 0..ROUNDS_WATCHED {
            if !matches!(waited, Err(PoolError::Stuck(_))) || !matches!(*self.watching(), Watching::Yes(_)) {
                break;
            }
            waited = self.look_for(PATIENCE, &mut look);
        }
        if matches!(waited, Err(PoolError::Stuck(_))) {
            self.condemn(format!("its worker did not answer within {PATIENCE:?}"));
        }
        waited
    }

    /// [`Worker::wait`], but the end of patience is the end of nothing else.
    pub(super) fn look_for<T>(&self, patience: Duration, look: &mut dyn FnMut(&mut Mail) -> Option<T>) -> Result<T, PoolError> {
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
                return Err(if mail.never_ran { PoolError::NeverRan(ended) } else { PoolError::Ended(ended) });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PoolError::Stuck(patience));
            }
            mail = self.changed.wait_timeout(mail, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn wait_for_end(&self, patience: Duration) -> Option<Ended> {
        let lives = |mail: &mut Mail| mail.ended.is_none();
        let waited = self.changed.wait_timeout_while(self.mail(), patience, lives);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended.clone()
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

    /// Ends it because somebody asked for it. It is gone when its mail says so.
    pub(super) fn kill(&self) {
        self.mail().was_killed = true;
        self.end_process();
    }

    /// Ends it because of what it did, or did not do.
    pub(super) fn condemn(&self, detail: String) {
        self.sentence(Ended { reason: Reason::WorkerCrashed, detail });
    }

    /// Ends it for this reason.
    pub(super) fn sentence(&self, ended: Ended) {
        self.mail().verdict.get_or_insert(ended);
        self.end_process();
    }

    /// Ends the process, whatever it does.
    pub(super) fn end_process(&self) {
        match &self.mail().pidfd {
            // ESRCH: it is gone already.
            Some(pidfd) => rustix::process::pidfd_send_signal(pidfd, Signal::KILL).unwrap_or_default(),
            // It has not been born yet, and will find nobody at the other end.
            None => self.channel.shut_down(),
        }
    }

    /// The worker is about to be told to have its memory watched for this host image.
    pub(super) fn await_watched(&self, host_image: &Arc<HostImage>) {
        *self.watching() = Watching::Due(Arc::clone(host_image));
    }

    /// Gives its absent memory into the hands of its host image. Says whether that was due.
    fn is_watched(self: &Arc<Self>, starts: &[u64], descriptors: Vec<OwnedFd>) -> bool {
        let mut watching = self.watching();
        let Watching::Due(host_image) = std::mem::take(&mut *watching) else { return false };
        let (machine, pid) = {
            let mail = self.mail();
            (mail.machine, mail.pid)
        };
        let Some(machine) = machine else { return false };
        let Some(descriptor) = descriptors.into_iter().next() else {
            // There was no room for it here.
            self.condemn("this process has no room for the descriptor that reports its faults".to_owned());
            return true;
        };
        let starts: Option<Vec<HostAddress>> =
            starts.iter().map(|start| usize::try_from(*start).ok().map(HostAddress)).collect();
        let keeper = Box::new(Arc::downgrade(self));
        let pagemap = pid.and_then(|pid| File::open(format!("/proc/{pid}/pagemap")).ok());
        let watch = Watch::over(descriptor);
        let watched = starts.and_then(|starts| Watched::new(machine, watch, &starts, host_image, pagemap, keeper));
        let Some(watched) = watched.map(Arc::new) else { return false };
        *watching = Watching::Yes(Arc::clone(&watched));
        drop(watching);
        watched.host_image().adopt(&watched);
        true
    }

    /// Lets it make no process any more, or as many as it needs again. Says whether its control group sees to that; if it has none
    /// it has to see to it itself, for good.
    pub(super) fn lock_processes(&self, is_locked: bool) -> Result<bool, CgroupError> {
        #[cfg(feature = "testing")]
        if crate::harness::guards::is_off(crate::harness::guards::Guard::NoProcesses) {
            return Ok(true);
        }
        match &*self.group.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(group) => group.limit_processes(if is_locked { 0 } else { THREADS_MAX }).map(|()| true),
            None => {
                self.is_childless.store(true, Ordering::Release);
                Ok(false)
            }
        }
    }

    /// Whether it may fork a copier.
    pub(super) fn may_have_processes(&self) -> bool {
        !self.is_childless.load(Ordering::Acquire) && !matches!(*self.watching(), Watching::Yes(_))
    }

    /// How often it has touched what was absent.
    pub(super) fn faults(&self) -> u64 {
        match &*self.watching() {
            Watching::Yes(watched) => watched.faults(),
            Watching::Was(faults) => *faults,
            _ => 0,
        }
    }

    /// It has closed its descriptor, since its host image has settled. Says whether that was due.
    fn has_let_go(&self) -> bool {
        let mut watching = self.watching();
        let watched = match &*watching {
            Watching::Yes(watched) if watched.host_image().is_settled() => Arc::clone(watched),
            _ => return false,
        };
        // Nothing of it can be absent any more, for whomever. If its group does not let it, it goes on without a copier.
        if self.lock_processes(false).is_err() {
            self.is_childless.store(true, Ordering::Release);
        }
        *watching = Watching::Was(watched.faults());
        drop(watching);
        watched.host_image().release(&watched);
        true
    }

    /// Its process is gone: nobody can touch anything any more.
    pub(super) fn release_host_image(&self) {
        if let Watching::Yes(watched) = std::mem::take(&mut *self.watching()) {
            watched.host_image().release(&watched);
        }
    }

    fn watching(&self) -> MutexGuard<'_, Watching> {
        self.watching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message that the worker sent.
    pub(super) fn take(self: &Arc<Self>, received: Received<FromWorker>) {
        let Received { message, descriptors } = received;
        if let FromWorker::Watched { starts } = &message {
            if !self.is_watched(starts, descriptors) {
                self.condemn("its worker said what nobody had asked".to_owned());
            }
            return;
        }
        if matches!(message, FromWorker::HasLetGo) {
            if !self.has_let_go() {
                self.condemn("its worker said what nobody had asked".to_owned());
            }
            return;
        }
        let is_end = matches!(message, FromWorker::Ended { .. });
        let mut is_due = true;
        self.deliver(|mail| is_due = mail.take(message));
        if !is_due {
            self.condemn("its worker said what nobody had asked".to_owned());
        } else if is_end {
            // What is left of it is of no use, and takes memory.
            self.end_process();
        }
    }

    /// The worker is gone. Says what that means, and of which machine it is news: whoever forked one that never ran is told as the
    /// outcome of that, and who asked for the end knows it.
    pub(super) fn has_exited(&self, how: Option<Exit>) -> (Option<MachineId>, Ended) {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner).take();
        let oom_kills = group.as_ref().map_or(0, WorkerGroup::oom_kills);
        let mut mail = self.mail();
        let was_killed = mail.was_killed;
        // The kernel's word before the pool's, and the pool's before the worker's.
        let said = mail.verdict.take().or(mail.said_end.take());
        // Also where the host had no memory left: what the kernel takes then is whoever it finds.
        let is_unasked = said.is_none() && !was_killed;
        mail.never_ran = is_unasked && mail.running.is_none() && how == Some(Exit::Signal(libc::SIGKILL));
        let ended = match (said, how) {
            (_, Some(Exit::Signal(libc::SIGKILL))) if oom_kills > 0 => {
                Ended { reason: Reason::Oom, detail: "it went over its memory limit, and the kernel killed it".to_owned() }
            }
            (_, Some(Exit::Signal(libc::SIGSYS))) => Ended {
                reason: Reason::JailViolation,
                detail: "its worker made a system call that it may not make; the kernel's audit log names it".to_owned(),
            },
            (Some(said), _) => said,
            (None, _) if was_killed => Ended { reason: Reason::Killed, detail: "somebody asked for it".to_owned() },
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
        let machine = mail.machine.filter(|_| mail.running.is_some() && !was_killed);
        drop(mail);
        self.changed.notify_all();
        // Back where it is removed, once the kernel has let go of its last process.
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
        (machine, ended)
    }
}

impl Keeper for Weak<Worker> {
    fn end(&self, ended: Ended) {
        if let Some(worker) = self.upgrade() {
            worker.sentence(ended);
        }
    }

    fn let_go(&self) {
        if let Some(worker) = self.upgrade() {
            // If it is gone, so are its faults.
            worker.channel.send(&ToWorker::LetGo, &[]).unwrap_or_default();
        }
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
