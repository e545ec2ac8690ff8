//! Nodes that one authority vouches for, services beside pages, and strangers who ask to be let in.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use pages::client::Unasked;
use pages::endpoint::{Limits, Tuning};
use pages::fakes::{MemoryImage, MemoryStore, OpenGate};
use pages::identity::Fingerprint;
use pages::server::{Answers, Handler, NoOrders, Server, Service, Setup};
use pages::trust::NotTrusted;
use pages::{Authority, Certificate, Client, Identity, LinkError, Role, Trust, join};
use types::{Digest, Name, Tenant};

use crate::common::{PATIENCE, identity};

const ALPN_ECHO: &[u8] = b"farfork-test-echo/1";

/// Says who asked, and what.
struct Echo;

impl Answers for Echo {
    fn answer(&self, shown: Certificate, request: Bytes) -> BoxFuture<'static, Bytes> {
        let peer = shown.peer();
        let text = format!("{} {} {}", peer.node, peer.name, String::from_utf8_lossy(&request));
        Box::pin(async move { text.into() })
    }
}

/// A node of a cluster.
struct Node {
    identity: Identity,
    trust: Trust,
    server: Server,
    client: Client,
}

impl Node {
    fn of(authority: &Authority, name: &str, images: impl IntoIterator<Item = MemoryImage>) -> Self {
        Self::with(certified(authority, &identity(), name, Role::Voter), authority, images)
    }

    fn with(identity: Identity, authority: &Authority, images: impl IntoIterator<Item = MemoryImage>) -> Self {
        let trust = Trust::new();
        trust.join(authority.root().clone());
        let service = |alpn, admits_strangers| Service {
            alpn,
            handler: Handler::Ask { answers: Arc::new(Echo), request_bytes_max: 1 << 20, request_time: PATIENCE },
            admits_strangers,
        };
        let server = Server::start(Setup {
            listen: "127.0.0.1:0".parse().unwrap(),
            identity: &identity,
            trust: trust.clone(),
            store: Arc::new(MemoryStore::new(OpenGate, images)),
            orders: Arc::new(NoOrders),
            services: vec![service(ALPN_ECHO, false), service(join::ALPN_JOIN, true)],
            tuning: Tuning::default(),
            limits: Limits::default(),
        });
        let client = Client::new(&identity, &trust, &Tuning::default()).unwrap();
        Self { server: server.unwrap(), identity, trust, client }
    }

    async fn echo(&self, other: &Self, text: &'static str) -> Result<Bytes, LinkError> {
        let way =
            self.client.way(&self.identity, ALPN_ECHO, other.server.address(), Some(other.identity.node()), true).unwrap();
        asked(way.ask(Bytes::from_static(text.as_bytes()), 1 << 20, PATIENCE).await)
    }
}

fn certified(authority: &Authority, identity: &Identity, name: &str, role: Role) -> Identity {
    let pem = authority.issue(identity.certificate(), &Name::parse(name).unwrap(), role).unwrap();
    Identity::from_pem(pem.as_bytes(), identity.key_pem().as_bytes()).unwrap()
}

fn asked(outcome: Result<Bytes, Unasked>) -> Result<Bytes, LinkError> {
    outcome.map_err(|(Unasked::NotSent(error) | Unasked::NoAnswer(error))| error)
}

#[track_caller]
fn not_trusted<T: std::fmt::Debug>(outcome: Result<T, LinkError>) -> NotTrusted {
    match outcome {
        Err(LinkError::NotTrusted { source, .. }) => source,
        other => panic!("it was let in: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_a_cluster_trust_one_another_until_one_is_revoked() {
    let authority = Authority::generate().unwrap();
    let image = MemoryImage::patterned(Tenant::default_tenant(), 8);
    let (one, two) = (Node::of(&authority, "one", [image.clone()]), Node::of(&authority, "two", []));
    let answer = two.echo(&one, "hello").await.unwrap();
    assert_eq!(answer, format!("{} two hello", two.identity.node()).as_bytes());
    let link = two.client.link(one.server.address(), Some(one.identity.node()));
    link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    // One that it trusts beside the cluster reads pages, and speaks nothing else.
    let friend = Node::with(identity(), &authority, []);
    one.trust.add(friend.identity.certificate(), [Tenant::default_tenant()]).unwrap();
    let pages = friend.client.link(one.server.address(), Some(one.identity.node()));
    pages.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    not_trusted(friend.echo(&one, "hello").await);
    // Of another cluster, and of none.
    let other = Authority::generate().unwrap();
    not_trusted(Node::of(&other, "two", []).echo(&one, "hello").await);
    not_trusted(Node::with(identity(), &authority, []).echo(&one, "hello").await);
    // Its connections end, and it gets no other; the one that stays is served.
    one.trust.set_revoked(BTreeSet::from([two.identity.node()]));
    let deadline = std::time::Instant::now() + PATIENCE;
    while link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "it is served on");
    }
    not_trusted(two.echo(&one, "hello").await);
    Node::of(&authority, "three", []).echo(&one, "hello").await.unwrap();
}

/// A certificate that has run out, and one of a time to come: the dates of the authority's signature count.
#[tokio::test(flavor = "multi_thread")]
async fn dates_of_certificates_hold_in_a_cluster() {
    let authority = Authority::generate().unwrap();
    let one = Node::of(&authority, "one", []);
    let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
    for (from, to) in [(now - 3 * hour, now - 2 * hour), (now + hour, now + 2 * hour)] {
        let own = identity();
        let pem = authority.issue_valid(own.certificate(), &Name::parse("late").unwrap(), Role::Voter, from, to).unwrap();
        let late = Identity::from_pem(pem.as_bytes(), own.key_pem().as_bytes()).unwrap();
        not_trusted(Node::with(late, &authority, []).echo(&one, "hello").await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_may_ask_to_be_let_in_and_nothing_else() {
    let authority = Authority::generate().unwrap();
    let one = Node::of(&authority, "one", []);
    let stranger = identity();
    let (address, root) = (one.server.address(), authority.root().fingerprint());
    let ask = |root: Fingerprint| join::ask(&stranger, address, root, Bytes::from_static(b"let me in"), PATIENCE);
    let answer = ask(root).await.unwrap();
    assert!(answer.starts_with(stranger.node().to_string().as_bytes()), "its key is proven: {answer:?}");
    // A node that is not of the cluster that is meant learns nothing.
    let refused = not_trusted(ask(Fingerprint(Digest::of(b"another"))).await);
    assert!(matches!(refused, NotTrusted::Handshake { .. }), "{refused:?}");
    // Nor does one that lets nobody in.
    let learner = Node::with(certified(&authority, &identity(), "learner", Role::Learner), &authority, []);
    let token = Bytes::from_static(b"a secret");
    let refused = not_trusted(join::ask(&stranger, learner.server.address(), root, token, PATIENCE).await);
    assert!(refused.to_string().contains("NoVoter"), "{refused:?}");
    // Any other protocol.
    let client = Client::new(&stranger, &one.trust, &Tuning::default()).unwrap();
    let way = client.way(&stranger, ALPN_ECHO, address, None, true).unwrap();
    not_trusted(asked(way.ask(Bytes::from_static(b"hello"), 1 << 20, PATIENCE).await));
    not_trusted(client.link(address, None).open(&Tenant::default_tenant(), Digest::of(b"image"), PATIENCE).await);
    // One that was revoked is a stranger.
    let two = Node::of(&authority, "two", []);
    one.trust.set_revoked(BTreeSet::from([two.identity.node()]));
    not_trusted(two.echo(&one, "hello").await);
    assert!(join::ask(&two.identity, address, root, Bytes::from_static(b"again"), PATIENCE).await.is_ok());
}
