//! Where the nodes of a local cluster are: each in a network namespace of its own, joined by a bridge in one more; or all on the
//! loopback.
//!
//! ```text
//!   ...-node-1             ...-node-2             ...-node-3
//!   eth0 198.18.0.1        eth0 198.18.0.2        eth0 198.18.0.3
//!      └──── port1 ─────────── port2 ─────────────── port3 ──── bridge, in ...-switch
//! ```
//!
//! Nothing of it leads to the host's own interfaces, so that every local cluster has the same addresses, those of RFC 2544.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use types::Name;

use super::error::UpError;
use super::state::Node;

/// Where `ip` keeps namespaces.
const DIRECTORY: &str = "/run/netns";
const PORT: u16 = 7117;

/// What the names of a local cluster's namespaces begin with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Namespaces(String);

impl Namespaces {
    /// Those of the cluster in this directory, and of no other.
    pub(super) fn of(directory: &Path) -> Self {
        let digest = blake3::hash(directory.as_os_str().as_encoded_bytes()).to_hex();
        Self(format!("farfork-{}", &digest[..16]))
    }

    pub(super) fn node(&self, name: &Name) -> String {
        format!("{}-{name}", self.0)
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.0)
    }

    /// Makes them anew.
    pub(super) fn make(&self, nodes: &[Node]) -> Result<(), UpError> {
        self.remove(nodes)?;
        let switch = self.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-netns", &switch, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-netns", &switch, "link", "set", "bridge", "up"])?;
        for (index, node) in nodes.iter().enumerate() {
            let (name, port) = (self.node(&node.name), format!("port{}", index + 1));
            ip(&["netns", "add", &name])?;
            ip(&["-netns", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-netns", &switch, "link", "set", &port, "master", "bridge", "up"])?;
            ip(&["-netns", &name, "link", "set", "lo", "up"])?;
            ip(&["-netns", &name, "addr", "add", &format!("{}/24", node.address.ip()), "dev", "eth0"])?;
            ip(&["-netns", &name, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    /// Removes those that there are. After a reboot there may be names without namespaces; they go too.
    pub(super) fn remove(&self, nodes: &[Node]) -> Result<(), UpError> {
        let names = nodes.iter().map(|node| self.node(&node.name)).chain([self.switch()]);
        names.filter(|name| path(name).exists()).try_for_each(|name| ip(&["netns", "del", &name]))
    }
}

/// Where nodes listen that have namespaces of their own.
pub(super) fn addresses(count: usize) -> Vec<SocketAddr> {
    (1..).take(count).map(|host| (Ipv4Addr::new(198, 18, 0, host), PORT).into()).collect()
}

/// Where nodes may listen that share the loopback.
pub(super) fn free_on_loopback(count: usize) -> io::Result<Vec<SocketAddr>> {
    // All are held until each has its own.
    let sockets: io::Result<Vec<UdpSocket>> = (0..count).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    sockets?.iter().map(UdpSocket::local_addr).collect()
}

/// Does something on a thread of its own, within a namespace if one is named: its sockets and processes are there for good.
pub(super) fn within<T: Send>(namespace: Option<&str>, work: impl FnOnce() -> T + Send) -> Result<T, UpError> {
    let there = || {
        if let Some(name) = namespace {
            let enter = |file: File| Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?);
            File::open(path(name)).and_then(enter).map_err(|source| UpError::Namespace { name: name.to_owned(), source })?;
        }
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(there).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn ip(arguments: &[&str]) -> Result<(), UpError> {
    let failed = |message: String| UpError::Ip { command: format!("ip {}", arguments.join(" ")), message };
    let output = match Command::new("ip").args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(UpError::NoIp),
        Err(error) => return Err(failed(error.to_string())),
    };
    if output.status.success() {
        return Ok(());
    }
    Err(failed(format!("{} ({})", String::from_utf8_lossy(&output.stderr).trim(), output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_directorys() {
        let (one, other) = (Namespaces::of(Path::new("/srv/one")), Namespaces::of(Path::new("/srv/other")));
        assert_eq!(one, Namespaces::of(Path::new("/srv/one")));
        assert_ne!(one.switch(), other.switch());
        assert_eq!(one.0.len(), "farfork-".len() + 16);
    }

    #[test]
    fn addresses_are_distinct() {
        for addresses in [addresses(9), free_on_loopback(9).unwrap()] {
            let distinct: std::collections::BTreeSet<_> = addresses.iter().collect();
            assert_eq!(distinct.len(), 9, "{addresses:?}");
        }
    }
}
