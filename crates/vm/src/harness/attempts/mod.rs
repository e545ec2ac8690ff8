//! The escape harness: attempts to break out of the jail, each made inside a real worker, and each with the mechanism that
//! refuses it. A case is judged three times:
//!
//! | jail | the attempt |
//! |---|---|
//! | whole | is refused |
//! | without what stands in front ([`Case::behind`]) | is refused by the case's mechanism |
//! | without that mechanism too | succeeds |
//!
//! So a mechanism that is not there, or does nothing, is found out. Where nothing stands in front the first two are one.

mod gifts;
mod layers;
mod render;
mod table;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use types::GuestAddress;

pub use gifts::{Gift, Given, own_hostname};
pub use render::{render_cases, render_syscalls};

use crate::jail::Mechanism;
use crate::machine::Machine;
use crate::sys::attempts::{MARK, NO_EFFECT, Outcome, Scene};

/// One attempt, and who refuses it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Unique: the system call, or what it is used for.
    pub name: &'static str,
    /// What is tried.
    pub what: &'static str,
    /// Who tries.
    pub thread: Thread,
    /// Who refuses.
    pub refused_by: Mechanism,
    /// What would refuse it before that.
    pub behind: &'static [Mechanism],
    /// How the mechanism refuses.
    pub refusal: Refusal,
    /// What the node sends along.
    pub given: Given,
    attempt: fn(&Scene) -> Outcome,
}

/// A thread of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Thread {
    /// The main one, which takes orders.
    Control,
    /// That of the first vCPU, which may do less. What it tries, the control thread may.
    Vcpu,
}

/// How an attempt is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The kernel kills the worker for the system call (SIGSYS).
    Killed,
    /// The kernel kills the worker for its memory.
    OutOfMemory,
    /// With this error number.
    Errno(i32),
    /// The calls are taken, but do not do what they do without the mechanism.
    NoEffect,
}

impl Refusal {
    /// What an [`attempt`](crate::pool::Jailed::attempt) answers then, if it answers.
    #[must_use]
    pub fn answer(self) -> Option<i32> {
        match self {
            Self::Killed | Self::OutOfMemory => None,
            Self::Errno(errno) => Some(errno),
            Self::NoEffect => Some(NO_EFFECT),
        }
    }
}

/// What to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Which of [`cases`].
    pub number: u16,
    /// On which thread.
    pub thread: Thread,
    /// A process, a port, a key: see [`Gift`].
    pub about: u64,
}

/// All of them.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    table::CONTROL.iter().chain(table::VCPU).chain(layers::CASES)
}

/// How long an attempt may take that another thread makes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes an attempt, in a worker. The error number, 0 for success.
pub(crate) fn attempt(order: Order, machine: &Machine, given: Vec<OwnedFd>) -> i32 {
    let Some(case) = cases().nth(usize::from(order.number)) else { return libc::EINVAL };
    let monitor = &machine.frame.monitor;
    if !monitor.pause(PATIENCE) {
        return libc::ETIMEDOUT;
    }
    // The last page of the first region: the probe's guest touches it only when it is told to.
    let (start, slot) = machine.memory().low_ram();
    let offset = slot.len() - 4096;
    if machine.memory().write(GuestAddress(start.0 + offset as u64), &[MARK; 4096]).is_err() {
        return libc::EFAULT;
    }
    let core = &machine.frame.core;
    let (vm, vcpu) = (core.vm.as_raw_fd(), core.vcpu(0).as_raw_fd());
    let scene = Scene { given, number: order.about, page: slot.start().0 + offset, vm, vcpu };
    let attempt = case.attempt;
    let outcome = match order.thread {
        Thread::Control => {
            let outcome = attempt(&scene);
            // Whatever has become of its descriptors, nobody closes them again.
            std::mem::forget(scene);
            outcome
        }
        Thread::Vcpu => {
            let done = Arc::new((Mutex::new(None), Condvar::new()));
            let tell = Arc::clone(&done);
            monitor.give_task(Box::new(move || {
                let outcome = attempt(&scene);
                *tell.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                tell.1.notify_all();
                // What was given is closed by the end of the worker: this thread may not.
                std::mem::forget(scene);
            }));
            let (outcome, changed) = &*done;
            let outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = changed.wait_timeout_while(outcome, PATIENCE, |outcome| outcome.is_none());
            waited.unwrap_or_else(PoisonError::into_inner).0.unwrap_or(Err(libc::ETIMEDOUT))
        }
    };
    outcome.err().unwrap_or(0)
}
