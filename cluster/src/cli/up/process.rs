//! Processes that `up` has started, also those of an `up` that is long gone, and how they end.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use types::Name;

use super::error::UpError;
use super::state::{Directory, Node, State};

/// What a node has to end by itself: it lets requests in flight end for 10 s.
const ENDS_WITHIN: Duration = Duration::from_secs(20);
/// What the kernel has to end one that was killed.
const DIES_WITHIN: Duration = Duration::from_secs(5);

/// One process and never another: ids are used again, but not for one that started at the same tick of the same boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// When it started, in clock ticks since the boot (proc_pid_stat(5)).
    started_ticks: u64,
    boot: String,
}

/// Who was stopped.
#[derive(Debug, Default)]
pub(super) struct Stopped {
    /// All who ran.
    pub(super) names: Vec<Name>,
    /// Those of them that did not end by themselves.
    pub(super) killed: Vec<Name>,
}

impl Process {
    /// The process that has this id now.
    pub(super) fn of(pid: Pid) -> io::Result<Self> {
        let pid = pid.as_raw_pid();
        let (_, started_ticks) = stat(pid)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { pid, started_ticks, boot: boot()? })
    }

    /// A handle of it, if it still runs. Whoever gets its id later is not reached by that.
    fn handle(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = (self.pid > 0).then(|| Pid::from_raw(self.pid)).flatten() else { return Ok(None) };
        // Its number may be a thread's by now, which has no such handle.
        let is_it = || -> io::Result<bool> {
            let stat = stat(self.pid)?;
            Ok(boot()? == self.boot
                && stat.is_some_and(|(state, started)| started == self.started_ticks && !matches!(state, 'Z' | 'X')))
        };
        if !is_it()? {
            return Ok(None);
        }
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH | Errno::NOENT | Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Looked at again now that it is open: what has this start time now had this id then.
        Ok(is_it()?.then_some(handle))
    }
}

impl Node {
    /// A handle of its process, if that runs.
    fn handle(&self) -> Result<Option<OwnedFd>, UpError> {
        let Some(process) = &self.process else { return Ok(None) };
        process.handle().map_err(|error| UpError::io(format!("/proc/{}", process.pid), error))
    }

    pub(super) fn runs(&self) -> Result<bool, UpError> {
        Ok(self.handle()?.is_some())
    }
}

impl State {
    /// How many of its nodes run.
    pub(super) fn running(&self) -> Result<usize, UpError> {
        let runs: Result<Vec<bool>, UpError> = self.nodes.iter().map(Node::runs).collect();
        Ok(runs?.into_iter().filter(|runs| *runs).count())
    }

    /// Ends such nodes, counted from zero: asks them first. With the last one the namespaces go.
    pub(super) fn stop(&mut self, directory: &Directory, which: impl Fn(usize) -> bool) -> Result<Stopped, UpError> {
        let mut stopped = Stopped::default();
        let mut ending = Vec::new();
        for (_, node) in self.nodes.iter().enumerate().filter(|(index, _)| which(*index)) {
            if let Some(handle) = node.handle()? {
                send(&handle, Signal::TERM);
                stopped.names.push(node.name.clone());
                ending.push((node, handle));
            }
        }
        let deadline = Instant::now() + ENDS_WITHIN;
        for (node, handle) in &ending {
            if !ends_by(handle, deadline) {
                send(handle, Signal::KILL);
                stopped.killed.push(node.name.clone());
            }
        }
        let deadline = Instant::now() + DIES_WITHIN;
        for (node, handle) in &ending {
            if !ends_by(handle, deadline) {
                let pid = node.process.as_ref().map_or(0, |process| process.pid);
                return Err(UpError::Immortal { name: node.name.to_string(), pid });
            }
        }
        drop(ending);
        for (_, node) in self.nodes.iter_mut().enumerate().filter(|(index, _)| which(*index)) {
            node.process = None;
        }
        if self.running()? == 0
            && let Some(namespaces) = &self.namespaces
        {
            namespaces.remove(&self.nodes)?;
            self.namespaces = None;
        }
        directory.write(self)?;
        Ok(stopped)
    }
}

/// One that has ended in between needs no signal.
fn send(handle: &OwnedFd, signal: Signal) {
    pidfd_send_signal(handle, signal).unwrap_or_default();
}

/// Waits until a process has ended, if it does by then.
fn ends_by(handle: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap_or_default();
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            ready => return ready == Ok(1),
        }
    }
}

/// Whether a process sleeps, is a zombie and so on, and when it started; `None` if there is none of this id.
fn stat(pid: i32) -> io::Result<Option<(char, u64)>> {
    let text = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    parse_stat(&text).map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is not understood"))
}

/// The state, and field 22. The name of the program may hold anything, so fields are counted after it.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

fn boot() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// What had this number may be gone, and a thread have it now.
    #[test]
    fn a_number_that_is_a_threads_by_now_is_nobody() {
        let tid = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let tid = rustix::thread::gettid().as_raw_pid();
                for boot in [boot().unwrap(), "another".to_owned()] {
                    assert!(Process { pid: tid, started_ticks: 1, boot }.handle().unwrap().is_none());
                }
                let (_, started_ticks) = stat(tid).unwrap().unwrap();
                assert!(Process { pid: tid, started_ticks, boot: boot().unwrap() }.handle().unwrap().is_none());
                tid
            });
            thread.join().unwrap()
        });
        assert_ne!(tid, rustix::process::getpid().as_raw_pid());
    }

    #[test]
    fn fields_are_counted_after_the_name_whatever_that_is() {
        let text = "7 (a) R 1 (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n";
        assert_eq!(parse_stat(text), Some(('S', 4711)));
        assert_eq!(parse_stat("7 (a) S 1 2"), None);
    }

    #[test]
    fn a_process_is_never_taken_for_another() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(Pid::from_child(&child)).unwrap();
        let later = Process { started_ticks: process.started_ticks + 1, ..process.clone() };
        let rebooted = Process { boot: "another".to_owned(), ..process.clone() };
        assert!(process.handle().unwrap().is_some());
        assert!(later.handle().unwrap().is_none() && rebooted.handle().unwrap().is_none());
        let handle = process.handle().unwrap().unwrap();
        assert!(!ends_by(&handle, Instant::now()));
        send(&handle, Signal::KILL);
        assert!(ends_by(&handle, Instant::now() + DIES_WITHIN));
        assert!(process.handle().unwrap().is_none(), "nobody has waited for it yet, and it does not run");
        child.wait().unwrap();
        assert!(process.handle().unwrap().is_none());
        assert!(Process { pid: -1, ..process }.handle().unwrap().is_none());
    }
}
