//! The clients that a relay carries for.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll;

use super::counters::Counters;
use super::decider::Decider;
use super::impairment::Direction;
use super::socket::Socket;

/// The most flows at a time; each has a socket.
pub(super) const FLOWS_MAX: usize = 256;

/// One client's address, and what stands for it towards the server.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) client: SocketAddr,
    /// The address that the client knows, if the relay listens on several.
    pub(super) reply_from: Option<IpAddr>,
    pub(super) socket: Socket,
    /// When the last datagram came, from either side.
    pub(super) heard_at: Duration,
    to_upstream: Decider,
    to_client: Decider,
}

impl Flow {
    pub(super) fn decider(&mut self, direction: Direction) -> &mut Decider {
        match direction {
            Direction::ToUpstream => &mut self.to_upstream,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// Flows by their number, which counts those before it and is never used again.
#[derive(Debug)]
pub(super) struct Flows {
    seed: u64,
    upstream: SocketAddr,
    numbers: HashMap<SocketAddr, u64>,
    flows: HashMap<u64, Flow>,
}

impl Flows {
    pub(super) fn new(seed: u64, upstream: SocketAddr) -> Self {
        Self { seed, upstream, numbers: HashMap::new(), flows: HashMap::new() }
    }

    pub(super) fn get(&mut self, number: u64) -> Option<&mut Flow> {
        self.flows.get_mut(&number)
    }

    /// The number of the flow of `client`; a new one, which `poller` hears of by its number, if there is none.
    pub(super) fn of(
        &mut self,
        client: SocketAddr,
        reply_from: Option<IpAddr>,
        now: Duration,
        poller: &OwnedFd,
        counters: &mut Counters,
    ) -> io::Result<u64> {
        if let Some(number) = self.numbers.get(&client) {
            return Ok(*number);
        }
        if self.flows.len() >= FLOWS_MAX {
            self.evict(counters);
        }
        let any: IpAddr = if self.upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = Socket::bind((any, 0).into())?;
        let number = counters.flows;
        epoll::add(poller, &socket, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?;
        let decider = |direction| Decider::new(self.seed, number, direction);
        let (to_upstream, to_client) = (decider(Direction::ToUpstream), decider(Direction::ToClient));
        self.flows.insert(number, Flow { client, reply_from, socket, heard_at: now, to_upstream, to_client });
        self.numbers.insert(client, number);
        counters.flows += 1;
        Ok(number)
    }

    /// Drops the flow that has been quiet for longest. Its socket's end takes it from the poller.
    fn evict(&mut self, counters: &mut Counters) {
        let quietest = self.flows.iter().min_by_key(|(number, flow)| (flow.heard_at, **number)).map(|(number, _)| *number);
        if let Some(flow) = quietest.and_then(|number| self.flows.remove(&number)) {
            self.numbers.remove(&flow.client);
            counters.flows_evicted += 1;
        }
    }
}
