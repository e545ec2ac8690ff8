//! Extents that nobody waits for: the recorded working set in its order, then all others in address order.
//!
//! Nothing is streamed while a demand is under way; the replay goes on. Each source gets as much as its [pace](super::pacing) allows, so
//! that the work spreads by what the links carry.

use std::collections::VecDeque;
use std::time::Duration;

use types::ExtentIndex;

use super::set::Extents;
use super::{ExtentId, RequestId, SourceId, Transfer, Urgency};

/// How far a replay is searched for what a source may have.
const LOOK_AHEAD: usize = 64;

/// The working set that is still to be asked for.
#[derive(Clone, Debug)]
pub(super) struct Replay {
    order: VecDeque<ExtentId>,
    /// The same extents: each is queued once.
    queued: Extents,
}

/// Background streaming.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) is_on: bool,
    /// Where it goes on.
    pub(super) cursor: ExtentId,
}

/// What a source can be sent now.
enum Turn {
    Sent,
    /// Not before.
    Later(Duration),
    /// Not before something else happens.
    Idle,
}

impl Replay {
    pub(super) fn new(queued: Extents) -> Self {
        Self { order: VecDeque::new(), queued }
    }

    pub(super) fn push(&mut self, extent: ExtentId) {
        if self.queued.insert(extent) {
            self.order.push_back(extent);
        }
    }

    fn push_front(&mut self, extent: ExtentId) {
        if self.queued.insert(extent) {
            self.order.push_front(extent);
        }
    }

    fn pop(&mut self) -> Option<ExtentId> {
        let extent = self.order.pop_front()?;
        self.queued.remove(extent);
        Some(extent)
    }
}

impl Stream {
    pub(super) const fn new() -> Self {
        Self { is_on: false, cursor: ExtentId { region: 0, extent: ExtentIndex(0) } }
    }
}

impl Transfer {
    /// Sends whatever replay and stream may send now, and notes when they may send more.
    pub(super) fn pump(&mut self) {
        self.bulk_wake = None;
        // The recorded working set is what would be demanded next: keeping it back would turn all of it into demands.
        if self.is_demand_under_way() {
            self.quiet_until = self.now.saturating_add(self.config.quiet);
        }
        let streams = self.quiet_until <= self.now;
        if !self.has_bulk_work() {
            return;
        }
        if !streams && self.replay.order.is_empty() {
            self.bulk_wake = Some(self.quiet_until);
            return;
        }
        let (now, config) = (self.now, self.config);
        let suspect_until: Vec<_> = self.sources.iter().map(|(id, source)| (id, source.suspect_until(&config))).collect();
        let are_all_suspect = suspect_until.iter().all(|(_, until)| *until > now);
        let mut wake = Duration::MAX;
        let mut sent = true;
        while std::mem::take(&mut sent) {
            wake = Duration::MAX;
            for (id, until) in &suspect_until {
                let turn = if are_all_suspect || *until <= now { self.send_batch(*id, streams) } else { Turn::Later(*until) };
                match turn {
                    Turn::Sent => sent = true,
                    Turn::Later(at) => wake = wake.min(at),
                    Turn::Idle => {}
                }
            }
        }
        let quiet_until = (!streams).then_some(self.quiet_until);
        let wake = Some(wake).filter(|wake| *wake != Duration::MAX).into_iter().chain(quiet_until).min();
        self.bulk_wake = wake.filter(|_| self.has_bulk_work());
    }

    /// A replay or stream request will not bring `extent`.
    pub(super) fn release_bulk(&mut self, request: RequestId, extent: ExtentId, urgency: Urgency) {
        if self.bulk.get(&extent) != Some(&request) {
            return;
        }
        self.bulk.remove(&extent);
        if urgency == Urgency::Replay {
            self.replay.push_front(extent);
        }
        self.restream(extent);
        self.ask_if_idle(extent);
    }

    /// Puts `extent` where the stream finds it, or takes it from there: whichever is right now.
    pub(super) fn restream(&mut self, extent: ExtentId) {
        let is_taken = self.bulk.contains_key(&extent) || self.demands.contains_key(&extent);
        if self.absent.contains(extent) && !self.evicted.contains(extent) && !is_taken {
            self.streamable.insert(extent);
        } else {
            self.streamable.remove(extent);
        }
    }

    fn has_bulk_work(&self) -> bool {
        !self.replay.order.is_empty() || (self.stream.is_on && !self.streamable.is_empty())
    }

    fn send_batch(&mut self, id: SourceId, streams: bool) -> Turn {
        let now = self.now;
        let Some(source) = self.sources.get_mut(id) else { return Turn::Idle };
        source.forget_old(now);
        if !source.pace.has_room() {
            return Turn::Idle;
        }
        if source.ready_at() > now {
            return Turn::Later(source.ready_at());
        }
        let (most, lacks_until) = (source.pace.batch(), source.lacks_any_until());
        let (mut extents, mut urgency) = (self.take_replay(id, most), Urgency::Replay);
        if extents.is_empty() && self.stream.is_on && streams {
            (extents, urgency) = (self.take_stream(id, most), Urgency::Stream);
        }
        if extents.is_empty() {
            return lacks_until.map_or(Turn::Idle, Turn::Later);
        }
        let count = extents.len() as u64;
        *(if urgency == Urgency::Replay { &mut self.stats.replayed } else { &mut self.stats.streamed }) += count;
        let request = self.send(id, extents.clone(), urgency);
        for extent in extents {
            self.bulk.insert(extent, request);
            self.restream(extent);
        }
        Turn::Sent
    }

    /// The next of the replay that the source may have, of one region. What need not be fetched any more is dropped.
    fn take_replay(&mut self, id: SourceId, most: u64) -> Vec<ExtentId> {
        let lacks = self.sources.get(id).and_then(|source| source.lacks());
        let (mut batch, mut skipped): (Vec<ExtentId>, Vec<ExtentId>) = (Vec::new(), Vec::new());
        while (batch.len() as u64) < most && skipped.len() < LOOK_AHEAD {
            let Some(extent) = self.replay.pop() else { break };
            let is_taken = self.bulk.contains_key(&extent) || self.demands.contains_key(&extent);
            if !self.absent.contains(extent) || is_taken {
                continue;
            }
            let is_elsewhere = batch.first().is_some_and(|first| first.region != extent.region);
            if is_elsewhere || lacks.is_some_and(|lacks| lacks.contains(extent)) {
                skipped.push(extent);
                if is_elsewhere {
                    break;
                }
            } else {
                batch.push(extent);
            }
        }
        for extent in skipped.into_iter().rev() {
            self.replay.push_front(extent);
        }
        batch
    }

    /// The next adjacent ones of the stream that the source may have.
    fn take_stream(&mut self, id: SourceId, most: u64) -> Vec<ExtentId> {
        let lacks = self.sources.get(id).and_then(|source| source.lacks());
        let mut batch = Vec::new();
        let Some(mut next) = self.streamable.next_around(self.stream.cursor, lacks) else { return batch };
        while (batch.len() as u64) < most && self.streamable.contains(next) && !lacks.is_some_and(|lacks| lacks.contains(next))
        {
            batch.push(next);
            next.extent.0 += 1;
        }
        self.stream.cursor = next;
        batch
    }
}
