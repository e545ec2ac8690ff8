//! Workers: jailed processes, each of which is one machine.
//!
//! ```text
//! node ──exec──▶ zygote ──fork──▶ worker: builder thread            one shell
//!   │  seqpacket   │                  │  Fork: maps the image
//!   │              │                  ▼
//!   │              │             vCPU 0: restores the state, sees the builder gone, runs the guest
//!   └──────────────┴─ seqpacket ─ control thread: orders, answers; has no way to map memory
//! ```
//!
//! A worker belongs to its node: it ends when its socket is closed, and the kernel kills it when its zygote ends, which the
//! kernel kills when the node ends. What a worker says is not trusted: see [`protocol`].

pub(crate) mod builder;
pub(crate) mod channel;
pub(crate) mod control;
pub mod protocol;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod samples;
pub mod zygote;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use types::Reason;
use vmm_sys_util::eventfd::EventFd;

use crate::jail::Jail;
use crate::jail::syscalls::Filters;
use crate::machine::monitor::Witness;
use crate::sys::uffd::Watch;
use channel::Channel;
use protocol::FromWorker;

/// What all threads of a worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) channel: Channel,
    pub(crate) filters: Filters,
    pub(crate) jail: Jail,
    /// Rung by the vCPUs' threads when there is something for the control thread to look at.
    bell: EventFd,
    /// When the first exit was, on the monotonic clock.
    first_exit_ns: AtomicU64,
    /// Until the first vCPU's thread has seen it end.
    builder: Mutex<Option<JoinHandle<()>>>,
    /// Open for as long as the worker lives: with the last descriptor to close, absent memory would become zeros.
    watch: Mutex<Option<Watch>>,
}

impl Shared {
    pub(crate) fn new(channel: Channel, filters: Filters, jail: Jail) -> io::Result<Arc<Self>> {
        let bell = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let first_exit_ns = AtomicU64::new(0);
        Ok(Arc::new(Self { channel, filters, jail, bell, first_exit_ns, builder: Mutex::new(None), watch: Mutex::default() }))
    }

    fn ring(&self) {
        // It can only fail when it has been rung 2^64 times, and is then ringing.
        self.bell.write(1).unwrap_or_default();
    }
}

impl Witness for Shared {
    fn first_exit(&self) {
        self.first_exit_ns.store(monotonic_ns(), Ordering::Release);
        self.ring();
    }

    fn news(&self) {
        self.ring();
    }
}

/// The monotonic clock, which all processes of a host share.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Where a panic of this process is reported.
static REPORT: OnceLock<Arc<Shared>> = OnceLock::new();

/// Lets a panic of any thread end the worker, after a word to the node.
pub(crate) fn report_panics(shared: &Arc<Shared>) {
    REPORT.get_or_init(|| Arc::clone(shared));
    std::panic::set_hook(Box::new(|panic| {
        if let Some(shared) = REPORT.get() {
            let detail = format!("its worker panicked: {panic}");
            let ended = FromWorker::Ended { reason: Reason::WorkerCrashed, detail, console: Vec::new() };
            shared.channel.send(&ended, &[]).unwrap_or_default();
        }
        crate::sys::process::exit(101);
    }));
}
