//! The copier: a process forked at the instant of a branch, whose memory is that instant for ever.
//!
//! `clone` without CLONE_VM marks the machine's private pages copy-on-write, at 0.11 us a page, while the vCPUs rest. They go
//! on at once; the copier writes the touched extents into the new layer, says so, and exits. It makes four system calls:
//! `close_range` (it has inherited every descriptor of the process, and must keep no machine alive that is closed meanwhile),
//! `pwrite64`, `write` (to an eventfd, since its exit takes as long again: its page tables are taken apart first) and
//! `exit_group`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus};
use types::HostAddress;
use vmm_sys_util::eventfd::EventFd;

use super::guest_memory::GuestMemory;

/// What a copier writes: `len` bytes from `from` (in a slot of the machine) to the same offset in `to` as in the region.
pub(crate) struct CopyJob<'fd> {
    pub(crate) from: HostAddress,
    pub(crate) len: usize,
    pub(crate) to: BorrowedFd<'fd>,
    pub(crate) at: u64,
}

/// The turn of one machine to fork. Its slots are inherited only in [`Turn::start`], since a process that is forked meanwhile
/// would copy its page tables too; hence one machine at a time.
pub(crate) struct Turn {
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// A copier at work.
#[derive(Debug)]
pub(crate) struct Copier {
    pidfd: OwnedFd,
    done: EventFd,
}

impl Turn {
    /// Waits for other branches of this process to take their instant. Called before the pause.
    pub(crate) fn wait() -> Self {
        static FORKING: Mutex<()> = Mutex::new(());
        Self { _one_at_a_time: FORKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner) }
    }

    /// The instant. The vCPUs of the machine whose memory it is are at rest; while they run, their page faults would keep the
    /// calls below waiting.
    ///
    /// The copier sees what is `inherited`, which holds all that is copied: no more than that is worth it, since `clone` copies
    /// the entries of clean pages too, and a guest may have read all its RAM.
    pub(crate) fn start(
        self,
        memory: &GuestMemory,
        inherited: &[(HostAddress, usize)],
        jobs: &[CopyJob<'_>],
    ) -> io::Result<Copier> {
        let slot_of = |from: HostAddress, len: usize| {
            let slot = memory.slots().iter().map(|(_, slot)| slot).find(|slot| slot.contains(from, len));
            slot.expect("what is copied lies within one slot")
        };
        for job in jobs {
            slot_of(job.from, job.len);
        }
        let inherited = inherited.iter().try_for_each(|(from, len)| slot_of(*from, *len).let_inherit(*from, *len));
        let copier = inherited.and_then(|()| clone_copier(jobs));
        for (_, slot) in memory.slots() {
            // If this fails, later processes of ours inherit page tables that they do not use: slower, not wrong.
            slot.let_inherit_nothing().unwrap_or_default();
        }
        copier
    }
}

fn clone_copier(jobs: &[CopyJob<'_>]) -> io::Result<Copier> {
    let done = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
    let mut kept: Vec<RawFd> = jobs.iter().map(|job| job.to.as_raw_fd()).collect();
    kept.push(done.as_raw_fd());
    kept.sort_unstable();
    kept.dedup();
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the new process has its own copy of everything; the kernel writes the descriptor to `pidfd`.
    // Other threads do not exist there and may have held any lock, so the child takes none: it runs `copy`, which makes system
    // calls only, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    match pid {
        0 => copy(jobs, done.as_raw_fd(), &kept),
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made this descriptor for us alone.
        _ => Ok(Copier { pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, done }),
    }
}

impl Copier {
    /// What becomes readable when [`Copier::finish`] would not wait: the event, and the end of the process.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [super::borrow_fd(&self.done), self.pidfd.as_fd()]
    }

    /// Waits until everything is written. The process may be on its way out for a little longer; dropping the copier waits for
    /// that.
    pub(crate) fn finish(&self) -> io::Result<()> {
        let [done, process] = self.descriptors();
        let mut fds = [PollFd::new(&done, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
        // It may have said so and ended between the looks at its two descriptors, hence the event first, whichever it was.
        match self.done.read() {
            Ok(SUCCESS) => Ok(()),
            Ok(word) => Err(io::Error::from_raw_os_error(i32::try_from(word - SUCCESS).unwrap_or(libc::EIO))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::other("the copier ended without a word")),
            Err(error) => Err(error),
        }
    }
}

/// What a copier says when all is written; when not, an error number more.
const SUCCESS: u64 = 1;

/// Says that the kernel reaps this process's children (`sys::process::ignore_children`).
pub(crate) fn leave_reaping_to_the_kernel() {
    KERNEL_REAPS.store(true, Ordering::Relaxed);
}

static KERNEL_REAPS: AtomicBool = AtomicBool::new(false);

impl Drop for Copier {
    /// Once everything is written the process is on its way out, which takes it as long again. Nobody need wait for that, but
    /// somebody must, or a zombie stays: a thread of this process does it for all copiers.
    fn drop(&mut self) {
        if KERNEL_REAPS.load(Ordering::Relaxed) {
            return;
        }
        static REAPER: OnceLock<Option<Sender<OwnedFd>>> = OnceLock::new();
        let reaper = REAPER.get_or_init(|| {
            let (sender, ended) = std::sync::mpsc::channel::<OwnedFd>();
            let live = move || ended.into_iter().for_each(|pidfd| reap(pidfd.as_fd()).map(drop).unwrap_or_default());
            std::thread::Builder::new().name("reaper".into()).stack_size(64 << 10).spawn(live).ok().map(|_| sender)
        });
        let handed_over = match (reaper, self.pidfd.try_clone()) {
            (Some(reaper), Ok(pidfd)) => reaper.send(pidfd).is_ok(),
            _ => false,
        };
        if !handed_over {
            reap(self.pidfd.as_fd()).map(drop).unwrap_or_default();
        }
    }
}

fn reap(pidfd: BorrowedFd<'_>) -> rustix::io::Result<Option<WaitIdStatus>> {
    rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED))
}

/// Does what a copier does, in this process.
pub(crate) fn copy_in_place(memory: &GuestMemory, jobs: &[CopyJob<'_>]) -> io::Result<()> {
    for job in jobs {
        let is_ours = memory.slots().iter().any(|(_, slot)| slot.contains(job.from, job.len));
        assert!(is_ours, "what is copied lies within one slot");
        write(job).map_err(io::Error::from_raw_os_error)?;
    }
    Ok(())
}

/// Writes all of a job, or says why not. Neither allocates nor panics.
fn write(job: &CopyJob<'_>) -> Result<(), i32> {
    let mut done = 0;
    while done < job.len {
        // SAFETY: the bytes lie in a slot of the machine (checked by the callers), of which a copier has inherited some; the kernel
        // reads them, and answers EFAULT for any that it cannot.
        let written = unsafe {
            libc::pwrite64(
                job.to.as_raw_fd(),
                (job.from.0 + done) as *const libc::c_void,
                job.len - done,
                (job.at + done as u64).cast_signed(),
            )
        };
        match usize::try_from(written) {
            Ok(0) => return Err(libc::EIO),
            Ok(written) => done += written,
            Err(_) => match io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
                libc::EINTR => {}
                errno => return Err(errno),
            },
        }
    }
    Ok(())
}

/// The child's whole life. No allocation, no lock, no panic that could run the parent's destructors.
fn copy(jobs: &[CopyJob<'_>], done: RawFd, kept: &[RawFd]) -> ! {
    let mut errno = 0;
    let mut from = 0;
    for last in kept.iter().map(|fd| fd.cast_unsigned()).chain([u32::MAX]) {
        if from < last {
            // SAFETY: closes descriptors of this process, none of which it uses. (Linux 5.9; if it fails they stay open until
            // the exit, as they would without it.)
            unsafe { libc::syscall(libc::SYS_close_range, from, last - 1, 0) };
        }
        from = last.saturating_add(1);
    }
    for job in jobs {
        if let Err(error) = write(job) {
            errno = error;
            break;
        }
    }
    let word = (SUCCESS + u64::from(errno.unsigned_abs())).to_ne_bytes();
    // SAFETY: the descriptor was inherited and the kernel reads eight bytes of this stack. Should it fail, the parent sees the
    // exit instead.
    unsafe { libc::write(done, word.as_ptr().cast(), word.len()) };
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}
