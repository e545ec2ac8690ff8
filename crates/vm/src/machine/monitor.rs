//! Where a machine's vCPU threads and whoever controls the machine meet: one lock, one condition variable.
//!
//! ```text
//! a vCPU's seat    Starting ──▶ Resting ◀──────▶ Running ──▶ Gone
//!                                  ▲                │ ▲
//!                                  │   order: Hold  ▼ │ ring
//!                                  └───────────── Idle       (the guest waits for work; no CPU time is used)
//! ```
//!
//! The order is what the controller wants of all vCPUs: Hold, Run or Stop. It is changed under the lock **before** the vCPUs
//! are kicked, and a vCPU looks at it **after** it has cleared its kick, so that no order is slept through.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use types::Reason;

use crate::sys::kvm::Kicker;

/// What a machine's end was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// From the closed list.
    pub reason: Reason,
    /// The numbers: which vCPU, which exit, which address.
    pub detail: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

/// What the controller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Hold,
    Run,
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    Starting,
    Resting,
    Running,
    Idle,
    Gone,
}

#[derive(Debug)]
struct Vcpu {
    seat: Seat,
    /// The guest said that it waits for work, and nobody has rung since.
    idle: bool,
    rings: u64,
    rings_seen: u64,
    faults: u64,
}

struct State {
    order: Order,
    vcpus: Vec<Vcpu>,
    ended: Option<Ended>,
    first_exit: Option<Instant>,
    /// The longest that a vCPU which ran before the last pause has not run because of it.
    stall: Duration,
    /// How many of them have not run again yet.
    stalled_vcpus: usize,
    /// Something for the first vCPU's thread to do.
    task: Option<Task>,
}

/// Work that a vCPU's thread does before it runs the guest.
pub(crate) type Task = Box<dyn FnOnce() + Send>;

/// Is told what happens to a machine, by the thread to which it happens. What it does must not take long, nor call the monitor.
pub(crate) trait Witness: Send + Sync {
    /// The first exit, which is how the first instruction is observed.
    fn first_exit(&self);
    /// A guest has said that it waits for work, or that it took an exception; or the machine has ended.
    fn news(&self);
}

/// See the module.
pub(crate) struct Monitor {
    state: Mutex<State>,
    changed: Condvar,
    kickers: Vec<Kicker>,
    witness: Option<Arc<dyn Witness>>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("kickers", &self.kickers).finish_non_exhaustive()
    }
}

/// What a vCPU thread does next.
pub(crate) enum Next {
    Run,
    Do(Task),
    Leave,
}

impl Monitor {
    pub(crate) fn new(kickers: Vec<Kicker>, witness: Option<Arc<dyn Witness>>) -> Self {
        let vcpus =
            kickers.iter().map(|_| Vcpu { seat: Seat::Starting, idle: false, rings: 0, rings_seen: 0, faults: 0 }).collect();
        let state = State {
            order: Order::Hold,
            vcpus,
            ended: None,
            first_exit: None,
            stall: Duration::ZERO,
            stalled_vcpus: 0,
            task: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), kickers, witness }
    }

    pub(crate) fn kicker(&self, vcpu: usize) -> &Kicker {
        &self.kickers[vcpu]
    }

    // ---- the controller's side

    /// Lets the vCPUs run. A machine that has ended stays so.
    pub(crate) fn run(&self) {
        let mut state = self.lock();
        if state.order == Order::Hold && state.ended.is_none() {
            state.order = Order::Run;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Brings every vCPU to rest. `false` if one did not come before the deadline.
    pub(crate) fn pause(&self, patience: Duration) -> bool {
        {
            let mut state = self.lock();
            let running = state.vcpus.iter().filter(|vcpu| vcpu.seat == Seat::Running).count();
            if running > 0 {
                (state.stall, state.stalled_vcpus) = (Duration::ZERO, running);
            }
        }
        self.give_order(Order::Hold);
        let state = self.lock();
        let resting = |state: &mut State| !state.vcpus.iter().all(|vcpu| matches!(vcpu.seat, Seat::Resting | Seat::Gone));
        let (state, timeout) =
            self.changed.wait_timeout_while(state, patience, resting).unwrap_or_else(PoisonError::into_inner);
        drop(state);
        !timeout.timed_out()
    }

    /// How long the last pause has kept a vCPU from running, as its own thread saw it: from leaving KVM_RUN until entering it
    /// again. `None` if one has not entered it again within `patience`.
    pub(crate) fn stall(&self, patience: Duration) -> Option<Duration> {
        let stalled = |state: &mut State| state.stalled_vcpus > 0;
        let waited = self.changed.wait_timeout_while(self.lock(), patience, stalled);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        (state.stalled_vcpus == 0).then_some(state.stall)
    }

    /// Gives the first vCPU's thread something to do before it runs the guest. The machine is at rest.
    pub(crate) fn give_task(&self, task: Task) {
        let replaced = self.lock().task.replace(task);
        assert!(replaced.is_none(), "one task at a time");
        self.changed.notify_all();
    }

    /// Tells every vCPU thread to leave. The caller joins them.
    pub(crate) fn stop(&self) {
        self.give_order(Order::Stop);
    }

    /// Tells a guest that waits for work that there is some.
    pub(crate) fn ring(&self, vcpu: usize) {
        let mut state = self.lock();
        state.vcpus[vcpu].rings += 1;
        state.vcpus[vcpu].idle = false;
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until `done` says so, the machine has ended, or the patience is over. `done` is asked again whenever something
    /// happens, with the number of faults that the vCPU has reported; it must not call this monitor. `Ok(false)` when the
    /// patience is over.
    pub(crate) fn wait_until(&self, vcpu: usize, patience: Duration, mut done: impl FnMut(u64) -> bool) -> Result<bool, Ended> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if done(state.vcpus[vcpu].faults) {
                return Ok(true);
            }
            if let Some(ended) = &state.ended {
                return Err(ended.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.lock().ended.clone()
    }

    pub(crate) fn first_exit(&self) -> Option<Instant> {
        self.lock().first_exit
    }

    pub(crate) fn wait_for_first_exit(&self, patience: Duration) -> Option<Instant> {
        let unseen = |state: &mut State| state.first_exit.is_none() && state.ended.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), patience, unseen);
        waited.unwrap_or_else(PoisonError::into_inner).0.first_exit
    }

    pub(crate) fn faults(&self, vcpu: usize) -> u64 {
        self.lock().vcpus[vcpu].faults
    }

    /// Ends the machine for a reason; the first reason stays.
    pub(crate) fn end(&self, ended: Ended) {
        self.lock().ended.get_or_insert(ended);
        self.give_order(Order::Hold);
        if let Some(witness) = &self.witness {
            witness.news();
        }
    }

    /// Whether every vCPU thread has done its warming run.
    pub(crate) fn wait_for_start(&self) {
        let starting = |state: &mut State| state.vcpus.iter().any(|vcpu| vcpu.seat == Seat::Starting);
        drop(self.changed.wait_while(self.lock(), starting).unwrap_or_else(PoisonError::into_inner));
    }

    fn give_order(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::Stop {
            state.order = order;
        }
        let to_kick: Vec<usize> =
            (0..self.kickers.len()).filter(|vcpu| matches!(state.vcpus[*vcpu].seat, Seat::Running)).collect();
        drop(state);
        self.changed.notify_all();
        for vcpu in to_kick {
            self.kickers[vcpu].kick();
        }
    }

    // ---- a vCPU thread's side

    /// Waits for the order to run. Called with the kick cleared.
    pub(crate) fn wait_to_run(&self, vcpu: usize) -> Next {
        let mut state = self.lock();
        loop {
            if vcpu == 0
                && let Some(task) = state.task.take()
            {
                return Next::Do(task);
            }
            let (seat, next) = match state.order {
                Order::Stop => (Seat::Gone, Some(Next::Leave)),
                Order::Hold => (Seat::Resting, None),
                Order::Run if state.vcpus[vcpu].idle => (Seat::Idle, None),
                Order::Run => (Seat::Running, Some(Next::Run)),
            };
            if state.vcpus[vcpu].seat != seat {
                state.vcpus[vcpu].seat = seat;
                self.changed.notify_all();
            }
            if let Some(next) = next {
                return next;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A vCPU that was kicked out of running runs again, after `gap`.
    pub(crate) fn note_gap(&self, gap: Duration) {
        let mut state = self.lock();
        if state.stalled_vcpus > 0 {
            state.stalled_vcpus -= 1;
            state.stall = state.stall.max(gap);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The guest waits for work, unless it was rung since it last did.
    pub(crate) fn note_idle(&self, number: usize) {
        let mut state = self.lock();
        let vcpu = &mut state.vcpus[number];
        vcpu.idle = vcpu.rings == vcpu.rings_seen;
        vcpu.rings_seen = vcpu.rings;
        drop(state);
        self.changed.notify_all();
        if let Some(witness) = &self.witness {
            witness.news();
        }
    }

    pub(crate) fn note_fault(&self, vcpu: usize) {
        self.lock().vcpus[vcpu].faults += 1;
        self.changed.notify_all();
        if let Some(witness) = &self.witness {
            witness.news();
        }
    }

    /// A device has something for who runs the machine.
    pub(crate) fn note_news(&self) {
        if let Some(witness) = &self.witness {
            witness.news();
        }
    }

    pub(crate) fn note_first_exit(&self, at: Instant) {
        self.lock().first_exit.get_or_insert(at);
        self.changed.notify_all();
        if let Some(witness) = &self.witness {
            witness.first_exit();
        }
    }

    /// The thread of this vCPU is about to end.
    pub(crate) fn leave(&self, vcpu: usize) {
        self.lock().vcpus[vcpu].seat = Seat::Gone;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
