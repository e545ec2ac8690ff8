//! Requests to holders, and what becomes of their answers: verified, published, told to the transfer.

use std::cell::RefCell;
use std::rc::Rc;

use pages::client::{ExtentAnswer, LinkError};
use pages::transfer::{Arrival, ExtentId, RequestId, SourceId, Urgency};
use pages::wire::{Content, ExtentsRequest, Wanted};
use vm::host_image::{PublishError, Published};

use super::super::metrics::{self, PageBytes};
use super::fetch::Fetch;

impl Fetch {
    pub(super) fn send(self: &Rc<Self>, request: RequestId, source: SourceId, extents: Vec<ExtentId>, urgency: Urgency) {
        let asked = {
            let state = self.state.borrow();
            let stats = state.transfer.sources().find(|(id, _)| *id == source);
            let may_compress = stats.is_some_and(|(_, stats)| super::source::may_compress(&stats));
            let source = state.sources.get(&source);
            source.and_then(|source| Some((source.link.clone(), source.lease.clone()?, may_compress)))
        };
        let wanted = Wanted::new(extents.clone());
        let (Some((link, lease, may_compress)), Ok(wanted)) = (asked, wanted) else {
            let now = self.shared.now();
            return self.state.borrow_mut().transfer.ended(now, request);
        };
        let order = ExtentsRequest { lease, image: self.key.1, urgency, extents: wanted, may_compress };
        if urgency == Urgency::Demand {
            let mut state = self.state.borrow_mut();
            for id in &extents {
                match state.answering.get_mut(id) {
                    Some(answering) if answering.was_sent => metrics::hedged(),
                    Some(answering) => {
                        let now = self.shared.now();
                        answering.stages.queue = now.saturating_sub(answering.since);
                        (answering.since, answering.was_sent) = (now, true);
                    }
                    None => {}
                }
            }
        }
        let this = Rc::clone(self);
        let within = self.shared.settings.deadline;
        let task = self.spawn(async move {
            let unknown = RefCell::new(Vec::new());
            let each = |answer: ExtentAnswer| {
                if let Some(answer) = this.arrived(request, urgency, answer) {
                    unknown.borrow_mut().push(answer);
                }
            };
            let ended = link.extents(&order, within, each).await;
            // Faster than the digests that say whether they are right.
            for answer in unknown.into_inner() {
                this.learn_digest(answer.id.region, answer.id.extent).await;
                drop(this.arrived(request, urgency, answer));
            }
            this.ended(request, source, ended);
        });
        self.state.borrow_mut().requests.insert(request, task);
    }

    /// Takes an answer; gives it back if it cannot be verified yet.
    fn arrived(self: &Rc<Self>, request: RequestId, urgency: Urgency, answer: ExtentAnswer) -> Option<ExtentAnswer> {
        let id = answer.id;
        let began = self.shared.now();
        let published = match &answer.content {
            Content::Absent => Ok(None),
            Content::Zero => self.publish(id, None).map(Some),
            Content::Data(bytes) => self.publish(id, Some(bytes)).map(Some),
        };
        let wire_bytes = u32::try_from(answer.wire_bytes).unwrap_or(u32::MAX);
        let arrival = match published {
            Ok(Some(published)) => {
                if let Some(answering) = self.state.borrow_mut().answering.get_mut(&id) {
                    answering.stages.wire = began.saturating_sub(answering.since);
                    (answering.stages.verify, answering.stages.publish) = (published.verify, published.place);
                    answering.since = self.shared.now();
                }
                metrics::page_bytes(page_bytes(urgency), u64::from(wire_bytes));
                Arrival::Published { wire_bytes }
            }
            Ok(None) => Arrival::Absent,
            Err(PublishError::NoDigest { .. }) => return Some(answer),
            Err(error @ PublishError::Wrong { .. }) => {
                tracing::warn!(image = %self.key.1, %error, "a holder sent what is not the image's");
                Arrival::Wrong
            }
            Err(error @ PublishError::Poisoned(_)) => {
                // The task that this is ends with the others.
                self.is_lost(&error);
                return None;
            }
            Err(error) => {
                tracing::warn!(image = %self.key.1, %error, "not published");
                Arrival::Absent
            }
        };
        {
            let mut state = self.state.borrow_mut();
            state.wire_bytes += u64::from(wire_bytes);
            let now = self.shared.now();
            if state.transfer.arrived(now, request, id, arrival) == pages::transfer::Taken::Stale {
                tracing::debug!(image = %self.key.1, %id, "an answer that nobody waits for any more");
            }
            if matches!(arrival, Arrival::Published { .. }) {
                state.published.push_back(id);
            }
        }
        self.keep_budget();
        self.pump();
        None
    }

    fn publish(&self, id: ExtentId, bytes: Option<&[u8]>) -> Result<Published, PublishError> {
        let region = usize::from(id.region);
        let publish = || match bytes {
            Some(bytes) => self.host_image.publish(region, id.extent, bytes),
            None => self.host_image.publish_zeros(region, id.extent),
        };
        match publish() {
            Err(PublishError::NoMemory { .. }) if self.make_room() => publish(),
            published => published,
        }
    }

    fn ended(self: &Rc<Self>, request: RequestId, source: SourceId, ended: Result<(), LinkError>) {
        if let Err(error) = &ended {
            tracing::debug!(image = %self.key.1, %request, %error, "a request failed");
            self.source_failed(source, error);
        }
        let mut state = self.state.borrow_mut();
        state.requests.remove(&request);
        let now = self.shared.now();
        state.transfer.ended(now, request);
        drop(state);
        self.pump();
    }
}

fn page_bytes(urgency: Urgency) -> PageBytes {
    match urgency {
        Urgency::Demand => PageBytes::Demand,
        Urgency::Replay => PageBytes::Replay,
        Urgency::Stream => PageBytes::Stream,
    }
}
