//! One request and its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use quinn::{Connection, ReadExactError, RecvStream, SendStream, VarInt};
use tracing::debug;

use super::admission::{Budget, Held};
use super::connection::Protocol;
use super::{CLOSE_SLOW, Extent, Handler, Shared, count};
use crate::identity::{Certificate, Peer, Role};
use crate::wire::{
    self, Answer, BadFrame, EXTENT_BYTES, Encoding, ExtentHeader, ExtentsRequest, HEADER_SIZE, Header, Kind, Refusal,
    RefusalCode, Request, Urgency,
};

/// Why the rest of a request is not read.
const STOP_BAD: VarInt = VarInt::from_u32(1);
/// Why a stream is reset.
const RESET_SLOW: VarInt = VarInt::from_u32(2);

/// The most bytes of a message of a peer without a vote.
const SHORT_MAX: usize = 1 << 20;
/// What an answer without extents may hold: as much as the longest.
const ANSWER_HOLD_BYTES: usize = Kind::Answer.body_max();

/// A stream, and all that its answer needs.
pub(crate) struct Exchange {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    pub(crate) peer: Arc<Peer>,
    pub(crate) shown: Arc<Certificate>,
    pub(crate) budget: Budget,
    pub(crate) shared: Arc<Shared>,
}

/// The peer has gone or does not want the answer: nobody is left to tell.
struct Gone;

impl Exchange {
    pub(crate) async fn run(mut self, protocol: Protocol) {
        let kind = match protocol {
            Protocol::Pages => Kind::Request,
            Protocol::Node => Kind::Order,
            Protocol::Service(index) => return self.service(index).await,
        };
        let body = match tokio::time::timeout(self.shared.limits.request_time, read(&mut self.receive, kind)).await {
            Ok(Ok(body)) => body,
            Ok(Err(problem)) => return self.bad(problem).await,
            Err(_) => {
                count(&self.shared.counters.requests_bad);
                let _ = self.send.reset(RESET_SLOW);
                return;
            }
        };
        count(&self.shared.counters.requests);
        match protocol {
            Protocol::Pages => match Request::decode(&body) {
                Ok(request) => self.pages(request).await,
                Err(problem) => self.bad(problem).await,
            },
            Protocol::Node | Protocol::Service(_) => self.order(body).await,
        }
    }

    async fn service(mut self, index: usize) {
        count(&self.shared.counters.requests);
        let shared = Arc::clone(&self.shared);
        let (answers, bytes_max, time) = match &shared.services[index].handler {
            Handler::Stream(streams) => return streams.take((*self.peer).clone(), self.send, self.receive).await,
            Handler::Ask { answers, request_bytes_max, request_time } => {
                // Only who decides has long messages.
                let is_voter = self.peer.role == Role::Voter;
                (answers, (*request_bytes_max).min(if is_voter { usize::MAX } else { SHORT_MAX }), *request_time)
            }
        };
        match tokio::time::timeout(time, self.receive.read_to_end(bytes_max)).await {
            Ok(Ok(request)) => {
                let answer = answers.answer((*self.shown).clone(), request.into()).await;
                let held = self.budget.hold(answer.len().min(ANSWER_HOLD_BYTES)).await;
                self.finish(vec![answer], held).await;
            }
            _ => {
                count(&self.shared.counters.requests_bad);
                let _ = self.send.reset(RESET_SLOW);
            }
        }
    }

    /// Bytes that are no request. What else comes is not read.
    async fn bad(mut self, problem: BadFrame) {
        count(&self.shared.counters.requests_bad);
        debug!(node = %self.peer.node, %problem, "a request is none");
        // Fails only where there is nothing left to stop.
        let _ = self.receive.stop(STOP_BAD);
        let frame = Answer::Refused(Refusal::new(RefusalCode::Malformed, problem)).encode();
        let held = self.budget.hold(frame.len()).await;
        self.finish(vec![frame], held).await;
    }

    async fn pages(self, request: Request) {
        let is_demand = !matches!(&request, Request::Extents(request) if request.urgency != Urgency::Demand);
        // Fails only on a stream that is gone, which the answer finds out.
        let _ = self.send.set_priority(i32::from(is_demand));
        if let Request::Extents(request) = request {
            return self.extents(request).await;
        }
        let held = self.budget.hold(ANSWER_HOLD_BYTES).await;
        let shared = Arc::clone(&self.shared);
        let (store, peer) = (&shared.store, Arc::clone(&self.peer));
        let answer = match request {
            Request::Open { tenant, image } => {
                if shared.trust.may_read(&peer, &tenant) {
                    store.open(&peer, &tenant, image).await.map(Answer::Opened)
                } else {
                    Err(Refusal::new(RefusalCode::OtherTenant, format_args!("tenant {tenant}")))
                }
            }
            Request::HashPage { lease, image, region, page } => {
                store.hash_page(&peer, &lease, image, region, page).await.map(Answer::HashPage)
            }
            Request::Renew { lease } => store.renew(&peer, &lease).map(Answer::Renewed),
            Request::Release { lease } => store.release(&peer, &lease).map(|()| Answer::Done),
            Request::Hints { lease, image, runs } => store.hints(&peer, &lease, image, runs).map(|()| Answer::Done),
            Request::Extents(_) => unreachable!("answered above"),
        };
        let frame = self.counted(answer).unwrap_or_else(Answer::Refused).encode();
        self.finish(vec![frame], held).await;
    }

    async fn order(self, body: Bytes) {
        let held = self.budget.hold(wire::ORDER_ANSWER_SIZE_MAX).await;
        let shared = Arc::clone(&self.shared);
        let answer = self.counted(shared.orders.order((*self.peer).clone(), body).await);
        let frame = answer.and_then(|answer| {
            wire::order_frame(Kind::OrderAnswer, &answer).map_err(|error| Refusal::new(RefusalCode::Failed, error))
        });
        self.finish(vec![frame.unwrap_or_else(|refusal| Answer::Refused(refusal).encode())], held).await;
    }

    /// The extents one after the other, each as soon as the store has it.
    async fn extents(mut self, request: ExtentsRequest) {
        let wanted = request.extents.as_slice();
        let held = self.budget.hold(wanted.len() * EXTENT_BYTES).await;
        for (number, id) in wanted.iter().enumerate() {
            if number > 0 {
                // What sends the one before may have its turn on this thread: a child waits for the first of them, not for all.
                tokio::task::yield_now().await;
            }
            #[cfg(feature = "testing")]
            if let Some(lie) = self.shared.store.lie(*id)
                && lie.tell(&mut self.send, *id).await.is_break()
            {
                return;
            }
            let store = Arc::clone(&self.shared.store);
            let extent = store.extent(&self.peer, &request.lease, request.image, *id, request.urgency).await;
            let (frames, is_last) = match self.counted(extent) {
                Ok(extent) => {
                    let (encoding, payload) = encode(extent, request.may_compress);
                    if !payload.is_empty() {
                        count(&self.shared.counters.extents);
                        self.shared.counters.extent_bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
                    }
                    (vec![ExtentHeader { id: *id, encoding }.encode(payload.len()), payload], false)
                }
                Err(refusal) => (vec![Answer::Refused(refusal).encode()], true),
            };
            if self.write(frames).await.is_err() {
                return;
            }
            if is_last {
                break;
            }
        }
        self.finish(Vec::new(), held).await;
    }

    fn counted<T>(&self, answer: Result<T, Refusal>) -> Result<T, Refusal> {
        answer.inspect_err(|refusal| {
            count(&self.shared.counters.refused);
            debug!(node = %self.peer.node, %refusal, "refused");
        })
    }

    /// Writes the last frames and waits until the peer has all of them; what was held for the answer is held until then.
    async fn finish(mut self, frames: Vec<Bytes>, held: Held) {
        if self.write(frames).await.is_ok() && self.send.finish().is_ok() {
            let acknowledged = tokio::time::timeout(self.shared.limits.answer_time, self.send.stopped());
            if acknowledged.await.is_err() {
                self.close();
            }
        }
        drop(held);
    }

    /// Hands bytes to the transport, which takes them as the peer reads.
    async fn write(&mut self, mut frames: Vec<Bytes>) -> Result<(), Gone> {
        let writing = self.send.write_all_chunks(&mut frames);
        match tokio::time::timeout(self.shared.limits.answer_time, writing).await {
            Ok(written) => written.map_err(|_| Gone),
            Err(_) => {
                self.close();
                Err(Gone)
            }
        }
    }

    fn close(&self) {
        count(&self.shared.counters.answers_not_taken);
        self.connection.close(CLOSE_SLOW, b"an answer was not taken");
    }
}

/// Reads the one frame of a request, and the end of its stream.
async fn read(receive: &mut RecvStream, kind: Kind) -> Result<Bytes, BadFrame> {
    let mut header = [0; HEADER_SIZE];
    receive.read_exact(&mut header).await.map_err(|_: ReadExactError| BadFrame::Truncated)?;
    let header = Header::decode(&header)?;
    if header.kind != kind {
        return Err(BadFrame::OtherKind(header.kind));
    }
    let mut body = vec![0; header.body_len];
    receive.read_exact(&mut body).await.map_err(|_: ReadExactError| BadFrame::Truncated)?;
    match receive.read(&mut [0]).await {
        Ok(None) => Ok(body.into()),
        _ => Err(BadFrame::TrailingBytes(1)),
    }
}

/// What travels for an extent: nothing if it is zero, whatever the store says.
fn encode(extent: Extent, may_compress: bool) -> (Encoding, Bytes) {
    match extent {
        Extent::Absent => (Encoding::Absent, Bytes::new()),
        Extent::Zero => (Encoding::Zero, Bytes::new()),
        Extent::Data(data) if data.iter().all(|byte| *byte == 0) => (Encoding::Zero, Bytes::new()),
        Extent::Data(data) => match may_compress.then(|| wire::compress(&data)).flatten() {
            Some(block) => (Encoding::Lz4, block),
            None => (Encoding::Raw, data),
        },
    }
}
