//! Read leases: each abuse is stopped by its own check and by no other, and the table does what a naive one does.

use std::time::Duration;

use control::lease::{Ask, Check, GRACE, LeaseKey, LeaseRefusal, Leases, Limits, TERM, TOKEN_SIZE_MAX};
use proptest::prelude::*;
use types::{Digest, NodeId, Tenant};
use uuid::Uuid;

const fn node(number: u128) -> NodeId {
    NodeId::from_uuid(Uuid::from_u128(number))
}

fn image(number: u8) -> Digest {
    Digest::of(&[number])
}

fn tenant(name: &str) -> Tenant {
    name.parse().unwrap()
}

fn leases() -> Leases {
    Leases::new(LeaseKey::new([7; 32]), Limits::default())
}

const START: Duration = Duration::from_secs(1000);
const READER: NodeId = node(1);

/// Grants a lease, abuses it, and says what came of checking and of renewing what is left of it.
fn abuse(check: Check, mut leases: Leases) -> [Result<(), LeaseRefusal>; 2] {
    let granted = leases.grant(START, READER, tenant("a"), image(1)).unwrap();
    let tenants = [tenant("a")];
    let others = [tenant("b"), tenant("c")];
    let mut token = granted.token;
    let mut now = START + Duration::from_secs(1);
    let mut ask = Ask { reader: READER, image: image(1), tenants: &tenants, regions: &[4, 8], extents: Some((1, 0..8)) };
    match check {
        Check::Present => token.clear(),
        Check::Signed => token[3] ^= 1,
        Check::Node => ask.reader = node(2),
        Check::Image => ask.image = image(2),
        Check::Tenant => ask.tenants = &others,
        Check::Term => now = START + TERM,
        Check::Serial => {
            leases.renew(now, &token, READER).unwrap();
            now += GRACE;
        }
        Check::Epoch => drop(leases.revoke_node(READER)),
        Check::Range => ask.extents = Some((1, 7..9)),
    }
    leases.expire(now);
    [leases.check(now, &token, &ask).map(drop), leases.renew(now, &token, ask.reader).map(drop)]
}

#[test]
fn each_abuse_is_stopped_by_its_own_check_alone() {
    let refusal = |check| match check {
        Check::Present => LeaseRefusal::NoLease,
        Check::Signed => LeaseRefusal::Forged,
        Check::Node => LeaseRefusal::OtherNode,
        Check::Image => LeaseRefusal::OtherImage,
        Check::Tenant => LeaseRefusal::OtherTenant,
        Check::Term => LeaseRefusal::Expired,
        Check::Serial => LeaseRefusal::Replayed,
        Check::Epoch => LeaseRefusal::Revoked,
        Check::Range => LeaseRefusal::OutOfRange,
    };
    for made in Check::ALL {
        // A renewal names no image and no extent.
        let is_renewal_stopped = !matches!(made, Check::Image | Check::Tenant | Check::Range);
        let no = Err(refusal(made));
        for left_out in Check::ALL {
            let outcome = abuse(made, leases().without(left_out));
            let expected = if left_out == made { [Ok(()), Ok(())] } else { [no, if is_renewal_stopped { no } else { Ok(()) }] };
            assert_eq!(outcome, expected, "abuse of {made:?} without the check of {left_out:?}");
        }
    }
}

#[test]
fn nothing_of_another_key_is_good() {
    let mut before = leases();
    let token = before.grant(START, READER, tenant("a"), image(1)).unwrap().token;
    let mut after = Leases::new(LeaseKey::new([8; 32]), Limits::default());
    after.grant(START, READER, tenant("a"), image(1)).unwrap();
    assert_eq!(after.renew(START, &token, READER), Err(LeaseRefusal::Forged));
}

#[test]
fn every_changed_bit_and_every_other_length_is_forged() {
    let mut leases = leases();
    let token = leases.grant(START, READER, tenant(&"x".repeat(63)), image(1)).unwrap().token;
    assert!(token.len() <= TOKEN_SIZE_MAX);
    for bit in 0..token.len() * 8 {
        let mut changed = token.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(leases.release(START, &changed, READER), Err(LeaseRefusal::Forged), "bit {bit}");
    }
    for len in 1..token.len() {
        assert_eq!(leases.release(START, &token[..len], READER), Err(LeaseRefusal::Forged), "{len} bytes");
    }
    let longer = [&token[..], &[0; TOKEN_SIZE_MAX]].concat();
    assert_eq!(leases.release(START, &longer, READER), Err(LeaseRefusal::Forged));
    leases.release(START, &token, READER).unwrap();
    assert_eq!(leases.release(START, &token, READER), Err(LeaseRefusal::Replayed));
}

#[test]
fn there_are_only_so_many() {
    let limits = Limits { per_reader: 2, in_all: 3 };
    let mut leases = Leases::new(LeaseKey::new([7; 32]), limits);
    let mut grant = |now, reader| leases.grant(now, reader, tenant("a"), image(1)).map(drop);
    grant(START, node(1)).unwrap();
    grant(START, node(1)).unwrap();
    assert_eq!(grant(START, node(1)), Err(LeaseRefusal::TooMany { most: 2 }));
    grant(START, node(2)).unwrap();
    assert_eq!(grant(START, node(2)), Err(LeaseRefusal::TooMany { most: 3 }));
    grant(START + TERM, node(1)).unwrap();
    assert_eq!(leases.len(), 1);
}

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Grant { reader: u128, image: u8 },
    Renew { token: prop::sample::Index, reader: u128 },
    Release { token: prop::sample::Index, reader: u128 },
    Check { token: prop::sample::Index, reader: u128, image: u8 },
    RevokeNode(u128),
    RevokeImage(u8),
    Expire,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let token = any::<prop::sample::Index>;
    let step = prop_oneof![
        3 => (0..30u64).prop_map(Step::Wait),
        3 => (0..3u128, 0..3u8).prop_map(|(reader, image)| Step::Grant { reader, image }),
        3 => (token(), 0..3u128).prop_map(|(token, reader)| Step::Renew { token, reader }),
        1 => (token(), 0..3u128).prop_map(|(token, reader)| Step::Release { token, reader }),
        6 => (token(), 0..3u128, 0..3u8).prop_map(|(token, reader, image)| Step::Check { token, reader, image }),
        1 => (0..3u128).prop_map(Step::RevokeNode),
        1 => (0..3u8).prop_map(Step::RevokeImage),
        3 => Just(Step::Expire),
    ];
    prop::collection::vec(step, 1..60)
}

/// All that a naive holder remembers of a token: everything, for ever.
#[derive(Clone)]
struct Issued {
    token: Vec<u8>,
    reader: u128,
    image: u8,
    expires: Duration,
    /// From when on it is a replay.
    replay_from: Option<Duration>,
    is_revoked: bool,
    lease: usize,
}

impl Issued {
    fn verdict(&self, now: Duration, reader: u128) -> Result<(), LeaseRefusal> {
        if self.reader != reader {
            Err(LeaseRefusal::OtherNode)
        } else if now >= self.expires {
            Err(LeaseRefusal::Expired)
        } else if self.replay_from.is_some_and(|from| now >= from) {
            Err(LeaseRefusal::Replayed)
        } else if self.is_revoked {
            Err(LeaseRefusal::Revoked)
        } else {
            Ok(())
        }
    }
}

#[derive(Default)]
struct Model {
    issued: Vec<Issued>,
    leases: usize,
}

impl Model {
    fn renewed(&mut self, at: usize, now: Duration, token: Vec<u8>) {
        let of = self.issued[at].clone();
        let mut newest_first: Vec<_> = self.issued.iter_mut().filter(|issued| issued.lease == of.lease).collect();
        newest_first.reverse();
        for (age, issued) in newest_first.into_iter().enumerate() {
            issued.replay_from = Some(if age == 0 { now + GRACE } else { now });
        }
        self.issued.push(Issued { token, expires: now + TERM, replay_from: None, ..of });
    }

    fn holds_on(&self, now: Duration, image: u8) -> bool {
        let is_newest = |issued: &Issued| issued.replay_from.is_none();
        self.issued
            .iter()
            .any(|issued| issued.image == image && is_newest(issued) && !issued.is_revoked && now < issued.expires)
    }
}

fn cases() -> u32 {
    match std::env::var("FARFORK_COUNT").as_deref() {
        Ok("full") => 20_000,
        _ => 300,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_table_does_what_a_naive_one_does(steps in steps()) {
        let mut leases = leases();
        let mut model = Model::default();
        let mut now = START;
        let tenants = [tenant("a")];
        for step in steps {
            let pick = |index: &prop::sample::Index| (!model.issued.is_empty()).then(|| index.index(model.issued.len()));
            match step {
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
                Step::Grant { reader, image: number } => {
                    let token = leases.grant(now, node(reader), tenant("a"), image(number)).unwrap().token;
                    prop_assert!(model.issued.iter().all(|issued| issued.token != token), "a token twice");
                    let (expires, lease) = (now + TERM, model.leases);
                    model.leases += 1;
                    let issued = Issued { token, reader, image: number, expires, replay_from: None, is_revoked: false, lease };
                    model.issued.push(issued);
                }
                Step::Renew { token, reader } => {
                    let Some(at) = pick(&token) else { continue };
                    let renewed = leases.renew(now, &model.issued[at].token, node(reader));
                    prop_assert_eq!(renewed.as_ref().map(drop).map_err(|refusal| *refusal), model.issued[at].verdict(now, reader));
                    if let Ok(renewed) = renewed {
                        model.renewed(at, now, renewed.token);
                    }
                }
                Step::Release { token, reader } => {
                    let Some(at) = pick(&token) else { continue };
                    let released = leases.release(now, &model.issued[at].token, node(reader));
                    prop_assert_eq!(released, model.issued[at].verdict(now, reader));
                    if released.is_ok() {
                        let lease = model.issued[at].lease;
                        for issued in model.issued.iter_mut().filter(|issued| issued.lease == lease) {
                            issued.replay_from = Some(now);
                        }
                    }
                }
                Step::Check { token, reader, image: number } => {
                    let Some(at) = pick(&token) else { continue };
                    let issued = &model.issued[at];
                    let ask = Ask {
                        reader: node(reader),
                        image: image(number),
                        tenants: &tenants,
                        regions: &[1],
                        extents: Some((0, 0..1)),
                    };
                    let expected = match issued.verdict(now, reader) {
                        Err(LeaseRefusal::OtherNode) => Err(LeaseRefusal::OtherNode),
                        _ if number != issued.image => Err(LeaseRefusal::OtherImage),
                        verdict => verdict,
                    };
                    prop_assert_eq!(leases.check(now, &issued.token, &ask).map(drop), expected);
                }
                Step::RevokeNode(of) => {
                    leases.revoke_node(node(of));
                    model.issued.iter_mut().filter(|issued| issued.reader == of).for_each(|issued| issued.is_revoked = true);
                }
                Step::RevokeImage(of) => {
                    leases.revoke_image(image(of));
                    model.issued.iter_mut().filter(|issued| issued.image == of).for_each(|issued| issued.is_revoked = true);
                }
                Step::Expire => {
                    leases.expire(now);
                    for number in 0..3 {
                        prop_assert_eq!(leases.holds_on(image(number)), model.holds_on(now, number), "image {}", number);
                    }
                }
            }
        }
    }
}
