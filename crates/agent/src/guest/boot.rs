//! From the initial RAM disk to the guest's own root file system.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::{AddressFamily, SocketType};

use super::say;

const ROOT: &str = "/root";
const DISK: &str = "/dev/vda";
/// How long the disk may take to appear.
const DISK_PATIENCE: Duration = Duration::from_secs(30);
/// What every program is given.
pub(super) const ENVIRONMENT: [(&str, &str); 4] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("TERM", "linux"),
    ("LANG", "C.UTF-8"),
];

/// Mounts what programs expect, changes to the disk's root, switches the loopback interface on.
pub(super) fn prepare() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("it is not the first process; name it as the kernel's init"));
    }
    // Before there are any threads.
    fs::create_dir_all("/dev")?;
    mounted("devtmpfs", "/dev", "devtmpfs", "")?;
    wait_for(Path::new(DISK))?;
    fs::create_dir_all(ROOT)?;
    mount(DISK, ROOT, "ext4", MountFlags::NOATIME, c"").map_err(|error| context("mounting /dev/vda as ext4", error.into()))?;
    for directory in ["dev", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(Path::new(ROOT).join(directory))?;
    }
    mount_move("/dev", format!("{ROOT}/dev")).map_err(|error| context("moving /dev", error.into()))?;
    rustix::process::chdir(ROOT)?;
    mount_move(".", "/").map_err(|error| context("moving the root", error.into()))?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;

    mounted("proc", "/proc", "proc", "")?;
    mounted("sysfs", "/sys", "sysfs", "")?;
    mounted("tmpfs", "/run", "tmpfs", "mode=755")?;
    mounted("tmpfs", "/tmp", "tmpfs", "mode=1777")?;
    fs::create_dir_all("/dev/pts")?;
    mounted("devpts", "/dev/pts", "devpts", "ptmxmode=666,mode=620,gid=5")?;
    fs::create_dir_all("/dev/shm")?;
    mounted("tmpfs", "/dev/shm", "tmpfs", "mode=1777")?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(context(link, error)),
            _ => {}
        }
    }
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    if let Err(error) = crate::interface::set_up(&socket, "lo") {
        say(&format!("the loopback interface stays down: {error}"));
    }
    Ok(())
}

fn mounted(source: &str, target: &str, kind: &str, options: &str) -> io::Result<()> {
    let options = std::ffi::CString::new(options).expect("options of ours");
    let mounted = mount(source, target, kind, MountFlags::empty(), options.as_c_str());
    mounted.map_err(|error| context(&format!("mounting {target}"), error.into()))
}

fn wait_for(path: &Path) -> io::Result<()> {
    let started = Instant::now();
    while !path.exists() {
        if started.elapsed() > DISK_PATIENCE {
            return Err(io::Error::other(format!("there is no {}: the machine has no disk", path.display())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn context(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
