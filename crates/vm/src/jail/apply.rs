//! Putting a process into the jail, step by step.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags};
use types::MemorySize;

use super::{Jail, Mechanism};
use crate::class::Class;
use crate::sys::process;

/// The first of the user ids that workers get when the node runs as root; the range is above those of accounts and of the
/// sub-ids that useradd hands out, and ends where numbers that some programs take for negative begin.
const FIRST_UID: u32 = 0x6000_0000;
/// Each pool has this many of them, after which they come back.
const UIDS_OF_POOL: u32 = 1 << 20;
/// So many pools have some of their own.
const POOLS: u32 = 1 << 9;

/// The user id of a worker: nobody else's among those alive. Pools of one process share none; those of two processes, each a
/// node on this host, once in 512 pairs, and then have their namespaces between them.
pub(crate) fn uid_of_worker(pool: u32, worker: u64) -> u32 {
    // Neighbours among process ids do not run into each other by having a few pools more.
    let share = std::process::id().wrapping_mul(37).wrapping_add(pool) % POOLS;
    FIRST_UID + share * UIDS_OF_POOL + u32::try_from(worker % u64::from(UIDS_OF_POOL)).expect("below 2^20")
}

/// A step of confining that failed.
pub(crate) type Failed = (&'static str, io::Error);

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Failed {
    move |error| (step, error.into())
}

/// Puts the zygote, and with it every worker, into namespaces that all share: no network, and a root with nothing in it.
/// Returns the descriptor of `/proc`, through which each worker opens its own pagemap.
pub(crate) fn confine_zygote(jail: &Jail) -> Result<OwnedFd, Failed> {
    let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let proc = proc.map_err(step("opening /proc"))?;
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        // Everything below needs capabilities, which a user namespace of one's own gives.
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        process::unshare(UnshareFlags::NEWUSER).map_err(step("unshare of the user namespace"))?;
        std::fs::write("/proc/self/setgroups", "deny").map_err(step("writing setgroups"))?;
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).map_err(step("writing uid_map"))?;
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).map_err(step("writing gid_map"))?;
    }
    if jail.has(Mechanism::NetNamespace) {
        process::unshare(UnshareFlags::NEWNET).map_err(step("unshare of the network namespace"))?;
    }
    if jail.has(Mechanism::MountNamespace) {
        process::unshare(UnshareFlags::NEWNS).map_err(step("unshare of the mount namespace"))?;
        empty_root()?;
    }
    Ok(proc)
}

/// Makes an empty file system that cannot be written to the root of this mount namespace.
fn empty_root() -> Result<(), Failed> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(step("making mounts private"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Over /proc, since that directory exists wherever farfork runs.
    rustix::mount::mount("none", "/proc", "tmpfs", flags, Some(c"size=4k,mode=555"))
        .map_err(step("mounting the empty root"))?;
    rustix::process::chdir("/proc").map_err(step("chdir"))?;
    rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("unmounting the old root"))?;
    rustix::process::chdir("/").map_err(step("chdir"))
}

/// The namespaces that a worker is born into.
pub(crate) fn namespaces_of_worker(jail: &Jail) -> UnshareFlags {
    let flags = [
        (Mechanism::PidNamespace, UnshareFlags::NEWPID),
        (Mechanism::MountNamespace, UnshareFlags::NEWNS),
        (Mechanism::IpcNamespace, UnshareFlags::NEWIPC),
        (Mechanism::UtsNamespace, UnshareFlags::NEWUTS),
    ];
    flags.into_iter().filter(|(mechanism, _)| jail.has(*mechanism)).map(|(_, flag)| flag).collect()
}

/// Takes from a new worker, which has one thread so far, what no thread of it will need. Returns its pagemap, which it could
/// not open later.
pub(crate) fn confine_worker(jail: &Jail, proc: OwnedFd, uid: u32) -> Result<File, Failed> {
    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let pagemap = rustix::fs::openat(&proc, "self/pagemap", read, Mode::empty()).map_err(step("opening the pagemap"))?;
    drop(proc);
    if jail.has(Mechanism::OwnUid) && rustix::process::geteuid().is_root() && has_left_groups() {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
        rustix::thread::set_keep_capabilities(true).map_err(step("keeping capabilities"))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("setresgid"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("setresuid"))?;
        if !jail.has(Mechanism::UserNamespace) {
            // They were kept, but are not in force; a new user namespace would have come with all of them.
            let mut kept = rustix::thread::capabilities(None).map_err(step("capget"))?;
            kept.effective = kept.permitted;
            rustix::thread::set_capabilities(None, kept).map_err(step("capset"))?;
        }
    }
    if jail.has(Mechanism::UserNamespace) {
        process::unshare(UnshareFlags::NEWUSER).map_err(step("unshare of the user namespace"))?;
    }
    if jail.has(Mechanism::NoCapabilities) {
        drop_capabilities()?;
    }
    if jail.has(Mechanism::NoNewPrivileges) {
        rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    }
    if jail.has(Mechanism::NotDumpable) {
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("PR_SET_DUMPABLE"))?;
    }
    if jail.has(Mechanism::Limits) {
        set_limits()?;
    }
    // After the change of user, which takes it back.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("PR_SET_PDEATHSIG"))?;
    if jail.has(Mechanism::Landlock) {
        restrict_by_landlock()?;
    }
    Ok(File::from(pagemap))
}

/// Leaves all groups. That fails below an unprivileged node, whose zygote is root in its own user namespace only, where there is
/// one user.
fn has_left_groups() -> bool {
    rustix::thread::set_thread_groups(&[]).is_ok()
}

fn drop_capabilities() -> Result<(), Failed> {
    // Those that this kernel has; past the last it says EINVAL.
    for capability in (0..64).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(step("dropping capabilities for good")(error)),
        }
    }
    let all = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(all).map_err(step("securebits"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(step("capset"))
}

fn set_limits() -> Result<(), Failed> {
    let limits = [
        (Resource::Core, 0),
        // Two memfds for each region, the layers of the image, what a machine is made of.
        (Resource::Nofile, DESCRIPTORS_MAX),
        // Its vCPUs, the builder, KVM's recovery thread and a copier, counted for its own uid.
        (Resource::Nproc, u64::from(THREADS_MAX)),
        // Layers of a branch are files as large as the region.
        (Resource::Fsize, MemorySize::MAX),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
        (Resource::Locks, 0),
        (Resource::Sigpending, 64),
    ];
    for (resource, limit) in limits {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        rustix::process::setrlimit(resource, limit).map_err(step("setrlimit"))?;
    }
    Ok(())
}

/// Makes sure, for good, that this process has no further process or thread.
pub(crate) fn have_no_more_processes() -> io::Result<()> {
    Ok(rustix::process::setrlimit(Resource::Nproc, Rlimit { current: Some(0), maximum: Some(0) })?)
}

/// The most threads and processes of one worker.
pub(crate) const THREADS_MAX: u32 = 16;
/// The most open files of one worker.
pub(crate) const DESCRIPTORS_MAX: u64 = 2048;

/// Bounds the worker's address space by what its class needs, once that is known.
pub(crate) fn limit_address_space(jail: &Jail, class: Class) -> io::Result<()> {
    if !jail.has(Mechanism::Limits) {
        return Ok(());
    }
    let most = class.region_bytes() + (256 << 20);
    Ok(rustix::process::setrlimit(Resource::As, Rlimit { current: Some(most), maximum: Some(most) })?)
}

/// No file system, no TCP, no abstract sockets and no signals beyond this process. Kernels that know less of it restrict what
/// they know.
fn restrict_by_landlock() -> Result<(), Failed> {
    let abi = ABI::V6;
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self());
    // A kernel without it does not enforce it; that is for the node to say, once: see `has_landlock`.
    restricted.map(drop).map_err(|error| ("Landlock", io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_workers_alive_have_one_user() {
        let uids =
            (0..POOLS).flat_map(|pool| [0, 1, 77, u64::from(UIDS_OF_POOL) - 1].map(|worker| uid_of_worker(pool, worker)));
        let mut uids: Vec<u32> = uids.collect();
        assert!(uids.iter().all(|uid| (FIRST_UID..=i32::MAX.cast_unsigned()).contains(uid)));
        let count = uids.len();
        uids.sort_unstable();
        uids.dedup();
        assert_eq!(uids.len(), count);
    }
}
