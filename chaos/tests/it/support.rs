//! What tests of relays and networks share.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use chaos::relay::{Config, Counters, Direction, Relay, Tally};

/// Far above what anything here takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// How long a test listens to be sure of silence.
pub(crate) const SILENCE: Duration = Duration::from_millis(200);

/// A socket that waits for the deadline and no longer.
pub(crate) fn socket(address: impl Into<SocketAddr>) -> UdpSocket {
    let socket = UdpSocket::bind(address.into()).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

/// The next datagram, and from where it came.
pub(crate) fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut room = vec![0; 1 << 16];
    let (length, from) = socket.recv_from(&mut room).expect("a datagram within the deadline");
    room.truncate(length);
    (room, from)
}

/// Whether nothing comes for a while.
pub(crate) fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let received = socket.recv_from(&mut [0; 1]);
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    received.is_err()
}

/// One client, a relay and a server, all on the loopback.
pub(crate) struct Line {
    pub(crate) client: UdpSocket,
    pub(crate) server: UdpSocket,
    pub(crate) relay: Relay,
}

impl Line {
    /// What `change` leaves as it is only carries.
    pub(crate) fn new(change: impl FnOnce(&mut Config)) -> Self {
        let server = loopback();
        let mut config = Config::to(server.local_addr().unwrap());
        change(&mut config);
        let relay = Relay::start(config).unwrap();
        let client = loopback();
        client.connect(relay.address()).unwrap();
        Self { client, server, relay }
    }

    /// Waits until the relay has dealt with `received` datagrams of a direction.
    pub(crate) fn settled(&self, direction: Direction, received: u64) -> Tally {
        wait_for(|| {
            let counters = self.relay.counters();
            let tally = *counters.of(direction);
            (tally.received == received && tally.in_flight() == 0).then_some(tally)
        })
    }

    /// Sends `count` numbered datagrams from the client, and returns what has come to the server, in the order of its coming.
    pub(crate) fn send_numbered(&self, count: u64) -> (Vec<Vec<u8>>, Tally) {
        let mut came = Vec::new();
        let tally = |came: &mut Vec<_>| {
            // The kernel's buffers are bounded, and what they drop no relay sees: so they are emptied all the time.
            self.server.set_nonblocking(true).unwrap();
            let mut room = [0; 2048];
            came.extend(std::iter::from_fn(|| self.server.recv(&mut room).ok().map(|length| room[..length].to_vec())));
            self.server.set_nonblocking(false).unwrap();
            self.relay.counters().to_upstream
        };
        for number in 0..count {
            self.client.send(&numbered(number)).unwrap();
            if number % 16 == 15 {
                wait_for(|| (tally(&mut came).received > number).then_some(()));
            }
        }
        let tally = wait_for(|| Some(tally(&mut came)).filter(|tally| tally.received == count && tally.in_flight() == 0));
        while (came.len() as u64) < tally.delivered {
            came.push(receive(&self.server).0);
        }
        (came, tally)
    }
}

/// A datagram that says which it is, in each of its bytes.
pub(crate) fn numbered(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(8)
}

pub(crate) fn loopback() -> UdpSocket {
    socket((std::net::Ipv4Addr::LOCALHOST, 0))
}

/// Asks until there is an answer.
pub(crate) fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "it did not come to pass");
        thread::sleep(Duration::from_micros(100));
    }
}

/// That every datagram that came in has come to exactly one end.
pub(crate) fn assert_balanced(counters: &Counters) {
    for tally in [counters.to_upstream, counters.to_client] {
        let ended = tally.delivered + tally.blocked + tally.lost + tally.overflowed + tally.refused;
        assert_eq!(tally.received + tally.duplicated, ended, "{tally:?}");
    }
}
