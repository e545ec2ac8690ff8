//! A request and what comes back on its stream, up to the end.

use std::collections::BTreeSet;

use bytes::Bytes;
use quinn::{Connection, ReadError, ReadExactError, ReadToEndError, RecvStream, WriteError};

use super::lane::lost;
use super::{ExtentAnswer, LinkError, Misbehaviour};
use crate::wire::{Answer, BadFrame, ExtentHeader, ExtentsRequest, HEADER_SIZE, Header, Kind, Request, Urgency};

/// Asks for one frame.
pub(crate) async fn answer(connection: &Connection, request: &Request) -> Result<Answer, LinkError> {
    let mut stream = Stream::start(connection, request.encode(), 1).await?;
    let (kind, body) = stream.frame().await?;
    let answer = match kind {
        Kind::Answer => Answer::decode(&body).map_err(Misbehaviour::Frame)?,
        other => return Err(Misbehaviour::Frame(BadFrame::OtherKind(other)).into()),
    };
    stream.end().await?;
    match answer {
        Answer::Refused(refusal) => Err(refusal.into()),
        answer => Ok(answer),
    }
}

/// Asks for extents.
pub(crate) async fn extents(
    connection: &Connection,
    request: &ExtentsRequest,
    mut each: impl FnMut(ExtentAnswer),
) -> Result<(), LinkError> {
    let mut missing: BTreeSet<_> = request.extents.as_slice().iter().copied().collect();
    let priority = i32::from(request.urgency == Urgency::Demand);
    let mut stream = Stream::start(connection, Request::Extents(request.clone()).encode(), priority).await?;
    while let Some((kind, body)) = stream.next_frame().await? {
        let wire_bytes = HEADER_SIZE + body.len();
        let (id, content) = match kind {
            Kind::Extent => ExtentHeader::decode(&body).map_err(Misbehaviour::Frame)?,
            Kind::Answer => return Err(refusal(&body)),
            other => return Err(Misbehaviour::Frame(BadFrame::OtherKind(other)).into()),
        };
        if !missing.remove(&id) {
            return Err(Misbehaviour::Unsolicited(id).into());
        }
        each(ExtentAnswer { id, content, wire_bytes });
        if missing.is_empty() {
            return stream.end().await;
        }
    }
    Err(Misbehaviour::Incomplete { missing: missing.len() }.into())
}

/// Sends an order.
pub(crate) async fn order(connection: &Connection, frame: Bytes) -> Result<Bytes, LinkError> {
    let mut stream = Stream::start(connection, frame, 0).await?;
    let (kind, body) = stream.frame().await?;
    match kind {
        Kind::OrderAnswer => stream.end().await.map(|()| body),
        Kind::Answer => Err(refusal(&body)),
        other => Err(Misbehaviour::Frame(BadFrame::OtherKind(other)).into()),
    }
}

/// Asks a service for one message.
pub(crate) async fn message(connection: &Connection, request: Bytes, answer_bytes_max: usize) -> Result<Bytes, LinkError> {
    let mut stream = Stream::start(connection, request, 0).await?;
    match stream.receive.read_to_end(answer_bytes_max).await {
        Ok(answer) if answer.is_empty() => Err(Misbehaviour::Frame(BadFrame::Truncated).into()),
        Ok(answer) => Ok(answer.into()),
        Err(ReadToEndError::TooLong) => Err(Misbehaviour::Trailing.into()),
        Err(ReadToEndError::Read(error)) => Err(stream.cut_short(ReadExactError::ReadError(error))),
    }
}

/// An answer where only a refusal may stand.
fn refusal(body: &[u8]) -> LinkError {
    match Answer::decode(body) {
        Ok(Answer::Refused(refusal)) => refusal.into(),
        Ok(other) => super::unexpected(&other),
        Err(problem) => Misbehaviour::Frame(problem).into(),
    }
}

/// The stream of one request. Dropping it tells the holder that no more is wanted.
struct Stream<'a> {
    connection: &'a Connection,
    receive: RecvStream,
}

impl<'a> Stream<'a> {
    async fn start(connection: &'a Connection, frame: Bytes, priority: i32) -> Result<Self, LinkError> {
        let lost = |error| lost(connection.remote_address(), &error);
        let (mut send, receive) = connection.open_bi().await.map_err(lost)?;
        // Fails only on a stream that is gone, which writing finds out.
        let _ = send.set_priority(priority);
        let stream = Self { connection, receive };
        match send.write_chunk(frame).await {
            // A holder that refuses need not read all of a request; its answer says why.
            Ok(()) | Err(WriteError::Stopped(_)) => {}
            Err(WriteError::ConnectionLost(error)) => return Err(lost(error)),
            Err(WriteError::ClosedStream | WriteError::ZeroRttRejected) => unreachable!("a fresh stream, without 0-RTT"),
        }
        // Fails only where the holder has stopped reading.
        let _ = send.finish();
        Ok(stream)
    }

    async fn frame(&mut self) -> Result<(Kind, Bytes), LinkError> {
        self.next_frame().await?.ok_or_else(|| Misbehaviour::Frame(BadFrame::Truncated).into())
    }

    /// The next frame, or the end between two frames.
    async fn next_frame(&mut self) -> Result<Option<(Kind, Bytes)>, LinkError> {
        let mut header = [0; HEADER_SIZE];
        match self.receive.read_exact(&mut header).await {
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            read => read.map_err(|error| self.cut_short(error))?,
        }
        let header = Header::decode(&header).map_err(Misbehaviour::Frame)?;
        // No longer than its kind may be, and of a node that is trusted to have an identity.
        let mut body = vec![0; header.body_len];
        self.receive.read_exact(&mut body).await.map_err(|error| self.cut_short(error))?;
        Ok(Some((header.kind, body.into())))
    }

    /// Nothing may follow.
    async fn end(&mut self) -> Result<(), LinkError> {
        match self.receive.read(&mut [0]).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(Misbehaviour::Trailing.into()),
            Err(error) => Err(self.cut_short(ReadExactError::ReadError(error))),
        }
    }

    fn cut_short(&self, error: ReadExactError) -> LinkError {
        match error {
            ReadExactError::FinishedEarly(_) => Misbehaviour::Frame(BadFrame::Truncated).into(),
            ReadExactError::ReadError(ReadError::ConnectionLost(error)) => lost(self.connection.remote_address(), &error),
            ReadExactError::ReadError(ReadError::Reset(code)) => Misbehaviour::Reset { code: code.into_inner() }.into(),
            ReadExactError::ReadError(ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected) => {
                unreachable!("read in order, to the end, without 0-RTT")
            }
        }
    }
}
