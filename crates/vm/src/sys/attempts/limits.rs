//! Attempts at using up what the host has.

use super::{MARK, Outcome, Scene, at, at_mut, call, does, effect, int, memory};

/// More than a worker may have open, and fewer than a node.
const DESCRIPTORS: usize = 4000;
/// More than a worker may have, of processes.
const PROCESSES: usize = 40;

pub(crate) fn descriptors(_: &Scene) -> Outcome {
    (0..DESCRIPTORS).try_for_each(|_| does(libc::SYS_eventfd2, [0, 0]))
}

/// Copiers, as a branch makes them; they end when their worker does, or after three seconds.
pub(crate) fn processes(_: &Scene) -> Outcome {
    (0..PROCESSES).try_for_each(|_| {
        let mut pidfd: libc::c_int = -1;
        let child = call(libc::SYS_clone, [int(libc::CLONE_PIDFD | libc::SIGCHLD), 0, at_mut(&mut pidfd), 0, 0])?;
        if child == 0 {
            call(libc::SYS_poll, [0, 0, 3000]).map(drop).unwrap_or_default();
            crate::sys::process::exit(0);
        }
        Ok(())
    })
}

/// 600 MiB of heap, of which nothing is used.
pub(crate) fn heap(_: &Scene) -> Outcome {
    let end = call(libc::SYS_brk, [0])?;
    let asked = end + (600 << 20);
    // It answers with the end as it is then.
    if call(libc::SYS_brk, [asked])? == asked { Ok(()) } else { Err(libc::ENOMEM) }
}

/// A byte at 4 TiB of a file that is given.
pub(crate) fn file_size(scene: &Scene) -> Outcome {
    effect(call(libc::SYS_pwrite64, [scene.gift(), at(&MARK), 1, 1 << 42])? == 1)
}

pub(crate) fn message_queue(_: &Scene) -> Outcome {
    let attributes = [0_u64, 10, 64, 0, 0, 0, 0, 0];
    let flags = int(libc::O_CREAT | libc::O_RDWR);
    does(libc::SYS_mq_open, [super::text(c"farfork"), flags, 0o600, at(&attributes)])?;
    does(libc::SYS_mq_unlink, [super::text(c"farfork")])
}

/// Writes to more memory than a worker of the tests' class may have.
pub(crate) fn memory(_: &Scene) -> Outcome {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    memory::map(0, 160 << 20, access, libc::MAP_POPULATE).map(drop)
}
