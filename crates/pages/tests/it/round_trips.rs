//! What honest nodes do with each other.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chaos::relay::{Config, Direction, Impairment, Relay};
use futures_util::future::BoxFuture;
use pages::endpoint::{Limits, Tuning};
use pages::fakes::{Ask, Gate, MemoryImage, OpenGate};
use pages::identity::Peer;
use pages::server::Orders;
use pages::wire::{Content, EXTENT_BYTES, Hints, Refusal, RefusalCode, Renewed, Urgency};
use pages::{LinkError, Role};
use types::manifest::{WorkingSetRun, decode_hash_page};
use types::{Digest, ExtentIndex, Head, Tenant};

use crate::common::{Holder, LeaseGate, PATIENCE, Reader, code, fetch, id, identity, request};

fn image() -> MemoryImage {
    MemoryImage::patterned(Tenant::default_tenant(), 64)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_gets_every_extent_as_it_is_and_no_bytes_of_zeros() {
    let image = image();
    let holder = Holder::of(LeaseGate::new(), [image.clone()]);
    let (_reader, link) = holder.reader(&["default"]);
    let opened = link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    assert!(opened.is_complete);
    let head = Head::decode(&opened.head, image.digest()).unwrap();
    let digests = decode_hash_page(&opened.hash_pages[0], 64, head.regions[0].hash_pages[0]).unwrap();
    let page = link.hash_page(&opened.lease, image.digest(), 0, 0, PATIENCE).await.unwrap();
    assert_eq!(page, opened.hash_pages[0]);
    for may_compress in [false, true] {
        for (first, urgency) in (0..64).step_by(16).zip([Urgency::Demand, Urgency::Replay, Urgency::Stream].into_iter().cycle())
        {
            let mut request = request(&opened.lease, image.digest(), (first..first + 16).rev());
            (request.may_compress, request.urgency) = (may_compress, urgency);
            let (answers, end) = fetch(&link, &request).await;
            end.unwrap();
            assert!(answers.iter().map(|answer| &answer.id).eq(request.extents.as_slice()), "in the order asked for");
            for answer in answers {
                let extent = answer.id.extent;
                let expected = image.extent(extent).map_or(Content::Zero, |data| Content::Data(data.clone()));
                assert_eq!(answer.content, expected, "{extent}");
                match answer.content {
                    Content::Data(data) => assert_eq!(Digest::of(&data), digests[extent.0 as usize]),
                    _ => assert!(answer.wire_bytes < 64, "{} bytes for a zero extent", answer.wire_bytes),
                }
                let compresses = may_compress && extent.0 % 4 == 1;
                assert_eq!(answer.wire_bytes < EXTENT_BYTES / 2, compresses || extent.0 % 4 == 0, "{extent}");
            }
        }
    }
}

/// Looks at the second extent of a request only when the first has arrived.
struct AfterTheFirst(Mutex<Receiver<ExtentIndex>>);

impl Gate for AfterTheFirst {
    fn grant(&self, peer: &Peer, tenant: &Tenant, image: Digest) -> Result<Renewed, Refusal> {
        OpenGate.grant(peer, tenant, image)
    }

    fn renew(&self, peer: &Peer, lease: &[u8]) -> Result<Renewed, Refusal> {
        OpenGate.renew(peer, lease)
    }

    fn release(&self, peer: &Peer, lease: &[u8]) -> Result<(), Refusal> {
        OpenGate.release(peer, lease)
    }

    fn check(&self, _peer: &Peer, _lease: &[u8], ask: &Ask) -> Result<(), Refusal> {
        if ask.extents.as_ref().is_none_or(|(_, extents)| extents.start != 1) {
            return Ok(());
        }
        match self.0.lock().unwrap().recv_timeout(PATIENCE / 2) {
            Ok(ExtentIndex(0)) => Ok(()),
            other => Err(Refusal::new(RefusalCode::Failed, format_args!("the first extent has not arrived: {other:?}"))),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extent_is_sent_before_the_next_one_of_its_request_is_read() {
    let image = image();
    let (arrived, arrivals) = channel();
    // As a node has it: one thread that reads and sends.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let holder = {
        let _within = runtime.enter();
        Holder::of(AfterTheFirst(Mutex::new(arrivals)), [image.clone()])
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || runtime.block_on(stopped));
    let (_reader, link) = holder.reader(&["default"]);
    let opened = link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    let request = request(&opened.lease, image.digest(), 0..2);
    link.extents(&request, PATIENCE, |answer| arrived.send(answer.id.extent).unwrap()).await.unwrap();
    stop.send(()).unwrap();
    serving.join().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_renewed_and_given_back_and_advice_is_taken() {
    let image = image();
    let gate = LeaseGate::new();
    let holder = Holder::of(gate.clone(), [image.clone()]);
    let (_reader, link) = holder.reader(&["default"]);
    let opened = link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    gate.advance(Duration::from_secs(50));
    let renewed = link.renew(&opened.lease, PATIENCE).await.unwrap();
    gate.advance(Duration::from_secs(50));
    let runs = Hints::first_of([WorkingSetRun { region: 0, start: ExtentIndex(5), count: 3 }]);
    link.hints(&renewed.lease, image.digest(), runs.clone(), PATIENCE).await.unwrap();
    assert_eq!(holder.store.hints_received(), [(image.digest(), runs)]);
    assert!(gate.leases.lock().unwrap().holds_on(image.digest()));
    link.release(&renewed.lease, PATIENCE).await.unwrap();
    assert!(!gate.leases.lock().unwrap().holds_on(image.digest()));
    assert_eq!(code(link.renew(&renewed.lease, PATIENCE).await), RefusalCode::Replayed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_holder_does_not_have_is_said() {
    let image = image();
    let holder = Holder::of(LeaseGate::new(), [image.clone()]);
    let (_reader, link) = holder.reader(&["default"]);
    let other = Digest::of(b"other");
    assert_eq!(code(link.open(&Tenant::default_tenant(), other, PATIENCE).await), RefusalCode::UnknownImage);
    holder.store.lose(id(2));
    let opened = link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
    assert!(!opened.is_complete);
    let (answers, end) = fetch(&link, &request(&opened.lease, image.digest(), 2..4)).await;
    end.unwrap();
    assert_eq!(answers[0].content, Content::Absent);
    assert!(matches!(answers[1].content, Content::Data(_)));
}

/// Reverses what it is told, and refuses voters.
struct Reverser;

impl Orders for Reverser {
    fn order(&self, peer: Peer, body: Bytes) -> BoxFuture<'_, Result<Bytes, Refusal>> {
        Box::pin(async move {
            match peer.role {
                Role::Learner => Ok(body.iter().rev().copied().collect()),
                Role::Voter => Err(Refusal::new(RefusalCode::Failed, "no \u{1b}[31mvoters")),
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_are_taken_and_refused() {
    let holder = Holder::with(LeaseGate::new(), [], Arc::new(Reverser), (Tuning::default(), Limits::default()));
    let (_reader, link) = holder.reader(&[]);
    assert_eq!(link.order(b"fork", PATIENCE).await.unwrap(), "krof");
    let longest = vec![7; 64 << 10];
    assert_eq!(link.order(&longest, PATIENCE).await.unwrap(), longest);
    assert!(matches!(link.order(&[0; (64 << 10) + 1], PATIENCE).await, Err(LinkError::Order(_))));
    let voter = Reader::of(pages::Identity::generate(identity().node(), Role::Voter).unwrap());
    holder.meet(&voter, &[]);
    let refusal = voter.link(&holder).order(b"fork", PATIENCE).await.unwrap_err();
    let LinkError::Refused(refusal) = refusal else { panic!("{refusal}") };
    assert_eq!(refusal.to_string(), "FAILED: no ?[31mvoters");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_connects_again_to_a_holder_that_was_away() {
    let image = image();
    let holder = Holder::of(OpenGate, [image.clone()]);
    let (reader, link) = holder.reader(&["default"]);
    let nobody = reader.client.link("127.0.0.1:9".parse().unwrap(), None);
    let short = Duration::from_millis(200);
    let unreachable = nobody.open(&Tenant::default_tenant(), image.digest(), short).await.unwrap_err();
    assert!(matches!(unreachable, LinkError::TimedOut { .. } | LinkError::Unreachable { .. }), "{unreachable}");

    let first = link.connect(PATIENCE).await.unwrap();
    assert_eq!(first.node, holder.identity.node());
    let _holder = holder.restart(&Tuning::default()).await;
    link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
}

/// A holder that was killed and started again does not know its connections, and cannot say so. What reads from it would wait
/// for the idle timeout.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_fallen_silent_is_replaced() {
    let image = image();
    let patient = Tuning { idle_timeout: 3 * PATIENCE, ..Tuning::default() };
    let orders = Arc::new(pages::server::NoOrders);
    let holder = Holder::with(OpenGate, [image.clone()], orders, (patient.clone(), Limits::default()));
    let relay = Relay::start(Config::to(holder.server.address())).unwrap();
    let reader = Reader::tuned(identity(), &patient);
    holder.meet(&reader, &["default"]);
    let link = reader.client.link(relay.address(), Some(holder.identity.node()));
    let tenant = Tenant::default_tenant();
    link.open(&tenant, image.digest(), PATIENCE).await.unwrap();

    let set = |impairment| [Direction::ToUpstream, Direction::ToClient].iter().for_each(|way| relay.set(*way, impairment));
    set(Impairment::blocked());
    // Calls that give up before the silence is long enough, and one that does not.
    for _ in 0..3 {
        let error = link.open(&tenant, image.digest(), Duration::from_millis(250)).await.unwrap_err();
        assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
    }
    let call = tokio::spawn({
        let (link, tenant, digest) = (link.clone(), tenant.clone(), image.digest());
        async move { link.open(&tenant, digest, PATIENCE).await }
    });
    let holder = holder.restart(&patient).await;
    assert!(!call.is_finished(), "nothing is answered over a way that is blocked");
    set(Impairment::default());
    call.await.unwrap().unwrap();
    assert_eq!(holder.server.counters().accepted, 1);
}

/// As the pager does: one thread, nothing that needs `Send`.
#[test]
fn a_client_works_in_a_current_thread_runtime() {
    let image = image();
    let serving = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let entered = serving.enter();
    let holder = Holder::of(LeaseGate::new(), [image.clone()]);
    drop(entered);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let got = std::rc::Rc::new(std::cell::Cell::new(0));
    let counting = std::rc::Rc::clone(&got);
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let (_reader, link) = holder.reader(&["default"]);
        let opened = link.open(&Tenant::default_tenant(), image.digest(), PATIENCE).await.unwrap();
        let task = tokio::task::spawn_local(async move {
            let request = request(&opened.lease, image.digest(), 0..16);
            link.extents(&request, PATIENCE, |_| counting.set(counting.get() + 1)).await
        });
        task.await.unwrap().unwrap();
    });
    assert_eq!(got.get(), 16);
}
