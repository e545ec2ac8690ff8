//! Notices that a node which was sent something does not acknowledge it.

use std::time::Duration;

use quinn::Connection;
use tokio::time::Instant;

/// How long a node may be silent. Shorter, and a busy one is connected to for nothing; longer, and children wait for it.
const SILENT: Duration = Duration::from_millis(500);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What was sent and received when something was last received.
pub(crate) struct Silence {
    received: u64,
    asked: u64,
    /// Since when something that is to be acknowledged is under way, and nothing was received.
    since: Option<Instant>,
}

impl Silence {
    pub(crate) fn new(connection: &Connection) -> Self {
        let (received, asked) = counts(connection);
        Self { received, asked, since: None }
    }

    /// Returns when the node has been silent for too long. Again and again, as long as it is.
    pub(crate) async fn wait(&mut self, connection: &Connection) {
        loop {
            tokio::time::sleep(LOOK).await;
            let (received, asked) = counts(connection);
            if received != self.received {
                *self = Self { received, asked, since: None };
            } else if asked != self.asked {
                let since = *self.since.get_or_insert_with(Instant::now);
                if since.elapsed() >= SILENT {
                    return;
                }
            }
        }
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
