//! The host's ends of guests' networks: a tap for each machine that is plugged in, with an address, its own rules, and nothing else.
//! What is sent on from there is the administrator's to say (docs/guests.md).
//!
//! A tap lives in the worker that has its descriptor, and goes with it. So the kernel itself keeps the book of which places are
//! taken: a name that is in use cannot be made a second time.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use agent::interface;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use types::MachineId;
use vm::Tap;

use super::super::engine::{EngineError, ErrorKind, no_guest_network};
use super::super::guest::network::{GuestNetwork, Link, PREFIX};
use super::KvmEngine;
use super::errors::of_pool;

/// Whether a packet is dropped whose source is not reached over where it came from.
const FILTER: &str = "rp_filter";
/// A packet is dropped unless its source is reached over where it came from.
const STRICT: &str = "1";
/// As long as its source is reached at all, it comes in. The stronger of two numbers holds, and this is greater.
const LOOSE: &str = "2";
/// How long udev may take to set up a new interface.
const UDEV_PATIENCE: Duration = Duration::from_millis(1500);

/// See the module.
pub(super) struct Links {
    network: GuestNetwork,
    next: AtomicU32,
}

impl Links {
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::Host`] if guests could use addresses of others, or there are no taps here.
    pub(super) fn open(network: GuestNetwork) -> Result<Self, EngineError> {
        let is_loose = |interface: &str| fs::read_to_string(setting(interface, FILTER)).is_ok_and(|set| set.trim() == LOOSE);
        let refused = |setting: &str| EngineError {
            kind: ErrorKind::Host,
            message: format!("guests could use addresses of other machines: {setting} is {LOOSE}"),
            remedy: format!("set {setting}=1, in /etc/sysctl.d too (docs/guests.md)"),
        };
        if is_loose("all") {
            return Err(refused("net.ipv4.conf.all.rp_filter"));
        }
        let links = Self { network, next: AtomicU32::new(0) };
        // One that is made now can be made later, and an administrator hears of what is missing at the start.
        let (tap, link) = links.make().map_err(|error| of_step("making a tap", &error))?;
        // Many systems have udev set up each new interface, a moment after it has come.
        std::thread::sleep(UDEV_PATIENCE);
        if is_loose(&name_of(link)) {
            return Err(refused("net.ipv4.conf.ff*.rp_filter"));
        }
        drop(tap);
        Ok(links)
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
        let name = name_of(link);
        let tap = Tap::create(&name)?;
        // Before it is up: nothing gets in or out in between.
        fs::write(setting(&name, FILTER), STRICT)?;
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

fn name_of(link: Link) -> String {
    format!("ff{:08x}", u32::from(link.guest))
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
    pub(super) fn links(&self) -> Result<&Links, EngineError> {
        self.links.as_ref().ok_or_else(no_guest_network)
    }

    /// A tap for a machine that is about to be plugged in.
    pub(super) fn make_link(&self) -> Result<(Tap, Link), EngineError> {
        self.links()?.make().map_err(|error| of_step("making a tap", &error))
    }

    pub(super) fn plug_in(&self, machine: MachineId) -> Result<Link, EngineError> {
        let jailed = self.running(machine)?.jailed;
        let (tap, link) = self.make_link()?;
        jailed.plug(&tap).map_err(of_pool)?;
        Ok(link)
    }
}
