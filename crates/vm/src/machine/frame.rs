//! The frame of a machine: VM, vCPUs and their threads, devices. Everything but memory and state.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use super::monitor::{Monitor, Witness};
use super::vcpu::{self, Seat};
use crate::class::{Class, RamLayout};
use crate::device::Bus;
use crate::device::serial::Console;
use crate::host::{Host, HostError};
use crate::sys::kvm::{Kicker, from_errno};

/// The part of a machine that is KVM's: VM, vCPUs and their threads, devices.
#[derive(Debug)]
pub(crate) struct Frame {
    threads: Vec<JoinHandle<()>>,
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) core: Core,
    pub(crate) console: Console,
}

/// What holds the state that a freeze captures and a fork restores.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) bus: Arc<Mutex<Bus>>,
}

/// How a machine's vCPU threads are kept, by whoever runs the machine.
#[derive(Clone, Default)]
pub(crate) struct Keeping {
    /// Called first by each vCPU's thread: takes from it what it will not need.
    pub(crate) confine: Option<fn() -> io::Result<()>>,
    /// Told what happens, by the thread to which it happens.
    pub(crate) witness: Option<Arc<dyn Witness>>,
}

/// Why no shell could be built.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum BuildError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{step} failed: {source}")]
    Step { step: &'static str, source: io::Error },
}

impl BuildError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Host(error) => error.remedy(),
            Self::Step { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE) => "raise the limit on open files (ulimit -n, fs.file-max)",
                Some(libc::ENOMEM) => "end other machines, or ask for less memory",
                Some(libc::EAGAIN) => "raise the limits on processes and threads (ulimit -u, pids.max)",
                _ => "look for its cause in the kernel log",
            },
        }
    }
}

impl Frame {
    pub(crate) fn start(
        host: &Host,
        class: Class,
        ram: RamLayout,
        vm: Arc<VmFd>,
        bus: Arc<Mutex<Bus>>,
        console: Console,
        keeping: Keeping,
    ) -> Result<Self, BuildError> {
        let Keeping { confine, witness } = keeping;
        let mut vcpus = Vec::with_capacity(usize::from(class.vcpu_count()));
        let mut kickers = Vec::with_capacity(usize::from(class.vcpu_count()));
        for index in 0..class.vcpu_count() {
            let vcpu = vm.create_vcpu(u64::from(index)).map_err(step("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpuid_of(&host.facts.cpuid, index)).map_err(step("KVM_SET_CPUID2"))?;
            kickers.push(Kicker::new(&vcpu).map_err(|source| BuildError::Step { step: "mapping the run page", source })?);
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let monitor = Arc::new(Monitor::new(kickers, witness));
        let core = Core { vcpus, vm, bus };
        // From here on dropping the frame ends the threads that were started.
        let mut frame = Self { threads: Vec::with_capacity(core.vcpus.len()), monitor, core, console };
        for index in 0..frame.core.vcpus.len() {
            let seat = Seat {
                index,
                vcpu: Arc::clone(&frame.core.vcpus[index]),
                monitor: Arc::clone(&frame.monitor),
                bus: Arc::clone(&frame.core.bus),
                ram,
                confine,
            };
            let thread = vcpu::spawn(seat).map_err(|source| BuildError::Step { step: "starting a vCPU thread", source })?;
            frame.threads.push(thread);
        }
        frame.monitor.wait_for_start();
        Ok(frame)
    }
}

impl Core {
    /// Locks a vCPU's descriptor. Its thread holds the lock while the guest runs, so callers have paused it.
    pub(crate) fn vcpu(&self, index: usize) -> std::sync::MutexGuard<'_, VcpuFd> {
        self.vcpus[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.monitor.stop();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has printed why; the machine is going away all the same.
            thread.join().unwrap_or_default();
        }
        // The memory that they reach goes after this, whoever still holds the bus.
        self.core.bus.lock().unwrap_or_else(PoisonError::into_inner).set_memory(None);
    }
}

/// The CPUID entries of one vCPU: KVM's, with its own APIC id (Intel SDM volume 2, leaves 1, 0xB and 0x1F).
fn cpuid_of(host: &CpuId, index: u8) -> CpuId {
    let mut cpuid = host.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00FF_FFFF | u32::from(index) << 24,
            0xB | 0x1F => entry.edx = u32::from(index),
            _ => {}
        }
    }
    cpuid
}

pub(crate) fn step(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> BuildError {
    move |error| BuildError::Step { step, source: from_errno(error) }
}

pub(crate) fn os_step(step: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Step { step, source }
}
