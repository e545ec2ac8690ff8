//! Whole members in virtual time: openraft, the log on disks whose power is cut, a network that is cut, and clients whose history
//! is checked. See [`world`] for the members, [`clients`] for what is asked of them.

mod clients;
mod world;

use vm::harness::{count, held, seed};

use clients::Flaw;
use world::{Outcome, live};

fn all_hold(seeds: std::ops::Range<u64>) -> Outcome {
    seeds.fold(Outcome::default(), |sum, seed| {
        let outcome = live(seed, None).unwrap_or_else(|wrong| panic!("FARFORK_SEED={seed}: {wrong}"));
        sum + outcome
    })
}

#[test]
fn what_was_acknowledged_stays_and_histories_have_an_order() {
    let first = seed();
    let seeds = count(50, 1000);
    let Outcome { calls, unanswered, crashes, cuts, leaders } = all_hold(first..first + seeds);
    println!(
        "{calls} calls, {unanswered} of them without an answer; {crashes} crashes, {cuts} cuts of the network, {leaders} leaders"
    );
    assert!(calls > seeds * 50 && crashes > seeds / 2 && cuts > seeds / 2 && leaders > seeds, "hardly anything was tried");
    held("runs of members with disks and a network that fail, linearizable and agreed", seeds);
}

/// What each promise is for: without it something is missed.
#[test]
fn flaws_are_found_out() {
    let first = seed();
    for flaw in [Flaw::LostFsync, Flaw::StaleRead, Flaw::KeyDropped] {
        let found = (0..200).find_map(|number| live(first + number, Some(flaw)).err().map(|wrong| (number + 1, wrong)));
        let (seeds, wrong) =
            found.unwrap_or_else(|| panic!("{flaw:?} was not found out with 200 seeds from FARFORK_SEED={first}"));
        println!("{flaw:?}: found out with seed {seeds}: {}", wrong.lines().next().unwrap_or_default());
    }
}
