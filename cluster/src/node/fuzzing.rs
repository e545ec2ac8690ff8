//! What the fuzz targets in `fuzz/` and the replay of their corpora in the tests run: every parser of another node's bytes that is
//! not in `pages`, with what must hold when it accepts them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use agent::protocol::{Exit, Failed, FromAgent, Outcome, Phase, Step, encode, receive};
use control::command::{Command, Key};
use control::state::ImageKey;
use types::{Digest, MachineId, Name, NodeId, Reason, Tenant};
use uuid::Uuid;

use super::engine::{ForkStages, Forked};
use super::error::NodeError;
use super::offer::About;
use crate::member::join;
use crate::member::token::JoinToken;
use crate::raft::wire;

use super::peers::{Answer, ForkedChild, Order, PeerFailure, PeerForkOrder, PeerForkReport, PeerRefusal};

/// A fuzz target: its name, which is also the name of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 7] = [
    ("order", order),
    ("order_answer", answer),
    ("about_image", about),
    ("from_agent", from_agent),
    ("join", join_request),
    ("join_token", token),
    ("raft_message", raft_message),
];

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

/// What anybody may ask at a voter's door.
pub fn join_request(bytes: &[u8]) {
    if let Ok(request) = join::read(bytes) {
        let again = postcard::to_stdvec(&request).expect("plain data");
        assert_eq!(join::read(&again).ok(), Some(request));
    }
}

/// What somebody gives as a join token.
pub fn token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(token) = text.parse::<JoinToken>() {
        assert_eq!(token.to_string().parse(), Ok(token));
    }
}

/// What a member takes from another.
pub fn raft_message(bytes: &[u8]) {
    if let Ok(request) = wire::decode::<wire::Request>(bytes) {
        let once = wire::encode(&request);
        let twice = wire::decode::<wire::Request>(&once).expect("it was read before");
        assert_eq!(wire::encode(&twice), once);
    }
    if let Ok(response) = wire::decode::<wire::Response>(bytes) {
        let once = wire::encode(&response);
        let twice = wire::decode::<wire::Response>(&once).expect("it was read before");
        assert_eq!(wire::encode(&twice), once);
    }
}

fn a_token() -> JoinToken {
    let (addresses, authority) = (vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 7117))], Digest::of(b"an authority"));
    JoinToken { addresses, authority, name: Name::parse("node-2").expect("a name"), secret: [7; 32] }
}

fn a_proposal() -> wire::Request {
    let key = ImageKey { tenant: Tenant::default_tenant(), digest: Digest::of(b"an image") };
    let (node, epoch) = (NodeId::from_uuid(Uuid::max()), types::Epoch(9));
    let command = Command::Report {
        node,
        incarnation: 3,
        progress: vec![(key.clone(), epoch, 40)],
        gone: vec![(key, epoch)],
        ended: Vec::new(),
        local: None,
    };
    wire::Request::Propose { key: Some(Key(Uuid::max())), command }
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
    let asked = join::requests().map(|(name, request)| ("join", name, request));
    let seeds = vec![
        ("order", "fork", order.encode()),
        ("order_answer", "refused", Answer::Refused(refusal).encode()),
        ("order_answer", "forked", Answer::Forked(report).encode()),
        ("about_image", "pattern", About { pattern_pages: Some(4096) }.encode()),
        ("about_image", "none", About::default().encode()),
        ("from_agent", "conversation", frames.concat()),
        ("join_token", "token", a_token().to_string().into_bytes()),
        ("raft_message", "alive", wire::encode(&wire::Request::Alive { incarnation: 7 })),
        ("raft_message", "propose", wire::encode(&a_proposal())),
        ("raft_message", "answered", wire::encode(&wire::Response::Answered(control::Answer::Granted(types::Epoch(7))))),
        ("raft_message", "heard", wire::encode(&wire::Response::Heard(wire::Standing::Unknown { above: 3 }))),
    ];
    seeds.into_iter().chain(asked).collect()
}
