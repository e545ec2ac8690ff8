//! Children that fault while the image is fetched over links with a rate and a delay, from sources that lie, break, stop, or lack
//! what is asked of them. Time is virtual: nothing here depends on how fast the machine is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use pages::transfer::{Arrival, Config, ExtentId, Region, RequestId, SourceId, Urgency, Waiter};
use types::EXTENT_SIZE;

use crate::books::Books;
use crate::{at, cases_and_seed};

const MBIT: u64 = 1_000_000 / 8;

/// How a source behaves.
#[derive(Clone, Debug)]
struct Manner {
    bytes_per_second: u64,
    /// One way.
    delay: Duration,
    /// Every other run of so many extents takes a sixteenth on the wire; 0 for none.
    compressible_run: u32,
    /// Parts of a thousand, by extent.
    wrong: u64,
    silent: u64,
    /// Until when it has only the extents below this one.
    incomplete: (u32, Duration),
    /// When its connection breaks, and for how long it is gone.
    breaks: Option<(Duration, Duration)>,
    /// When it is stopped, and for how long.
    stops: Option<(Duration, Duration)>,
}

impl Manner {
    fn good(bytes_per_second: u64, delay: Duration) -> Self {
        let incomplete = (0, Duration::ZERO);
        Self { bytes_per_second, delay, compressible_run: 0, wrong: 0, silent: 0, incomplete, breaks: None, stops: None }
    }

    /// What an extent takes on the wire.
    fn wire_bytes(&self, extent: ExtentId) -> u64 {
        let is_small = extent.extent.0.checked_div(self.compressible_run).is_some_and(|run| run % 2 == 1);
        if is_small { EXTENT_SIZE / 16 } else { EXTENT_SIZE }
    }

    fn any(random: &mut Rng) -> Self {
        let some_time = |random: &mut Rng| Duration::from_micros(random.u64(..500_000));
        let mut manner = Self::good(random.u64(100..2_000) * MBIT, Duration::from_micros(random.u64(50..20_000)));
        match random.u8(..7) {
            0 => manner.wrong = random.u64(1..50),
            6 => manner.compressible_run = random.u32(1..100),
            1 => manner.silent = random.u64(1..300),
            2 => manner.incomplete = (random.u32(..300), some_time(random)),
            3 => manner.breaks = Some((some_time(random), some_time(random))),
            4 => manner.stops = Some((some_time(random), some_time(random))),
            _ => {}
        }
        manner
    }
}

/// A source's side: a queue for each of the two connections, which share the link.
struct Link {
    manner: Manner,
    demand: VecDeque<(RequestId, ExtentId)>,
    bulk: VecDeque<(RequestId, ExtentId)>,
    is_busy: bool,
    is_turn_of_bulk: bool,
    sent: u64,
    /// How many extents waited for the link whenever one was put on it.
    queues: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    /// A request reaches its source.
    Asked(SourceId, RequestId),
    /// A link is free again.
    Free(SourceId),
    Arrives(SourceId, RequestId, ExtentId),
    Breaks(SourceId),
    Returns(SourceId),
    /// A child goes on to its next fault.
    Touches(Waiter),
}

struct Network {
    books: Books,
    random: Rng,
    links: BTreeMap<SourceId, Link>,
    due: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    count: u64,
    next_request: u64,
    extents: u32,
    /// What each child waits for since when, and how many faults it has left.
    children: BTreeMap<Waiter, (Option<(ExtentId, Duration)>, u32)>,
    pause: Duration,
    latencies: Vec<Duration>,
}

impl Network {
    fn new(extents: u32, manners: &[Manner], seed: u64) -> Self {
        let regions = [Region { extents, absent: std::iter::once(0..extents).collect() }];
        let config = Config::with_deadline(Duration::from_secs(10));
        let mut network = Self {
            books: Books::new(config, &regions, seed),
            random: Rng::with_seed(seed),
            links: BTreeMap::new(),
            due: BinaryHeap::new(),
            count: 0,
            next_request: 0,
            extents,
            children: BTreeMap::new(),
            pause: Duration::from_millis(1),
            latencies: Vec::new(),
        };
        for (number, manner) in (0..).zip(manners) {
            let source = SourceId(number);
            network.books.add_source(source);
            if let Some((at, time)) = manner.breaks {
                network.later(at, Happening::Breaks(source));
                network.later(at + time, Happening::Returns(source));
            }
            let (demand, bulk) = (VecDeque::new(), VecDeque::new());
            let link = Link {
                manner: manner.clone(),
                demand,
                bulk,
                is_busy: false,
                is_turn_of_bulk: false,
                sent: 0,
                queues: Vec::new(),
            };
            network.links.insert(source, link);
        }
        network
    }

    fn with_children(mut self, children: u64, faults: u32, pause: Duration) -> Self {
        self.pause = pause;
        for number in 0..children {
            self.children.insert(Waiter(number), (None, faults));
            self.later(Duration::from_micros(number), Happening::Touches(Waiter(number)));
        }
        self
    }

    /// Until all children are through and, when it streams, the image is settled.
    fn run(&mut self, is_streaming: bool) {
        self.books.stream(is_streaming);
        let is_done = |network: &Self| {
            network.children.values().all(|(_, left)| *left == 0) && (!is_streaming || network.books.absent.is_empty())
        };
        while !is_done(self) {
            self.look();
            let timer = self.books.transfer.next_timeout();
            let next = self.due.peek().map(|Reverse((at, ..))| *at).into_iter().chain(timer).min();
            let next = next.expect("nothing will happen any more").max(self.books.now);
            assert!(next < Duration::from_secs(600), "not done after ten minutes");
            self.books.advance(next);
            self.look();
            while let Some(Reverse((_, _, happening))) = self.due.peek().filter(|Reverse((at, ..))| *at <= next) {
                let happening = *happening;
                self.due.pop();
                self.happen(happening);
            }
        }
    }

    /// Requests that were just sent are on their way, and children that were just woken go on.
    fn look(&mut self) {
        let is_new = |(id, _): &(&RequestId, _)| id.0 >= self.next_request;
        let new: Vec<_> = self.books.live.iter().filter(is_new).map(|(id, live)| (*id, live.source)).collect();
        for (id, source) in new {
            self.next_request = id.0 + 1;
            let delay = self.links[&source].manner.delay;
            self.later(self.books.now + delay, Happening::Asked(source, id));
        }
        let mut woken = Vec::new();
        for (child, (waits, _)) in &mut self.children {
            if let Some((extent, since)) = *waits
                && !self.books.waiting.contains_key(&(extent, *child))
            {
                self.latencies.push(self.books.now - since);
                woken.push(*child);
                *waits = None;
            }
        }
        for child in woken {
            self.later(self.books.now + self.pause, Happening::Touches(child));
        }
    }

    fn later(&mut self, at: Duration, happening: Happening) {
        self.count += 1;
        self.due.push(Reverse((at, self.count, happening)));
    }

    fn happen(&mut self, happening: Happening) {
        let now = self.books.now;
        match happening {
            Happening::Asked(source, request) => {
                let (Some(live), Some(link)) = (self.books.live.get(&request), self.links.get_mut(&source)) else { return };
                let queue = if live.urgency == Urgency::Demand { &mut link.demand } else { &mut link.bulk };
                queue.extend(live.awaited.iter().map(|extent| (request, *extent)));
                self.serve(source);
            }
            Happening::Free(source) => {
                if let Some(link) = self.links.get_mut(&source) {
                    link.is_busy = false;
                }
                self.serve(source);
            }
            Happening::Arrives(source, request, extent) => {
                let manner = &self.links[&source].manner;
                let per_mille = self.random.u64(..1_000);
                let arrival = match manner.incomplete {
                    (below, until) if extent.extent.0 >= below && now < until => Arrival::Absent,
                    _ if per_mille < manner.wrong => Arrival::Wrong,
                    _ => Arrival::Published { wire_bytes: u32::try_from(manner.wire_bytes(extent)).unwrap() },
                };
                self.books.arrived(request, extent, arrival);
            }
            Happening::Breaks(source) => {
                let of: Vec<_> = self.books.live.iter().filter(|(_, live)| live.source == source).map(|(id, _)| *id).collect();
                of.into_iter().for_each(|request| self.books.ended(request));
                self.books.remove_source(source);
            }
            Happening::Returns(source) => self.books.add_source(source),
            Happening::Touches(child) => {
                let extent = at(self.random.u32(..self.extents));
                let Some((waits, left)) = self.children.get_mut(&child).filter(|(_, left)| *left > 0) else { return };
                *left -= 1;
                *waits = Some((extent, now));
                self.books.demand(extent, child);
            }
        }
        self.look();
    }

    /// Puts the next extent on the link: the two connections take turns. What was cancelled is left out.
    fn serve(&mut self, source: SourceId) {
        let now = self.books.now;
        let Some(link) = self.links.get_mut(&source).filter(|link| !link.is_busy) else { return };
        let is_wanted = |(request, extent): &(RequestId, ExtentId)| {
            self.books.live.get(request).is_some_and(|live| live.awaited.contains(extent))
        };
        link.demand.retain(is_wanted);
        link.bulk.retain(is_wanted);
        link.queues.push(link.bulk.len());
        let is_bulk = link.demand.is_empty() || (link.is_turn_of_bulk && !link.bulk.is_empty());
        let Some((request, extent)) = (if is_bulk { link.bulk.pop_front() } else { link.demand.pop_front() }) else { return };
        link.is_turn_of_bulk = !is_bulk;
        link.is_busy = true;
        link.sent += 1;
        let stopped = link.manner.stops.filter(|(at, time)| (*at..*at + *time).contains(&now)).map(|(at, time)| at + time);
        let free = stopped.unwrap_or(now)
            + Duration::from_nanos(link.manner.wire_bytes(extent) * 1_000_000_000 / link.manner.bytes_per_second);
        let (delay, is_silent) = (link.manner.delay, self.random.u64(..1_000) < link.manner.silent);
        self.later(free, Happening::Free(source));
        if !is_silent {
            self.later(free + delay, Happening::Arrives(source, request, extent));
        }
    }

    fn p90(&mut self) -> Duration {
        self.latencies.sort_unstable();
        self.latencies[self.latencies.len() * 9 / 10]
    }
}

#[test]
fn every_child_goes_on_whatever_the_other_sources_do() {
    let (cases, seed) = cases_and_seed(100, 5_000);
    let (mut lies, mut hedged) = (0, 0);
    for seed in seed..seed + u64::from(cases) {
        let mut random = Rng::with_seed(seed);
        let others = random.usize(..4);
        let mut manners: Vec<Manner> = (0..others).map(|_| Manner::any(&mut random)).collect();
        let good = Manner::good(random.u64(100..1_000) * MBIT, Duration::from_micros(random.u64(50..5_000)));
        manners.insert(random.usize(..=others), good);
        let (extents, pause) = (random.u32(1..1_500), Duration::from_micros(random.u64(..5_000)));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let (children, faults) = (random.u64(1..16), random.u32(1..60));
            let mut network = Network::new(extents, &manners, seed).with_children(children, faults, pause);
            if random.bool() {
                network.books.replay((0..extents.min(200)).map(|_| at(random.u32(..extents))).collect());
            }
            network.run(true);
            assert_eq!(network.books.given_up, 0);
            for (source, link) in &network.links {
                assert!(link.manner.wrong > 0 || !network.books.quarantined.contains(source), "{source} never lied");
            }
            let stats = network.books.transfer.stats();
            (stats.quarantined, stats.hedged)
        }));
        let counts = outcome.unwrap_or_else(|_| panic!("FARFORK_SEED={seed}: {manners:#?}"));
        (lies, hedged) = (lies + counts.0, hedged + counts.1);
    }
    println!("held: {lies} lies found, {hedged} hedges");
    assert!(lies > 0 && hedged > 0, "nothing went wrong in {cases} cases");
}

/// How long a stream of `extents` takes.
fn time_to_settled(extents: u32, manners: &[Manner]) -> (Duration, Network) {
    let mut network = Network::new(extents, manners, 1);
    network.run(true);
    (network.books.now, network)
}

#[test]
fn a_stream_finds_out_what_its_link_carries() {
    for (mbit, delay) in [(1, 1), (10, 1), (100, 0), (100, 25), (1_000, 0), (1_000, 5), (10_000, 1)] {
        let rate = mbit * MBIT;
        let extents = (rate * 4 / EXTENT_SIZE).clamp(64, 8_192);
        let manner = Manner::good(rate, Duration::from_millis(delay));
        let (time, network) = time_to_settled(u32::try_from(extents).unwrap(), &[manner]);
        let ideal = Duration::from_nanos(extents * EXTENT_SIZE * 1_000_000_000 / rate);
        let (_, source) = network.books.transfer.sources().next().expect("it has a source");
        let found = source.link_bytes_per_second.expect("it was measured");
        println!("{mbit} Mbit/s, {delay} ms: {time:?} of {ideal:?}, {found} of {rate} B/s");
        assert!(time < ideal * 7 / 5 + Duration::from_millis(delay * 20), "{mbit} Mbit/s, {delay} ms: {time:?}, not {ideal:?}");
        assert!(found >= rate * 8 / 10 && found <= rate * 12 / 10, "{mbit} Mbit/s, {delay} ms: found {found} of {rate}");
    }
}

/// What is compressed comes sooner, which is no reason to think that what is not had to wait. (The window counts extents, so it is
/// too small for a while after each run of what is not.)
#[test]
fn a_stream_of_extents_of_all_sizes_uses_its_link() {
    let manner = Manner { compressible_run: 64, ..Manner::good(100 * MBIT, Duration::from_millis(10)) };
    let bytes: u64 = (0..2_048).map(|extent| manner.wire_bytes(at(extent))).sum();
    let ideal = Duration::from_nanos(bytes * 1_000_000_000 / manner.bytes_per_second);
    let (time, _) = time_to_settled(2_048, &[manner]);
    println!("{time:?} of {ideal:?}");
    assert!(time < ideal * 8 / 5, "{time:?} of {ideal:?}");
}

/// Also when it has gone on for so long that the shortest round trip was found anew, several times.
#[test]
fn what_a_stream_piles_up_does_not_grow() {
    for (mbit, delay, most) in [(100, 0, 1), (1_000, 0, 2), (1_000, 5, 4)] {
        let extents = u32::try_from(mbit * MBIT * 30 / EXTENT_SIZE).unwrap();
        let (time, network) = time_to_settled(extents, &[Manner::good(mbit * MBIT, Duration::from_millis(delay))]);
        let queues = &network.links.values().next().expect("it has a source").queues;
        // Of the last third.
        let last = &queues[queues.len() * 2 / 3..];
        let queue = last.iter().sum::<usize>() / last.len();
        println!("{mbit} Mbit/s, {delay} ms: {queue} extents waited on average, {time:?}");
        assert!(queue <= most && time < Duration::from_secs(33), "{mbit} Mbit/s, {delay} ms: {queue} extents, {time:?}");
    }
}

#[test]
fn a_stream_spreads_over_its_sources() {
    let manner = Manner::good(100 * MBIT, Duration::from_millis(1));
    let (alone, _) = time_to_settled(1_000, std::slice::from_ref(&manner));
    let (shared, network) = time_to_settled(1_000, &[manner.clone(), manner.clone(), manner]);
    assert!(shared < alone / 2, "{shared:?} by three, {alone:?} by one");
    assert!(network.links.values().all(|link| link.sent > 200));
}

#[test]
fn a_demand_hardly_waits_for_the_stream() {
    let manner = [Manner::good(1_000 * MBIT, Duration::from_micros(500))];
    let run = |is_streaming| {
        let mut network = Network::new(20_000, &manner, 3).with_children(1, 200, Duration::from_millis(5));
        network.run(is_streaming);
        network.p90()
    };
    let (idle, busy) = (run(false), run(true));
    println!("idle {idle:?}, while streaming {busy:?}");
    assert!(busy <= idle * 2, "{busy:?} while streaming, {idle:?} without");
}
