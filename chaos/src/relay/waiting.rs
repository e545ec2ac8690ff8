//! Datagrams that wait for their time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use quinn_udp::{EcnCodepoint, RecvMeta};

use super::impairment::Direction;

/// The most bytes that wait in one relay: 100 ms of 5 Gbit/s.
const BYTES_MAX: usize = 64 << 20;
/// How much of them a datagram takes besides its bytes, so that empty ones are bounded as well.
const OVERHEAD_BYTES: usize = 128;
/// The most buffers that are kept to be used again.
const SPARE_MAX: usize = 512;

/// What goes with datagrams besides their bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label {
    pub(super) flow: u64,
    pub(super) direction: Direction,
    pub(super) ecn: Option<EcnCodepoint>,
    /// The length of each datagram but the last, which may be shorter; at least one.
    pub(super) stride: usize,
}

impl Label {
    pub(super) fn new(flow: u64, direction: Direction, meta: &RecvMeta) -> Self {
        Self { flow, direction, ecn: meta.ecn, stride: meta.stride.max(1) }
    }
}

/// Datagrams of one message that leave together.
#[derive(Debug)]
pub(super) struct Parcel {
    pub(super) label: Label,
    pub(super) bytes: Vec<u8>,
}

/// Parcels, by the time at which they are due; those due at the same time in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    heap: BinaryHeap<Reverse<Entry>>,
    /// How many have come.
    count: u64,
    bytes: usize,
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Entry {
    due: Duration,
    number: u64,
    parcel: Parcel,
}

impl Waiting {
    /// Keeps a copy of `bytes` until they are due. `false` if the relay's memory is full.
    pub(super) fn push(&mut self, due: Duration, label: Label, bytes: &[u8]) -> bool {
        let cost = bytes.len() + OVERHEAD_BYTES;
        if self.bytes + cost > BYTES_MAX {
            return false;
        }
        self.bytes += cost;
        let mut copy = self.spare.pop().unwrap_or_default();
        copy.extend_from_slice(bytes);
        self.count += 1;
        self.heap.push(Reverse(Entry { due, number: self.count, parcel: Parcel { label, bytes: copy } }));
        true
    }

    /// When the next is due.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.heap.peek().map(|Reverse(entry)| entry.due)
    }

    /// The next that is due by `now`.
    pub(super) fn pop(&mut self, now: Duration) -> Option<Parcel> {
        if self.next_due()? > now {
            return None;
        }
        let Reverse(Entry { parcel, .. }) = self.heap.pop()?;
        self.bytes -= parcel.bytes.len() + OVERHEAD_BYTES;
        Some(parcel)
    }

    /// Takes a buffer back.
    pub(super) fn recycle(&mut self, mut bytes: Vec<u8>) {
        if self.spare.len() < SPARE_MAX {
            bytes.clear();
            self.spare.push(bytes);
        }
    }
}

impl Entry {
    fn key(&self) -> (Duration, u64) {
        (self.due, self.number)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(flow: u64) -> Label {
        Label { flow, direction: Direction::ToClient, ecn: None, stride: 1 }
    }

    #[test]
    fn parcels_leave_by_time_and_then_in_the_order_in_which_they_came() {
        let mut waiting = Waiting::default();
        for (flow, due) in [(1, 5), (2, 3), (3, 5), (4, 9), (5, 3)] {
            assert!(waiting.push(Duration::from_secs(due), label(flow), b"abc"));
        }
        assert_eq!(waiting.next_due(), Some(Duration::from_secs(3)));
        let mut left = Vec::new();
        while let Some(parcel) = waiting.pop(Duration::from_secs(5)) {
            assert_eq!(parcel.bytes, b"abc");
            left.push(parcel.label.flow);
            waiting.recycle(parcel.bytes);
        }
        assert_eq!(left, [2, 5, 1, 3]);
        assert_eq!(waiting.next_due(), Some(Duration::from_secs(9)));
    }

    #[test]
    fn memory_is_bounded_also_against_empty_datagrams_and_comes_back() {
        for length in [0, 1200, 60_000] {
            let bytes = vec![7; length];
            let mut waiting = Waiting::default();
            let mut count = 0;
            while waiting.push(Duration::ZERO, label(0), &bytes) {
                count += 1;
            }
            assert_eq!(count, BYTES_MAX / (length + OVERHEAD_BYTES));
            let parcel = waiting.pop(Duration::ZERO).unwrap();
            waiting.recycle(parcel.bytes);
            assert!(waiting.push(Duration::ZERO, label(0), &bytes));
        }
    }
}
