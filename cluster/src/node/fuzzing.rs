//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of another node's bytes that is
//! not in `pages`, with what must hold when it accepts them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use agent::protocol::{Exit, Failed, FromAgent, Outcome, Phase, Step, encode, receive};
use types::{Digest, MachineId, NodeId, Reason, Tenant};
use uuid::Uuid;

use super::engine::{ForkStages, Forked};
use super::error::NodeError;
use super::offer::About;
use super::peers::{Answer, ForkedChild, Order, PeerFailure, PeerForkOrder, PeerForkReport, PeerRefusal};

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 4] =
    [("order", order), ("order_answer", answer), ("about_image", about), ("from_agent", from_agent)];

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

/// What a guest says, one frame after the other.
pub fn from_agent(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(message) = receive::<FromAgent>(&mut rest) {
        let again = encode(&message).expect("what came in a frame fits into one");
        assert_eq!(receive::<FromAgent>(&mut &again[..]).expect("a whole frame"), message);
    }
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
        network: true,
        holders: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 7117)), "[::1]:7117".parse().expect("an address")],
        deadline: Duration::from_secs(60),
    });
    let id = MachineId::from_uuid(Uuid::max());
    let refusal = PeerRefusal { reason: Some(Reason::PageSourceLost), ..PeerRefusal::of(&NodeError::Stopping) };
    let forked = Forked { id, first: Duration::from_micros(300), stages: ForkStages::default(), had_shell: true };
    let report = PeerForkReport {
        node: NodeId::from_uuid(Uuid::max()),
        children: vec![ForkedChild { forked, verified_pages: Some(4096), ready: None, link: None }],
        failures: vec![PeerFailure { id, refusal: refusal.clone() }],
    };
    let step = |name: &str, outcome| Step { name: name.to_owned(), took_us: 7, outcome };
    let steps = vec![step("rng", Outcome::Done), step("addresses", Outcome::Skipped("none".to_owned()))];
    let said = [
        FromAgent::Hello { version: 1, phase: Phase::Gated },
        FromAgent::Ready(steps),
        FromAgent::Stdout(b"out".to_vec()),
        FromAgent::Failed(Failed { message: "what".to_owned(), errno: 2 }),
        FromAgent::Exited(Exit::Signal(9)),
        FromAgent::Reply { bytes: 3 },
        FromAgent::Data(vec![1, 2, 3]),
    ];
    let frames: Vec<Vec<u8>> = said.iter().map(|message| encode(message).expect("short")).collect();
    vec![
        ("order", "fork", order.encode()),
        ("order_answer", "refused", Answer::Refused(refusal).encode()),
        ("order_answer", "forked", Answer::Forked(report).encode()),
        ("about_image", "pattern", About { pattern_pages: Some(4096) }.encode()),
        ("about_image", "none", About::default().encode()),
        ("from_agent", "conversation", frames.concat()),
    ]
}
