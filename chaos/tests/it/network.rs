//! Hosts are apart from one another and from this machine, can be slowed and cut off, and leave nothing behind.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use chaos::network::{Network, NetworkError};
use chaos::relay::{Config, Direction, Impairment, Relay};

use crate::support::{DEADLINE, SILENCE, is_silent, receive, socket, wait_for};

/// The same on every host, since each has its own.
const PORT: u16 = 7443;

/// A network, where there can be one.
fn network(name: &str, hosts: usize) -> Option<Network> {
    let network = Network::new(name, hosts).unwrap();
    if let Some(reason) = network.why_shared() {
        println!("SKIPPED: hosts cannot be isolated here: {reason}");
        return None;
    }
    Some(network)
}

fn sockets(network: &Network) -> Vec<UdpSocket> {
    network.hosts().iter().map(|host| host.run_in(|| socket((host.address(), PORT)))).collect()
}

/// The namespaces of this process whose names contain `name`.
fn namespaces(name: &str) -> BTreeSet<String> {
    let ours = format!("farfork-chaos-{}-", std::process::id());
    let listed = std::fs::read_dir("/run/netns").into_iter().flatten();
    let names = listed.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|listed| listed.starts_with(&ours) && listed.contains(name)).collect()
}

#[test]
fn hosts_have_ports_of_their_own_and_reach_one_another_and_nothing_else() {
    let Some(network) = network("reach", 3) else { return };
    let addresses: Vec<_> = network.hosts().iter().map(|host| host.address().to_string()).collect();
    assert_eq!(addresses, ["10.77.0.1", "10.77.0.2", "10.77.0.3"]);
    let sockets = sockets(&network);
    for from in 0..3 {
        for to in 0..3 {
            let text = format!("{from} to {to}");
            sockets[from].send_to(text.as_bytes(), (network.host(to).address(), PORT)).unwrap();
            let (came, sender) = receive(&sockets[to]);
            assert_eq!((came, sender.ip()), (text.into_bytes(), network.host(from).address()));
        }
    }
    // No way out, and none in: this machine has no such address, and the hosts no route to elsewhere.
    UdpSocket::bind((network.host(0).address(), 0)).unwrap_err();
    assert!(network.host(0).run_in(|| UdpSocket::bind("0.0.0.0:0").unwrap().connect("192.0.2.1:9")).is_err());
    let interfaces = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    assert!(!interfaces.contains("port0") && !interfaces.contains("bridge:"), "{interfaces}");
}

#[test]
fn work_and_programs_run_in_their_host() {
    let Some(network) = network("work", 2) else { return };
    let host = network.host(1);
    assert_eq!(host.run_in(|| thread::spawn(|| 6 * 7).join().unwrap()), 42);
    // The host's loopback is up.
    let (one, other) = host.run_in(|| (socket(([127, 0, 0, 1], PORT)), socket(([127, 0, 0, 1], 0))));
    other.send_to(b"within", one.local_addr().unwrap()).unwrap();
    assert_eq!(receive(&one).0, b"within");
    let shown = host.command("ip").args(["-oneline", "address"]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("10.77.0.2/16") && !shown.contains("10.77.0.1/"), "{shown}");
    let panic = catch_unwind(AssertUnwindSafe(|| host.run_in(|| panic!("as asked")))).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"as asked"));
    let mut child = host.command("sleep").arg("1000").spawn().unwrap();
    let of_host = host.run_in(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    let of_child = format!("/proc/{}/ns/net", child.id());
    wait_for(|| (std::fs::read_link(&of_child).unwrap() == of_host).then_some(()));
    // It sees this machine's files, control groups among them.
    let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
    assert_eq!(mounts(&child.id().to_string()), mounts("self"));
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());
}

#[test]
fn a_link_that_is_down_lets_nothing_through_until_it_is_up() {
    let Some(network) = network("link", 3) else { return };
    let sockets = sockets(&network);
    let to = |host: usize| (network.host(host).address(), PORT);
    sockets[0].send_to(b"before", to(1)).unwrap();
    assert_eq!(receive(&sockets[1]).0, b"before");
    network.set_link(1, false).unwrap();
    for _ in 0..5 {
        // That the host is known to be unreachable is silence as well.
        let _ = sockets[0].send_to(b"cut off", to(1));
        let _ = sockets[1].send_to(b"cut off", to(0));
    }
    assert!(is_silent(&sockets[1]) && is_silent(&sockets[0]));
    sockets[0].send_to(b"others", to(2)).unwrap();
    assert_eq!(receive(&sockets[2]).0, b"others");
    network.set_link(1, true).unwrap();
    let begin = Instant::now();
    sockets[1].set_read_timeout(Some(SILENCE)).unwrap();
    let mut room = [0; 64];
    loop {
        let _ = sockets[0].send_to(b"after", to(1));
        // What had waited for the link may come first.
        if sockets[1].recv(&mut room).is_ok_and(|length| &room[..length] == b"after") {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "the link did not come back");
    }
}

#[test]
fn a_rate_slows_what_a_host_sends_and_what_it_receives_until_it_is_lifted() {
    let Some(network) = network("rate", 2) else { return };
    let kib = 200;
    // 1.6 Mbit/s are 200 kB a second: without its headers and one burst, that is more than 0.8 s.
    let least = Duration::from_millis(800);
    for (from, to) in [(0, 1), (1, 0)] {
        network.set_rate(0, Some(1_600_000)).unwrap();
        let slow = transfer(&network, from, to, kib);
        assert!(slow >= least, "{kib} KiB from {from} to {to} took {slow:?}");
        network.set_rate(0, None).unwrap();
        let lifted = transfer(&network, from, to, kib);
        assert!(lifted < slow, "{kib} KiB from {from} to {to} took {lifted:?} without limit");
    }
    network.set_rate(0, None).unwrap();
    let refused = network.set_rate(0, Some(0)).unwrap_err();
    assert!(matches!(refused, NetworkError::Tool { .. }), "{refused}");
}

/// How long it takes to send so many KiB over TCP, until the last is read.
fn transfer(network: &Network, from: usize, to: usize, kib: usize) -> Duration {
    let address = network.host(to).address();
    let listener = network.host(to).run_in(|| TcpListener::bind((address, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let begin = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = network.host(from).run_in(|| TcpStream::connect_timeout(&address, DEADLINE).unwrap());
            stream.write_all(&vec![7; kib << 10]).unwrap();
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut came = Vec::new();
        stream.read_to_end(&mut came).unwrap();
        assert_eq!(came.len(), kib << 10);
    });
    begin.elapsed()
}

#[test]
fn networks_at_the_same_time_have_the_same_addresses_and_do_not_hear_one_another() {
    thread::scope(|scope| {
        for number in 0..4_u8 {
            scope.spawn(move || {
                let Some(network) = network("parallel", 2) else { return };
                let sockets = sockets(&network);
                for round in 0..20 {
                    sockets[0].send_to(&[number, round], (network.host(1).address(), PORT)).unwrap();
                    assert_eq!(receive(&sockets[1]).0, [number, round]);
                }
                assert!(is_silent(&sockets[1]));
            });
        }
    });
}

#[test]
fn nothing_is_left_of_a_network_also_after_a_panic() {
    let Some(network) = network("gone", 3) else { return };
    assert_eq!(namespaces("gone").len(), 4);
    drop(network);
    assert_eq!(namespaces("gone"), BTreeSet::new());
    let panicked = catch_unwind(|| {
        let network = Network::new("gone", 2).unwrap();
        assert_eq!(namespaces("gone").len(), 3);
        network.host(0).run_in(|| panic!("as asked"));
    });
    panicked.unwrap_err();
    assert_eq!(namespaces("gone"), BTreeSet::new());
}

/// A relay belongs to the host in which it was started, also with the sockets that it opens later.
#[test]
fn a_relay_in_a_host_stands_between_two_others() {
    let Some(network) = network("relay", 3) else { return };
    let sockets = sockets(&network);
    let address = |host: usize| -> (IpAddr, u16) { (network.host(host).address(), PORT) };
    let config = Config { listen: (network.host(1).address(), 0).into(), ..Config::to(address(2).into()) };
    let relay = network.host(1).run_in(|| Relay::start(config)).unwrap();
    sockets[0].send_to(b"?", relay.address()).unwrap();
    let (came, from) = receive(&sockets[2]);
    assert_eq!((&came[..], from.ip()), (&b"?"[..], network.host(1).address()));
    sockets[2].send_to(b"!", from).unwrap();
    assert_eq!(receive(&sockets[0]), (b"!".to_vec(), relay.address()));
    relay.set(Direction::ToUpstream, Impairment::blocked());
    sockets[0].send_to(b"?", relay.address()).unwrap();
    assert!(is_silent(&sockets[2]));
}
