//! Each item on trees of its own.

use std::path::Path;

use tempfile::TempDir;
use vm::HostError;

use super::checks::{SOCKET_BUFFER_BYTES, all};
use super::host::HostView;
use super::{Item, Status, for_people, report};

/// A host on which everything is right, for a user other than root.
fn good() -> (TempDir, HostView) {
    let tree = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.12.1-amd64"),
        ("dev/userfaultfd", ""),
        ("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable:    4194304 kB\nSwapTotal:             0 kB"),
        ("proc/sys/vm/overcommit_memory", "0"),
        ("proc/sys/vm/max_map_count", "262144"),
        ("proc/sys/kernel/pid_max", "4194304"),
        ("proc/sys/user/max_user_namespaces", "15000"),
        ("proc/self/cgroup", "0::/farfork.service"),
        ("sys/fs/cgroup/farfork.service/cgroup.controllers", "cpuset cpu io memory pids"),
        ("sys/fs/cgroup/farfork.service/pids.max", "max"),
        ("proc/sys/kernel/seccomp/actions_avail", "kill_process kill_thread trap errno allow"),
        ("sys/kernel/security/lsm", "capability,landlock,yama"),
        ("proc/sys/net/core/rmem_max", "8388608"),
        ("proc/sys/net/core/wmem_max", "8388608"),
    ] {
        write(tree.path(), path, text);
    }
    let root = tree.path().to_owned();
    (tree, HostView { root, uid: 1000, kvm: Ok(()), nofile: Some(1 << 20), nproc: None })
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("{text}\n")).unwrap();
}

fn found(host: &HostView, id: &str) -> Item {
    all(host).into_iter().find(|item| item.id == id).unwrap()
}

#[test]
fn a_good_host_has_nothing_to_remedy() {
    let (_tree, host) = good();
    for item in all(&host) {
        assert_eq!((item.status, &item.remedy), (Status::Ok, &None), "{item:?}");
    }
    assert_eq!(report(&host).status, Status::Ok);
}

#[test]
fn each_wrong_file_is_found_with_a_remedy() {
    let cases = [
        ("kernel", "proc/sys/kernel/osrelease", "6.6.99", Status::Fail),
        ("kernel", "proc/sys/kernel/osrelease", "5.10.0-28", Status::Fail),
        ("kernel", "proc/sys/kernel/osrelease", "custom", Status::Warn),
        ("memory", "proc/meminfo", "MemAvailable: 1000 kB", Status::Fail),
        ("memory", "proc/meminfo", "MemAvailable: 900000 kB", Status::Warn),
        ("memory", "proc/meminfo", "nonsense", Status::Warn),
        ("overcommit", "proc/sys/vm/overcommit_memory", "2", Status::Fail),
        ("max_map_count", "proc/sys/vm/max_map_count", "65529", Status::Fail),
        ("max_map_count", "proc/sys/vm/max_map_count", "65530", Status::Warn),
        ("pids", "proc/sys/kernel/pid_max", "1000", Status::Fail),
        ("pids", "sys/fs/cgroup/farfork.service/pids.max", "4915", Status::Warn),
        ("pids", "sys/fs/cgroup/farfork.service/pids.max", "100", Status::Fail),
        ("namespaces", "proc/sys/user/max_user_namespaces", "0", Status::Fail),
        ("namespaces", "proc/sys/kernel/unprivileged_userns_clone", "0", Status::Fail),
        ("namespaces", "proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", Status::Warn),
        ("cgroups", "sys/fs/cgroup/farfork.service/cgroup.controllers", "cpu io", Status::Fail),
        ("cgroups", "proc/self/cgroup", "", Status::Fail),
        ("seccomp", "proc/sys/kernel/seccomp/actions_avail", "kill_thread", Status::Fail),
        ("landlock", "sys/kernel/security/lsm", "capability,yama", Status::Warn),
        ("rmem_max", "proc/sys/net/core/rmem_max", "212992", Status::Warn),
        ("rmem_max", "proc/sys/net/core/rmem_max", "8388607", Status::Warn),
        ("wmem_max", "proc/sys/net/core/wmem_max", "212992", Status::Warn),
        ("wmem_max", "proc/sys/net/core/wmem_max", "", Status::Warn),
    ];
    for (id, path, text, status) in cases {
        let (tree, host) = good();
        write(tree.path(), path, text);
        let item = found(&host, id);
        assert_eq!(item.status, status, "{path} = {text}: {item:?}");
        assert!(item.remedy.as_ref().is_some_and(|remedy| !remedy.is_empty()), "{item:?}");
        let others = all(&host).into_iter().filter(|other| other.id != id && other.status != Status::Ok);
        assert_eq!(others.collect::<Vec<_>>(), [], "{path} = {text} touches one item");
        assert_eq!(report(&host).status, status);
        assert!(for_people(&report(&host)).contains(&format!("{id}: ")));
    }
}

#[test]
fn kvm_says_its_own_remedy() {
    let (_tree, mut host) = good();
    host.kvm = Err(HostError::Missing { path: "/dev/kvm" });
    let item = found(&host, "kvm");
    assert_eq!(item.status, Status::Fail);
    assert!(item.remedy.unwrap().contains("kvm_intel"));
}

#[test]
fn limits_of_the_process_count() {
    let (_tree, mut host) = good();
    for (nofile, status) in
        [(Some(1024), Status::Fail), (Some(4096), Status::Warn), (Some(65_536), Status::Ok), (None, Status::Ok)]
    {
        host.nofile = nofile;
        assert_eq!(found(&host, "nofile").status, status, "{nofile:?}");
    }
    host.nproc = Some(500);
    assert_eq!(found(&host, "pids").status, Status::Fail);
    host.uid = 0;
    assert_eq!(found(&host, "pids").status, Status::Ok, "root is not counted");
}

#[test]
fn without_its_device_userfaultfd_is_of_no_use() {
    let (tree, mut host) = good();
    std::fs::remove_file(tree.path().join("dev/userfaultfd")).unwrap();
    // Neither who may make the system call, nor who is root, can do without.
    write(tree.path(), "proc/sys/vm/unprivileged_userfaultfd", "1");
    host.uid = 0;
    let missing = found(&host, "userfaultfd");
    assert_eq!(missing.status, Status::Warn, "machines of this host need it for nothing");
    assert!(missing.remedy.unwrap().contains("Linux 6.1"));
    std::fs::create_dir(tree.path().join("dev/userfaultfd")).unwrap();
    let forbidden = found(&host, "userfaultfd");
    assert_eq!(forbidden.status, Status::Warn, "there, but does not open");
    assert!(forbidden.remedy.unwrap().contains("udev"));
}

#[test]
fn the_buffers_that_are_asked_for_are_those_of_the_transport() {
    assert_eq!(SOCKET_BUFFER_BYTES, u64::from(pages::endpoint::Tuning::default().socket_buffer_bytes));
}

#[test]
fn cgroups_of_version_1_count_too() {
    let (tree, host) = good();
    std::fs::remove_dir_all(tree.path().join("sys/fs/cgroup")).unwrap();
    write(tree.path(), "proc/self/cgroup", "8:pids:/a\n4:memory:/a\n2:cpu,cpuacct:/a\n0::/a");
    assert_eq!(found(&host, "cgroups").status, Status::Fail);
    for directory in ["pids/a", "memory/a", "cpu,cpuacct/a"] {
        std::fs::create_dir_all(tree.path().join("sys/fs/cgroup").join(directory)).unwrap();
    }
    assert_eq!(found(&host, "cgroups").status, Status::Ok);
    write(tree.path(), "sys/fs/cgroup/pids/a/pids.max", "100");
    assert_eq!(found(&host, "pids").status, Status::Fail);
}

#[test]
fn an_empty_tree_is_no_panic() {
    let tree = tempfile::tempdir().unwrap();
    let host = HostView {
        root: tree.path().to_owned(),
        uid: 1000,
        kvm: Err(HostError::Missing { path: "/dev/kvm" }),
        nofile: None,
        nproc: None,
    };
    let report = report(&host);
    assert_eq!(report.status, Status::Fail);
    for item in report.items.iter().filter(|item| !matches!(item.id, "nofile" | "namespaces")) {
        assert_ne!(item.status, Status::Ok, "{item:?}");
        assert!(item.remedy.is_some());
    }
}
