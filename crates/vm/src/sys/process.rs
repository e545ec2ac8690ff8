//! Making processes: what `fork(2)` is in a process of one thread, with namespaces and a pidfd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::UnshareFlags;

/// A child process.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Forks a process that lives in new `namespaces` and does `life`.
///
/// The caller has one thread: the child then has a consistent copy of everything, locks and heap among it, and may go on as the
/// caller could have. (The zygote never starts a thread; see `worker::zygote`.)
pub(crate) fn fork_into(namespaces: UnshareFlags, life: impl FnOnce() -> std::convert::Infallible) -> io::Result<Child> {
    let mut pidfd: libc::c_int = -1;
    let flags = i64::from(namespaces.bits()) | i64::from(libc::CLONE_PIDFD | libc::SIGCHLD);
    // SAFETY: without CLONE_VM the new process has its own copy of everything; the kernel writes the descriptor to `pidfd`. The
    // copy is consistent, since no other thread was in the middle of anything (see above).
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    match pid {
        0 => {
            let life = std::panic::AssertUnwindSafe(life);
            let ended = std::panic::catch_unwind(life);
            // A child must not unwind into the loop of its parent.
            let Err(_) = ended;
            exit(101)
        }
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made this descriptor for us alone.
        _ => Ok(Child { pid: i32::try_from(pid).expect("a pid"), pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// Moves this process into new namespaces.
pub(crate) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: unsharing CLONE_FILES is what could break others' use of descriptors; only namespaces are unshared here.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// Closes every descriptor but these and the standard ones. What owned them is never dropped: the caller is a new process that
/// does not return to its parent's code.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd().cast_unsigned()).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if from < fd {
            // SAFETY: the descriptors in between are not used again by this process (see above).
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
        }
        from = from.max(fd.saturating_add(1));
    }
}

/// Ends this process at once, without running destructors or what was registered for its exit.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Has the kernel reap this process's children.
pub(crate) fn ignore_children() {
    // SAFETY: ignoring a signal runs no code.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    assert_ne!(before, libc::SIG_ERR, "SIGCHLD can be ignored");
}

/// Has a fault end this process at once. The standard library's handler, which explains overflows of the stack, makes system
/// calls that a worker may not make.
pub(crate) fn die_of_faults() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default action runs no code of ours.
        let before = unsafe { libc::signal(signal, libc::SIG_DFL) };
        assert_ne!(before, libc::SIG_ERR, "the handler of a fault can be changed");
    }
}

/// Ways for a worker to end that tests ask for.
#[cfg(feature = "testing")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Crash {
    /// A panic.
    Panic,
    /// An access to memory that is not there.
    Fault,
    /// A system call that it may not make.
    ForbiddenCall,
    /// A status of its own.
    Exit,
    /// A message that nobody has asked for.
    Lie,
    /// Something that is no message.
    Garbage,
}

#[cfg(feature = "testing")]
impl Crash {
    pub(crate) fn happen(self) -> ! {
        match self {
            Self::Panic => panic!("a test asked for it"),
            Self::Fault => {
                // SAFETY: there is nothing at address 8, which is what this is for: the process ends here.
                unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
            }
            Self::ForbiddenCall => {
                // SAFETY: reads nothing and changes nothing.
                unsafe { libc::getuid() };
            }
            // The lies have been told by the caller.
            Self::Exit | Self::Lie | Self::Garbage => {}
        }
        exit(3)
    }
}

/// Keeps the heap in one piece that only grows, so that no thread of a worker needs a mapping of its own for it.
pub(crate) fn keep_heap_in_one_piece() {
    let settings = [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, i32::MAX),
        (libc::M_MMAP_MAX, 0),
        (libc::M_TRIM_THRESHOLD, i32::MAX),
        (libc::M_TOP_PAD, 1 << 20),
    ];
    for (parameter, value) in settings {
        // SAFETY: has no preconditions.
        unsafe { libc::mallopt(parameter, value) };
    }
}
