//! Networks of hosts on this machine, for tests and benchmarks.
//!
//! ```text
//!   namespace of host 0       namespace of host 1        namespace of host 2
//!   ┌────────────────┐        ┌────────────────┐         ┌────────────────┐
//!   │ lo  10.77.0.1  │        │ lo  10.77.0.2  │         │ lo  10.77.0.3  │      all in 10.77.0.0/16
//!   │       eth0     │        │       eth0     │         │       eth0     │
//!   └────────┬───────┘        └────────┬───────┘         └────────┬───────┘
//!   ┌────────┴─────────────────────────┴──────────────────────────┴───────┐
//!   │      port0 ─────────────────── port1 ──────────────────── port2     │      rate and link of a host are set here
//!   │                           bridge, of the switch                     │      and, for what it sends, at its eth0
//!   └─────────────────────────────────────────────────────────────────────┘
//!                           namespace of the switch
//! ```
//!
//! All of it is in namespaces of its own, so this machine's interfaces, addresses and routes are neither used nor touched, and
//! every network can have the same addresses. It takes root and the programs of iproute2; without them hosts are addresses of the
//! loopback that share everything, and [`Network::is_isolated`] says so.
//!
//! A network takes away what it made when it is dropped, also while a panic unwinds. What a killed process has left is swept
//! when another process makes its first network: names carry the id of their process, and only those are taken whose process is
//! gone.

mod iproute;
mod names;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::thread;

use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

use iproute::Tool;
use names::Name;

/// The most hosts of one network.
pub const HOSTS_MAX: usize = 250;

/// Why a network could not be made or changed.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum NetworkError {
    #[error("{0:?} is no name for a network")]
    Name(String),
    #[error("{0} hosts are too many for one network; the most is {HOSTS_MAX}")]
    TooMany(usize),
    #[error("`{command}` failed: {message}")]
    Tool { command: String, message: String },
    #[error("the network namespace {name} cannot be opened")]
    Open { name: String, source: io::Error },
    #[error("hosts of this network share the loopback: {reason}")]
    Shared { reason: String },
}

impl NetworkError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Name(_) => "take 1 to 32 small letters, digits and dashes",
            Self::TooMany(_) => "make several networks",
            Self::Tool { .. } => "load the modules veth, bridge and sch_tbf, or build the kernel with them",
            Self::Open { .. } => "raise the limit on open files (ulimit -n), and leave /run/netns as it is",
            Self::Shared { .. } => "run as root, with iproute2 installed, where namespaces may be made",
        }
    }
}

/// Hosts that reach one another.
#[derive(Debug)]
pub struct Network {
    switch: Switch,
    hosts: Vec<Host>,
}

/// What joins them.
#[derive(Debug)]
enum Switch {
    Isolated(Namespace),
    /// There are no namespaces, for this reason.
    Shared(String),
}

/// One of a network.
#[derive(Debug)]
pub struct Host {
    address: Ipv4Addr,
    namespace: Option<Namespace>,
}

/// A network namespace that has a name, which goes with it.
#[derive(Debug)]
struct Namespace {
    name: Name,
    file: File,
}

impl Network {
    /// A network of `hosts` hosts, all linked, without limits of rate. Its name is for those who look at what runs.
    ///
    /// # Errors
    /// [`NetworkError`] if the name or the number of hosts is not possible, or if `ip` fails half-way, which takes back what was
    /// made. That there may not be namespaces at all is no error: see [`Network::is_isolated`].
    pub fn new(name: &str, hosts: usize) -> Result<Self, NetworkError> {
        let name = Name::new(name)?;
        if hosts > HOSTS_MAX {
            return Err(NetworkError::TooMany(hosts));
        }
        names::sweep();
        match Namespace::new(name.of_switch()) {
            Ok(switch) => Self::isolated(&name, switch, hosts),
            Err(refused) => Ok(Self::shared(refused.to_string(), hosts)),
        }
    }

    /// Whether each host has interfaces, routes and ports of its own, and rates and links can be set.
    #[must_use]
    pub fn is_isolated(&self) -> bool {
        self.why_shared().is_none()
    }

    /// Why hosts are not isolated from one another, if so.
    #[must_use]
    pub fn why_shared(&self) -> Option<&str> {
        match &self.switch {
            Switch::Isolated(_) => None,
            Switch::Shared(reason) => Some(reason),
        }
    }

    /// All of them.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// One of them, counted from zero.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// Limits what the host sends, and what it receives, to so many bits a second each; `None` lifts the limit. Frames count with
    /// their headers, 50 ms wait, more is dropped.
    ///
    /// # Errors
    /// [`NetworkError::Shared`] if hosts are not isolated, [`NetworkError::Tool`] if the kernel refuses, as it does a rate of zero.
    ///
    /// # Panics
    /// If there are not so many hosts.
    pub fn set_rate(&self, host: usize, bits_per_second: Option<u64>) -> Result<(), NetworkError> {
        let (switch, namespace) = self.link(host)?;
        for (side, device) in [(namespace, "eth0".to_owned()), (switch, port(host))] {
            let tool = Tool::tc(&side.name);
            // To delete a limit that is not there is refused; to replace it first makes it be there.
            tool.run(&["qdisc", "replace", "dev", &device, "root", "pfifo"])?;
            match bits_per_second {
                None => tool.run(&["qdisc", "del", "dev", &device, "root"])?,
                Some(bits) => {
                    let (rate, burst) = (format!("{bits}bit"), burst_bytes(bits).to_string());
                    let limit = ["rate", &rate, "burst", &burst, "latency", "50ms"];
                    tool.run(&[&["qdisc", "replace", "dev", &device, "root", "tbf"], &limit[..]].concat())?;
                }
            }
        }
        Ok(())
    }

    /// Plugs the host's cable in, or pulls it out.
    ///
    /// # Errors
    /// [`NetworkError::Shared`] if hosts are not isolated, [`NetworkError::Tool`] if the kernel refuses.
    ///
    /// # Panics
    /// If there are not so many hosts.
    pub fn set_link(&self, host: usize, is_up: bool) -> Result<(), NetworkError> {
        let (switch, _) = self.link(host)?;
        Tool::ip(&switch.name).run(&["link", "set", &port(host), if is_up { "up" } else { "down" }])
    }

    fn isolated(name: &Name, switch: Namespace, hosts: usize) -> Result<Self, NetworkError> {
        let at_switch = Tool::ip(&switch.name);
        at_switch.run(&["link", "add", "bridge", "type", "bridge"])?;
        at_switch.run(&["link", "set", "bridge", "up"])?;
        // From here on what was made goes with this value, also if a later step fails.
        let mut network = Self { switch: Switch::Isolated(switch), hosts: Vec::new() };
        for index in 0..hosts {
            let address = address(Ipv4Addr::new(10, 77, 0, 0), index);
            let namespace = Namespace::new(name.of_host(index))?;
            let (port, in_host) = (port(index), Tool::ip(&namespace.name));
            let peer = ["type", "veth", "peer", "name", "eth0", "netns", namespace.name.as_str()];
            at_switch.run(&[&["link", "add", &port], &peer[..]].concat())?;
            at_switch.run(&["link", "set", &port, "master", "bridge", "up"])?;
            in_host.run(&["link", "set", "lo", "up"])?;
            in_host.run(&["addr", "add", &format!("{address}/16"), "dev", "eth0"])?;
            in_host.run(&["link", "set", "eth0", "up"])?;
            network.hosts.push(Host { address, namespace: Some(namespace) });
        }
        Ok(network)
    }

    fn shared(reason: String, hosts: usize) -> Self {
        let address = |index| address(Ipv4Addr::new(127, 0, 0, 0), index);
        let hosts = (0..hosts).map(|index| Host { address: address(index), namespace: None }).collect();
        Self { switch: Switch::Shared(reason), hosts }
    }

    /// Both ends of the host's cable.
    fn link(&self, host: usize) -> Result<(&Namespace, &Namespace), NetworkError> {
        match (&self.switch, &self.hosts[host].namespace) {
            (Switch::Isolated(switch), Some(namespace)) => Ok((switch, namespace)),
            (Switch::Shared(reason), _) => Err(NetworkError::Shared { reason: reason.clone() }),
            (Switch::Isolated(_), None) => unreachable!("hosts of an isolated network have namespaces"),
        }
    }
}

impl Host {
    /// Its address: of the whole machine's loopback if hosts are not isolated.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address.into()
    }

    /// Runs `work` in this host, on a thread of its own, and returns what it returns.
    ///
    /// Sockets that it makes, threads that it starts and programs that it runs are this host's for as long as they live. So is an
    /// async runtime that is built in it, with all its threads. What `/proc/self/net` shows is not: that is
    /// `/proc/thread-self/net`.
    ///
    /// # Panics
    /// If `work` does, or if no thread can be started or moved, for want of memory.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let in_host = || {
            if let Some(namespace) = &self.namespace {
                move_into_link_name_space(namespace.file.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("the network namespace is open, and this process is root");
            }
            work()
        };
        thread::scope(|scope| scope.spawn(in_host).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A command that starts `program` in this host. Its process is the program's own, for signals and waits, and all but its
    /// network is this machine's.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                // Not `ip netns exec`: that mounts /sys anew, and so takes the control groups away that nodes need.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", namespace.name.path().display())).args(["--", program]);
                command
            }
        }
    }
}

impl Namespace {
    fn new(name: Name) -> Result<Self, NetworkError> {
        Tool::netns().run(&["add", name.as_str()])?;
        match File::open(name.path()) {
            Ok(file) => Ok(Self { name, file }),
            Err(source) => {
                names::remove(name.as_str());
                Err(NetworkError::Open { name: name.to_string(), source })
            }
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        names::remove(self.name.as_str());
    }
}

fn port(host: usize) -> String {
    format!("port{host}")
}

/// The address of the host, counted from the first after `network`.
fn address(network: Ipv4Addr, host: usize) -> Ipv4Addr {
    let host = u32::try_from(host).expect("not so many") + 1;
    Ipv4Addr::from(u32::from(network) + host)
}

/// What goes at once: 1 ms of the rate, but at least some frames.
fn burst_bytes(bits_per_second: u64) -> u64 {
    (bits_per_second / 8 / 1000).max(8 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What those get who are not root.
    #[test]
    fn hosts_that_share_the_loopback_say_so_and_work() {
        let network = Network::shared("this is a test".into(), 3);
        assert!(!network.is_isolated());
        assert_eq!(network.why_shared(), Some("this is a test"));
        assert!(matches!(network.set_rate(0, Some(1)), Err(NetworkError::Shared { reason }) if reason == "this is a test"));
        assert!(matches!(network.set_link(0, false), Err(NetworkError::Shared { .. })));
        let addresses: Vec<_> = network.hosts().iter().map(|host| host.address().to_string()).collect();
        assert_eq!(addresses, ["127.0.0.1", "127.0.0.2", "127.0.0.3"]);
        let bind = || std::net::UdpSocket::bind((network.host(2).address(), 0)).unwrap().local_addr().unwrap();
        assert_eq!(network.host(2).run_in(bind).ip(), network.host(2).address());
        assert!(network.host(1).command("true").status().unwrap().success());
    }

    #[test]
    fn too_many_hosts_are_refused() {
        assert!(matches!(Network::new("many", HOSTS_MAX + 1), Err(NetworkError::TooMany(_))));
    }
}
