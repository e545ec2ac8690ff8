//! What a relay has done.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::impairment::Direction;

/// What a relay has done since its start, as of an instant between two batches: what has been sent on has been counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// From clients to the server.
    pub to_upstream: Tally,
    /// From the server to clients.
    pub to_client: Tally,
    /// Clients' addresses seen. A client that comes back after its flow was dropped counts again.
    pub flows: u64,
    /// Flows dropped, since there were too many: each time that of the client which had been quiet for longest.
    pub flows_evicted: u64,
    /// Datagrams that came to a flow's socket from elsewhere than the server, or for which no flow could be made. They have no
    /// fate, and are in no other count.
    pub strays: u64,
    /// Processor time of the relay's thread; in JSON, in seconds.
    #[serde(rename = "processor_seconds", serialize_with = "as_seconds")]
    pub processor_time: Duration,
}

impl Counters {
    /// Those of one direction.
    #[must_use]
    pub fn of(&self, direction: Direction) -> &Tally {
        match direction {
            Direction::ToUpstream => &self.to_upstream,
            Direction::ToClient => &self.to_client,
        }
    }

    pub(super) fn of_mut(&mut self, direction: Direction) -> &mut Tally {
        match direction {
            Direction::ToUpstream => &mut self.to_upstream,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// The datagrams of one direction. Each that comes in, and each copy made, ends in one of `delivered`, `blocked`, `lost`,
/// `overflowed`, `refused`, or is still [on its way](Tally::in_flight).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Came in.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Sent on.
    pub delivered: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Came while the direction was blocked.
    pub blocked: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Copies made.
    pub duplicated: u64,
    /// Held back.
    pub reordered: u64,
    /// Changed by one bit.
    pub corrupted: u64,
    /// Did not fit into the queue before the rate, or into the relay's memory.
    pub overflowed: u64,
    /// The kernel did not take them, or their flow was dropped while they waited.
    pub refused: u64,
}

impl Tally {
    /// How many wait in the relay.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let ended = self.delivered + self.blocked + self.lost + self.overflowed + self.refused;
        (self.received + self.duplicated).saturating_sub(ended)
    }
}

fn as_seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}
