//! Naive books of everything that a transfer was told and said. Each command is checked against them, each event closed with
//! what must hold afterwards. They know the rules and nothing of how the transfer keeps them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pages::transfer::{Arrival, Command, Config, ExtentId, Region, RequestId, SourceId, Taken, Transfer, Urgency, Waiter};
use types::{EXTENT_SIZE, ExtentIndex};

/// A request that has neither ended nor been cancelled, with what it has not answered.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    pub(crate) source: SourceId,
    pub(crate) urgency: Urgency,
    pub(crate) awaited: Vec<ExtentId>,
}

/// What happened to an extent since somebody waits for it.
#[derive(Clone, Debug, Default)]
struct Story {
    /// The request for replay or stream that had it as its next when the first waiter came, and when that was.
    next_of: Option<(RequestId, Duration)>,
    first_asked: Option<Duration>,
    asked: Vec<SourceId>,
    absent_at: BTreeSet<SourceId>,
}

/// A transfer, and books about it.
pub(crate) struct Books {
    pub(crate) transfer: Transfer,
    pub(crate) config: Config,
    pub(crate) now: Duration,
    pub(crate) absent: BTreeSet<ExtentId>,
    counts: Vec<u32>,
    evicted: BTreeSet<ExtentId>,
    is_streaming: bool,
    pub(crate) sources: BTreeSet<SourceId>,
    pub(crate) quarantined: BTreeSet<SourceId>,
    /// Sources that failed, lied by omission, or were added late: the strict rules about the order of asking are not for them.
    is_odd: BTreeSet<SourceId>,
    pub(crate) live: BTreeMap<RequestId, Live>,
    pub(crate) waiting: BTreeMap<(ExtentId, Waiter), Duration>,
    stories: BTreeMap<ExtentId, Story>,
    next_request: u64,
    has_settled: bool,
    liar: Option<SourceId>,
    /// Everything said, for whoever wonders.
    pub(crate) log: Vec<String>,
    pub(crate) woken: u64,
    pub(crate) given_up: u64,
    pub(crate) forgotten: u64,
}

impl Books {
    pub(crate) fn new(config: Config, regions: &[Region], seed: u64) -> Self {
        let id = |region, extent| ExtentId { region, extent: ExtentIndex(extent) };
        let absent = (0u8..)
            .zip(regions)
            .flat_map(|(number, region)| region.absent.clone().into_iter().flatten().map(move |extent| id(number, extent)));
        let mut books = Self {
            transfer: Transfer::new(config, regions, seed).unwrap(),
            config,
            now: Duration::ZERO,
            absent: absent.collect(),
            counts: regions.iter().map(|region| region.extents).collect(),
            evicted: BTreeSet::new(),
            is_streaming: false,
            sources: BTreeSet::new(),
            quarantined: BTreeSet::new(),
            is_odd: BTreeSet::new(),
            live: BTreeMap::new(),
            waiting: BTreeMap::new(),
            stories: BTreeMap::new(),
            next_request: 0,
            has_settled: false,
            liar: None,
            log: Vec::new(),
            woken: 0,
            given_up: 0,
            forgotten: 0,
        };
        books.close();
        books
    }

    pub(crate) fn add_source(&mut self, source: SourceId) {
        let is_new = !self.quarantined.contains(&source) && self.sources.insert(source);
        assert_eq!(self.transfer.add_source(self.now, source), is_new, "{source}");
        if is_new && !self.waiting.is_empty() {
            self.is_odd.insert(source);
        }
        self.close();
    }

    pub(crate) fn remove_source(&mut self, source: SourceId) {
        self.sources.remove(&source);
        self.transfer.remove_source(self.now, source);
        self.close();
        assert!(self.live.values().all(|live| live.source != source), "something is still asked of {source}");
    }

    pub(crate) fn demand(&mut self, extent: ExtentId, waiter: Waiter) {
        self.log.push(format!("{:?} {waiter} demands {extent}", self.now));
        if self.absent.contains(&extent) {
            let next_of = next_of(&self.live, extent);
            self.stories.entry(extent).or_insert_with(|| Story {
                next_of: next_of.map(|request| (request, self.now)),
                // It was asked for it, if not as a demand.
                asked: next_of.map(|request| self.live[&request].source).into_iter().collect(),
                ..Story::default()
            });
        }
        self.waiting.entry((extent, waiter)).or_insert(self.now);
        self.transfer.demand(self.now, extent, waiter);
        self.close();
        if !self.absent.contains(&extent) {
            assert!(!self.waiting.contains_key(&(extent, waiter)), "{waiter} waits for {extent}, which is there or is none");
        }
    }

    pub(crate) fn forget(&mut self, waiter: Waiter) {
        let before = self.waiting.len();
        self.waiting.retain(|(_, other), _| *other != waiter);
        self.forgotten += (before - self.waiting.len()) as u64;
        self.transfer.forget_waiter(self.now, waiter);
        self.close();
    }

    pub(crate) fn replay(&mut self, extents: Vec<ExtentId>) {
        self.transfer.replay(self.now, extents);
        self.close();
    }

    pub(crate) fn stream(&mut self, is_on: bool) {
        self.is_streaming = is_on;
        if is_on {
            self.evicted.clear();
        }
        self.transfer.stream(self.now, is_on);
        self.close();
    }

    pub(crate) fn arrived(&mut self, request: RequestId, extent: ExtentId, arrival: Arrival) {
        self.log.push(format!("{:?} {request} {extent} {arrival:?}", self.now));
        let live = self.live.get_mut(&request).filter(|live| live.awaited.contains(&extent));
        let (expected, source) = (live.is_some(), live.as_ref().map(|live| live.source));
        let is_for_stream = live.as_ref().is_some_and(|live| live.urgency == Urgency::Stream);
        if let Some(live) = live {
            live.awaited.retain(|awaited| *awaited != extent);
            if live.awaited.is_empty() {
                self.live.remove(&request);
            }
        }
        match arrival {
            Arrival::Published { .. } => self.is_present(extent),
            Arrival::Absent => {
                // Who does not have it for the stream may have it for somebody who waits.
                if let (Some(story), Some(source), false) = (self.stories.get_mut(&extent), source, is_for_stream) {
                    story.absent_at.insert(source);
                }
                self.is_odd.extend(source.filter(|_| !self.stories.contains_key(&extent)));
            }
            Arrival::Wrong => self.liar = source,
        }
        let taken = self.transfer.arrived(self.now, request, extent, arrival);
        assert_eq!(taken == Taken::Expected, expected, "{request} {extent}");
        self.close();
        assert_eq!(self.liar, None, "a lie was let pass");
    }

    pub(crate) fn ended(&mut self, request: RequestId) {
        self.log.push(format!("{:?} {request} ended", self.now));
        self.is_odd.extend(self.live.remove(&request).map(|live| live.source));
        self.transfer.ended(self.now, request);
        self.close();
    }

    pub(crate) fn evict(&mut self, extent: ExtentId) {
        if self.is_within(extent) && self.absent.insert(extent) {
            self.evicted.insert(extent);
            self.has_settled = false;
        }
        self.transfer.is_absent_again(self.now, extent);
        self.close();
    }

    pub(crate) fn published_otherwise(&mut self, extent: ExtentId) {
        self.is_present(extent);
        self.transfer.published_otherwise(self.now, extent);
        self.close();
    }

    /// Lets time pass, with a tick whenever one is due.
    pub(crate) fn advance(&mut self, until: Duration) {
        let mut ticks = 0;
        while let Some(due) = self.transfer.next_timeout().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.transfer.tick(self.now);
            self.close();
            assert!(self.transfer.next_timeout().is_none_or(|next| next > self.now), "a tick left something due");
            ticks += 1;
            assert!(ticks < 100_000, "it ticks for ever");
        }
        self.now = until;
    }

    /// Reads all commands, and checks what must hold when there are none.
    fn close(&mut self) {
        while let Some(command) = self.transfer.poll() {
            self.log.push(format!("{:?} {command}", self.now));
            self.check(command);
        }
        assert_eq!(self.has_settled, self.absent.is_empty(), "settled");
        let absent: u64 = self.absent.len() as u64;
        assert_eq!(self.transfer.stats().absent, absent);
        assert_eq!(self.transfer.stats().requests_now, self.live.len() as u64);
        for ((extent, waiter), since) in &self.waiting {
            assert!(self.absent.contains(extent), "{waiter} was not woken for {extent}");
            assert!(*since + self.config.deadline >= self.now, "{waiter} was not given up");
            assert!(self.transfer.next_timeout().is_some_and(|due| due <= *since + self.config.deadline), "no timer");
        }
        self.end_stories();
        assert_eq!(self.transfer.stats().demands_now, self.stories.len() as u64);
        for live in self.live.values().filter(|live| live.urgency == Urgency::Demand) {
            assert!(self.stories.contains_key(&live.awaited[0]), "{} is demanded for nobody", live.awaited[0]);
        }
    }

    /// Nobody waits for those any more.
    fn end_stories(&mut self) {
        let waiting = &self.waiting;
        self.stories.retain(|extent, _| waiting.keys().any(|(waited, _)| waited == extent));
    }

    fn check(&mut self, command: Command) {
        self.end_stories();
        match command {
            Command::Send { request, source, extents, urgency } => self.check_send(request, source, extents, urgency),
            Command::Cancel { request } => {
                let live = self.live.remove(&request).expect("what is cancelled is under way");
                // It stalled, or is gone, or lied; or nobody wants it, and then the source is not to blame.
                if live.awaited.iter().any(|extent| self.absent.contains(extent)) {
                    self.is_odd.insert(live.source);
                }
            }
            Command::Wake { extent, waiters } => {
                assert!(self.is_within(extent) && !self.absent.contains(&extent), "{extent} is not there");
                for waiter in waiters {
                    assert!(self.waiting.remove(&(extent, waiter)).is_some(), "{waiter} does not wait for {extent}");
                    self.woken += 1;
                }
            }
            Command::GiveUp { extent, waiters, waited } => {
                assert!(self.absent.contains(&extent) || !self.is_within(extent), "{extent} is there");
                let limit = if self.is_within(extent) { self.config.deadline } else { Duration::ZERO };
                for (number, waiter) in waiters.into_iter().enumerate() {
                    let since = self.waiting.remove(&(extent, waiter)).expect("it waits");
                    assert!(self.now - since >= limit, "{waiter} was given up early");
                    assert!(number > 0 || self.now - since == waited);
                    self.given_up += 1;
                }
            }
            Command::Quarantine { source, .. } => {
                assert_eq!(self.liar.take(), Some(source), "{source} did not lie");
                self.sources.remove(&source);
                assert!(self.quarantined.insert(source), "{source} a second time");
            }
            Command::Settled => {
                assert!(self.absent.is_empty() && !self.has_settled, "settled, but {} are absent", self.absent.len());
                self.has_settled = true;
            }
        }
    }

    fn check_send(&mut self, request: RequestId, source: SourceId, extents: Vec<ExtentId>, urgency: Urgency) {
        assert!(self.sources.contains(&source), "{source} is no source");
        assert!((1..=16).contains(&extents.len()));
        assert!(extents.iter().all(|extent| self.absent.contains(extent)), "it is there already");
        assert!(extents.iter().all(|extent| extent.region == extents[0].region), "more than one region");
        assert_eq!(request.0, self.next_request);
        self.next_request += 1;
        match urgency {
            Urgency::Demand => self.check_demand_send(source, extents[0]),
            Urgency::Replay | Urgency::Stream => {
                self.check_bulk_send(&extents, urgency);
                let asked = self.live.values().filter(|live| live.source == source && live.urgency != Urgency::Demand);
                let owed: usize = asked.map(|live| live.awaited.len()).sum();
                let owed_bytes = (owed + extents.len()) as u64 * EXTENT_SIZE;
                assert!(owed == 0 || owed_bytes <= self.config.window_max_bytes, "{owed_bytes} bytes are outstanding");
            }
        }
        if urgency == Urgency::Stream {
            assert!(self.is_streaming && extents.iter().all(|extent| !self.evicted.contains(extent)));
            let is_next = |pair: &[ExtentId]| pair[1].extent.0 == pair[0].extent.0 + 1;
            assert!(extents.windows(2).all(is_next), "not adjacent: {extents:?}");
        }
        self.live.insert(request, Live { source, urgency, awaited: extents });
    }

    fn check_demand_send(&mut self, source: SourceId, extent: ExtentId) {
        let story = self.stories.get_mut(&extent).expect("somebody waits for it");
        let under_way = |urgency_is_demand: bool| {
            self.live.iter().filter(move |(_, live)| {
                (live.urgency == Urgency::Demand) == urgency_is_demand && live.awaited.contains(&extent)
            })
        };
        assert!(under_way(true).all(|(_, live)| live.source != source), "{extent} is demanded of {source} twice");
        if under_way(true).next().is_some() {
            let first = story.first_asked.expect("it was asked for");
            assert!(self.now >= first + self.config.hedge_min, "hedged too early");
        }
        if let Some((request, since)) = story.next_of
            && under_way(false).any(|(id, _)| *id == request)
        {
            assert!(self.now >= since + self.config.hedge_min, "it was the next to arrive");
        }
        if story.absent_at.contains(&source) {
            let others = self.sources.iter().filter(|other| **other != source && !self.is_odd.contains(other));
            for other in others {
                assert!(story.asked.contains(other), "{source} does not have {extent}, and {other} was not asked");
            }
        }
        story.first_asked.get_or_insert(self.now);
        story.asked.push(source);
    }

    fn check_bulk_send(&self, extents: &[ExtentId], urgency: Urgency) {
        for live in self.live.values() {
            for extent in &live.awaited {
                assert!(!extents.contains(extent), "{extent} is under way");
                let is_demanded = self.stories.contains_key(extent);
                assert!(urgency == Urgency::Replay || !is_demanded, "streamed while {extent} is demanded and under way");
            }
        }
        assert!(extents.iter().all(|extent| !self.stories.contains_key(extent)), "somebody waits for it");
    }

    fn is_present(&mut self, extent: ExtentId) {
        self.absent.remove(&extent);
        self.evicted.remove(&extent);
        // What is left of a request goes on without it; a request for it alone is cancelled, which `check` sees.
        for live in self.live.values_mut().filter(|live| live.awaited.len() > 1) {
            live.awaited.retain(|awaited| *awaited != extent);
        }
    }

    fn is_within(&self, extent: ExtentId) -> bool {
        self.counts.get(usize::from(extent.region)).is_some_and(|count| extent.extent.0 < *count)
    }
}

/// The oldest replay or stream request of its source, if `extent` is the first that it awaits.
fn next_of(live: &BTreeMap<RequestId, Live>, extent: ExtentId) -> Option<RequestId> {
    let bulk = || live.iter().filter(|(_, live)| live.urgency != Urgency::Demand);
    let (id, found) = bulk().find(|(_, live)| live.awaited.first() == Some(&extent))?;
    bulk().find(|(_, live)| live.source == found.source).filter(|(oldest, _)| *oldest == id).map(|(id, _)| *id)
}
