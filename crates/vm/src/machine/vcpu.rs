//! A vCPU's thread: it runs the vCPU whenever the machine's order says so, and answers its exits.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_ioctls::{VcpuExit, VcpuFd};
use types::{GuestAddress, Reason};

use super::monitor::{Ended, Monitor, Next};
use crate::class::RamLayout;
use crate::device::{Bus, Outcome};
use crate::sys::kvm::internal_error;

const STACK_SIZE: usize = 256 << 10;
/// What a Linux kernel says last.
const PANIC: &str = "Kernel panic - not syncing";

/// What a vCPU thread needs.
pub(crate) struct Seat {
    pub(crate) index: usize,
    pub(crate) vcpu: Arc<Mutex<VcpuFd>>,
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) bus: Arc<Mutex<Bus>>,
    pub(crate) ram: RamLayout,
    pub(crate) confine: Option<fn() -> io::Result<()>>,
}

/// Why a stretch of guest code came to an end.
enum Stretch {
    /// Somebody kicked.
    Kicked,
    /// The guest waits for work.
    Idle,
    Ended(Ended),
}

/// Starts the thread. It does its warming run at once: one KVM_RUN that comes straight back, whose set-up cost (60 us, and
/// KVM's own recovery thread) a fork then does not pay.
pub(crate) fn spawn(seat: Seat) -> io::Result<JoinHandle<()>> {
    let name = format!("vcpu{}", seat.index);
    std::thread::Builder::new().name(name).stack_size(STACK_SIZE).spawn(move || seat.live())
}

/// Says that the thread is gone however it goes, so that nobody waits for a thread that has panicked.
struct Leaving<'a> {
    monitor: &'a Monitor,
    index: usize,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.monitor.leave(self.index);
        if std::thread::panicking() {
            let detail = format!("vCPU {}: its thread panicked; the message is on stderr", self.index);
            self.monitor.end(Ended { reason: Reason::KvmInternal, detail });
        }
    }
}

impl Seat {
    fn live(self) {
        let _leaving = Leaving { monitor: &self.monitor, index: self.index };
        if let Some(confine) = self.confine
            && let Err(error) = confine()
        {
            self.monitor.end(self.ended(Reason::KvmInternal, format!("its thread could not be confined: {error}")));
            return;
        }
        let kicker = self.monitor.kicker(self.index);
        kicker.adopt_this_thread();
        self.finish_exit(&mut self.vcpu.lock().unwrap_or_else(PoisonError::into_inner));
        let mut first = true;
        let mut kicked_at = None;
        loop {
            // Before the order is looked at: whoever changes the order afterwards kicks again.
            kicker.set_immediate_exit(false);
            match self.monitor.wait_to_run(self.index) {
                Next::Leave => return,
                Next::Run => {}
                Next::Do(task) => {
                    task();
                    continue;
                }
            }
            if let Some(kicked_at) = kicked_at.take() {
                self.monitor.note_gap(Instant::elapsed(&kicked_at));
            }
            let stretch = self.run(&mut self.vcpu.lock().unwrap_or_else(PoisonError::into_inner), &mut first);
            match stretch {
                Stretch::Kicked => kicked_at = Some(Instant::now()),
                Stretch::Idle => self.monitor.note_idle(self.index),
                Stretch::Ended(ended) => self.monitor.end(ended),
            }
        }
    }

    fn run(&self, vcpu: &mut VcpuFd, first: &mut bool) -> Stretch {
        loop {
            let exit = vcpu.run();
            if *first && exit.is_ok() {
                *first = false;
                self.monitor.note_first_exit(Instant::now());
            }
            match exit {
                Ok(VcpuExit::InternalError) => {
                    let (suberror, data) = internal_error(vcpu);
                    let detail = format!("KVM cannot go on with the guest: suberror {suberror}, data {data:x?}");
                    return Stretch::Ended(self.ended(Reason::KvmInternal, detail));
                }
                Ok(exit) => match self.answer(exit) {
                    Ok(Outcome::Continue) => {}
                    Ok(Outcome::Rest) => {
                        self.finish_exit(vcpu);
                        return Stretch::Idle;
                    }
                    Ok(Outcome::GuestFault) => self.monitor.note_fault(self.index),
                    Ok(Outcome::News) => self.monitor.note_news(),
                    Ok(Outcome::Reset) => return Stretch::Ended(self.reset()),
                    Err((reason, detail)) => return Stretch::Ended(self.ended(reason, detail)),
                },
                Err(error) => match error.errno() {
                    libc::EINTR => return Stretch::Kicked,
                    libc::EAGAIN => {}
                    libc::EFAULT | libc::EHWPOISON => {
                        let detail = format!("a page of its RAM cannot be had ({error})");
                        return Stretch::Ended(self.ended(Reason::RamUnavailable, detail));
                    }
                    _ => {
                        return Stretch::Ended(self.ended(Reason::KvmInternal, format!("KVM_RUN: {error}")));
                    }
                },
            }
        }
    }

    /// Completes the access that the last exit was about, without running the guest. Until then the registers are those of
    /// the middle of an instruction.
    fn finish_exit(&self, vcpu: &mut VcpuFd) {
        self.monitor.kicker(self.index).set_immediate_exit(true);
        match vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => {
                let detail = format!("KVM_RUN with immediate exit came back with {other:?}");
                self.monitor.end(self.ended(Reason::KvmInternal, detail));
            }
        }
    }

    fn answer(&self, exit: VcpuExit<'_>) -> Result<Outcome, (Reason, String)> {
        match exit {
            VcpuExit::IoOut(port, data) => Ok(self.bus.lock().unwrap_or_else(PoisonError::into_inner).write(port, data)),
            VcpuExit::IoIn(port, data) => {
                self.bus.lock().unwrap_or_else(PoisonError::into_inner).read(port, data);
                Ok(Outcome::Continue)
            }
            VcpuExit::MmioRead(at, data) => {
                self.refuse_ram("read", at)?;
                self.bus.lock().unwrap_or_else(PoisonError::into_inner).read_memory(at, data);
                Ok(Outcome::Continue)
            }
            VcpuExit::MmioWrite(at, data) => {
                self.refuse_ram("write", at)?;
                Ok(self.bus.lock().unwrap_or_else(PoisonError::into_inner).write_memory(at, data))
            }
            VcpuExit::Shutdown => Err((Reason::GuestTripleFault, "its CPU shut down".to_owned())),
            VcpuExit::SystemEvent(kind, _) => Err((Reason::GuestShutdown, format!("system event {kind}"))),
            VcpuExit::MemoryFault { gpa, size, .. } => {
                Err((Reason::RamUnavailable, format!("{size} bytes at {} cannot be had", GuestAddress(gpa))))
            }
            VcpuExit::FailEntry(cause, cpu) => {
                Err((Reason::KvmInternal, format!("the guest could not be entered: cause {cause:#x} on CPU {cpu}")))
            }
            other => Err((Reason::KvmInternal, format!("unexpected exit {other:?}"))),
        }
    }

    /// KVM reports an access to RAM as MMIO when it cannot map the page: a page that its source poisoned, or a slot that went
    /// read-only. Answering it with made-up bytes would be silent corruption, so it ends the machine.
    fn refuse_ram(&self, access: &str, at: u64) -> Result<(), (Reason, String)> {
        if self.ram.contains(GuestAddress(at)) {
            return Err((Reason::RamUnavailable, format!("its {access} of RAM at {} came out as MMIO", GuestAddress(at))));
        }
        Ok(())
    }

    /// The guest has restarted itself, of its own will or after a panic of its kernel.
    fn reset(&self) -> Ended {
        let (printed, _) = self.bus.lock().unwrap_or_else(PoisonError::into_inner).serial.printed();
        let panic = String::from_utf8_lossy(&printed).lines().rev().find(|line| line.contains(PANIC)).map(str::to_owned);
        match panic {
            Some(line) => self.ended(Reason::GuestPanic, line),
            None => self.ended(Reason::GuestShutdown, "its kernel reset it".to_owned()),
        }
    }

    fn ended(&self, reason: Reason, detail: String) -> Ended {
        Ended { reason, detail: format!("vCPU {}: {detail}", self.index) }
    }
}
