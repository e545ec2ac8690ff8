//! Who is let in.

use std::time::{Duration, SystemTime};

use pages::fakes::{Lie, MemoryImage, OpenGate};
use pages::trust::{NotTrusted, TrustError};
use pages::wire::RefusalCode;
use pages::{Certificate, Identity, LinkError, Role};
use types::{NodeId, Tenant};
use uuid::Uuid;

use crate::common::{Holder, PATIENCE, Reader, code, id, identity, request};

fn image() -> MemoryImage {
    MemoryImage::patterned(Tenant::default_tenant(), 64)
}

#[track_caller]
fn assert_not_trusted<T: std::fmt::Debug>(outcome: Result<T, LinkError>) -> NotTrusted {
    match outcome {
        Err(LinkError::NotTrusted { source, .. }) => source,
        other => panic!("it was let in: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_must_be_mutual() {
    let image = image();
    let holder = Holder::of(OpenGate, [image.clone()]);
    let tenant = Tenant::default_tenant();
    let reader = Reader::of(identity());
    // Neither, one side alone, the other alone.
    assert_not_trusted(reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    reader.trust.add(holder.identity.certificate(), []).unwrap();
    assert_not_trusted(reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    reader.trust.remove(holder.identity.node());
    holder.trust.add(reader.identity.certificate(), [tenant.clone()]).unwrap();
    assert_not_trusted(reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    // Both.
    reader.trust.add(holder.identity.certificate(), []).unwrap();
    reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await.unwrap();
    // And only for its tenants.
    holder.trust.add(reader.identity.certificate(), ["other".parse().unwrap()]).unwrap();
    let refused = reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await;
    assert_eq!(code(refused), RefusalCode::OtherTenant);
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_future_and_copied_certificates_are_refused_on_both_sides() {
    let image = image();
    let tenant = Tenant::default_tenant();
    let holder = Holder::of(OpenGate, [image.clone()]);
    let node = || NodeId::from_uuid(Uuid::now_v7());
    let (hour, now) = (Duration::from_hours(1), SystemTime::now());
    let expired = Identity::generate_valid(node(), Role::Learner, now - 2 * hour, now - hour).unwrap();
    let future = Identity::generate_valid(node(), Role::Learner, now + hour, now + 2 * hour).unwrap();
    for identity in [expired, future] {
        let reader = Reader::of(identity);
        holder.meet(&reader, &["default"]);
        assert_not_trusted(reader.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    }
    // A reader whose node is trusted, but with another key: it made a certificate with the same name for itself.
    let (good, link) = holder.reader(&["default"]);
    link.open(&tenant, image.digest(), PATIENCE).await.unwrap();
    let copy = Reader::of(Identity::generate(good.identity.node(), Role::Learner).unwrap());
    copy.trust.add(holder.identity.certificate(), []).unwrap();
    assert_not_trusted(copy.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    // The same the other way round: the reader knows the holder's node by another certificate.
    let wary = Reader::of(identity());
    holder.trust.add(wary.identity.certificate(), [tenant.clone()]).unwrap();
    let false_holder = Identity::generate(holder.identity.node(), Role::Learner).unwrap();
    wary.trust.add(false_holder.certificate(), []).unwrap();
    assert_not_trusted(wary.link(&holder).open(&tenant, image.digest(), PATIENCE).await);
    let twice = wary.trust.add(holder.identity.certificate(), []);
    assert!(matches!(twice, Err(TrustError::NodeHasAnother { .. })), "{twice:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_than_the_expected_one_is_refused() {
    let holder = Holder::of(OpenGate, []);
    let (reader, _) = holder.reader(&["default"]);
    let expected = identity().node();
    let link = reader.client.link(holder.server.address(), Some(expected));
    let refusal = assert_not_trusted(link.connect(PATIENCE).await);
    assert_eq!(refusal, NotTrusted::OtherNode { expected, actual: holder.identity.node() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_removed_loses_its_connections_also_in_the_middle_of_an_answer() {
    let image = image();
    let tenant = Tenant::default_tenant();
    let holder = Holder::of(OpenGate, [image.clone()]);
    let (reader, link) = holder.reader(&["default"]);
    let lease = link.open(&tenant, image.digest(), PATIENCE).await.unwrap().lease;
    holder.store.lie_about(id(3), Some(Lie::Silent));
    let waiting = tokio::spawn({
        let (link, request) = (link.clone(), request(&lease, image.digest(), [3]));
        async move { link.extents(&request, PATIENCE, |_| {}).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(holder.trust.remove(reader.identity.node()));
    assert_not_trusted(waiting.await.unwrap());
    assert_not_trusted(link.open(&tenant, image.digest(), PATIENCE).await);
    // The reader's own list works at once, too.
    holder.trust.add(reader.identity.certificate(), [tenant.clone()]).unwrap();
    link.open(&tenant, image.digest(), PATIENCE).await.unwrap();
    reader.trust.remove(holder.identity.node());
    assert_not_trusted(link.open(&tenant, image.digest(), PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_does_not_outlive_its_certificate() {
    let image = image();
    let tenant = Tenant::default_tenant();
    let holder = Holder::of(OpenGate, [image.clone()]);
    let now = SystemTime::now();
    let node = NodeId::from_uuid(Uuid::now_v7());
    let reader = Reader::of(Identity::generate_valid(node, Role::Learner, now, now + Duration::from_secs(3)).unwrap());
    holder.meet(&reader, &["default"]);
    let link = reader.link(&holder);
    let lease = link.open(&tenant, image.digest(), PATIENCE).await.unwrap().lease;
    holder.store.lie_about(id(3), Some(Lie::Silent));
    assert_not_trusted(link.extents(&request(&lease, image.digest(), [3]), PATIENCE, |_| {}).await);
}

/// A certificate says nothing without its key: the handshake's signature is checked.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_with_another_key_is_no_identity() {
    let (one, other) = (identity(), identity());
    let mixed = Identity::from_pem(one.certificate_pem().as_bytes(), other.key_pem().as_bytes());
    assert!(mixed.is_err());
    assert_eq!(Certificate::from_pem(one.certificate_pem().as_bytes()).as_ref(), Ok(one.certificate()));
}
