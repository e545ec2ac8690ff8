//! Attempts on memory: the worker's own, and its guest's.

use super::{MARK, Outcome, PAGE_SIZE, Scene, at, at_mut, call, does, effect, int, knock, opens, peek, poke, this_process};

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ALL: libc::c_int = READ_WRITE | libc::PROT_EXEC;
/// `mov eax, 42; ret`
const CODE: [u8; 6] = [0xB8, 42, 0, 0, 0, 0xC3];

pub(super) fn map(near: usize, len: usize, access: libc::c_int, flags: libc::c_int) -> Result<usize, i32> {
    let flags = int(flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    call(libc::SYS_mmap, [near, len, int(access), flags, usize::MAX, 0])
}

/// Runs [`CODE`] at an address where it was written.
fn run(code: usize) -> Outcome {
    // SAFETY: the callers have written a function of this signature there, and made it executable.
    let function = unsafe { std::mem::transmute::<usize, extern "C" fn() -> u32>(code) };
    effect(function() == 42)
}

/// Maps a page of the file and reads it, which makes one where there is a hole.
pub(crate) fn read_hole(file: &[std::os::fd::OwnedFd], offset: u64) -> Outcome {
    let file = int(file.first().map_or(-1, std::os::fd::AsRawFd::as_raw_fd));
    let offset = usize::try_from(offset).expect("64-bit");
    let page = call(libc::SYS_mmap, [0, PAGE_SIZE, int(libc::PROT_READ), int(libc::MAP_PRIVATE), file, offset])?;
    // SAFETY: just mapped, and readable.
    std::hint::black_box(unsafe { (page as *const u8).read_volatile() });
    Ok(())
}

/// Forks a process as a copier is, which inherits memory without what watches it, and reads a byte there.
pub(crate) fn fork_and_read(slot: &crate::sys::slot::Slot, offset: u64) -> Outcome {
    let at = slot.start().0 + usize::try_from(offset).expect("64-bit");
    assert!(offset < slot.len() as u64, "within the region");
    does(libc::SYS_madvise, [slot.start().0, slot.len(), int(libc::MADV_DOFORK)])?;
    let mut pidfd: libc::c_int = -1;
    let flags = int(libc::CLONE_PIDFD | libc::SIGCHLD);
    match call(libc::SYS_clone, [flags, 0, at_mut(&mut pidfd), 0, 0])? {
        0 => {
            // SAFETY: inherited, and readable.
            std::hint::black_box(unsafe { (at as *const u8).read_volatile() });
            does(libc::SYS_exit_group, [0])
        }
        _ => {
            let mut fd = libc::pollfd { fd: pidfd, events: libc::POLLIN, revents: 0 };
            does(libc::SYS_poll, [at_mut(&mut fd), 1, usize::MAX])
        }
    }
}

pub(crate) fn mmap(_: &Scene) -> Outcome {
    let page = map(0, PAGE_SIZE, READ_WRITE, 0)?;
    poke(page, &[7])?;
    effect(peek(page)? == 7)
}

pub(crate) fn mmap_code(_: &Scene) -> Outcome {
    let page = map(0, PAGE_SIZE, ALL, 0)?;
    poke(page, &CODE)?;
    run(page)
}

pub(crate) fn mmap_over_ram(scene: &Scene) -> Outcome {
    let page = map(scene.page, PAGE_SIZE, READ_WRITE, libc::MAP_FIXED)?;
    effect(page == scene.page && peek(page)? == 0)
}

pub(crate) fn munmap_ram(scene: &Scene) -> Outcome {
    does(libc::SYS_munmap, [scene.page, PAGE_SIZE])?;
    effect(peek(scene.page) == Err(libc::EFAULT))
}

pub(crate) fn mremap_ram(scene: &Scene) -> Outcome {
    // Into the gap that is left free behind the guest's RAM.
    let (to, flags) = (scene.page + (1 << 20), int(libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED));
    let moved = call(libc::SYS_mremap, [scene.page, PAGE_SIZE, PAGE_SIZE, flags, to])?;
    effect(moved == to && peek(moved)? == MARK && peek(scene.page) == Err(libc::EFAULT))
}

pub(crate) fn mprotect_ram(scene: &Scene) -> Outcome {
    does(libc::SYS_mprotect, [scene.page, PAGE_SIZE, int(ALL)])?;
    poke(scene.page, &CODE)?;
    run(scene.page)
}

pub(crate) fn pkey_mprotect_ram(scene: &Scene) -> Outcome {
    // Key -1: as mprotect, whatever the CPU.
    does(libc::SYS_pkey_mprotect, [scene.page, PAGE_SIZE, int(libc::PROT_NONE), usize::MAX])?;
    effect(peek(scene.page) == Err(libc::EFAULT))
}

pub(crate) fn madvise_ram(scene: &Scene) -> Outcome {
    does(libc::SYS_madvise, [scene.page, PAGE_SIZE, int(libc::MADV_DONTNEED)])?;
    effect(peek(scene.page)? != MARK)
}

pub(crate) fn inherit_ram(scene: &Scene) -> Outcome {
    does(libc::SYS_madvise, [scene.page, PAGE_SIZE, int(libc::MADV_DOFORK)])
}

pub(crate) fn mincore(scene: &Scene) -> Outcome {
    let mut present = 0_u8;
    does(libc::SYS_mincore, [scene.page, PAGE_SIZE, at_mut(&mut present)])?;
    effect(present == 1)
}

pub(crate) fn process_vm_readv(scene: &Scene) -> Outcome {
    effect(peek(scene.page)? == MARK)
}

pub(crate) fn process_vm_writev(scene: &Scene) -> Outcome {
    poke(scene.page, &[9])?;
    effect(peek(scene.page)? == 9)
}

pub(crate) fn mlock(scene: &Scene) -> Outcome {
    does(libc::SYS_mlock, [scene.page, PAGE_SIZE])
}

pub(crate) fn shmget(_: &Scene) -> Outcome {
    let id = call(libc::SYS_shmget, [int(libc::IPC_PRIVATE), PAGE_SIZE, int(libc::IPC_CREAT | 0o600)])?;
    let address = call(libc::SYS_shmat, [id, 0, 0])?;
    poke(address, &[3])?;
    let was_shared = effect(peek(address)? == 3);
    does(libc::SYS_shmctl, [id, int(libc::IPC_RMID), 0])?;
    was_shared
}

/// A segment of the node's, which holds [`MARK`] and any user may read.
pub(crate) fn shmget_of_node(scene: &Scene) -> Outcome {
    let id = call(libc::SYS_shmget, [scene.process(), 0, 0])?;
    let address = call(libc::SYS_shmat, [id, 0, int(libc::SHM_RDONLY)])?;
    effect(peek(address)? == MARK)
}

/// `UFFD_USER_MODE_ONLY`
const USER_MODE_ONLY: usize = 1;
/// `USERFAULTFD_IOC_NEW`
const NEW_USERFAULTFD: usize = 0xAA00;
/// `UFFDIO_API`, and the value that goes with it
const USERFAULTFD_API: (usize, u64) = (0xC018_AA3F, 0xAA);

/// Says hello to a userfaultfd, which makes it one that can be used.
fn greet_userfaultfd(descriptor: usize) -> Outcome {
    let mut hello = [USERFAULTFD_API.1, 0, 0_u64];
    does(libc::SYS_ioctl, [descriptor, USERFAULTFD_API.0, at_mut(&mut hello)])?;
    // The kernel fills in what it can do.
    effect(hello[2] != 0)
}

pub(crate) fn userfaultfd(_: &Scene) -> Outcome {
    greet_userfaultfd(call(libc::SYS_userfaultfd, [USER_MODE_ONLY])?)
}

pub(crate) fn userfaultfd_of_device(scene: &Scene) -> Outcome {
    greet_userfaultfd(call(libc::SYS_ioctl, [scene.gift(), NEW_USERFAULTFD, 0])?)
}

pub(crate) fn userfaultfd_hello(scene: &Scene) -> Outcome {
    greet_userfaultfd(scene.gift())
}

/// Fills a page of the process whose userfaultfd was given: the node's, at the address that is the number.
pub(crate) fn userfaultfd_fill(scene: &Scene) -> Outcome {
    // `UFFDIO_COPY`: to, from, length, mode, bytes copied.
    const COPY: usize = 0xC028_AA03;
    let content = [MARK; 2 * PAGE_SIZE];
    let from = at(&content).next_multiple_of(PAGE_SIZE);
    let mut copy = [scene.process(), from, PAGE_SIZE, 0, 0];
    does(libc::SYS_ioctl, [scene.gift(), COPY, at_mut(&mut copy)])
}

pub(crate) fn pidfd_getfd(_: &Scene) -> Outcome {
    knock(libc::SYS_pidfd_getfd, [usize::MAX, 0, 0]);
    let process = call(libc::SYS_pidfd_open, [this_process()?, 0])?;
    opens(libc::SYS_pidfd_getfd, [process, 0, 0])
}

/// Reads, from a process that it starts, the memory of the worker.
pub(crate) fn read_worker(scene: &Scene) -> Outcome {
    let worker = this_process()?;
    knock(libc::SYS_process_vm_readv, [0, 0, 0, 0, 0, 0]);
    super::process::in_child(|| {
        let mut byte = 0_u8;
        let (to, from) = ([at_mut(&mut byte), 1], [scene.page, 1]);
        call(libc::SYS_process_vm_readv, [worker, at(&to), 1, at(&from), 1, 0])?;
        effect(byte == MARK)
    })
}
