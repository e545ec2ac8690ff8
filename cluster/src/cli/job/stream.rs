//! What comes of a job piece by piece: lines and events, wherever the pieces are cut, and which tasks were heard of.

use thiserror::Error;

/// The most bytes of a line: two outputs of 16 MiB each in which every byte is written as six, an input, and the rest.
const LINE_MAX: usize = 256 << 20;
/// The most bytes of an event.
const EVENT_MAX: usize = 16 << 20;

/// More than a node writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("more than {most} bytes without an end")]
pub(super) struct TooLong {
    most: usize,
}

/// Lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    /// Those that end in this piece and are not empty.
    pub(super) fn take(&mut self, piece: &[u8]) -> Result<Vec<Vec<u8>>, TooLong> {
        self.within(piece, LINE_MAX).map(|lines| lines.into_iter().filter(|line| !line.is_empty()).collect())
    }

    /// What is left when no more will come: a last line without an end.
    pub(super) fn rest(&mut self) -> Result<Vec<Vec<u8>>, TooLong> {
        self.take(b"\n")
    }

    fn within(&mut self, piece: &[u8], most: usize) -> Result<Vec<Vec<u8>>, TooLong> {
        let mut whole = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            if self.begun.len() + part.len() > most {
                return Err(TooLong { most });
            }
            self.begun.extend_from_slice(part);
            if self.begun.ends_with(b"\n") {
                let mut line = std::mem::take(&mut self.begun);
                line.pop();
                if line.ends_with(b"\r") {
                    line.pop();
                }
                whole.push(line);
            }
        }
        Ok(whole)
    }
}

/// What a server sends as `text/event-stream`
/// ([HTML, 9.2](https://html.spec.whatwg.org/multipage/server-sent-events.html)).
#[derive(Debug, Default)]
pub(super) struct Events {
    lines: Lines,
    name: String,
    data: Vec<u8>,
}

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Vec<u8>,
}

impl Events {
    /// Those that end in this piece.
    pub(super) fn take(&mut self, piece: &[u8]) -> Result<Vec<Event>, TooLong> {
        let mut whole = Vec::new();
        for line in self.lines.within(piece, EVENT_MAX)? {
            if line.is_empty() {
                let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
                if !data.is_empty() {
                    whole.push(Event { name, data });
                }
                continue;
            }
            let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
            let value = line.get(colon + 1..).unwrap_or_default();
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &line[..colon] {
                b"event" => self.name = String::from_utf8_lossy(value).into_owned(),
                b"data" if self.data.len() + value.len() > EVENT_MAX => return Err(TooLong { most: EVENT_MAX }),
                b"data" => {
                    if !self.data.is_empty() {
                        self.data.push(b'\n');
                    }
                    self.data.extend_from_slice(value);
                }
                // Comments keep the connection alive.
                _ => {}
            }
        }
        Ok(whole)
    }
}

/// Which tasks were heard of.
#[derive(Debug)]
pub(super) struct Seen {
    tasks: Vec<bool>,
    count: u32,
    /// All before it were.
    first: u32,
}

impl Seen {
    pub(super) fn new(tasks: u32) -> Self {
        Self { tasks: vec![false; tasks as usize], count: 0, first: 0 }
    }

    /// Whether this is the first that is heard of it; none if there is no such task.
    pub(super) fn see(&mut self, task: u32) -> Option<bool> {
        let seen = self.tasks.get_mut(task as usize)?;
        let is_new = !std::mem::replace(seen, true);
        self.count += u32::from(is_new);
        while self.tasks.get(self.first as usize).is_some_and(|seen| *seen) {
            self.first += 1;
        }
        Some(is_new)
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// The first that was not heard of; none if all were.
    pub(super) fn first_missing(&self) -> Option<u32> {
        ((self.first as usize) < self.tasks.len()).then_some(self.first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_events_are_the_same_wherever_the_pieces_are_cut() {
        let text = b"{\"task\":1}\n\n{\"task\":2}\r\nrest";
        let stream = b": alive\n\nevent: progress\ndata: {\"a\":\ndata:1}\n\nevent: end\r\ndata: {}\r\n\r\ndata: cut";
        for cut in 1..stream.len() {
            let mut lines = Lines::default();
            let mut whole: Vec<_> = text.chunks(cut).flat_map(|piece| lines.take(piece).unwrap()).collect();
            whole.extend(lines.rest().unwrap());
            assert_eq!(whole, [&b"{\"task\":1}"[..], b"{\"task\":2}", b"rest"]);
            let mut events = Events::default();
            let whole: Vec<_> = stream.chunks(cut).flat_map(|piece| events.take(piece).unwrap()).collect();
            let event = |name: &str, data: &[u8]| Event { name: name.to_owned(), data: data.to_vec() };
            assert_eq!(whole, [event("progress", b"{\"a\":\n1}"), event("end", b"{}")]);
        }
    }

    #[test]
    fn what_has_no_end_is_not_kept() {
        let (mut events, piece) = (Events::default(), vec![b'x'; 1 << 20]);
        let taken: Result<Vec<_>, _> = (0..17).map(|_| events.take(&piece)).collect();
        assert_eq!(taken.unwrap_err(), TooLong { most: EVENT_MAX });
        let mut line = b"data: ".to_vec();
        line.resize(1 << 20, b'x');
        line.push(b'\n');
        let mut events = Events::default();
        let taken: Result<Vec<_>, _> = (0..17).map(|_| events.take(&line)).collect();
        assert!(taken.is_err());
    }

    #[test]
    fn tasks_are_new_once() {
        let mut seen = Seen::new(3);
        assert_eq!((seen.see(1), seen.see(1), seen.see(3), seen.first_missing()), (Some(true), Some(false), None, Some(0)));
        assert_eq!((seen.see(0), seen.count(), seen.first_missing()), (Some(true), 2, Some(2)));
        assert_eq!((seen.see(2), seen.count(), seen.first_missing()), (Some(true), 3, None));
    }
}
