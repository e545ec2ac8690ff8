//! The one place where ended processes are waited for: those that a session started, and orphans that fall to the first process.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions, pidfd_open, wait, waitid};

use super::say;
use crate::protocol::Exit;

/// See the module.
pub(super) struct Reaper {
    /// By process id: those that a session waits for, and how they ended.
    awaited: Mutex<HashMap<i32, Option<Exit>>>,
    changed: Condvar,
}

impl Reaper {
    pub(super) fn start() -> Arc<Self> {
        let reaper = Arc::new(Self { awaited: Mutex::default(), changed: Condvar::new() });
        let its_own = Arc::clone(&reaper);
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || its_own.live());
        if let Err(error) = thread {
            say(&format!("no thread to reap with: {error}"));
        }
        reaper
    }

    /// Starts a program, with what becomes readable when it ends; its end is then [waited for](Self::wait) once.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<(Child, OwnedFd)> {
        // Locked meanwhile: its end is not looked at before it is known that somebody waits for it, and what becomes readable
        // with its end is opened.
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let end = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        awaited.insert(pid_of(&child), None);
        self.changed.notify_all();
        Ok((child, end))
    }

    /// Waits for the end of a program that was started here.
    pub(super) fn wait(&self, pid: i32) -> Exit {
        let still_runs = |awaited: &mut HashMap<i32, Option<Exit>>| matches!(awaited.get(&pid), Some(None));
        let waited = self.changed.wait_while(self.awaited.lock().unwrap_or_else(PoisonError::into_inner), still_runs);
        let ended = waited.unwrap_or_else(PoisonError::into_inner).remove(&pid);
        // Nobody waits for one twice.
        ended.flatten().unwrap_or(Exit::Status(0))
    }

    fn live(&self) {
        loop {
            // Seen and left: it is reaped with the lock held, so that its number is not used again before it has been noted.
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match waitid(WaitId::All, look) {
                Ok(Some(_)) => self.reap(),
                Ok(None) | Err(Errno::INTR) => {}
                Err(Errno::CHILD) => {
                    // No process at all: until one is started.
                    let awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
                    let nobody = |awaited: &mut HashMap<i32, Option<Exit>>| !awaited.values().any(Option::is_none);
                    drop(self.changed.wait_while(awaited, nobody));
                }
                Err(error) => {
                    say(&format!("waiting for processes: {error}"));
                    std::thread::sleep(std::time::Duration::from_secs(1));
                }
            }
        }
    }

    fn reap(&self) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else { return };
        if let Some(place) = awaited.get_mut(&pid.as_raw_pid()) {
            let signal = || Exit::Signal(status.terminating_signal().unwrap_or(0));
            *place = Some(status.exit_status().map_or_else(signal, Exit::Status));
            self.changed.notify_all();
        }
    }
}

pub(super) fn pid_of(child: &Child) -> i32 {
    Pid::from_child(child).as_raw_pid()
}
