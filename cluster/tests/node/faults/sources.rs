//! Faults of the node that pages come from, and of the way to it.

use std::time::Duration;

use chaos::relay::{Direction, Impairment, Probability, Rate};
use fastrand::Rng;
use rustix::process::Signal;
use vm::harness::{count, seed};

use super::stage::{IMAGE_BYTES, PAGE_DEADLINE, Stage, paced};
use super::{CHILDREN, inject_all, only};
use crate::between::{introduce, listening};

const BOTH: [Direction; 2] = [Direction::ToUpstream, Direction::ToClient];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Killed,
    Stopped,
    StoppedForAWhile,
    CutOff,
    CutOffForAWhile,
    NotHeard,
    NotHearing,
    AtOneMegabit,
    Losing,
    Corrupting,
    Duplicating,
    Reordering,
    /// With another holder at hand.
    OneOfTwoKilled,
    OneOfTwoStopped,
    OneOfTwoCutOff,
}

const FAULTS: [Fault; 15] = [
    Fault::Killed,
    Fault::Stopped,
    Fault::StoppedForAWhile,
    Fault::CutOff,
    Fault::CutOffForAWhile,
    Fault::NotHeard,
    Fault::NotHearing,
    Fault::AtOneMegabit,
    Fault::Losing,
    Fault::Corrupting,
    Fault::Duplicating,
    Fault::Reordering,
    Fault::OneOfTwoKilled,
    Fault::OneOfTwoStopped,
    Fault::OneOfTwoCutOff,
];

#[test]
fn real_children_outlive_their_source_or_end_for_a_reason() {
    let (seed, injections) = (seed(), count(30, 500));
    inject_all("faults of sources and of the way to them", (seed, injections), &FAULTS, inject, |seed| {
        Stage::new(seed, &[], "")
    });
}

fn inject(stage: &mut Stage, dice: &mut Rng, fault: Fault) -> Vec<String> {
    let digest = stage.warm();
    let has_another = matches!(fault, Fault::OneOfTwoKilled | Fault::OneOfTwoStopped | Fault::OneOfTwoCutOff);
    let another = has_another.then(|| another_holder(stage, &digest));
    let holders = [Some(stage.holder()), another.as_ref().map(|(_, address)| address.clone())];
    let holders: Vec<&str> = holders.iter().flatten().map(String::as_str).collect();
    let mut asked = stage.ask(&digest, CHILDREN, &holders);
    stage.wait_until(&mut asked, dice.u64(1..IMAGE_BYTES));
    let chance = Probability::new(0.02 + 0.1 * dice.f64()).unwrap();
    match fault {
        Fault::Killed | Fault::OneOfTwoKilled => stage.source().signal(Signal::KILL),
        Fault::Stopped | Fault::OneOfTwoStopped => stage.source().signal(Signal::STOP),
        Fault::StoppedForAWhile => {
            stage.source().signal(Signal::STOP);
            std::thread::sleep(a_while(dice));
            stage.source().signal(Signal::CONT);
        }
        Fault::CutOff | Fault::OneOfTwoCutOff => stage.impair(&BOTH, Impairment::blocked()),
        Fault::CutOffForAWhile => {
            stage.impair(&BOTH, Impairment::blocked());
            std::thread::sleep(a_while(dice));
            stage.repair();
        }
        Fault::NotHeard => stage.impair(&[Direction::ToClient], Impairment::blocked()),
        Fault::NotHearing => stage.impair(&[Direction::ToUpstream], Impairment::blocked()),
        Fault::AtOneMegabit => {
            stage.impair(&BOTH, Impairment { rate: Some(Rate::new(125_000)), ..paced() });
            std::thread::sleep(a_while(dice) * 2);
            stage.repair();
        }
        Fault::Losing => stage.impair(&BOTH, Impairment { loss: chance, ..paced() }),
        Fault::Corrupting => stage.impair(&BOTH, Impairment { corrupt: chance, ..paced() }),
        Fault::Duplicating => stage.impair(&BOTH, Impairment { duplicate: chance, ..paced() }),
        Fault::Reordering => {
            let hold_back = Duration::from_millis(dice.u64(1..20));
            stage.impair(&BOTH, Impairment { reorder: chance, hold_back, ..paced() });
        }
    }
    let outcomes = asked.outcomes();
    match fault {
        // Nobody could tell the difference, and there was somebody to ask.
        Fault::Duplicating | Fault::Reordering | Fault::OneOfTwoKilled | Fault::OneOfTwoStopped | Fault::OneOfTwoCutOff => {
            only(&outcomes, &["complete"])
        }
        _ => only(&outcomes, &["complete", "PAGE_SOURCE_LOST", "UNREACHABLE"]),
    }
    // All is well again, and so is the image where it was.
    stage.repair();
    match fault {
        Fault::Killed | Fault::OneOfTwoKilled => stage.replace_source(),
        Fault::Stopped | Fault::OneOfTwoStopped => {
            stage.source().signal(Signal::CONT);
            stage.recovers(&digest);
        }
        _ => stage.recovers(&digest),
    }
    outcomes
}

/// Less than a child waits for a page, or about as long.
fn a_while(dice: &mut Rng) -> Duration {
    PAGE_DEADLINE.mul_f64(dice.f64())
}

/// A third node that has settled the image.
pub(super) fn another_holder(stage: &Stage, digest: &str) -> (crate::support::Node, String) {
    let (node, address) = listening(tempfile::tempdir().unwrap(), &[], "");
    introduce(&[stage.source(), stage.destination(), &node]);
    let from = stage.source_address().to_string();
    node.json(&["fork", digest, "--from", &from]);
    assert_eq!(node.cli(&["watch", digest, "--timeout", "60s"]).code, Some(0));
    (node, address)
}
