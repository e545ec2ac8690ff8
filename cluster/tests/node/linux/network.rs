//! Guests with a network, in a namespace that the test makes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use chaos::network::{Host, Network};
use serde_json::Value;
use vm::harness::{count, held};

use super::{BASE, Shared, exec, in_time, node_with, provide, sh};
use crate::support::{Node, ids};

/// A template with a network card, which spoke with its host while it was warmed up.
const NET: Shared = Shared {
    name: "net",
    arguments: &[
        "--rootfs",
        "base",
        "--memory",
        "64MiB",
        "--network",
        "--warm",
        "ping -c 1 -W 60 $(ip route | sed 's/.*via //;s/ .*//;q')",
    ],
};
const RANGE: &str = "10.90.0.0/24";
/// Bytes that each says, and hears again.
const ECHO: usize = 64 << 10;

fn node_in(host: &Host) -> Node {
    let node = host.run_in(|| Node::start_in(tempfile::tempdir().unwrap(), &["--guest-network", RANGE]));
    provide(&node, NET);
    node
}

fn addresses(forked: &Value) -> Vec<String> {
    forked["children"].as_array().unwrap().iter().map(|child| child["address"].as_str().unwrap().to_owned()).collect()
}

/// The host's end of the cable of the guest at this address.
fn gateway(address: &str) -> String {
    let guest: std::net::Ipv4Addr = address.parse().unwrap();
    std::net::Ipv4Addr::from(u32::from(guest) - 1).to_string()
}

/// The guest sends bytes to its host, which sends them back.
fn echoes(host: &Host, node: &Node, machine: &str, address: &str) {
    let listener = host.run_in(|| TcpListener::bind((gateway(address), 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().unwrap();
        let mut said = vec![0; ECHO];
        stream.read_exact(&mut said).unwrap();
        stream.write_all(&said).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        from.ip().to_string()
    });
    let command = format!(
        "head -c {ECHO} /dev/urandom > /tmp/said; nc {} {port} < /tmp/said > /tmp/heard; cmp /tmp/said /tmp/heard && echo same",
        gateway(address)
    );
    assert_eq!(sh(node, machine, &command), "same");
    assert_eq!(echo.join().unwrap(), address, "it speaks under its own address");
}

/// The host sends bytes to a server in the guest.
fn reaches(host: &Host, node: &Node, machine: &str, address: &str) {
    sh(node, machine, "nc -ll -p 7 -e cat > /dev/null 2>&1 &");
    let mut heard = Vec::new();
    in_time("the guest's server answers", || {
        let Ok(mut stream) = host.run_in(|| TcpStream::connect((address, 7))) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(b"to the guest").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        heard.clear();
        stream.read_to_end(&mut heard).is_ok()
    });
    assert_eq!(heard, b"to the guest");
}

/// How many pings this host has been sent.
fn pings(host: &Host) -> u64 {
    let table = host.run_in(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let of = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "InEchos").unwrap();
    of.1.parse().unwrap()
}

fn taps(host: &Host) -> usize {
    let table = host.run_in(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    table.lines().filter(|line| line.trim_start().starts_with("ff")).count()
}

#[test]
fn real_guests_have_a_network_of_their_own_if_they_are_to() {
    let network = Network::new("guests", 1).unwrap();
    if let Some(reason) = network.why_shared() {
        return println!("SKIPPED: guests with a network, since there are no network namespaces here: {reason}");
    }
    let host = network.host(0);
    let node = node_in(host);
    let forked = node.json(&["fork", NET.name, "-n", &count(2, 40).to_string(), "--network"]);
    let (children, addresses) = (ids(&forked["children"]), addresses(&forked));
    let different: std::collections::BTreeSet<_> = addresses.iter().collect();
    assert_eq!(different.len(), children.len(), "{addresses:?}");
    for (child, address) in children.iter().zip(&addresses) {
        assert_eq!(node.json(&["show", child])["machine"]["ready"]["address"], *address.as_str());
        assert!(sh(&node, child, "ip -4 addr show eth0").contains(&format!("inet {address}/30")));
    }
    for (child, address) in children.iter().zip(&addresses).take(2) {
        echoes(host, &node, child, address);
    }
    reaches(host, &node, &children[1], &addresses[1]);

    // It cannot take the address of another.
    let (spoofer, other) = (&children[0], &addresses[1]);
    let ping = |from: &str| format!("ping -c 1 -W 5 -I {from} {}", gateway(&addresses[0]));
    let before = pings(host);
    assert_eq!(exec(&node, spoofer, &ping(&addresses[0])).code, Some(0));
    assert_eq!(pings(host), before + 1);
    sh(&node, spoofer, &format!("ip addr add {other}/32 dev eth0"));
    assert_eq!(exec(&node, spoofer, &ping(other)).code, Some(1));
    assert_eq!(pings(host), before + 1, "a ping under the address of another has arrived");

    // A branch has an address of its own; without being asked for there is none.
    let branched = node.json(&["branch", &children[1], "--network"]);
    let (branch, its) = (ids(&branched["children"]).remove(0), self::addresses(&branched).remove(0));
    assert!(!addresses.contains(&its));
    echoes(host, &node, &branch, &its);
    let without = node.json(&["fork", NET.name]);
    assert!(without["children"][0]["address"].is_null(), "{without}");
    assert_eq!(sh(&node, &ids(&without["children"])[0], "cat /sys/class/net/eth0/carrier"), "0");

    // Places come back with the machines that had them, and there are no more than there are.
    assert_eq!(taps(host), children.len() + 1);
    assert_eq!(node.cli(&["kill", "--all"]).code, Some(0));
    in_time("the taps are gone", || taps(host) == 0);
    held("guests with a network", children.len() as u64);
}

#[test]
fn real_networks_that_cannot_be_had_are_refused() {
    let plain = node_with(BASE);
    let refused = plain.cli(&["fork", BASE.name, "--network", "--output", "json"]);
    assert_eq!((refused.code, refused.error_code().as_str()), (Some(4), "NO_GUEST_NETWORK"));
    let order = format!(r#"{{"from":{{"template":"{}"}},"network":true}}"#, BASE.name);
    plain.http("POST", "/v1/forks", order.as_bytes()).refused(409, "NO_GUEST_NETWORK");
    let build = ["template", "build", "t", "--rootfs", "base", "--network", "--output", "json"];
    let refused = plain.cli(&build);
    assert_eq!(refused.error_code(), "NO_GUEST_NETWORK", "{refused:?}");
    assert!(plain.machines().is_empty());

    let network = Network::new("no-places", 1).unwrap();
    if let Some(reason) = network.why_shared() {
        return println!("SKIPPED: places in a network, since there are no network namespaces here: {reason}");
    }
    let host = network.host(0);
    // One place, which the first child takes.
    let node = host.run_in(|| Node::start_in(tempfile::tempdir().unwrap(), &["--guest-network", "10.90.0.0/30"]));
    provide(&node, BASE);
    node.http("POST", "/v1/forks", order.as_bytes()).refused(422, "NO_NETWORK_CARD");
    provide(&node, NET);
    let said = node.cli(&["fork", NET.name, "-n", "2", "--network", "--output", "json"]);
    assert_eq!(said.code, Some(5), "one of two: {said:?}");
    let answer: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((answer["children"].as_array().unwrap().len(), answer["failures"][0]["code"].as_str()), (1, Some("EXHAUSTED")));
    assert_eq!((node.machines().len(), taps(host)), (1, 1));
    // A node that has no network for guests, and an image that wants one.
    provide(&plain, NET);
    let refused = plain.cli(&["fork", NET.name, "--network", "--output", "json"]);
    assert_eq!(refused.error_code(), "NO_GUEST_NETWORK");
    assert!(plain.machines().is_empty());
}
