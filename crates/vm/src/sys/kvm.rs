//! The KVM calls that take addresses, and the page through which a running vCPU is asked to come out.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{kvm_run, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use types::GuestAddress;

use super::slot::Slot;

const RUN_PAGE_SIZE: usize = 4096;

/// Gives the VM a memory slot over `slot`, mapped or not.
///
/// The caller keeps `slot` until the VM and its vCPUs are closed (`Machine` and `Shell` by the order of their fields): after
/// that its addresses may belong to another machine.
pub(crate) fn set_memory_slot(vm: &VmFd, number: u32, guest: GuestAddress, slot: &Slot) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: guest.0,
        memory_size: slot.len() as u64,
        userspace_addr: slot.start().0 as u64,
    };
    // SAFETY: the guest can reach these host addresses from now on. They are owned by `slot`, hold guest memory or nothing,
    // and outlive the VM, as said above.
    unsafe { vm.set_user_memory_region(region) }.map_err(from_errno)
}

/// Makes slot 0 of a running VM read-only, so that a guest's write to its RAM comes out as an MMIO exit.
#[cfg(feature = "testing")]
pub(crate) fn set_read_only_slot(vm: &VmFd, number: u32, guest: GuestAddress, slot: &Slot) -> io::Result<()> {
    let mut region = kvm_userspace_memory_region { slot: number, guest_phys_addr: guest.0, ..Default::default() };
    // SAFETY: a region of size 0 takes the slot away; the guest can reach less than before.
    unsafe { vm.set_user_memory_region(region) }.map_err(from_errno)?;
    region.flags = kvm_bindings::KVM_MEM_READONLY;
    region.memory_size = slot.len() as u64;
    region.userspace_addr = slot.start().0 as u64;
    // SAFETY: as in `set_memory_slot`, with less access.
    unsafe { vm.set_user_memory_region(region) }.map_err(from_errno)
}

/// Restores the x87, SSE and AVX state. `Host::open` has checked that the kernel's structure has this size.
pub(crate) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, which `Host::open` refuses above the 4,096 of
    // `kvm_xsave`.
    unsafe { vcpu.set_xsave(xsave) }.map_err(from_errno)
}

/// The KVM device behind a descriptor that was handed down.
pub(crate) fn from_descriptor(device: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is owned, and its ownership goes over.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

/// Asks a vCPU's thread to leave KVM_RUN: first the flag, which makes the next entry return at once, then a signal, which
/// ends an entry under way. Whichever comes first, no request is lost.
#[derive(Debug)]
pub(crate) struct Kicker {
    run: NonNull<kvm_run>,
    thread: OnceLock<libc::pthread_t>,
}

// SAFETY: the page is shared memory between the kernel and this process; the only field touched here is one byte, atomically.
unsafe impl Send for Kicker {}
// SAFETY: as above; `thread` is set once and read only.
unsafe impl Sync for Kicker {}

impl Kicker {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
        let installed = HANDLER.get_or_init(|| {
            vmm_sys_util::signal::register_signal_handler(kick_signal(), ignore).map_err(|error| error.errno())
        });
        (*installed).map_err(io::Error::from_raw_os_error)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the descriptor stays open during this call; `VcpuFd` keeps it as a valid one.
        let fd: BorrowedFd<'_> = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a fresh mapping at an address of the kernel's choice, of the page that every vCPU descriptor has at offset 0.
        let page = unsafe { rustix::mm::mmap(std::ptr::null_mut(), RUN_PAGE_SIZE, prot, MapFlags::SHARED, fd.as_fd(), 0) }?;
        let run = NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { run, thread: OnceLock::new() })
    }

    /// Names the calling thread as the one to kick. Called once, by the vCPU's thread, before it runs the vCPU.
    pub(crate) fn adopt_this_thread(&self) {
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        assert!(self.thread.set(this).is_ok(), "a vCPU has one thread for life");
    }

    /// Asks the thread to come out. It must not have been joined yet: `Monitor` stops kicking before `Machine` joins.
    pub(crate) fn kick(&self) {
        self.set_immediate_exit(true);
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        // The thread itself is not in the guest.
        if let Some(thread) = self.thread.get().filter(|thread| **thread != this) {
            // SAFETY: the thread has not been joined, so the id is valid; a thread that has ended gets nothing.
            let sent = unsafe { libc::pthread_kill(*thread, kick_signal()) };
            assert!(sent == 0 || sent == libc::ESRCH, "pthread_kill: {sent}");
        }
    }

    /// Whether the next entry returns at once.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the mapping lives as long as `self`, and the field lies within its first page.
        let byte = unsafe { &raw mut (*self.run.as_ptr()).immediate_exit };
        // SAFETY: aligned (it is one byte) and valid as above; all of this process's accesses to it are atomic.
        let flag = unsafe { AtomicU8::from_ptr(byte) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and no pointer to it is kept elsewhere.
        let unmapped = unsafe { rustix::mm::munmap(self.run.as_ptr().cast(), RUN_PAGE_SIZE) };
        assert!(unmapped.is_ok(), "unmapping the run page cannot fail: {unmapped:?}");
    }
}

pub(crate) fn from_errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

pub(crate) fn kick_signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}

/// The signal only has to end the system call.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What KVM says of the instruction it could not go on with: the sub-error and its data (for an emulation failure, the opcode
/// bytes). Only after an exit of that kind.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    let run = vcpu.get_kvm_run();
    assert_eq!(run.exit_reason, kvm_bindings::KVM_EXIT_INTERNAL_ERROR);
    // SAFETY: for this exit reason (asserted) the kernel has filled this member of the union, which is plain numbers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let words = internal.data.len().min(internal.ndata as usize);
    (internal.suberror, internal.data[..words].to_vec())
}
