//! What the node sends along with an attempt: a worker that has been taken over has such things from somewhere, or will.

use std::any::Any;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::MemfdFlags;

use crate::pool::Jailed;
use crate::sys::attempts::node::{Segment, Watched};
use crate::sys::attempts::{MARK, node, privileges, process, sockets};

/// What the node sends along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// Nothing.
    Nothing,
    /// A socket with a datagram in it, and another.
    Pair,
    /// A file in memory.
    Memfd,
    /// A file.
    File,
    /// A directory of the host's, with a file, one of root's, a link to `/etc/passwd`, a program, and one that is set-user-id.
    Directory,
    /// A file in memory that is a program.
    Program,
    /// `/dev/kvm`.
    Kvm,
    /// `/dev/userfaultfd`.
    UserfaultfdDevice,
    /// A new userfaultfd of the node's.
    Userfaultfd,
    /// One that watches a page of the node's; with the page's address.
    ReadyUserfaultfd,
    /// A terminal.
    Terminal,
    /// A TCP listener with a connection that waits.
    Listener,
    /// A UDP socket of the node's; with the port of another.
    Bound,
    /// The port of a UDP socket of the node's.
    Udp,
    /// The port of a TCP listener of the node's.
    Tcp,
    /// The abstract name of a listener of the node's.
    AbstractSocket,
    /// The key of a shared memory segment of the node's.
    Segment,
    /// The process of another worker.
    Sibling,
    /// The same; it must not survive.
    Victim,
    /// `/proc`; with the process of another worker.
    Proc,
    /// A name for the host.
    Hostname,
    /// Nothing, but a kernel that takes the system calls of 32-bit programs.
    OldKernel,
}

/// [`Given`], made.
pub struct Gift {
    /// Descriptors.
    pub descriptors: Vec<OwnedFd>,
    /// A number.
    pub about: u64,
    took_effect: Box<dyn Fn() -> bool>,
    _kept: Box<dyn Any>,
}

impl std::fmt::Debug for Gift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gift").field("descriptors", &self.descriptors).field("about", &self.about).finish_non_exhaustive()
    }
}

/// How long the node waits for what an attempt is to bring about.
const PATIENCE: Duration = Duration::from_secs(10);

impl Given {
    /// Makes it. `directory` is empty, or was used for this before.
    ///
    /// # Errors
    /// If this host, or this user, has not got it.
    ///
    /// # Panics
    /// If a sibling is needed and there is none.
    pub fn make(self, directory: &Path, sibling: Option<&std::sync::Arc<Jailed>>) -> io::Result<Gift> {
        let gift = |descriptors, about| Gift { descriptors, about, took_effect: Box::new(|| true), _kept: Box::new(()) };
        let pid_of_sibling = || {
            let pid = sibling.and_then(|sibling| sibling.pid()).expect("another worker");
            u64::try_from(pid).expect("a pid")
        };
        Ok(match self {
            Self::Nothing => gift(Vec::new(), 0),
            Self::OldKernel if node::has_calls_of_32_bits() => gift(Vec::new(), 0),
            Self::OldKernel => return Err(io::ErrorKind::Unsupported.into()),
            Self::Pair => {
                let (ours, theirs) = UnixDatagram::pair()?;
                ours.send(&[MARK])?;
                let mut gift = gift(vec![theirs.into(), UnixDatagram::unbound()?.into()], 0);
                gift._kept = Box::new(ours);
                gift
            }
            Self::Memfd => gift(vec![memfd(&[MARK; 4096])?], 0),
            Self::File => gift(vec![File::create(directory.join("large"))?.into()], 0),
            Self::Directory => {
                furnish(directory)?;
                gift(vec![File::open(directory)?.into()], 0)
            }
            Self::Program => {
                let program = memfd(&process::program())?;
                // What is open for writing cannot be run.
                gift(vec![File::open(format!("/proc/self/fd/{}", program.as_raw_fd()))?.into()], 0)
            }
            Self::Kvm => gift(vec![device("/dev/kvm")?.into()], 0),
            Self::UserfaultfdDevice => gift(vec![device("/dev/userfaultfd")?.into()], 0),
            Self::Userfaultfd | Self::ReadyUserfaultfd => {
                let is_ready = self == Self::ReadyUserfaultfd;
                let (watched, descriptor) = Watched::new(&device("/dev/userfaultfd")?, is_ready)?;
                let mut gift = gift(vec![descriptor], watched.address());
                if is_ready {
                    gift.took_effect = Box::new(move || watched.is_marked());
                } else {
                    gift._kept = Box::new(watched);
                }
                gift
            }
            Self::Terminal => {
                let terminal = device("/dev/ptmx")?;
                node::unlock_terminal(&terminal)?;
                gift(vec![terminal.into()], 0)
            }
            Self::Listener => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let connection = TcpStream::connect(listener.local_addr()?)?;
                let mut gift = gift(vec![listener.into()], 0);
                gift._kept = Box::new(connection);
                gift
            }
            Self::Bound => {
                let bind = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
                let (theirs, ours) = (bind()?, bind()?);
                let (other_end, port) = (theirs.try_clone()?, ours.local_addr()?.port());
                let mut gift = gift(vec![theirs.into()], u64::from(port));
                gift._kept = Box::new(ours);
                gift.took_effect = Box::new(move || other_end.peer_addr().is_ok_and(|peer| peer.port() == port));
                gift
            }
            Self::Udp => {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let mut gift = gift(Vec::new(), u64::from(socket.local_addr()?.port()));
                gift.took_effect = Box::new(move || {
                    let mut byte = [0];
                    socket.recv(&mut byte).is_ok() && byte == [MARK]
                });
                gift
            }
            Self::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                listener.set_nonblocking(true)?;
                let mut gift = gift(Vec::new(), u64::from(listener.local_addr()?.port()));
                gift.took_effect = Box::new(move || listener.accept().is_ok());
                gift
            }
            Self::AbstractSocket => {
                let number = unique();
                let name = SocketAddr::from_abstract_name(sockets::abstract_name_of(number))?;
                let listener = UnixListener::bind_addr(&name)?;
                listener.set_nonblocking(true)?;
                let mut gift = gift(Vec::new(), number);
                gift.took_effect = Box::new(move || listener.accept().is_ok());
                gift
            }
            Self::Segment => {
                let key = unique();
                let mut gift = gift(Vec::new(), key);
                gift._kept = Box::new(Segment::new(key)?);
                gift
            }
            Self::Sibling => gift(Vec::new(), pid_of_sibling()),
            Self::Victim => {
                let mut gift = gift(Vec::new(), pid_of_sibling());
                let victim = std::sync::Arc::clone(sibling.expect("another worker"));
                gift.took_effect = Box::new(move || victim.wait_for_end(PATIENCE).is_some());
                gift
            }
            Self::Proc => gift(vec![File::open("/proc")?.into()], pid_of_sibling()),
            Self::Hostname => {
                rustix::system::sethostname(b"farfork-jailed")?;
                let mut gift = gift(Vec::new(), 0);
                gift.took_effect = Box::new(|| rustix::system::uname().nodename() == privileges::HOSTNAME);
                gift
            }
        })
    }
}

impl Gift {
    /// Whether the node sees what the attempt was to bring about. To be asked once, of an attempt that says it has succeeded.
    #[must_use]
    pub fn took_effect(&self) -> bool {
        (self.took_effect)()
    }
}

/// Gives the calling thread, and the workers of pools that it opens, a host name of their own, so that no attempt changes that
/// of the real host.
///
/// # Errors
/// If this user may not.
pub fn own_hostname() -> io::Result<()> {
    node::own_hostname()
}

/// A number for keys and names, of this process alone.
fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    u64::from(std::process::id()) << 8 | NEXT.fetch_add(1, Ordering::Relaxed)
}

fn device(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn memfd(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("escape", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(content)?;
    Ok(file.into())
}

fn furnish(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    for (name, content, mode) in [
        ("file", b"for all".to_vec(), 0o644),
        ("secret", b"for root".to_vec(), 0o600),
        ("program", process::program(), 0o755),
        ("setuid", process::program(), 0o4755),
    ] {
        let path = directory.join(name);
        if !path.exists() {
            fs::write(&path, content)?;
            fs::set_permissions(&path, Permissions::from_mode(mode))?;
        }
    }
    match std::os::unix::fs::symlink("/etc/passwd", directory.join("link")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}
