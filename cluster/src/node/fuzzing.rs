//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of another node's bytes that is
//! not in `pages`, with what must hold when it accepts them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use types::{Digest, MachineId, NodeId, Reason, Tenant};
use uuid::Uuid;

use super::engine::{ForkStages, Forked};
use super::error::NodeError;
use super::offer::About;
use super::peers::{Answer, ForkedChild, Order, PeerFailure, PeerForkOrder, PeerForkReport, PeerRefusal};

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 3] = [("order", order), ("order_answer", answer), ("about_image", about)];

/// What a node takes from one that asks it to fork.
pub fn order(bytes: &[u8]) {
    if let Ok(order) = Order::decode(bytes) {
        assert_eq!(Order::decode(&order.encode()), Ok(order));
    }
}

/// What a node takes from one that it has asked.
pub fn answer(bytes: &[u8]) {
    if let Ok(answer) = Answer::decode(bytes) {
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
    }
}

/// What a node takes from a holder besides the head of an image.
pub fn about(bytes: &[u8]) {
    let about = About::decode(bytes);
    assert_ne!(about.pattern_pages, Some(0), "nothing proves nothing");
    assert_eq!(About::decode(&about.encode()), about);
}

/// Messages for the corpora: a target, a name, and bytes that it accepts.
#[must_use]
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let order = Order::Fork(PeerForkOrder {
        image: Digest::of(b"an image"),
        tenant: Tenant::default_tenant(),
        count: 3,
        limit_bytes: Some(64 << 20),
        verify: true,
        holders: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 7117)), "[::1]:7117".parse().expect("an address")],
        deadline: Duration::from_secs(60),
    });
    let id = MachineId::from_uuid(Uuid::max());
    let refusal = PeerRefusal { reason: Some(Reason::PageSourceLost), ..PeerRefusal::of(&NodeError::Stopping) };
    let forked = Forked { id, first: Duration::from_micros(300), stages: ForkStages::default(), had_shell: true };
    let report = PeerForkReport {
        node: NodeId::from_uuid(Uuid::max()),
        children: vec![ForkedChild { forked, verified_pages: Some(4096), ready: None }],
        failures: vec![PeerFailure { id, refusal: refusal.clone() }],
    };
    vec![
        ("order", "fork", order.encode()),
        ("order_answer", "refused", Answer::Refused(refusal).encode()),
        ("order_answer", "forked", Answer::Forked(report).encode()),
        ("about_image", "pattern", About { pattern_pages: Some(4096) }.encode()),
        ("about_image", "none", About::default().encode()),
    ]
}
