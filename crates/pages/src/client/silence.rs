//! Notices that a node which was sent something does not acknowledge it.

use std::time::Duration;

use quinn::Connection;
use tokio::time::Instant;

/// How long a node may be silent. Shorter, and a busy one is connected to for nothing; longer, and children wait for it.
const SILENT: Duration = Duration::from_millis(500);
/// How often it is looked at, as long as a call is under way.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// What was sent and received on a connection when something was last received. It outlives calls: those that give up early would
/// never notice.
#[derive(Default)]
pub(crate) struct Silence {
    connection: usize,
    received: u64,
    asked: u64,
    /// Since when something that is to be acknowledged is under way, and nothing was received.
    since: Option<Instant>,
}

impl Silence {
    /// Whether the node has been silent for too long.
    pub(crate) fn look(&mut self, connection: &Connection) -> bool {
        let (received, asked) = counts(connection);
        if self.connection != connection.stable_id() || received != self.received {
            *self = Self { connection: connection.stable_id(), received, asked, since: None };
        } else if asked != self.asked {
            return self.since.get_or_insert_with(Instant::now).elapsed() >= SILENT;
        }
        false
    }
}

/// Datagrams received, and frames sent that a peer has to acknowledge. Not the acknowledgements themselves: after the last
/// answer they are all that is sent, and nothing has to follow.
fn counts(connection: &Connection) -> (u64, u64) {
    let stats = connection.stats();
    let sent = stats.frame_tx;
    let asked = sent.stream + sent.ping + sent.stop_sending + sent.reset_stream + sent.max_data + sent.max_stream_data;
    (stats.udp_rx.datagrams, asked)
}
