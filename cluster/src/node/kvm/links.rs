//! The host's ends of guests' networks: a tap for each machine that is plugged in, with an address, its own rules, and nothing else.
//! What is sent on from there is the administrator's to say (docs/guests.md).
//!
//! A tap lives in the worker that has its descriptor, and goes with it. So the kernel itself keeps the book of which places are
//! taken: a name that is in use cannot be made a second time.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use agent::interface;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use types::MachineId;
use vm::Tap;

use super::super::engine::{EngineError, ErrorKind};
use super::super::guest::network::{GuestNetwork, Link, PREFIX};
use super::KvmEngine;
use super::errors::of_pool;

/// `net.ipv4.conf.*.rp_filter`: a packet is dropped unless its source is reached over where it came from.
const STRICT: &str = "1";
/// As long as its source is reached at all, it comes in. The stronger of two numbers holds, and this is greater.
const LOOSE: &str = "2";

/// See the module.
pub(super) struct Links {
    network: GuestNetwork,
    next: AtomicU32,
}

impl Links {
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::Host`] if guests could use addresses of others, or there are no taps here.
    pub(super) fn open(network: GuestNetwork) -> Result<Self, EngineError> {
        let filter = fs::read_to_string(setting("all", "rp_filter")).unwrap_or_default();
        if filter.trim() == LOOSE {
            let message = "guests could use addresses of other machines: net.ipv4.conf.all.rp_filter is 2".to_owned();
            let remedy = "sysctl net.ipv4.conf.all.rp_filter=1".to_owned();
            return Err(EngineError { kind: ErrorKind::Host, message, remedy });
        }
        let links = Self { network, next: AtomicU32::new(0) };
        // One that is made now can be made later, and an administrator hears of what is missing at the start.
        links.make().map(|_| links).map_err(|error| of_step("making a tap", &error))
    }

    /// A tap on a place that nobody has.
    fn make(&self) -> io::Result<(Tap, Link)> {
        for _ in 0..self.network.places() {
            let link = self.network.link(self.next.fetch_add(1, Ordering::Relaxed));
            match self.make_at(link) {
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {}
                made => return made.map(|tap| (tap, link)),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::QuotaExceeded,
            format!("all {} places of {} are taken", self.network.places(), self.network),
        ))
    }

    fn make_at(&self, link: Link) -> io::Result<Tap> {
        let name = format!("ff{:08x}", u32::from(link.guest));
        let tap = Tap::create(&name)?;
        // Before it is up: nothing gets in or out in between.
        fs::write(setting(&name, "rp_filter"), STRICT)?;
        match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
            // This kernel has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            written => written?,
        }
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        interface::set_address(&socket, &name, link.host.octets(), PREFIX)?;
        interface::set_up(&socket, &name)?;
        Ok(tap)
    }
}

fn setting(interface: &str, name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/{name}")
}

fn of_step(step: &str, error: &io::Error) -> EngineError {
    let (kind, remedy) = match error.kind() {
        io::ErrorKind::QuotaExceeded => (ErrorKind::Exhausted, "end other machines, or give the node a larger --guest-network"),
        io::ErrorKind::PermissionDenied => (ErrorKind::Host, "run the node as root, or with CAP_NET_ADMIN"),
        io::ErrorKind::NotFound => (ErrorKind::Host, "load the module tun (modprobe tun)"),
        _ => (ErrorKind::Host, "look for its cause in the kernel log"),
    };
    EngineError { kind, message: format!("the network of guests: {step} failed: {error}"), remedy: remedy.to_owned() }
}

impl KvmEngine {
    /// A tap for a machine that is about to be plugged in.
    pub(super) fn make_link(&self) -> Result<(Tap, Link), EngineError> {
        let links = self.links.as_ref().ok_or_else(|| EngineError {
            kind: ErrorKind::NoGuestNetwork,
            message: "this node has no network for guests".to_owned(),
            remedy: "start it with --guest-network RANGE, or leave --network out".to_owned(),
        })?;
        links.make().map_err(|error| of_step("making a tap", &error))
    }

    pub(super) fn plug_in(&self, machine: MachineId) -> Result<Link, EngineError> {
        let jailed = self.running(machine)?.jailed;
        let (tap, link) = self.make_link()?;
        jailed.plug(&tap).map_err(of_pool)?;
        Ok(link)
    }
}
