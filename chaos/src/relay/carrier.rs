//! The relay's thread: receives, asks for fates, sends now or later.
//!
//! A message of the kernel holds one datagram or several of the same length. Each datagram has its own fate; neighbours that
//! leave at the same time go on as one message, straight from where they were received if that time is now.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn_udp::Transmit;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};

use super::bucket::Bucket;
use super::counters::{Counters, Tally};
use super::decider::Fate;
use super::flows::Flows;
use super::impairment::{Direction, Impairment};
use super::socket::{Inbox, Sent, Socket, bytes_of, count_of, pieces};
use super::waiting::{Label, Waiting};

/// What the poller says besides the number of a flow, which does not get that high.
const STOP: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const LISTENER: u64 = u64::MAX - 2;

/// What the relay's thread shares with its owner. The thread holds the lock while it works on a batch, so that whoever has it
/// sees counts that fit together, and sets what holds for all that comes after.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) to_upstream: Impairment,
    pub(super) to_client: Impairment,
    pub(super) counters: Counters,
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub(super) struct Carrier {
    shared: Arc<Mutex<Shared>>,
    poller: OwnedFd,
    timer: OwnedFd,
    /// Readable when the relay is to stop.
    stop: Arc<OwnedFd>,
    timer_due: Option<Duration>,
    link: Link,
}

/// What carries datagrams; it is borrowed apart from what they were received into.
struct Link {
    listener: Socket,
    upstream: SocketAddr,
    has_many_addresses: bool,
    flows: Flows,
    waiting: Waiting,
    to_upstream: Bucket,
    to_client: Bucket,
}

/// Neighbours in a message that leave at the same time.
struct Run {
    range: Range<usize>,
    due: Duration,
}

impl Carrier {
    pub(super) fn new(listener: Socket, upstream: SocketAddr, seed: u64, shared: Arc<Mutex<Shared>>) -> io::Result<Self> {
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        epoll::add(&poller, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        epoll::add(&poller, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;
        epoll::add(&poller, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        let link = Link::new(listener, upstream, seed)?;
        Ok(Self { shared, poller, timer, stop, timer_due: None, link })
    }

    /// What to write an eight-byte one to, so that [`Carrier::run`] ends.
    pub(super) fn stop_handle(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.stop)
    }

    /// Carries until it is to stop. What waits then is dropped.
    pub(super) fn run(mut self) {
        let mut inbox = Inbox::new();
        let mut events = Vec::with_capacity(64);
        loop {
            self.arm();
            events.clear();
            // Only a signal ends it early; then there are no events.
            let _ = epoll::wait(&self.poller, rustix::buffer::spare_capacity(&mut events), None);
            for event in &events {
                let number = event.data.u64();
                if number == STOP {
                    return;
                }
                let mut shared = lock(&self.shared);
                let now = clock(ClockId::Monotonic);
                self.link.handle(number, &mut shared, &mut inbox, now, &self.poller);
                shared.counters.processor_time = clock(ClockId::ThreadCPUTime);
            }
            self.link.deliver_due(&mut lock(&self.shared), clock(ClockId::Monotonic));
        }
    }

    /// Has the timer fire when the next datagram is due. To set it is also what takes back that it has fired.
    fn arm(&mut self) {
        let due = self.link.waiting.next_due();
        if due == self.timer_due {
            return;
        }
        // Zero would disarm it; a time beyond what the kernel counts never comes.
        let at = due.map_or(Duration::ZERO, |due| due.clamp(Duration::from_nanos(1), Duration::from_secs(u64::MAX >> 32)));
        let it_value = Timespec::try_from(at).expect("within what the kernel counts");
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval, it_value })
            .expect("a valid time for an open timer");
        self.timer_due = due;
    }
}

impl Link {
    fn new(listener: Socket, upstream: SocketAddr, seed: u64) -> io::Result<Self> {
        Ok(Self {
            has_many_addresses: listener.address()?.ip().is_unspecified(),
            listener,
            upstream,
            flows: Flows::new(seed, upstream),
            waiting: Waiting::default(),
            to_upstream: Bucket::default(),
            to_client: Bucket::default(),
        })
    }

    /// Does what the poller says there is to do.
    fn handle(&mut self, number: u64, shared: &mut Shared, inbox: &mut Inbox, now: Duration, poller: &OwnedFd) {
        // What is due goes first: what comes now must not overtake it.
        self.deliver_due(shared, now);
        match number {
            TIMER => {}
            LISTENER => self.take_from_clients(shared, inbox, now, poller),
            flow => self.take_from_upstream(shared, inbox, now, flow),
        }
    }

    fn deliver_due(&mut self, shared: &mut Shared, now: Duration) {
        while let Some(parcel) = self.waiting.pop(now) {
            self.send(shared, parcel.label, &parcel.bytes);
            self.waiting.recycle(parcel.bytes);
        }
    }

    fn take_from_clients(&mut self, shared: &mut Shared, inbox: &mut Inbox, now: Duration, poller: &OwnedFd) {
        let count = self.listener.receive(inbox);
        for (meta, bytes) in inbox.messages(count) {
            let reply_from = meta.dst_ip.filter(|_| self.has_many_addresses);
            match self.flows.of(meta.addr, reply_from, now, poller, &mut shared.counters) {
                Ok(flow) => self.carry(shared, Label::new(flow, Direction::ToUpstream, &meta), bytes, now),
                Err(_) => shared.counters.strays += count_of(bytes.len(), meta.stride),
            }
        }
    }

    fn take_from_upstream(&mut self, shared: &mut Shared, inbox: &mut Inbox, now: Duration, number: u64) {
        // It may have been dropped since its event came.
        let Some(flow) = self.flows.get(number) else { return };
        let count = flow.socket.receive(inbox);
        for (meta, bytes) in inbox.messages(count) {
            if meta.addr == self.upstream {
                self.carry(shared, Label::new(number, Direction::ToClient, &meta), bytes, now);
            } else {
                shared.counters.strays += count_of(bytes.len(), meta.stride);
            }
        }
    }

    /// Carries the datagrams of one message.
    fn carry(&mut self, shared: &mut Shared, label: Label, bytes: &mut [u8], now: Duration) {
        let Some(flow) = self.flows.get(label.flow) else { return };
        flow.heard_at = now;
        let mut decider = flow.decider(label.direction).clone();
        let impairment = *shared.impairment(label.direction);
        let mut run: Option<Run> = None;
        for range in pieces(bytes.len(), label.stride) {
            let tally = shared.counters.of_mut(label.direction);
            tally.received += 1;
            tally.received_bytes += bytes_of(range.len());
            let fate = decider.decide(&impairment, range.len());
            let Some(due) = self.suffer(tally, label, &impairment, fate, &mut bytes[range.clone()], now) else { continue };
            match &mut run {
                Some(run) if run.due == due && run.range.end == range.start => run.range.end = range.end,
                _ => {
                    if let Some(done) = run.replace(Run { range, due }) {
                        self.dispatch(shared, label, &bytes[done.range], done.due, now);
                    }
                }
            }
        }
        if let Some(done) = run {
            self.dispatch(shared, label, &bytes[done.range], done.due, now);
        }
        if let Some(flow) = self.flows.get(label.flow) {
            *flow.decider(label.direction) = decider;
        }
    }

    /// Lets one datagram suffer its fate, and says when it leaves, if it does.
    fn suffer(
        &mut self,
        tally: &mut Tally,
        label: Label,
        impairment: &Impairment,
        fate: Fate,
        datagram: &mut [u8],
        now: Duration,
    ) -> Option<Duration> {
        let (delay, is_reordered, flipped_bit, copy) = match fate {
            Fate::Delivered { delay, is_reordered, flipped_bit, copy } => (delay, is_reordered, flipped_bit, copy),
            Fate::Blocked => {
                tally.blocked += 1;
                return None;
            }
            Fate::Lost => {
                tally.lost += 1;
                return None;
            }
        };
        let bucket = match label.direction {
            Direction::ToUpstream => &mut self.to_upstream,
            Direction::ToClient => &mut self.to_client,
        };
        let mut leave = |delay| Some(bucket.pass(impairment.rate, now, datagram.len())?.saturating_add(delay));
        let due = leave(delay);
        if let Some(copy) = copy {
            tally.duplicated += 1;
            let is_kept = leave(copy).is_some_and(|due| self.waiting.push(due, label, datagram));
            tally.overflowed += u64::from(!is_kept);
        }
        if due.is_none() {
            tally.overflowed += 1;
            return None;
        }
        tally.reordered += u64::from(is_reordered);
        if let Some(bit) = flipped_bit {
            datagram[bit / 8] ^= 1 << (bit % 8);
            tally.corrupted += 1;
        }
        due
    }

    /// Sends what is due, and keeps what is not.
    fn dispatch(&mut self, shared: &mut Shared, label: Label, bytes: &[u8], due: Duration, now: Duration) {
        if due <= now {
            self.send(shared, label, bytes);
        } else if !self.waiting.push(due, label, bytes) {
            shared.counters.of_mut(label.direction).overflowed += count_of(bytes.len(), label.stride);
        }
    }

    fn send(&mut self, shared: &mut Shared, label: Label, bytes: &[u8]) {
        let sent = self.flows.get(label.flow).map_or_else(Sent::default, |flow| {
            let (socket, destination, src_ip) = match label.direction {
                Direction::ToUpstream => (&flow.socket, self.upstream, None),
                Direction::ToClient => (&self.listener, flow.client, flow.reply_from),
            };
            let segment_size = Some(label.stride);
            socket.send(&Transmit { destination, ecn: label.ecn, contents: bytes, segment_size, src_ip }, label.stride)
        });
        let tally = shared.counters.of_mut(label.direction);
        tally.delivered += sent.datagrams;
        tally.delivered_bytes += sent.bytes;
        tally.refused += count_of(bytes.len(), label.stride) - sent.datagrams;
    }
}

impl Shared {
    fn impairment(&self, direction: Direction) -> &Impairment {
        match direction {
            Direction::ToUpstream => &self.to_upstream,
            Direction::ToClient => &self.to_client,
        }
    }
}

fn clock(id: ClockId) -> Duration {
    Duration::try_from(clock_gettime(id)).expect("time since the start is not negative")
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};

    use super::*;
    use crate::relay::Rate;

    /// Also when the queue has run empty since, so that what comes goes straight on.
    #[test]
    fn what_is_due_is_not_overtaken_by_what_comes() {
        let any = (Ipv4Addr::LOCALHOST, 0);
        let (server, client) = (UdpSocket::bind(any).unwrap(), UdpSocket::bind(any).unwrap());
        server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let mut link = Link::new(Socket::bind(any.into()).unwrap(), server.local_addr().unwrap(), 0).unwrap();
        let rate = Rate { bytes_per_second: 3, burst_bytes: 0, queue_bytes: 100 };
        let to_upstream = Impairment { rate: Some(rate), ..Impairment::default() };
        let (to_client, counters) = (Impairment::default(), Counters::default());
        let mut shared = Shared { to_upstream, to_client, counters };
        let mut inbox = Inbox::new();
        for (second, text) in [(10, "one"), (10, "two"), (20, "six")] {
            client.send_to(text.as_bytes(), link.listener.address().unwrap()).unwrap();
            if second == 20 {
                shared.to_upstream.rate = None;
            }
            link.handle(LISTENER, &mut shared, &mut inbox, Duration::from_secs(second), &poller);
        }
        let mut room = [0; 8];
        let came = [(); 3].map(|()| server.recv(&mut room).map(|length| room[..length].to_vec()).unwrap());
        assert_eq!(came, [b"one", b"two", b"six"].map(|text| text.to_vec()));
        assert_eq!((shared.counters.to_upstream.delivered, shared.counters.to_upstream.in_flight()), (3, 0));
    }
}
