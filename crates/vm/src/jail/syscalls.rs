//! The published table of system calls: which thread may make which, with which arguments, and why. Everything else kills the
//! process. `docs/security.md` holds the same table, and a test compares the two.
//!
//! | filter | on |
//! |---|---|
//! | [`ZYGOTE`] | the zygote, and by inheritance every thread of its workers, on top of which theirs come |
//! | [`FIRST_PARENT`] | the builder of a first parent, from its boot until its freeze: it is frozen by mapping its memory anew |
//! | [`CONTROL`] | a worker's main thread, which takes over when the builder has gone, and its copiers |
//! | [`VCPU`] | each vCPU's thread |

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{Jail, Mechanism};
use crate::sys::kvm::kick_signal;
use crate::sys::pagemap::PAGEMAP_SCAN;

/// One system call of a table.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Its name.
    pub name: &'static str,
    number: i64,
    /// What its arguments must be.
    pub arguments: Arguments,
    /// What it is for.
    pub why: &'static str,
}

/// What the arguments of a system call must be.
#[derive(Clone, Copy, Debug)]
pub enum Arguments {
    /// Anything.
    Any,
    /// The argument of this index is one of these values, of which each has a name.
    OneOf(u8, &'static [(&'static str, u64)]),
    /// The argument of this index is the signal that brings a vCPU out of the guest.
    Kick(u8),
}

macro_rules! allowed {
    ($name:ident, $number:ident, $arguments:expr, $why:literal) => {
        Allowed { name: stringify!($name), number: libc::$number, arguments: $arguments, why: $why }
    };
}

use Arguments::{Any, Kick, OneOf};

const KVM: u64 = 0xAE;
const fn io(number: u64) -> u64 {
    KVM << 8 | number
}
const fn ior(number: u64, size: usize) -> u64 {
    2 << 30 | (size as u64) << 16 | io(number)
}
const fn iow(number: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | io(number)
}
const fn iowr(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | io(number)
}

/// Requests of `ioctl` that restore a machine's state, and the one that runs it (`linux/kvm.h`).
const RUN_AND_RESTORE: &[(&str, u64)] = &[
    ("KVM_RUN", io(0x80)),
    ("KVM_SET_TSC_KHZ", io(0xA2)),
    ("KVM_GET_TSC_KHZ", io(0xA3)),
    ("KVM_SET_MP_STATE", iow(0x99, 4)),
    ("KVM_SET_REGS", iow(0x82, 144)),
    ("KVM_SET_SREGS", iow(0x84, 312)),
    ("KVM_SET_XSAVE", iow(0xA5, 4096)),
    ("KVM_SET_XCRS", iow(0xA7, 392)),
    ("KVM_SET_DEBUGREGS", iow(0xA2, 128)),
    ("KVM_SET_LAPIC", iow(0x8F, 1024)),
    ("KVM_SET_MSRS", iow(0x89, 8)),
    ("KVM_SET_VCPU_EVENTS", iow(0xA0, 64)),
    ("KVM_KVMCLOCK_CTRL", io(0xAD)),
    ("KVM_SET_PIT2", iow(0xA0, 112)),
    ("KVM_SET_CLOCK", iow(0x7B, 48)),
    ("KVM_SET_IRQCHIP", ior(0x63, 520)),
    ("KVM_IRQ_LINE", iow(0x61, 8)),
];

/// Requests of `ioctl` that a branch makes: reading a machine's state, and its private pages.
const CAPTURE: &[(&str, u64)] = &[
    ("KVM_GET_MP_STATE", ior(0x98, 4)),
    ("KVM_GET_REGS", ior(0x81, 144)),
    ("KVM_GET_SREGS", ior(0x83, 312)),
    ("KVM_GET_XSAVE", ior(0xA4, 4096)),
    ("KVM_GET_XCRS", ior(0xA6, 392)),
    ("KVM_GET_DEBUGREGS", ior(0xA1, 128)),
    ("KVM_GET_LAPIC", ior(0x8E, 1024)),
    ("KVM_GET_MSRS", iowr(0x88, 8)),
    ("KVM_GET_VCPU_EVENTS", ior(0x9F, 64)),
    ("KVM_GET_PIT2", ior(0x9F, 112)),
    ("KVM_GET_CLOCK", ior(0x7C, 48)),
    ("KVM_GET_IRQCHIP", iowr(0x62, 520)),
    ("PAGEMAP_SCAN", PAGEMAP_SCAN),
    ("KVM_IRQ_LINE", iow(0x61, 8)),
];

const COPIER_FLAGS: &[(&str, u64)] = &[("CLONE_PIDFD|SIGCHLD", libc::CLONE_PIDFD as u64 | libc::SIGCHLD as u64)];
const CHECK: &[(&str, u64)] = &[("F_GETFD", 1)];
const INHERITANCE: &[(&str, u64)] = &[("MADV_DONTFORK", 10), ("MADV_DOFORK", 11)];

/// A vCPU's thread.
pub const VCPU: &[Allowed] = &[
    allowed!(
        ioctl,
        SYS_ioctl,
        OneOf(1, RUN_AND_RESTORE),
        "runs the guest; before its first instruction, restores its state; raises a device's interrupt"
    ),
    allowed!(futex, SYS_futex, Any, "locks, and waiting for work"),
    allowed!(write, SYS_write, Any, "raises a device's interrupt, and wakes the control thread (eventfds)"),
    allowed!(getrandom, SYS_getrandom, Any, "random numbers, for the guest's device of that name"),
    allowed!(rt_sigreturn, SYS_rt_sigreturn, Any, "comes back from the signal that brings it out of the guest"),
    allowed!(tgkill, SYS_tgkill, Kick(2), "brings the other vCPUs out of the guest when the machine ends"),
    allowed!(getpid, SYS_getpid, Any, "the C library asks before tgkill"),
    allowed!(rt_sigprocmask, SYS_rt_sigprocmask, Any, "the C library keeps signals away during tgkill"),
    allowed!(clock_gettime, SYS_clock_gettime, Any, "time stamps, where the vDSO cannot give them"),
    allowed!(brk, SYS_brk, Any, "the heap grows: a device's buffer, the text of an error"),
    allowed!(sched_yield, SYS_sched_yield, Any, "a contended lock of the standard library"),
    allowed!(restart_syscall, SYS_restart_syscall, Any, "a wait that a signal has interrupted goes on"),
    allowed!(exit_group, SYS_exit_group, Any, "the end of the worker"),
];

/// A worker's main thread, once the builder has gone, and its copiers.
pub const CONTROL: &[Allowed] = &[
    allowed!(recvmsg, SYS_recvmsg, Any, "orders of the node, and the descriptors that come with them"),
    allowed!(sendmsg, SYS_sendmsg, Any, "answers to the node"),
    allowed!(poll, SYS_poll, Any, "waits for orders, for news of the vCPUs, for a copier"),
    allowed!(ppoll, SYS_ppoll, Any, "the same"),
    allowed!(read, SYS_read, Any, "news of the vCPUs and of a copier (eventfds); vsock streams and network frames"),
    allowed!(
        write,
        SYS_write,
        Any,
        "a device's interrupt line; a copier's last word (eventfds); vsock streams and network frames"
    ),
    allowed!(close, SYS_close, Any, "descriptors that it is done with"),
    allowed!(fcntl, SYS_fcntl, OneOf(1, CHECK), "the standard library, built for tests, looks whether they are open"),
    allowed!(
        ioctl,
        SYS_ioctl,
        OneOf(1, CAPTURE),
        "a branch: the state of the machine, and which pages it has written; a device's interrupt"
    ),
    allowed!(madvise, SYS_madvise, OneOf(2, INHERITANCE), "a branch: which memory its copier inherits; changes no mapping"),
    allowed!(clone, SYS_clone, OneOf(0, COPIER_FLAGS), "a branch: its copier, a process and never a thread"),
    allowed!(eventfd2, SYS_eventfd2, Any, "a branch: how its copier says that it is done"),
    allowed!(close_range, SYS_close_range, Any, "a copier closes what it has inherited"),
    allowed!(pwrite64, SYS_pwrite64, Any, "a copier writes the extents into the new layer"),
    allowed!(tgkill, SYS_tgkill, Kick(2), "brings a vCPU out of the guest"),
    allowed!(getpid, SYS_getpid, Any, "the C library asks before tgkill"),
    allowed!(rt_sigprocmask, SYS_rt_sigprocmask, Any, "the C library keeps signals away during tgkill"),
    allowed!(rt_sigreturn, SYS_rt_sigreturn, Any, "comes back from a signal"),
    allowed!(futex, SYS_futex, Any, "locks"),
    allowed!(clock_gettime, SYS_clock_gettime, Any, "time stamps, where the vDSO cannot give them"),
    allowed!(brk, SYS_brk, Any, "the heap grows: messages"),
    allowed!(sched_yield, SYS_sched_yield, Any, "a contended lock of the standard library"),
    allowed!(restart_syscall, SYS_restart_syscall, Any, "a wait that a signal has interrupted goes on"),
    allowed!(exit_group, SYS_exit_group, Any, "the end of the worker, and of a copier"),
];

/// What the builder of a first parent may do besides what [`CONTROL`] may, until the machine is frozen.
pub const FIRST_PARENT: &[Allowed] = &[
    allowed!(mmap, SYS_mmap, Any, "the freeze maps the machine's memory privately"),
    allowed!(madvise, SYS_madvise, Any, "and advises the kernel about it; the thread gives back its stack at its end"),
    allowed!(munmap, SYS_munmap, Any, "the thread's alternate signal stack, at its end"),
    allowed!(sigaltstack, SYS_sigaltstack, Any, "the same"),
    allowed!(lseek, SYS_lseek, Any, "the freeze looks for holes in the memory's files"),
    allowed!(fallocate, SYS_fallocate, Any, "and fills the short ones with zeros"),
    allowed!(fstat, SYS_fstat, Any, "their sizes"),
    allowed!(statx, SYS_statx, Any, "their sizes"),
    allowed!(fcntl, SYS_fcntl, Any, "duplicates and seals them"),
    allowed!(getrandom, SYS_getrandom, Any, "the image's id"),
    allowed!(gettid, SYS_gettid, Any, "the C library, at the thread's end"),
    allowed!(exit, SYS_exit, Any, "the thread ends when the machine is frozen"),
];

/// What the zygote and the builders of shells may do besides what all others may. No guest has run anywhere near them.
pub const ZYGOTE: &[Allowed] = &[
    allowed!(clone, SYS_clone, Any, "workers, and the threads of a worker"),
    allowed!(clone3, SYS_clone3, Any, "the threads of a worker"),
    allowed!(unshare, SYS_unshare, Any, "a worker's user namespace"),
    allowed!(setgroups, SYS_setgroups, Any, "a worker's own user"),
    allowed!(setresgid, SYS_setresgid, Any, "the same"),
    allowed!(setresuid, SYS_setresuid, Any, "the same"),
    allowed!(geteuid, SYS_geteuid, Any, "the same"),
    allowed!(capget, SYS_capget, Any, "a worker drops its capabilities"),
    allowed!(capset, SYS_capset, Any, "the same"),
    allowed!(prctl, SYS_prctl, Any, "a worker drops what it may do; names of threads"),
    allowed!(prlimit64, SYS_prlimit64, Any, "a worker's limits"),
    allowed!(landlock_create_ruleset, SYS_landlock_create_ruleset, Any, "Landlock"),
    allowed!(landlock_restrict_self, SYS_landlock_restrict_self, Any, "Landlock"),
    allowed!(seccomp, SYS_seccomp, Any, "the filters of a worker's threads"),
    allowed!(openat, SYS_openat, Any, "a worker's own pagemap, beneath the descriptor of /proc"),
    allowed!(wait4, SYS_wait4, Any, "workers that have ended"),
    allowed!(waitid, SYS_waitid, Any, "workers that have ended"),
    allowed!(epoll_wait, SYS_epoll_wait, Any, "orders of the node, and the ends of workers"),
    allowed!(epoll_pwait, SYS_epoll_pwait, Any, "the same"),
    allowed!(epoll_ctl, SYS_epoll_ctl, Any, "the same"),
    allowed!(ioctl, SYS_ioctl, Any, "building a shell"),
    allowed!(mmap, SYS_mmap, Any, "building a shell, mapping an image"),
    allowed!(mprotect, SYS_mprotect, Any, "stacks of a worker's threads"),
    allowed!(
        rt_sigaction,
        SYS_rt_sigaction,
        Any,
        "the signal that brings a vCPU out of the guest; children are not waited for"
    ),
    allowed!(set_robust_list, SYS_set_robust_list, Any, "the C library, at a thread's start"),
    allowed!(rseq, SYS_rseq, Any, "the same"),
    allowed!(sched_getaffinity, SYS_sched_getaffinity, Any, "the standard library, at a thread's start"),
    allowed!(tgkill, SYS_tgkill, Any, "the C library, when a worker aborts"),
];

/// Filters, compiled once by the zygote for all workers.
#[derive(Clone, Debug)]
pub(crate) struct Filters {
    pub(crate) zygote: BpfProgram,
    pub(crate) first_parent: BpfProgram,
    pub(crate) control: BpfProgram,
    pub(crate) vcpu: BpfProgram,
}

impl Filters {
    pub(crate) fn compile() -> io::Result<Self> {
        Ok(Self {
            zygote: compile(&[ZYGOTE, FIRST_PARENT, CONTROL, VCPU])?,
            first_parent: compile(&[FIRST_PARENT, CONTROL])?,
            control: compile(&[CONTROL])?,
            vcpu: compile(&[VCPU])?,
        })
    }
}

/// Puts a filter on the calling thread, for good.
pub(crate) fn confine_thread(jail: &Jail, filter: &BpfProgram) -> io::Result<()> {
    if !jail.has(Mechanism::Seccomp) {
        return Ok(());
    }
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

fn compile(tables: &[&[Allowed]]) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = std::collections::BTreeSet::new();
    for allowed in tables.iter().copied().flatten() {
        let (index, values): (u8, Vec<u64>) = match allowed.arguments {
            Any => {
                unconditional.insert(allowed.number);
                rules.insert(allowed.number, Vec::new());
                continue;
            }
            OneOf(index, values) => (index, values.iter().map(|(_, value)| *value).collect()),
            Kick(index) => (index, vec![u64::try_from(kick_signal()).expect("a signal number")]),
        };
        if unconditional.contains(&allowed.number) {
            continue;
        }
        let of_call = rules.entry(allowed.number).or_default();
        for value in values {
            let is =
                SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).map_err(io::Error::other)?;
            of_call.push(SeccompRule::new(vec![is]).map_err(io::Error::other)?);
        }
    }
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
    filter.and_then(TryInto::try_into).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_has_at_most_twenty_calls_and_no_table_names_one_twice() {
        assert!(VCPU.len() <= 20);
        for table in [VCPU, CONTROL, FIRST_PARENT, ZYGOTE] {
            let mut names: Vec<_> = table.iter().map(|allowed| allowed.name).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            assert_eq!(names.len(), count);
            assert!(table.iter().all(|allowed| !allowed.why.is_empty()));
        }
        Filters::compile().unwrap();
    }

    /// The request numbers are built from the sizes of the kernel's structures.
    #[test]
    fn ioctl_requests_are_those_of_the_kernel() {
        use kvm_bindings as k;
        let size = |name: &str| match name {
            "MP_STATE" => size_of::<k::kvm_mp_state>(),
            "REGS" => size_of::<k::kvm_regs>(),
            "SREGS" => size_of::<k::kvm_sregs>(),
            "XSAVE" => 4096,
            "XCRS" => size_of::<k::kvm_xcrs>(),
            "DEBUGREGS" => size_of::<k::kvm_debugregs>(),
            "LAPIC" => size_of::<k::kvm_lapic_state>(),
            "MSRS" => 8,
            "VCPU_EVENTS" => size_of::<k::kvm_vcpu_events>(),
            "PIT2" => size_of::<k::kvm_pit_state2>(),
            "CLOCK" => size_of::<k::kvm_clock_data>(),
            "IRQCHIP" => size_of::<k::kvm_irqchip>(),
            _ => 0,
        };
        for (name, request) in RUN_AND_RESTORE.iter().chain(CAPTURE) {
            let Some(structure) = name.strip_prefix("KVM_SET_").or_else(|| name.strip_prefix("KVM_GET_")) else { continue };
            assert_eq!(request >> 16 & 0x3FFF, size(structure) as u64, "{name}");
            assert_eq!(request >> 8 & 0xFF, KVM, "{name}");
        }
    }
}
