//! Control groups: memory and number of processes of each worker, and the share of the CPUs that all workers together have
//! beside their node. Both versions of the kernel's interface are spoken, whichever has the controllers.
//!
//! ```text
//! farfork-NAME/node           the node
//! farfork-NAME/workers        a tenth of the node's CPU weight, for the zygote and all workers
//! farfork-NAME/workers/N      one worker: memory, processes
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use thiserror::Error;

/// The node's weight and that of all its workers (version 1: shares; version 2: weight).
const SHARES: (u32, u32) = (1024, 102);
const WEIGHT: (u32, u32) = (100, 10);
/// How long processes that were killed may take to end.
const REAP_PATIENCE: Duration = Duration::from_secs(10);

/// The groups of one node.
#[derive(Debug)]
pub struct Groups {
    /// `farfork-NAME` in each hierarchy.
    tops: Vec<Top>,
}

#[derive(Debug)]
struct Top {
    path: PathBuf,
    hierarchy: Hierarchy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    Unified,
    Memory,
    Pids,
    Cpu,
}

/// The group of one worker. Removed when it is dropped, which only works once the worker is gone.
#[derive(Debug)]
pub struct WorkerGroup {
    directories: Vec<(PathBuf, Hierarchy)>,
}

/// Why there are no groups.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum CgroupError {
    #[error("{root} has no control groups for memory, pids and cpu")]
    None { root: PathBuf },
    #[error("{step} {path} failed: {source}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    #[error("processes of an earlier node in {path} do not end")]
    Immortal { path: PathBuf },
}

impl CgroupError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::None { .. } => "mount cgroup2 with these controllers (systemd does), or the three of version 1",
            Self::Io { .. } => "run the node as root, or as a systemd service with Delegate=yes",
            Self::Immortal { .. } => "look for what keeps them in the kernel log; a restart of the host ends them",
        }
    }
}

impl Groups {
    /// Makes the groups called `name`, beneath the group that this process is in. What an earlier node of that name has left in
    /// them is ended first.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn open(name: &str) -> Result<Self, CgroupError> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::open_at(Path::new("/sys/fs/cgroup"), &own, name)
    }

    /// [`Groups::open`] in another tree, with another `/proc/self/cgroup`.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn open_at(root: &Path, own: &str, name: &str) -> Result<Self, CgroupError> {
        let tops: Vec<Top> = find(root, own)
            .ok_or_else(|| CgroupError::None { root: root.to_owned() })?
            .into_iter()
            .map(|(parent, hierarchy)| Top { path: parent.join(format!("farfork-{name}")), hierarchy })
            .collect();
        let groups = Self { tops };
        groups.reap()?;
        for Top { path, hierarchy } in &groups.tops {
            let (node, workers) = (path.join("node"), path.join("workers"));
            for directory in [path, &node, &workers] {
                make(directory)?;
            }
            match hierarchy {
                Hierarchy::Unified => {
                    for directory in [path, &workers] {
                        write(&directory.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
                    }
                    write(&node.join("cpu.weight"), &WEIGHT.0.to_string())?;
                    write(&workers.join("cpu.weight"), &WEIGHT.1.to_string())?;
                }
                Hierarchy::Cpu => {
                    write(&node.join("cpu.shares"), &SHARES.0.to_string())?;
                    write(&workers.join("cpu.shares"), &SHARES.1.to_string())?;
                }
                Hierarchy::Memory | Hierarchy::Pids => {}
            }
        }
        Ok(groups)
    }

    /// Moves a process into the node's group.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn admit_node(&self, pid: u32) -> Result<(), CgroupError> {
        self.tops.iter().try_for_each(|top| write(&top.path.join("node/cgroup.procs"), &pid.to_string()))
    }

    /// Moves the zygote where its workers will be born, as far as that is one group for all of them.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn admit_zygote(&self, pid: u32) -> Result<(), CgroupError> {
        let mut cpu = self.tops.iter().filter(|top| top.hierarchy == Hierarchy::Cpu);
        cpu.try_for_each(|top| write(&top.path.join("workers/cgroup.procs"), &pid.to_string()))
    }

    /// Makes a worker's group.
    ///
    /// # Errors
    /// [`CgroupError::Io`]; nothing is left behind.
    pub fn worker(&self, number: u64, memory_bytes: u64, processes: u32) -> Result<WorkerGroup, CgroupError> {
        let mut group = WorkerGroup { directories: Vec::with_capacity(2) };
        for top in self.tops.iter().filter(|top| top.hierarchy != Hierarchy::Cpu) {
            let directory = top.path.join("workers").join(number.to_string());
            make(&directory)?;
            group.directories.push((directory, top.hierarchy));
        }
        group.limit_memory(memory_bytes)?;
        group.limit_processes(processes)?;
        Ok(group)
    }

    /// Ends every process in these groups, and removes all but their tops.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn reap(&self) -> Result<(), CgroupError> {
        let started = Instant::now();
        for Top { path, .. } in &self.tops {
            while !kill_and_remove(path)? {
                if started.elapsed() > REAP_PATIENCE {
                    return Err(CgroupError::Immortal { path: path.clone() });
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// How many groups of workers there are.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        let count = |top: &Top| subdirectories(&top.path.join("workers")).len();
        self.tops.iter().map(count).max().unwrap_or(0)
    }

    /// Removes the groups, as far as they are empty; the node itself goes back to the group above.
    pub fn close(&self) {
        for Top { path, .. } in &self.tops {
            for pid in processes(&path.join("node")) {
                if let Some(above) = path.parent() {
                    write(&above.join("cgroup.procs"), &pid.to_string()).unwrap_or_default();
                }
            }
            for directory in [path.join("workers"), path.join("node"), path.clone()] {
                fs::remove_dir(directory).unwrap_or_default();
            }
        }
    }
}

impl WorkerGroup {
    /// The files through which a process moves itself in, by writing `0` to each. What it allocates from then on counts.
    ///
    /// With version 1 a process of one thread does that without the lock for which the kernel waits until all CPUs have
    /// passed through a quiet state (milliseconds); that is why the worker does it, and not the node.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn entrances(&self) -> Result<Vec<File>, CgroupError> {
        let entrance = |(directory, hierarchy): &(PathBuf, Hierarchy)| {
            let path = directory.join(if *hierarchy == Hierarchy::Unified { "cgroup.procs" } else { "tasks" });
            File::options().write(true).open(&path).map_err(|source| CgroupError::Io { step: "opening", path, source })
        };
        self.directories.iter().map(entrance).collect()
    }

    /// Changes how much memory it may have.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        self.directories.iter().try_for_each(|(directory, hierarchy)| match hierarchy {
            Hierarchy::Unified => write(&directory.join("memory.max"), &bytes.to_string()),
            Hierarchy::Memory => write(&directory.join("memory.limit_in_bytes"), &bytes.to_string()),
            Hierarchy::Pids | Hierarchy::Cpu => Ok(()),
        })
    }

    /// Changes how many threads and processes it may have. Those that there are stay.
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn limit_processes(&self, most: u32) -> Result<(), CgroupError> {
        let mut pids = self.directories.iter().filter(|(_, of)| matches!(of, Hierarchy::Unified | Hierarchy::Pids));
        pids.try_for_each(|(directory, _)| write(&directory.join("pids.max"), &most.to_string()))
    }

    /// How many processes of it the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = |(directory, hierarchy): &(PathBuf, Hierarchy)| match hierarchy {
            Hierarchy::Unified => Some(directory.join("memory.events")),
            Hierarchy::Memory => Some(directory.join("memory.oom_control")),
            Hierarchy::Pids | Hierarchy::Cpu => None,
        };
        let texts = self.directories.iter().filter_map(file).filter_map(|path| fs::read_to_string(path).ok());
        texts.filter_map(|text| field(&text, "oom_kill")).sum()
    }

    /// Removes it. Says whether it is gone: the kernel keeps a group until its last process is.
    #[must_use]
    pub fn remove(&mut self) -> bool {
        self.directories.retain(|(directory, _)| match fs::remove_dir(directory) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        });
        self.directories.is_empty()
    }
}

impl Drop for WorkerGroup {
    fn drop(&mut self) {
        let _is_gone = self.remove();
    }
}

/// The directories beneath which groups are made, one for each hierarchy that is needed.
fn find(root: &Path, own: &str) -> Option<Vec<(PathBuf, Hierarchy)>> {
    let unified = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    if ["memory", "pids", "cpu"].iter().all(|needed| unified.split_whitespace().any(|found| found == *needed)) {
        return Some(vec![(beneath(root, own_path(own, "")), Hierarchy::Unified)]);
    }
    let one = |controller: &str, hierarchy| {
        let mount = [controller.to_owned(), format!("{controller},cpuacct")]
            .iter()
            .map(|name| root.join(name))
            .find(|path| path.join("cgroup.procs").exists())?;
        Some((beneath(&mount, own_path(own, controller)), hierarchy))
    };
    Some(vec![one("memory", Hierarchy::Memory)?, one("pids", Hierarchy::Pids)?, one("cpu", Hierarchy::Cpu)?])
}

/// The path of this process's group for a controller, from lines like `4:memory:/a/b`; for no controller, that of version 2.
fn own_path<'a>(own: &'a str, controller: &str) -> &'a str {
    let of_controller = |line: &'a str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(path)
    };
    own.lines().find_map(of_controller).unwrap_or("/")
}

/// A group's directory; the mount's own where the group is not visible, as in a container.
fn beneath(mount: &Path, path: &str) -> PathBuf {
    let directory = mount.join(path.trim_start_matches('/'));
    // A node that was started by one that had moved is in that one's group.
    let above = directory
        .ancestors()
        .find(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"farfork-")));
    let directory = above.and_then(Path::parent).map_or(directory.clone(), Path::to_owned);
    if directory.is_dir() { directory } else { mount.to_owned() }
}

fn make(directory: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Io { step: "making", path: directory.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(|source| CgroupError::Io { step: "writing", path: path.to_owned(), source })
}

/// Kills what is in a group and below it, and removes the groups below. Says whether all that is done.
fn kill_and_remove(directory: &Path) -> Result<bool, CgroupError> {
    let mut is_done = true;
    for below in subdirectories(directory) {
        is_done &= kill_and_remove(&below)?;
        is_done &= match fs::remove_dir(&below) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
    }
    for pid in processes(directory) {
        if let Some(pid) = Pid::from_raw(pid).filter(|pid| *pid != rustix::process::getpid()) {
            is_done = false;
            rustix::process::kill_process(pid, Signal::KILL).unwrap_or_default();
        }
    }
    Ok(is_done)
}

fn processes(directory: &Path) -> Vec<i32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: PathBuf) -> String {
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn version_2_has_one_tree() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
        fs::create_dir_all(root.path().join("system.slice/farfork.service")).unwrap();
        let groups = Groups::open_at(root.path(), "0::/system.slice/farfork.service\n", "test").unwrap();
        let top = root.path().join("system.slice/farfork.service/farfork-test");
        assert_eq!(read(top.join("cgroup.subtree_control")), "+memory +pids +cpu");
        assert_eq!(read(top.join("workers/cgroup.subtree_control")), "+memory +pids +cpu");
        assert_eq!((read(top.join("node/cpu.weight")), read(top.join("workers/cpu.weight"))), ("100".into(), "10".into()));
        groups.admit_node(7).unwrap();
        groups.admit_zygote(8).unwrap();
        assert_eq!(read(top.join("node/cgroup.procs")), "7");
        let group = groups.worker(5, 1 << 20, 9).unwrap();
        let of_worker = top.join("workers/5");
        fs::write(of_worker.join("cgroup.procs"), "").unwrap();
        io::Write::write_all(&mut &group.entrances().unwrap()[0], b"0").unwrap();
        assert_eq!(read(of_worker.join("memory.max")), "1048576");
        assert_eq!(read(of_worker.join("pids.max")), "9");
        assert_eq!(read(of_worker.join("cgroup.procs")), "0");
        fs::write(of_worker.join("memory.events"), "low 0\noom 3\noom_kill 2\noom_group_kill 0\n").unwrap();
        assert_eq!(group.oom_kills(), 2);
        assert_eq!(groups.worker_count(), 1);
    }

    #[test]
    fn version_1_has_a_tree_for_each_controller() {
        let root = tempfile::tempdir().unwrap();
        for controller in ["memory/a/b", "pids", "cpu,cpuacct"] {
            fs::create_dir_all(root.path().join(controller)).unwrap();
        }
        for controller in ["memory", "pids", "cpu,cpuacct"] {
            fs::write(root.path().join(controller).join("cgroup.procs"), "").unwrap();
        }
        let own = "9:pids:/gone\n4:memory:/a/b\n2:cpu,cpuacct:/\n0::/\n";
        let groups = Groups::open_at(root.path(), own, "test").unwrap();
        assert_eq!(read(root.path().join("cpu,cpuacct/farfork-test/workers/cpu.shares")), "102");
        let group = groups.worker(5, 1 << 20, 9).unwrap();
        assert_eq!(read(root.path().join("memory/a/b/farfork-test/workers/5/memory.limit_in_bytes")), "1048576");
        assert_eq!(read(root.path().join("pids/farfork-test/workers/5/pids.max")), "9");
        fs::write(root.path().join("memory/a/b/farfork-test/workers/5/memory.oom_control"), "under_oom 0\noom_kill 1\n")
            .unwrap();
        assert_eq!(group.oom_kills(), 1);
    }

    #[test]
    fn a_host_without_the_controllers_says_so() {
        let root = tempfile::tempdir().unwrap();
        let error = Groups::open_at(root.path(), "", "test").unwrap_err();
        assert!(matches!(error, CgroupError::None { .. }), "{error}");
        assert!(error.remedy().contains("cgroup2"));
    }
}
