//! Read leases that are abused, over the wire: each case is refused with its code, succeeds when its one check is left out, and
//! no byte of another tenant leaves.

use std::time::Duration;

use bytes::Bytes;
use control::lease::{Check, GRACE, TERM};
use pages::fakes::MemoryImage;
use pages::wire::{Blob, Content, EXTENT_BYTES, Hints, LeaseToken, RefusalCode};
use pages::{Link, LinkError};
use types::manifest::WorkingSetRun;
use types::{Digest, ExtentIndex, NodeId, Tenant};

use crate::common::{Holder, LeaseGate, PATIENCE, code, fetch, id, request};

const CANARY: [u8; 16] = *b"canary of victim";
const EXTENTS: u32 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    HashPage,
    Extents,
    Hints,
    Renew,
    Release,
}

const KINDS: [Kind; 5] = [Kind::HashPage, Kind::Extents, Kind::Hints, Kind::Renew, Kind::Release];

fn expected(check: Check) -> RefusalCode {
    match check {
        Check::Present => RefusalCode::NoLease,
        Check::Signed => RefusalCode::Forged,
        Check::Node => RefusalCode::OtherNode,
        Check::Image => RefusalCode::OtherImage,
        Check::Tenant => RefusalCode::OtherTenant,
        Check::Term => RefusalCode::Expired,
        Check::Serial => RefusalCode::Replayed,
        Check::Epoch => RefusalCode::Revoked,
        Check::Range => RefusalCode::OutOfRange,
    }
}

/// A renewal and a release name no image, tenant or extent, so these cannot be wrong there.
fn is_possible(check: Check, kind: Kind) -> bool {
    !matches!((check, kind), (Check::Image | Check::Tenant | Check::Range, Kind::Renew | Kind::Release))
}

fn own_image() -> MemoryImage {
    MemoryImage::patterned(Tenant::default_tenant(), EXTENTS)
}

fn victims_image() -> MemoryImage {
    let extent = Bytes::from(CANARY.repeat(EXTENT_BYTES / CANARY.len()));
    MemoryImage::new("victim".parse().unwrap(), vec![Some(extent); EXTENTS as usize])
}

/// A holder of two tenants' images, and a reader that may read one.
struct Scene {
    holder: Holder,
    gate: LeaseGate,
    reader: NodeId,
    link: Link,
    _reader: crate::common::Reader,
}

/// What is sent, and all that came back.
struct Abuse {
    lease: LeaseToken,
    image: Digest,
    first: u32,
}

impl Scene {
    fn new(gate: LeaseGate) -> Self {
        let holder = Holder::of(gate.clone(), [own_image(), victims_image()]);
        let (reader, link) = holder.reader(&["default"]);
        Self { holder, gate, reader: reader.identity.node(), link, _reader: reader }
    }

    fn grant(&self, reader: NodeId, tenant: &str, image: Digest) -> LeaseToken {
        let mut leases = self.gate.leases.lock().unwrap();
        Blob::new(leases.grant(self.gate.now(), reader, tenant.parse().unwrap(), image).unwrap().token).unwrap()
    }

    /// Prepares an abuse of a lease on one's own image.
    fn abuse(&self, check: Check) -> Abuse {
        let (own, victims) = (own_image().digest(), victims_image().digest());
        let mut lease = self.grant(self.reader, "default", own);
        let mut image = own;
        let mut first = 0;
        match check {
            Check::Present => lease = LeaseToken::default(),
            Check::Signed => {
                let mut token = lease.to_vec();
                token[3] ^= 1;
                lease = Blob::new(token).unwrap();
            }
            Check::Node => lease = self.grant(NodeId::from_uuid(uuid::Uuid::now_v7()), "default", own),
            // For a lease that names both images' tenant, only the image is another.
            Check::Image => {
                image = victims;
                lease = self.grant(self.reader, "victim", own);
            }
            // As if a bug had granted it: a lease on the victim's image in the reader's own name.
            Check::Tenant => {
                image = victims;
                lease = self.grant(self.reader, "default", victims);
            }
            Check::Term => self.gate.advance(TERM),
            Check::Serial => {
                self.gate.leases.lock().unwrap().renew(self.gate.now(), &lease, self.reader).unwrap();
                self.gate.advance(GRACE);
            }
            Check::Epoch => drop(self.gate.leases.lock().unwrap().revoke_node(self.reader)),
            Check::Range => first = EXTENTS,
        }
        Abuse { lease, image, first }
    }

    /// Sends it. All bytes that come back are in the result.
    async fn send(&self, kind: Kind, abuse: &Abuse) -> Result<Vec<u8>, LinkError> {
        let Abuse { lease, image, first } = abuse;
        match kind {
            Kind::HashPage => {
                let page = first.div_ceil(1024);
                self.link.hash_page(lease, *image, 0, page, PATIENCE).await.map(|page| page.to_vec())
            }
            Kind::Extents => {
                let (answers, end) = fetch(&self.link, &request(lease, *image, *first..first + 4)).await;
                let mut bytes = Vec::new();
                for answer in answers {
                    if let Content::Data(data) = answer.content {
                        bytes.extend_from_slice(&data);
                    }
                }
                assert!(end.is_ok() || bytes.is_empty(), "extents came before the refusal");
                end.map(|()| bytes)
            }
            Kind::Hints => {
                let runs = Hints::first_of([WorkingSetRun { region: 0, start: ExtentIndex(*first), count: 2 }]);
                self.link.hints(lease, *image, runs, PATIENCE).await.map(|()| Vec::new())
            }
            Kind::Renew => self.link.renew(lease, PATIENCE).await.map(|renewed| renewed.lease.to_vec()),
            Kind::Release => self.link.release(lease, PATIENCE).await.map(|()| Vec::new()),
        }
    }
}

fn has_canary(bytes: &[u8]) -> bool {
    bytes.windows(CANARY.len()).any(|window| window == CANARY)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_abuse_of_each_request_is_refused_with_its_code_and_passes_only_without_its_check() {
    let mut cases = 0;
    for check in Check::ALL {
        let guarded = Scene::new(LeaseGate::new());
        let open = Scene::new(LeaseGate::without(check));
        for kind in KINDS.into_iter().filter(|kind| is_possible(check, *kind)) {
            let outcome = guarded.send(kind, &guarded.abuse(check)).await;
            assert_eq!(code(outcome), expected(check), "{check:?} x {kind:?}");
            assert_eq!(guarded.holder.store.served(), [], "{check:?} x {kind:?}");

            let abuse = open.abuse(check);
            let got = open.send(kind, &abuse).await.unwrap_or_else(|error| panic!("{check:?} x {kind:?}: {error:?}"));
            // The guard matters: without it the canary does leave.
            let leaks = matches!(check, Check::Image | Check::Tenant) && kind == Kind::Extents;
            assert_eq!(has_canary(&got), leaks, "{check:?} x {kind:?}");
            cases += 1;
        }
        assert!(guarded.holder.server.counters().refused > 0);
    }
    println!("held: {cases} abuses of leases, each refused by its own check alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_image_cannot_be_opened() {
    let scene = Scene::new(LeaseGate::new());
    let victims = victims_image().digest();
    for tenant in ["victim", "default"] {
        let tenant: Tenant = tenant.parse().unwrap();
        assert_eq!(code(scene.link.open(&tenant, victims, PATIENCE).await), RefusalCode::OtherTenant, "as {tenant}");
    }
    assert!(scene.gate.leases.lock().unwrap().is_empty());
    // Whoever may read that tenant opens it: it is the tenant that was refused.
    let (_friend, link) = scene.holder.reader(&["victim"]);
    let opened = link.open(&"victim".parse().unwrap(), victims, PATIENCE).await.unwrap();
    let (answers, end) = fetch(&link, &request(&opened.lease, victims, [0])).await;
    end.unwrap();
    assert!(matches!(&answers[0].content, Content::Data(data) if has_canary(data)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_ends_in_the_middle_of_an_answer_ends_the_answer() {
    let scene = Scene::new(LeaseGate::new());
    let own = own_image().digest();
    let lease = scene.grant(scene.reader, "default", own);
    scene.holder.store.lie_about(id(2), Some(pages::fakes::Lie::Slow(Duration::from_millis(300))));
    let asked = request(&lease, own, 1..5);
    let mut got = Vec::new();
    let answer = scene.link.extents(&asked, PATIENCE, |answer| {
        // The first has come; the second is late, and by then the lease has gone.
        scene.gate.leases.lock().unwrap().revoke_image(own);
        got.push(answer.id);
    });
    assert_eq!(code(answer.await), RefusalCode::Revoked);
    assert_eq!(got, [id(1)]);
}
