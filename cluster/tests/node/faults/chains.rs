//! Three hosts: what the second has of an image, and what only the first has, as the third needs it.

use rustix::process::Signal;
use vm::harness::{count, held, seed};

use super::stage::answer_of;
use super::{CHILDREN, only};
use crate::between::{introduce, listening, warm};
use crate::support::{Node, eventually};

/// What the second host has of the image when the third asks it, and whether the first still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chain {
    /// Little; the rest is fetched in turn.
    PartAndAlive,
    /// Little, and that is all there is.
    PartAndDead,
    /// All of it.
    AllAndDead,
}

#[test]
fn real_chains_of_hosts_give_what_they_have_and_fetch_the_rest_in_turn() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let chains = [Chain::PartAndAlive, Chain::PartAndDead, Chain::AllAndDead];
    let rounds = count(3, 60);
    for round in 0..rounds {
        let chain = chains[usize::try_from(round % 3).unwrap()];
        // Of a branch of a child there, or of the image that came.
        let is_of_branch = round == 0 || dice.bool();
        let outcomes = run(chain, is_of_branch);
        println!("{chain:?}, {}: {outcomes:?}", if is_of_branch { "of a branch" } else { "of the image" });
        match chain {
            Chain::PartAndAlive | Chain::AllAndDead => only(&outcomes, &["complete"]),
            Chain::PartAndDead => only(&outcomes, &["PAGE_SOURCE_LOST"]),
        }
    }
    held("chains of three hosts", rounds);
}

fn run(chain: Chain, is_of_branch: bool) -> Vec<String> {
    let node = |flags: &[&str]| listening(tempfile::tempdir().unwrap(), &[&["--page-deadline", "2s"], flags].concat(), "");
    let ((first, at_first), (second, at_second), (third, _)) = (node(&[]), node(&["--no-stream"]), node(&[]));
    introduce(&[&first, &second, &third]);
    let (_, digest) = warm(&first, "16MiB");
    let verify: &[&str] = if chain == Chain::AllAndDead { &["--verify"] } else { &[] };
    let forked = second.json(&[&["fork", &digest, "--from", &at_first], verify].concat());
    if chain == Chain::AllAndDead {
        eventually("it has all of it", || is_settled(&second, &digest));
    } else {
        assert!(!is_settled(&second, &digest), "it has all of it already");
    }
    let digest = if is_of_branch {
        let child = forked["children"][0]["id"].as_str().unwrap();
        let branched = second.json(&["branch", child]);
        second.json(&["image", "digest", branched["image"]["id"].as_str().unwrap()])["digest"].as_str().unwrap().to_owned()
    } else {
        digest
    };
    if chain != Chain::PartAndAlive {
        first.signal(Signal::KILL);
    }
    let count = CHILDREN.to_string();
    answer_of(&third, &["fork", &digest, "-n", &count, "--verify", "--from", &at_second], CHILDREN)
}

fn is_settled(node: &Node, image: &str) -> bool {
    node.json(&["show", image])["residency"]["is_settled"].as_bool().unwrap()
}

/// The third has a lease on what failed at the second, and reads what the second has opened in its place.
#[test]
fn real_hosts_give_what_they_have_opened_anew_after_it_failed() {
    let node = || listening(tempfile::tempdir().unwrap(), &["--page-deadline", "2s", "--no-stream"], "");
    let ((first, at_first), (second, at_second), (third, _)) = (node(), node(), node());
    introduce(&[&first, &second, &third]);
    let (_, digest) = warm(&first, "16MiB");
    second.json(&["fork", &digest, "--from", &at_first]);
    third.json(&["fork", &digest, "--from", &at_second]);
    second.signal(Signal::USR2);
    eventually("its pager's children have ended", || second.machines().is_empty());
    second.json(&["fork", &digest, "--from", &at_first]);
    let outcomes = answer_of(&third, &["fork", &digest, "-n", "3", "--verify", "--from", &at_second], CHILDREN);
    only(&outcomes, &["complete"]);
}
