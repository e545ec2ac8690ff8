//! Rules about nodes that have lost their logs.

use control::command::{Answer, Command, Refusal};
use control::state::{Role, State, Task};
use control::validate::{Invalid, validate};
use types::{Digest, Name, NodeId};

use super::{Cluster, node, node_facts, spec};

/// Node `old` asks to be `new`, with a key of this number.
fn replace(old: u128, new: u128, key: u8) -> Command {
    Command::Replace { old: node(old), new: node(new), proven: Digest::of(&[key]) }
}

fn voters(cluster: &mut Cluster, numbers: &[u128]) {
    for number in numbers {
        cluster.run(Command::SetRole { node: node(*number), role: Role::Voter }).unwrap();
    }
}

#[test]
fn a_node_that_lost_its_log_comes_back_once_under_another_id() {
    let mut cluster = Cluster::new(3, 10);
    voters(&mut cluster, &[1, 2, 3]);
    cluster.run(Command::Cordon { node: node(2), is_cordoned: true }).unwrap();
    assert_eq!(cluster.run(replace(2, 12, 7)), Ok(Answer::Admitted(Role::Voter)));
    assert!(cluster.state.revoked.contains(&node(2)) && !cluster.state.nodes.contains_key(&node(2)));
    assert_eq!(cluster.register(2, 9, 10, &[]), Err(Refusal::Revoked(node(2))), "the old id never comes back");
    // It did not hear the answer.
    assert_eq!(cluster.run(replace(2, 12, 7)), Ok(Answer::Admitted(Role::Voter)));
    // Another key, or another id, is somebody else.
    let by = Refusal::Replaced { node: node(2), by: node(12) };
    assert_eq!(cluster.run(replace(2, 12, 8)), Err(by.clone()));
    assert_eq!(cluster.run(replace(2, 13, 7)), Err(by));
    // Nobody else gets the id that was promised.
    assert_eq!(cluster.run(replace(3, 12, 7)), Err(Refusal::NodeExists(node(12))));
    let (token, name) = (Digest::of(b"token"), Name::parse("node-4").unwrap());
    cluster.run(Command::AddToken { token, name: name.clone(), role: Role::Learner }).unwrap();
    let show = |by: NodeId| Command::UseToken { token, node: by, proven: Digest::of(&[7]), name: name.clone() };
    assert_eq!(cluster.run(show(node(12))), Err(Refusal::NodeExists(node(12))));
    cluster.run(show(node(4))).unwrap();
    assert_eq!(cluster.run(replace(3, 4, 7)), Err(Refusal::NodeExists(node(4))), "a token lets that one in");
    // It registers under its name, and is kept free as before.
    let facts = node_facts(2, 10);
    let back = |incarnation| Command::Register { node: node(12), incarnation, facts: facts.clone(), images: vec![] };
    cluster.run(back(1)).unwrap();
    assert!(cluster.state.nodes[&node(12)].is_cordoned && !cluster.state.nodes[&node(12)].is_draining);
    assert_eq!(cluster.run(replace(2, 12, 7)), Ok(Answer::Admitted(Role::Voter)), "also after that");
    // Its log may be lost again.
    voters(&mut cluster, &[12]);
    assert_eq!(cluster.run(replace(12, 22, 9)), Ok(Answer::Admitted(Role::Voter)));
    assert_eq!(cluster.run(replace(2, 12, 7)), Err(Refusal::Revoked(node(12))));
    let again = Command::Register { node: node(22), incarnation: 1, facts: facts.clone(), images: vec![] };
    cluster.run(again).unwrap();
    // One that was forgotten since begins anew.
    cluster.run(Command::Remove { node: node(22) }).unwrap();
    assert_eq!(cluster.run(replace(12, 22, 9)), Err(Refusal::UnknownNode(node(22))), "by an old request nobody comes back");
    cluster.run(Command::Register { node: node(22), incarnation: 2, facts, images: vec![] }).unwrap();
    assert!(!cluster.state.nodes[&node(22)].is_cordoned);
}

#[test]
fn who_is_unknown_revoked_or_the_only_voter_is_not_replaced() {
    let mut cluster = Cluster::new(3, 10);
    voters(&mut cluster, &[1]);
    assert_eq!(cluster.run(replace(9, 12, 7)), Err(Refusal::UnknownNode(node(9))));
    assert_eq!(cluster.run(replace(2, 2, 7)), Err(Refusal::NodeExists(node(2))));
    assert_eq!(cluster.run(replace(2, 3, 7)), Err(Refusal::NodeExists(node(3))));
    assert_eq!(cluster.run(replace(1, 12, 7)), Err(Refusal::LastVoter(node(1))));
    assert_eq!(cluster.run(replace(2, 12, 7)), Ok(Answer::Admitted(Role::Learner)));
    cluster.run(Command::Revoke { node: node(3) }).unwrap();
    assert_eq!(cluster.run(replace(3, 13, 7)), Err(Refusal::Revoked(node(3))));
    assert_eq!(cluster.run(replace(1, 3, 7)), Err(Refusal::Revoked(node(3))));
    // Removed: it is nobody, until it has started again.
    cluster.register(4, 1, 10, &[]).unwrap();
    cluster.run(Command::Remove { node: node(4) }).unwrap();
    assert_eq!(cluster.run(replace(4, 14, 7)), Err(Refusal::UnknownNode(node(4))));
    assert_eq!(cluster.run(replace(1, 4, 7)), Err(Refusal::NodeExists(node(4))));
    // The new one is revoked before it came: its directory is worth nothing either.
    cluster.run(Command::Revoke { node: node(12) }).unwrap();
    assert_eq!(cluster.run(replace(2, 12, 7)), Err(Refusal::Revoked(node(12))));
    // Members come and go by word of voters.
    let asked = replace(2, 12, 7);
    assert!(asked.may_be_proposed_by(node(1), true) && !asked.may_be_proposed_by(node(2), false));
}

#[test]
fn what_ran_on_a_node_that_lost_its_log_runs_elsewhere() {
    let mut cluster = Cluster::new(3, 10);
    voters(&mut cluster, &[1, 2]);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 40);
    cluster.open(3, &[2, 1]).unwrap();
    let id = cluster.submit(spec(2));
    cluster.place(id, &[(2, 0..2)]);
    let before = cluster.state.epoch;
    cluster.run(replace(2, 12, 7)).unwrap();
    assert_eq!(cluster.task(id, 1), Task::Waiting { attempt: 1, not_on: None });
    assert!(cluster.holder(2).is_none());
    assert_eq!(cluster.holder(3).unwrap().sources, [node(1)], "nobody reads from it any more");
    assert!(cluster.state.epoch > before, "what it was allowed to read is over");
    assert_eq!(cluster.report(2, vec![], vec![], vec![]), Err(Refusal::UnknownNode(node(2))));
    assert_eq!(cluster.place(id, &[(1, 0..2)]), (2, 0), "elsewhere");
}

#[test]
fn a_node_that_was_replaced_is_revoked_in_every_state() {
    let mut cluster = Cluster::new(2, 10);
    cluster.run(replace(2, 12, 7)).unwrap();
    let good: State = cluster.state.clone();
    let not_revoked = State { revoked: [].into(), ..good.clone() };
    assert_eq!(validate(&not_revoked), Err(Invalid::Replaced { node: node(2) }));
    let mut by_itself = good;
    by_itself.replaced.get_mut(&node(2)).unwrap().by = node(2);
    assert_eq!(validate(&by_itself), Err(Invalid::Replaced { node: node(2) }));
}
