//! Holders that lie, alone and beside an honest one.

use fastrand::Rng;
use pages::fakes::Lie;
use std::time::Duration;
use vm::harness::{count, seed};

use super::liar::{Falsehood, Liar};
use super::stage::Stage;
use super::{CHILDREN, inject_all, only};

#[derive(Clone, Copy, PartialEq, Eq)]
struct Fault {
    falsehood: Falsehood,
    /// Beside an honest holder.
    is_alone: bool,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {}", self.falsehood, if self.is_alone { "alone" } else { "beside an honest one" })
    }
}

const FALSEHOODS: [Falsehood; 14] = [
    Falsehood::Extents(Lie::Flipped),
    Falsehood::Extents(Lie::Swapped),
    Falsehood::Extents(Lie::Stale),
    Falsehood::Zeroed,
    Falsehood::Absent,
    Falsehood::Head,
    Falsehood::HashPages,
    Falsehood::Extents(Lie::Truncated),
    Falsehood::Extents(Lie::Unsolicited),
    Falsehood::Extents(Lie::Silent),
    Falsehood::Extents(Lie::Slow(Duration::from_millis(50))),
    Falsehood::Extents(Lie::Garbage),
    Falsehood::Extents(Lie::Twice),
    Falsehood::Extents(Lie::Bomb),
];

/// Lies that are found out by the digests, after which the liar is asked nothing more.
fn is_of_content(falsehood: Falsehood) -> bool {
    matches!(falsehood, Falsehood::Extents(Lie::Flipped | Lie::Swapped | Lie::Stale) | Falsehood::Zeroed)
}

#[test]
fn real_children_never_see_what_a_holder_made_up() {
    let faults = FALSEHOODS.map(|falsehood| [true, false].map(|is_alone| Fault { falsehood, is_alone })).concat();
    let run = (seed(), count(28, 350));
    inject_all("lies of holders", run, &faults, inject, |seed| Stage::new(seed, &[], ""));
}

fn inject(stage: &mut Stage, dice: &mut Rng, Fault { falsehood, is_alone }: Fault) -> Vec<String> {
    let digest = stage.warm();
    let liar = Liar::start(stage.source(), stage.source_address(), &[stage.destination()]);
    liar.tell(falsehood, dice.u64(1..8), dice.u64(..));
    let (address, honest) = (liar.address().to_string(), stage.holder());
    let holders: &[&str] = if is_alone { &[&address] } else { &[&address, &honest] };
    let asked = stage.ask(&digest, CHILDREN, holders);
    let outcomes = asked.outcomes();
    match falsehood {
        _ if !is_alone => only(&outcomes, &["complete"]),
        Falsehood::None | Falsehood::Extents(Lie::Slow(_)) => only(&outcomes, &["complete"]),
        Falsehood::Head => only(&outcomes, &["BAD_IMAGE"]),
        // Nobody else has what it keeps back, or says wrongly.
        _ => only(&outcomes, &["PAGE_SOURCE_LOST"]),
    }
    if is_alone {
        assert!(liar.told() > 0, "it was asked for nothing that it lies about");
    }
    if is_of_content(falsehood) && is_alone {
        let sources = stage.destination().json(&["show", &digest])["residency"]["sources"].clone();
        let is_liar = |source: &&serde_json::Value| source["node"] == liar.node().to_string();
        let liar = sources.as_array().unwrap().iter().find(is_liar).unwrap();
        assert_eq!(liar["state"], "quarantined", "{sources}");
    }
    // An honest holder is all that was missing.
    stage.forks_well(&digest);
    for node in [stage.source(), stage.destination()] {
        assert_eq!(node.cli(&["trust", "rm", &liar.node().to_string()]).code, Some(0));
    }
    outcomes
}

/// The proof that the test above finds what it looks for.
#[test]
fn real_children_without_verification_see_what_a_holder_made_up() {
    // An image that settles is looked at as a whole, which may find it out sooner than the children do. This one has hardly room to,
    // but pages in use cannot be evicted: which comes first is chance.
    let stage = Stage::new(seed(), &["--no-stream", "--no-replay", "--host-image-memory", "1MiB"], "verification");
    let liar = Liar::start(stage.source(), stage.source_address(), &[stage.destination()]);
    for _ in 0..20 {
        let digest = stage.warm();
        liar.tell(Falsehood::Extents(Lie::Flipped), 1, 0);
        let outcomes = stage.ask(&digest, CHILDREN, &[&liar.address().to_string()]).outcomes();
        only(&outcomes, &["WRONG_PROOF", "IMAGE_POISONED"]);
        if outcomes.iter().any(|outcome| outcome == "WRONG_PROOF") {
            return;
        }
        stage.clear();
    }
    panic!("no child has seen what the holder made up");
}
