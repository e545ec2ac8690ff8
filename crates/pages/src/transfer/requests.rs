//! Requests under way, from `Send` to the last answer.
//!
//! ```text
//!           Send                answer to each extent
//! unsent ─────────▶ under way ─────────────────────────▶ over
//!                       ├── ended early, stalled, source gone ──▶ over; what is left is asked for elsewhere
//!                       └── nothing of it is wanted any more ──▶ over, `Cancel`
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Command, ExtentId, RequestId, SourceId, Timer, Transfer, Urgency};

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Requests {
    under_way: BTreeMap<RequestId, Request>,
    sent: u64,
}

#[derive(Clone, Debug)]
struct Request {
    source: SourceId,
    urgency: Urgency,
    /// In the order of asking; never empty.
    awaited: Vec<ExtentId>,
    sent: Duration,
    /// When the last answer came, or it was sent.
    progress: Duration,
    has_answer: bool,
    timer: Duration,
}

/// The question that an answer belongs to.
pub(super) struct Question {
    pub(super) source: SourceId,
    pub(super) urgency: Urgency,
    pub(super) age: Duration,
    /// Nothing else of its request has been answered.
    pub(super) is_first: bool,
}

impl Requests {
    pub(super) fn len(&self) -> u64 {
        self.under_way.len() as u64
    }

    pub(super) fn source_of(&self, id: RequestId) -> Option<SourceId> {
        self.under_way.get(&id).map(|request| request.source)
    }

    pub(super) fn of_source(&self, source: SourceId) -> Vec<RequestId> {
        self.under_way.iter().filter(|(_, request)| request.source == source).map(|(id, _)| *id).collect()
    }

    /// Whether `extent` is what its source sends now or next: the first that is left of its oldest request for replay or stream.
    pub(super) fn is_next(&self, id: RequestId, extent: ExtentId) -> bool {
        let Some(request) = self.under_way.get(&id) else { return false };
        let mut earlier = self.under_way.range(..id).map(|(_, other)| other);
        request.awaited.first() == Some(&extent)
            && !earlier.any(|other| other.source == request.source && other.urgency != Urgency::Demand)
    }
}

impl Transfer {
    /// Sends a request of at least one extent.
    pub(super) fn send(&mut self, source: SourceId, extents: Vec<ExtentId>, urgency: Urgency) -> RequestId {
        let id = RequestId(self.requests.sent);
        self.requests.sent += 1;
        if let Some(asked) = self.sources.get_mut(source)
            && urgency != Urgency::Demand
        {
            asked.pace.sent(self.now, extents.len() as u64);
        }
        let timer = self.now + self.config.stall;
        self.timers.insert((timer, Timer::Request(id)));
        let awaited = extents.clone();
        let request = Request { source, urgency, awaited, sent: self.now, progress: self.now, has_answer: false, timer };
        self.requests.under_way.insert(id, request);
        self.commands.push_back(Command::Send { request: id, source, extents, urgency });
        id
    }

    /// The question that an answer for `extent` belongs to, if it is still awaited.
    pub(super) fn question(&self, id: RequestId, extent: ExtentId) -> Option<Question> {
        let request = self.requests.under_way.get(&id).filter(|request| request.awaited.contains(&extent))?;
        let Request { source, urgency, sent, has_answer, .. } = *request;
        Some(Question { source, urgency, age: self.now.saturating_sub(sent), is_first: !has_answer })
    }

    /// `extent` is awaited no longer. Returns whether the request is under way for others.
    pub(super) fn take(&mut self, id: RequestId, extent: ExtentId) -> bool {
        let Some(request) = self.requests.under_way.get_mut(&id) else { return false };
        let Some(position) = request.awaited.iter().position(|awaited| *awaited == extent) else { return true };
        if request.awaited.len() == 1 {
            self.drop_request(id);
            return false;
        }
        request.awaited.remove(position);
        (request.progress, request.has_answer) = (self.now, true);
        let (source, urgency) = (request.source, request.urgency);
        self.leave(source, urgency, 1);
        true
    }

    /// `extent` is not wanted of that request any more; if nothing else is, it is cancelled. Returns what it was, if it was.
    pub(super) fn let_go(&mut self, id: RequestId, extent: ExtentId) -> Option<Question> {
        let question = self.question(id, extent)?;
        if !self.take(id, extent) {
            self.commands.push_back(Command::Cancel { request: id });
        }
        Some(question)
    }

    /// The request is over; what it leaves is asked for elsewhere. `is_blamed` on its source.
    pub(super) fn fail(&mut self, id: RequestId, is_blamed: bool) {
        let Some(request) = self.drop_request(id) else { return };
        if is_blamed {
            self.stats.failures += 1;
            if let Some(source) = self.sources.get_mut(request.source) {
                source.has_failed(self.now, request.sent);
            }
        }
        // From the last, so that a replay keeps its order.
        for extent in request.awaited.into_iter().rev() {
            self.release(id, extent, request.urgency);
        }
    }

    /// As [`fail`](Self::fail), where its stream may still be open.
    pub(super) fn cancel(&mut self, id: RequestId, is_blamed: bool) {
        self.commands.push_back(Command::Cancel { request: id });
        self.fail(id, is_blamed);
    }

    /// Its timer fired.
    pub(super) fn check_stalled(&mut self, id: RequestId) {
        let (stall, patience) = (self.config.stall, self.config.patience);
        let Some(request) = self.requests.under_way.get_mut(&id) else { return };
        let of_source = self.sources.get(request.source).map_or(Duration::ZERO, |source| source.progress);
        let due = (request.progress.max(of_source) + stall).min(request.progress + patience.max(stall));
        if due > self.now {
            request.timer = due;
            self.timers.insert((due, Timer::Request(id)));
        } else {
            self.cancel(id, true);
        }
    }

    fn drop_request(&mut self, id: RequestId) -> Option<Request> {
        let request = self.requests.under_way.remove(&id)?;
        self.timers.remove(&(request.timer, Timer::Request(id)));
        self.leave(request.source, request.urgency, request.awaited.len() as u64);
        Some(request)
    }

    fn leave(&mut self, source: SourceId, urgency: Urgency, extents: u64) {
        if let Some(source) = self.sources.get_mut(source)
            && urgency != Urgency::Demand
        {
            source.pace.left(extents);
        }
    }
}
