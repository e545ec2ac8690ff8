//! Guards of the remote fork that a test can take out, to see that something goes wrong without them.

use std::sync::atomic::{AtomicU8, Ordering};

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Guard {
    /// Bytes are verified before they are published.
    Verification = 1,
    /// A page that exists is only taken for published if the pager has placed it.
    PresenceOnExists = 2,
    /// A worker holds a userfaultfd of its own, beside the node's.
    WorkersWatch = 4,
    /// A worker some of whose memory is absent makes no process.
    NoProcesses = 8,
    /// What is still in a fault when a child has ended is refused the page, before nobody watches any more.
    RefusalOfTheDead = 16,
}

static OFF: AtomicU8 = AtomicU8::new(0);

/// Takes a guard out, for the rest of this process's life.
pub fn take_out(guard: Guard) {
    OFF.fetch_or(guard as u8, Ordering::SeqCst);
}

/// Whether it is out.
#[must_use]
pub fn is_off(guard: Guard) -> bool {
    OFF.load(Ordering::Relaxed) & guard as u8 != 0
}
