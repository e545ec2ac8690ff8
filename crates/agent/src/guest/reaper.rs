//! The one place where ended processes are waited for: those that a session started, and orphans that fall to the first process.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions, pidfd_open, wait, waitid};

use super::say;
use crate::protocol::Exit;

/// See the module.
pub(super) struct Reaper {
    /// By process id: those that were started here.
    programs: Mutex<HashMap<i32, Program>>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Runs,
    /// It runs, and nobody will ask how it ended.
    RunsAlone,
    Ended(Exit),
}

impl Reaper {
    pub(super) fn start() -> Arc<Self> {
        let reaper = Arc::new(Self { programs: Mutex::default(), changed: Condvar::new() });
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
        let mut programs = self.lock();
        let child = command.spawn()?;
        let end = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        programs.insert(pid_of(&child), Program::Runs);
        self.changed.notify_all();
        Ok((child, end))
    }

    /// Nobody will wait for the end of this program.
    pub(super) fn forget(&self, pid: i32) {
        let mut programs = self.lock();
        match programs.get_mut(&pid) {
            Some(program @ Program::Runs) => *program = Program::RunsAlone,
            _ => drop(programs.remove(&pid)),
        }
    }

    /// Waits for the end of a program that was started here.
    pub(super) fn wait(&self, pid: i32) -> Exit {
        let still_runs = |programs: &mut HashMap<i32, Program>| programs.get(&pid) == Some(&Program::Runs);
        let waited = self.changed.wait_while(self.lock(), still_runs);
        match waited.unwrap_or_else(PoisonError::into_inner).remove(&pid) {
            Some(Program::Ended(exit)) => exit,
            // Nobody waits for one twice.
            _ => Exit::Status(0),
        }
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
                    let has_ended = |program: &Program| matches!(program, Program::Ended(_));
                    let nobody = |programs: &mut HashMap<i32, Program>| programs.values().all(has_ended);
                    drop(self.changed.wait_while(self.lock(), nobody));
                }
                Err(error) => {
                    say(&format!("waiting for processes: {error}"));
                    std::thread::sleep(std::time::Duration::from_secs(1));
                }
            }
        }
    }

    fn reap(&self) {
        let mut programs = self.lock();
        let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else { return };
        match programs.get_mut(&pid.as_raw_pid()) {
            None => {}
            Some(Program::RunsAlone) => drop(programs.remove(&pid.as_raw_pid())),
            Some(program) => {
                let signal = || Exit::Signal(status.terminating_signal().unwrap_or(0));
                *program = Program::Ended(status.exit_status().map_or_else(signal, Exit::Status));
                self.changed.notify_all();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Program>> {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn pid_of(child: &Child) -> i32 {
    Pid::from_child(child).as_raw_pid()
}
