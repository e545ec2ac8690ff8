//! The control of a running machine: takes the node's orders, tells it what happens.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags};
use rustix::time::Timespec;

use super::Shared;
use super::channel::{ReceiveError, Received};
use super::protocol::{Failure, FromWorker, ToWorker, WireFrozen};
use crate::host::Host;
use crate::machine::freeze::{Copied, FreezeError, Taken};
use crate::machine::{FreezeReport, Machine};
use crate::probe::{Command, Pending, Probe, ProbeError};
use crate::sys::process::exit;

/// A guest that has not come out of its own code by then runs all the same.
const FIRST_EXIT_PATIENCE_MS: i64 = 20;
/// The same where its first instructions may have to be fetched from far away.
const WATCHED_FIRST_EXIT_PATIENCE_MS: i64 = 500;
/// How much of what a machine printed goes with the news of its end.
const CONSOLE_TAIL_BYTES: usize = 4096;

/// When a [`Control`] stops serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Never: the worker ends with its channel.
    Closed,
    /// When the machine has been frozen.
    Frozen,
}

/// Times of a fork, on the monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct ForkTimes {
    pub(super) received_ns: u64,
    pub(super) map_ns: u64,
    pub(super) restore_ns: u64,
}

/// See the module.
pub(super) struct Control {
    machine: Machine,
    host: Host,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    /// Until the node was told that the machine runs.
    unreported: Option<ForkTimes>,
    first_exit_patience_ms: i64,
    has_reported_end: bool,
    /// For each vCPU, the command that its probe works on.
    pending: Vec<Option<Pending>>,
    copying: Option<Taken>,
}

impl Control {
    pub(super) fn over(machine: Machine, host: Host, shared: Arc<Shared>, buffer: Vec<u8>) -> Self {
        let pending = vec![None; usize::from(machine.class().vcpu_count())];
        Self {
            machine,
            host,
            shared,
            buffer,
            unreported: None,
            first_exit_patience_ms: FIRST_EXIT_PATIENCE_MS,
            has_reported_end: false,
            pending,
            copying: None,
        }
    }

    /// The machine has its memory and state, and runs.
    pub(super) fn is_forked(&mut self, times: ForkTimes, is_watched: bool) {
        self.machine.is_now_running();
        if is_watched {
            self.first_exit_patience_ms = WATCHED_FIRST_EXIT_PATIENCE_MS;
            self.machine.may_wait_for_pages();
        }
        self.unreported = Some(times);
    }

    pub(super) fn resume(&mut self) {
        self.machine.resume();
    }

    pub(super) fn serve(&mut self, until: Until) {
        loop {
            self.look_around();
            if self.wait_for_order() {
                let frozen = self.obey();
                if frozen && until == Until::Frozen {
                    return;
                }
            }
        }
    }

    /// Waits for something to happen; says whether it is an order.
    fn wait_for_order(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let bell = crate::sys::borrow_fd(&shared.bell);
        let mut fds = vec![PollFd::new(&shared.channel, PollFlags::IN), PollFd::from_borrowed_fd(bell, PollFlags::IN)];
        let copier: Option<[BorrowedFd<'_>; 2]> =
            self.copying.as_ref().and_then(Taken::copier).map(|copier| copier.descriptors());
        fds.extend(copier.into_iter().flatten().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let of_devices = if self.machine.is_running() { self.machine.device_descriptors() } else { Vec::new() };
        let devices_from = fds.len();
        fds.extend(of_devices.iter().map(|(fd, interest)| PollFd::new(fd, *interest)));
        let patience = Timespec { tv_sec: 0, tv_nsec: self.first_exit_patience_ms * 1_000_000 };
        let patience = self.unreported.is_some().then_some(patience);
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, patience.as_ref()));
        let is_readable = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let (order, rung) = (is_readable(&fds[0]), is_readable(&fds[1]));
        let copied = fds[2..devices_from].iter().any(is_readable);
        drop(fds);
        if rung {
            // EAGAIN: another thread was faster.
            shared.bell.read().unwrap_or_default();
        }
        if ready == Ok(0) {
            self.report_running(0);
        }
        if copied {
            self.finish_freeze();
        }
        if self.machine.is_running() {
            self.machine.serve_devices();
        }
        order
    }

    /// Tells the node what it does not know yet.
    fn look_around(&mut self) {
        let first_ns = self.shared.first_exit_ns.load(Ordering::Acquire);
        if first_ns != 0 {
            self.report_running(first_ns);
        }
        for vcpu in 0..self.pending.len() {
            let Some(pending) = self.pending[vcpu] else { continue };
            if let Some(answer) = Probe::on(&self.machine, vcpu).look(pending) {
                self.pending[vcpu] = None;
                let vcpu = u8::try_from(vcpu).expect("at most 8");
                let answer = answer.map_err(|error| probe_failure(&error));
                self.send(&FromWorker::Answer { vcpu, answer });
            }
        }
        if let (false, Some(ended)) = (self.has_reported_end, self.machine.ended()) {
            self.has_reported_end = true;
            let (printed, _) = self.machine.console().contents();
            let console = printed[printed.len().saturating_sub(CONSOLE_TAIL_BYTES)..].to_vec();
            self.send(&FromWorker::Ended { reason: ended.reason, detail: ended.detail, console });
        }
    }

    fn report_running(&mut self, first_ns: u64) {
        if let Some(ForkTimes { received_ns, map_ns, restore_ns }) = self.unreported.take() {
            self.send(&FromWorker::Running { received_ns, first_ns, map_ns, restore_ns });
        }
    }

    /// Takes one order. Says whether the machine was frozen.
    fn obey(&mut self) -> bool {
        let Received { message, descriptors } = match self.shared.channel.receive(&mut self.buffer) {
            Ok(received) => received,
            Err(ReceiveError::Gone) => exit(0),
            Err(error) => {
                let failed = super::builder::failure("receiving an order", &io::Error::other(error));
                super::builder::give_up(&self.shared, &failed)
            }
        };
        match message {
            ToWorker::Freeze => return self.freeze(descriptors.into_iter().map(File::from).collect(), Copied::Extents),
            ToWorker::FreezePages => return self.freeze(descriptors.into_iter().map(File::from).collect(), Copied::Pages),
            ToWorker::LetGo => {
                drop(self.shared.watch.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take());
                self.send(&FromWorker::HasLetGo);
            }
            ToWorker::Pause => {
                // If it cannot be paused it has ended, and that is said.
                if self.machine.pause().is_ok() {
                    self.send(&FromWorker::Done);
                }
            }
            ToWorker::Resume => {
                self.machine.resume();
                self.send(&FromWorker::Done);
            }
            ToWorker::Probe { vcpu, command } => self.give_command(vcpu, command),
            ToWorker::StopProbe { vcpu } => {
                if let Some(pending) = self.pending.get_mut(usize::from(vcpu)) {
                    let probe = Probe::on(&self.machine, usize::from(vcpu));
                    *pending = pending.or_else(|| probe.inherited(Command::Ping).ok());
                    probe.tell_to_stop().unwrap_or_default();
                }
            }
            ToWorker::Connect { port } => {
                // Without a descriptor the node had no room for one, and sees its other end closed.
                if let Some(socket) = descriptors.into_iter().next() {
                    self.machine.connect(port, socket);
                }
            }
            ToWorker::Plug => match descriptors.into_iter().next() {
                Some(tap) => {
                    self.machine.plug(tap);
                    self.send(&FromWorker::Done);
                }
                None => {
                    let failed = super::builder::failure("plugging a tap in", &io::Error::from(io::ErrorKind::NotFound));
                    super::builder::give_up(&self.shared, &failed)
                }
            },
            ToWorker::Touched => {
                let touched = self.machine.touched(&self.host).unwrap_or_default();
                self.send(&FromWorker::Touched(touched));
            }
            ToWorker::Console => {
                let (bytes, dropped) = self.machine.console().contents();
                self.send(&FromWorker::Console { bytes, dropped });
            }
            #[cfg(feature = "testing")]
            ToWorker::Attempt(order) => {
                let errno = crate::harness::attempts::attempt(order, &self.machine, descriptors);
                self.send(&FromWorker::Attempted(errno));
            }
            #[cfg(feature = "testing")]
            ToWorker::ReadHole { at, is_forked } => {
                use crate::sys::attempts::memory;
                let slot = &self.machine.memory().slots()[0].1;
                let read = if is_forked { memory::fork_and_read(slot, at) } else { memory::read_hole(&descriptors, at) };
                let errno = read.err().unwrap_or(0);
                self.send(&FromWorker::Attempted(errno));
            }
            #[cfg(feature = "testing")]
            ToWorker::Crash(crash) => match crash {
                crate::harness::Crash::Lie => self.send(&FromWorker::Done),
                crate::harness::Crash::Garbage => self.shared.channel.send_bytes(b"not ours", &[]).unwrap_or_default(),
                crash => crash.happen(),
            },
            ToWorker::Build { .. }
            | ToWorker::Layers
            | ToWorker::Fork { .. }
            | ToWorker::ForkWatched { .. }
            | ToWorker::BootProbe { .. }
            | ToWorker::BootLinux { .. } => {
                let message = "the order is for a shell, and this is a machine".to_owned();
                self.send(&FromWorker::NotFrozen(Failure { message, remedy: "none: the node is wrong".into(), errno: 0 }));
            }
        }
        false
    }

    fn give_command(&mut self, vcpu: u8, command: Command) {
        let index = usize::from(vcpu);
        let answer = match self.pending.get(index) {
            None => Err("it has no such vCPU".to_owned()),
            Some(Some(_)) => Err("its probe works on another command".to_owned()),
            Some(None) => Probe::on(&self.machine, index).post(command).map_err(|error| error.to_string()),
        };
        match answer {
            Ok(pending) => self.pending[index] = Some(pending),
            Err(message) => {
                let failure = Failure { message, remedy: "ask when it has answered".into(), errno: 0 };
                self.send(&FromWorker::Answer { vcpu, answer: Err(failure) });
            }
        }
    }

    fn freeze(&mut self, layers: Vec<File>, copied: Copied) -> bool {
        if self.copying.is_some() {
            let message = "the freeze before this one is not complete".to_owned();
            self.send(&FromWorker::NotFrozen(Failure { message, remedy: "freeze again when it is".into(), errno: 0 }));
            return false;
        }
        let regions = self.machine.image().map_or(0, |image| image.regions().len());
        if layers.len() != regions {
            let message = format!("{} layers for {regions} regions", layers.len());
            self.send(&FromWorker::NotFrozen(Failure { message, remedy: "none: the node is wrong".into(), errno: 0 }));
            return false;
        }
        match self.machine.take_instant(&self.host, &layers, copied) {
            Ok(taken) => {
                let is_complete = taken.copier().is_none();
                self.copying = Some(taken);
                if is_complete {
                    self.finish_freeze();
                }
                is_complete
            }
            Err(error) => {
                self.send(&FromWorker::NotFrozen(freeze_failure(&error)));
                false
            }
        }
    }

    fn finish_freeze(&mut self) {
        let Some(mut taken) = self.copying.take() else { return };
        match taken.finish_copy() {
            Ok(report) => {
                let FreezeReport { stall, rest, capture, scan, instant, copy, dirty_pages, copied_extents } = report;
                let ns = |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
                self.send(&FromWorker::Frozen(Box::new(WireFrozen {
                    state: taken.state.encode(),
                    identity_page: self.machine.identity_page(),
                    maps: taken.maps,
                    took_ns: [stall, rest, capture, scan, instant, copy].map(ns),
                    dirty_pages,
                    copied_extents,
                })));
            }
            Err(error) => self.send(&FromWorker::NotFrozen(freeze_failure(&error))),
        }
    }

    fn send(&self, message: &FromWorker) {
        match self.shared.channel.send(message, &[]) {
            Ok(()) => {}
            // The node is gone, which the next wait finds out.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            // A node that is left without an answer would wait for it.
            Err(error) => super::builder::give_up(&self.shared, &super::builder::failure("answering the node", &error)),
        }
    }
}

fn freeze_failure(error: &FreezeError) -> Failure {
    let errno = match error {
        FreezeError::Step { source, .. } => source.raw_os_error().unwrap_or(0),
        _ => 0,
    };
    Failure { errno, ..Failure::of(error, error.remedy()) }
}

fn probe_failure(error: &ProbeError) -> Failure {
    Failure::of(error, "fork again from its image")
}
