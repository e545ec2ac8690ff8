//! The prerequisites. One function each: what is there, against what is needed.

use super::host::{Device, HostView};
use super::{Item, Status};
use crate::cli::size;

/// Descriptors of the node per machine: its worker's socket, pipe, process, console and doorbells.
const DESCRIPTORS_PER_MACHINE: u64 = 8;
/// Tasks per machine of one vCPU: its worker's main thread, the vCPU, and those that serve it.
const TASKS_PER_MACHINE: u64 = 4;
/// What each of the two buffers of a node's UDP sockets is to have.
pub(super) const SOCKET_BUFFER_BYTES: u64 = 8 << 20;
/// Controllers that limit machines.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

pub(super) fn all(host: &HostView) -> Vec<Item> {
    vec![
        kvm(host),
        kernel(host),
        userfaultfd(host),
        memory(host),
        overcommit(host),
        max_map_count(host),
        nofile(host),
        pids(host),
        namespaces(host),
        cgroups(host),
        seccomp(host),
        landlock(host),
        rmem_max(host),
        wmem_max(host),
    ]
}

fn kvm(host: &HostView) -> Item {
    let needed = "/dev/kvm opens and has what machines need";
    match &host.kvm {
        Ok(()) => ok("kvm", "opens", needed),
        Err(error) => item("kvm", Status::Fail, error.to_string(), needed, error.remedy()),
    }
}

fn kernel(host: &HostView) -> Item {
    let needed = "Linux 6.7 (PAGEMAP_SCAN)";
    let Some(release) = host.text("/proc/sys/kernel/osrelease") else { return unknown("kernel", needed, "mount /proc") };
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 7) => ok("kernel", release, needed),
        (Some(Ok(_)), Some(Ok(_))) => item("kernel", Status::Fail, release, needed, "install a newer kernel"),
        _ => item("kernel", Status::Warn, release, needed, "look whether it is 6.7 or newer"),
    }
}

/// Workers are jailed and KVM touches their memory from within the kernel, so it has to be the device: the system call of the
/// same name would not do. Without it everything on this host works.
fn userfaultfd(host: &HostView) -> Item {
    let needed = "/dev/userfaultfd opens, for images of other nodes";
    match host.device("/dev/userfaultfd") {
        Device::Opens => ok("userfaultfd", "opens", needed),
        Device::Forbidden => item(
            "userfaultfd",
            Status::Warn,
            "there, but not for this user: no children of other nodes' images",
            needed,
            "run as root, or give a group of this user access by a udev rule: KERNEL==\"userfaultfd\", GROUP=\"kvm\", MODE=\"0660\"",
        ),
        Device::Missing => item(
            "userfaultfd",
            Status::Warn,
            "missing: no children of other nodes' images",
            needed,
            "use Linux 6.1 or newer with CONFIG_USERFAULTFD, and mount devtmpfs on /dev (a container has to be given the device)",
        ),
    }
}

fn memory(host: &HostView) -> Item {
    let needed = "1 GiB available";
    let info = host.text("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line?.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    let Some(available) = bytes("MemAvailable") else { return unknown("memory", needed, "mount /proc") };
    let swap = bytes("SwapTotal").unwrap_or_default();
    let found = format!("{} available, {} swap", size::bytes(available), size::bytes(swap));
    let remedy = "end what else uses memory, or use a larger host";
    match available {
        0..0x1000_0000 => item("memory", Status::Fail, found, needed, remedy),
        0x1000_0000..0x4000_0000 => item("memory", Status::Warn, found, needed, remedy),
        _ => ok("memory", found, needed),
    }
}

fn overcommit(host: &HostView) -> Item {
    let needed = "vm.overcommit_memory 0 or 1";
    match host.number("/proc/sys/vm/overcommit_memory") {
        None => unknown("overcommit", needed, "mount /proc"),
        Some(2) => item(
            "overcommit",
            Status::Fail,
            "2: all RAM of each child counts at once",
            needed,
            "sysctl vm.overcommit_memory=0: children share nearly all of their RAM",
        ),
        Some(mode) => ok("overcommit", mode.to_string(), needed),
    }
}

fn max_map_count(host: &HostView) -> Item {
    let needed = "vm.max_map_count 65530, better 262144";
    let remedy = "sysctl vm.max_map_count=262144";
    match host.number("/proc/sys/vm/max_map_count") {
        None => unknown("max_map_count", needed, "mount /proc"),
        Some(count @ 0..65_530) => item("max_map_count", Status::Fail, count.to_string(), needed, remedy),
        Some(count @ 65_530..262_144) => item("max_map_count", Status::Warn, count.to_string(), needed, remedy),
        Some(count) => ok("max_map_count", count.to_string(), needed),
    }
}

fn nofile(host: &HostView) -> Item {
    let needed = "a hard limit of 65536 descriptors";
    let remedy = "raise it: LimitNOFILE= of the unit, or /etc/security/limits.conf";
    let Some(limit) = host.nofile else { return ok("nofile", "unlimited", needed) };
    let found = format!("{limit}, for {} machines", limit / DESCRIPTORS_PER_MACHINE);
    match limit {
        0..4096 => item("nofile", Status::Fail, found, needed, remedy),
        4096..65_536 => item("nofile", Status::Warn, found, needed, remedy),
        _ => ok("nofile", found, needed),
    }
}

/// The least of what the kernel, this cgroup and this user may have.
fn pids(host: &HostView) -> Item {
    let needed = "32768 tasks";
    let own = [own_cgroup(host, "pids"), own_cgroup(host, "")].into_iter().flatten();
    let of_cgroup = own.filter_map(|path| host.number(&format!("{path}/pids.max"))).min();
    // Root's processes are not counted against its limit.
    let of_user = host.nproc.filter(|_| !host.is_root());
    let bounds = [
        ("kernel.pid_max", host.number("/proc/sys/kernel/pid_max"), "sysctl kernel.pid_max=4194304"),
        ("pids.max of the cgroup", of_cgroup, "raise TasksMax= of the unit"),
        ("RLIMIT_NPROC", of_user, "raise it: LimitNPROC= of the unit, or /etc/security/limits.conf"),
    ];
    let least = bounds.into_iter().filter_map(|(name, bound, remedy)| Some((bound?, name, remedy))).min();
    let Some((bound, name, remedy)) = least else { return unknown("pids", needed, "mount /proc") };
    let found = format!("{bound} ({name}), for {} machines", bound / TASKS_PER_MACHINE);
    match bound {
        0..1024 => item("pids", Status::Fail, found, needed, remedy),
        1024..32_768 => item("pids", Status::Warn, found, needed, remedy),
        _ => ok("pids", found, needed),
    }
}

fn namespaces(host: &HostView) -> Item {
    let needed = "namespaces for the workers' jail";
    let none_at_all = host.number("/proc/sys/user/max_user_namespaces") == Some(0);
    let not_for_users = host.number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0);
    let by_apparmor = host.number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1);
    match (host.is_root(), none_at_all, not_for_users, by_apparmor) {
        (true, ..) => ok("namespaces", "root makes them", needed),
        (false, true, ..) => item(
            "namespaces",
            Status::Fail,
            "user.max_user_namespaces is 0",
            needed,
            "sysctl user.max_user_namespaces=15000, or run as root",
        ),
        (false, _, true, _) => item(
            "namespaces",
            Status::Fail,
            "kernel.unprivileged_userns_clone is 0",
            needed,
            "sysctl kernel.unprivileged_userns_clone=1, or run as root",
        ),
        (false, _, _, true) => item(
            "namespaces",
            Status::Warn,
            "AppArmor restricts them",
            needed,
            "add an AppArmor profile for farfork that allows userns, or run as root",
        ),
        _ => ok("namespaces", "users may make them", needed),
    }
}

fn cgroups(host: &HostView) -> Item {
    let needed = "cpu, memory and pids, writable";
    let remedy = "use Delegate=yes in the unit, or run as root in a cgroup of one's own";
    if let Some(listed) = own_cgroup(host, "").and_then(|path| Some((host.text(&format!("{path}/cgroup.controllers"))?, path)))
        && CONTROLLERS.iter().all(|name| listed.0.split(' ').any(|found| found == *name))
    {
        let (_, path) = listed;
        return match host.is_writable(&path) {
            true => ok("cgroups", "version 2, writable", needed),
            false => item("cgroups", Status::Warn, "version 2, read-only: no limits per machine", needed, remedy),
        };
    }
    let own: Vec<_> = CONTROLLERS.iter().filter_map(|name| own_cgroup(host, name)).collect();
    if own.len() < CONTROLLERS.len() {
        let remedy = "mount cgroup2 on /sys/fs/cgroup with these controllers enabled";
        return item("cgroups", Status::Fail, "not all of them", needed, remedy);
    }
    match own.iter().all(|path| host.is_writable(path)) {
        true => ok("cgroups", "version 1, writable", needed),
        false => item("cgroups", Status::Warn, "version 1, read-only: no limits per machine", needed, remedy),
    }
}

fn seccomp(host: &HostView) -> Item {
    let needed = "filters that can kill a process";
    match host.text("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) if actions.split(' ').any(|action| action == "kill_process") => ok("seccomp", "filters", needed),
        Some(actions) => item("seccomp", Status::Fail, actions, needed, "use a kernel with CONFIG_SECCOMP_FILTER"),
        None => item("seccomp", Status::Fail, "none", needed, "use a kernel with CONFIG_SECCOMP_FILTER"),
    }
}

fn landlock(host: &HostView) -> Item {
    let needed = "Landlock, a second wall around workers";
    match host.text("/sys/kernel/security/lsm") {
        Some(list) if list.split(',').any(|name| name == "landlock") => ok("landlock", "on", needed),
        Some(list) => {
            let found = format!("off (only {list})");
            item("landlock", Status::Warn, found, needed, "boot with lsm=landlock,... (CONFIG_SECURITY_LANDLOCK)")
        }
        None => unknown("landlock", needed, "mount securityfs on /sys/kernel/security to see it"),
    }
}

fn rmem_max(host: &HostView) -> Item {
    let remedy = "sysctl net.core.rmem_max=8388608: what does not fit is dropped, and looks like losses of the network";
    socket_buffer(host, "rmem_max", "net.core.rmem_max 8 MiB, for images of other nodes", remedy)
}

fn wmem_max(host: &HostView) -> Item {
    let remedy = "sysctl net.core.wmem_max=8388608: a smaller one makes this node send in small bursts";
    socket_buffer(host, "wmem_max", "net.core.wmem_max 8 MiB, for what other nodes read here", remedy)
}

fn socket_buffer(host: &HostView, id: &'static str, needed: &'static str, remedy: &str) -> Item {
    match host.number(&format!("/proc/sys/net/core/{id}")) {
        None => unknown(id, needed, "mount /proc; within a network namespace of its own, look on the host"),
        Some(bytes @ 0..SOCKET_BUFFER_BYTES) => item(id, Status::Warn, size::bytes(bytes), needed, remedy),
        Some(bytes) => ok(id, size::bytes(bytes), needed),
    }
}

/// Where this process's cgroup of `controller` is; of version 2 if it is empty.
fn own_cgroup(host: &HostView, controller: &str) -> Option<String> {
    let text = host.text("/proc/self/cgroup")?;
    let path = text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (names, path) = (parts.next()?, parts.next()?);
        names.split(',').any(|name| name == controller).then_some(path)
    })?;
    let path = path.trim_end_matches('/');
    let mounts = match controller {
        "" => vec!["/sys/fs/cgroup".to_owned(), "/sys/fs/cgroup/unified".to_owned()],
        name => vec![format!("/sys/fs/cgroup/{name}"), "/sys/fs/cgroup/cpu,cpuacct".to_owned()],
    };
    // Within a container the path may be the host's: then the mount itself is this process's.
    let places = mounts.iter().map(|mount| format!("{mount}{path}")).chain(mounts.iter().cloned());
    places.into_iter().find(|place| host.is_directory(place))
}

fn ok(id: &'static str, found: impl Into<String>, needed: &'static str) -> Item {
    Item { id, status: Status::Ok, found: found.into(), needed, remedy: None }
}

fn unknown(id: &'static str, needed: &'static str, remedy: &str) -> Item {
    item(id, Status::Warn, "cannot be read", needed, remedy)
}

fn item(id: &'static str, status: Status, found: impl Into<String>, needed: &'static str, remedy: &str) -> Item {
    Item { id, status, found: found.into(), needed, remedy: Some(remedy.to_owned()) }
}
