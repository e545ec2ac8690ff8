//! Attempts that only the filters of system calls refuse.

use super::{Case, Given, Refusal, Thread};
use crate::jail::Mechanism;
use crate::sys::attempts::{Outcome, Scene, files, kernel, kvm, memory, process, sockets};

const fn filtered(
    thread: Thread,
    name: &'static str,
    what: &'static str,
    given: Given,
    attempt: fn(&Scene) -> Outcome,
) -> Case {
    Case { name, what, thread, refused_by: Mechanism::Seccomp, behind: &[], refusal: Refusal::Killed, given, attempt }
}

const fn control(name: &'static str, what: &'static str, given: Given, attempt: fn(&Scene) -> Outcome) -> Case {
    filtered(Thread::Control, name, what, given, attempt)
}

const fn vcpu(name: &'static str, what: &'static str, given: Given, attempt: fn(&Scene) -> Outcome) -> Case {
    filtered(Thread::Vcpu, name, what, given, attempt)
}

use Given::{
    Bound, Directory, Kvm, Listener, Memfd, Nothing, OldKernel, Pair, Program, ReadyUserfaultfd, Userfaultfd, UserfaultfdDevice,
};

/// On the control thread.
pub(super) const CONTROL: &[Case] = &[
    control("mmap", "maps memory", Nothing, memory::mmap),
    control(
        "mmap code",
        "maps memory that it can write and run, writes a function into it, and calls it",
        Nothing,
        memory::mmap_code,
    ),
    control("mmap over RAM", "maps an empty page over one of the guest's RAM", Nothing, memory::mmap_over_ram),
    control("munmap RAM", "takes a page of the guest's RAM away", Nothing, memory::munmap_ram),
    control("mremap RAM", "moves a page of the guest's RAM elsewhere", Nothing, memory::mremap_ram),
    control("mprotect RAM", "makes the guest's RAM executable, and calls a function there", Nothing, memory::mprotect_ram),
    control("pkey_mprotect RAM", "makes the guest's RAM inaccessible", Nothing, memory::pkey_mprotect_ram),
    control("madvise RAM", "drops what the guest has written to a page of its RAM", Nothing, memory::madvise_ram),
    control("mincore", "asks which pages are present", Nothing, memory::mincore),
    control("process_vm_readv", "reads memory by way of the kernel", Nothing, memory::process_vm_readv),
    control("process_vm_writev", "writes memory by way of the kernel", Nothing, memory::process_vm_writev),
    control("shmget", "makes shared memory of System V and writes to it", Nothing, memory::shmget),
    control("userfaultfd", "watches its own page faults", Nothing, memory::userfaultfd),
    control("USERFAULTFD_IOC_NEW", "the same, through the device", UserfaultfdDevice, memory::userfaultfd_of_device),
    control("UFFDIO_API", "begins to use the node's userfaultfd", Userfaultfd, memory::userfaultfd_hello),
    control("UFFDIO_COPY", "fills a page of the node's through its userfaultfd", ReadyUserfaultfd, memory::userfaultfd_fill),
    control("pidfd_getfd", "takes a descriptor of a process", Nothing, memory::pidfd_getfd),
    control("memfd_create", "makes a file", Nothing, files::memfd_create),
    control("openat", "opens the root by its path", Nothing, files::open_root),
    control("open", "the same, with the oldest call", Nothing, files::old_open),
    control("openat2", "the same, with the newest call", Nothing, files::openat2),
    control("newfstatat", "asks about a path", Nothing, files::stat_root),
    control("chdir", "changes its working directory", Nothing, files::chdir),
    control("fchdir", "changes its working directory to a given one of the host", Directory, files::fchdir),
    control("pipe2", "makes a pipe", Nothing, files::pipe2),
    control("dup", "duplicates a descriptor", Pair, files::dup),
    control("dup3", "puts a descriptor in the place of another", Pair, files::dup3),
    control("F_ADD_SEALS", "seals a file of the node's, so that the node cannot write", Memfd, files::seal),
    control("ftruncate", "empties a given file", Memfd, files::ftruncate),
    control("fallocate", "punches a hole into a given file", Memfd, files::fallocate),
    control("pread64", "reads a given file", Memfd, files::pread64),
    control("lseek", "moves in a given file", Memfd, files::lseek),
    control("splice", "moves a page of a given file into a pipe", Memfd, files::splice),
    control("sendfile", "copies a given file", Memfd, files::sendfile),
    control("name_to_handle_at", "makes a handle of a directory", Directory, files::name_to_handle_at),
    control("inotify_init1", "watches files", Nothing, files::inotify_init1),
    control("epoll_create1", "makes an epoll", Nothing, files::epoll_create1),
    control("FIONBIO", "an ioctl of sockets", Pair, files::other_ioctl),
    control("socket AF_UNIX", "makes a socket", Nothing, sockets::unix),
    control("socket AF_INET", "makes a socket", Nothing, sockets::inet),
    control("socket AF_INET6", "makes a socket", Nothing, sockets::inet6),
    control("socket AF_NETLINK", "makes a socket to configure the network", Nothing, sockets::netlink),
    control("socket AF_VSOCK", "makes a socket to other VMs of this host", Nothing, sockets::vsock),
    control("socketpair", "makes a pair of sockets", Nothing, sockets::socketpair),
    control("connect", "connects a given socket of the node's network to a port of the host", Bound, sockets::connect_given),
    control("accept4", "takes a connection to a given listener", Listener, sockets::accept),
    control("setsockopt", "changes a given socket", Pair, sockets::setsockopt),
    control("shutdown", "ends a given connection", Pair, sockets::shutdown),
    control("recvfrom", "receives, by another call than its own", Pair, sockets::recvfrom),
    control("sendto", "sends, by another call than its own", Pair, sockets::sendto),
    control("execveat", "runs a program that is in no file system", Program, process::execveat_memfd),
    control("clone", "starts a process that is no copier", Nothing, process::fork_at_once),
    control("clone3", "the same, with the newest call", Nothing, process::clone3),
    control("a thread", "starts a thread (mmap, mprotect, clone3)", Nothing, process::thread),
    control("ptrace", "lets its zygote trace it", Nothing, process::ptrace_me),
    control("kill", "sends itself a signal", Nothing, process::kill_itself),
    control("tkill", "sends a thread of its own a signal", Nothing, process::tkill),
    control("tgkill", "sends its thread another signal than the one for vCPUs", Nothing, process::tgkill_other_signal),
    control("rt_sigqueueinfo", "sends itself a signal of its own making", Nothing, process::rt_sigqueueinfo),
    control("rt_sigaction", "ignores a signal", Nothing, process::rt_sigaction),
    control("pidfd_open", "makes a descriptor of a process", Nothing, process::pidfd_open),
    control("PR_SET_PDEATHSIG", "arranges to outlive its zygote", Nothing, process::outlive_zygote),
    control("PR_SET_DUMPABLE", "lets others of its user trace it", Nothing, process::become_dumpable),
    control("prlimit64", "changes its limits", Nothing, process::prlimit),
    control("setsid", "makes a session", Nothing, process::setsid),
    control("setpriority", "changes its priority", Nothing, process::setpriority),
    control("sched_setaffinity", "chooses its CPUs", Nothing, process::sched_setaffinity),
    control("sched_setscheduler", "chooses its scheduler", Nothing, process::sched_setscheduler),
    control("personality", "takes randomness from its addresses", Nothing, process::personality),
    control("unshare", "has descriptors and a working directory of its own", Nothing, process::unshare),
    // Its rings count as locked memory, of which the limits allow none.
    Case { behind: &[Mechanism::Limits], ..control("io_uring_setup", "makes an io_uring", Nothing, kernel::io_uring_setup) },
    control("add_key", "adds a key to the kernel's keyrings", Nothing, kernel::add_key),
    control("keyctl", "makes a keyring", Nothing, kernel::keyctl),
    control("perf_event_open", "counts events", Nothing, kernel::perf_event_open),
    control("modify_ldt", "makes a segment descriptor", Nothing, kernel::modify_ldt),
    control("timer_create", "makes a timer", Nothing, kernel::timer_create),
    control("timerfd_create", "makes a timer with a descriptor", Nothing, kernel::timerfd_create),
    control("signalfd4", "takes signals by a descriptor", Nothing, kernel::signalfd4),
    control("uname", "asks for the host's name and kernel", Nothing, kernel::uname),
    control("sysinfo", "asks for the host's load and memory", Nothing, kernel::sysinfo),
    control("landlock_create_ruleset", "makes a Landlock ruleset", Nothing, kernel::landlock_create_ruleset),
    control("seccomp", "adds a filter whose decisions it takes itself", Nothing, kernel::seccomp),
    control("membarrier", "has other CPUs interrupted", Nothing, kernel::membarrier),
    control("semget", "makes semaphores", Nothing, kernel::semget),
    control("msgget", "makes a message queue", Nothing, kernel::msgget),
    control("kcmp", "compares kernel pointers", Nothing, kernel::kcmp),
    control("getrandom", "takes random numbers", Nothing, kernel::getrandom),
    control("int 0x80", "makes a system call of 32-bit programs", OldKernel, kernel::call_of_32_bits),
    control("KVM_CREATE_VM", "makes a second VM", Kvm, kvm::create_vm),
    control("KVM_CREATE_VCPU", "adds a vCPU", Nothing, kvm::create_vcpu),
    control("KVM_SET_USER_MEMORY_REGION", "shows the guest the worker's own memory", Nothing, kvm::show_worker_to_guest),
    control("KVM_IRQFD", "ties a descriptor to an interrupt", Nothing, kvm::irqfd),
    control("KVM_SET_REGS", "changes the guest's registers when it runs", Nothing, kvm::set_regs),
];

/// On a vCPU's thread; the control thread may do each.
pub(super) const VCPU: &[Case] = &[
    vcpu("vCPU: recvmsg", "takes orders of the node", Pair, sockets::recvmsg),
    vcpu("vCPU: sendmsg", "answers the node", Pair, sockets::sendmsg),
    vcpu("vCPU: poll", "waits for orders", Pair, sockets::poll),
    vcpu("vCPU: clone", "makes a copier", Nothing, process::copier),
    vcpu("vCPU: pwrite64", "writes to a layer", Memfd, files::pwrite64),
    vcpu("vCPU: close", "closes a descriptor", Pair, files::close),
    vcpu("vCPU: eventfd2", "makes an eventfd", Nothing, files::eventfd2),
    vcpu("vCPU: madvise", "has its memory inherited by copiers", Nothing, memory::inherit_ram),
    vcpu("vCPU: KVM_GET_REGS", "reads the guest's registers", Nothing, kvm::get_regs),
    vcpu("vCPU: read", "reads what the node has sent", Pair, sockets::read),
];
