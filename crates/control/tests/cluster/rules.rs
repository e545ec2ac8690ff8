//! What each command does, and when it is refused.

use std::time::Duration;

use control::apply::{REMEMBERED, STRANDED_MAX};
use control::command::{Answer, Command, Key, Refusal};
use control::state::{Life, NodeFacts, Outcome, Role, Task};
use types::{Digest, Epoch, Name, Reason, Tenant};
use uuid::Uuid;

use super::{Cluster, job, key, machines, node, node_facts, spec};

#[test]
fn a_request_that_comes_again_is_carried_out_once() {
    let mut cluster = Cluster::new(1, 10);
    let request = Key(Uuid::from_u128(7));
    let submit = Command::Submit { job: job(1), spec: spec(2) };
    assert_eq!(cluster.entry(Some(request), submit.clone()), Ok(Answer::Done));
    cluster.place(job(1), &[(1, 0..2)]);
    let before = cluster.state.jobs.clone();
    assert_eq!(cluster.entry(Some(request), submit.clone()), Ok(Answer::Done), "the answer of the first time");
    assert_eq!(cluster.state.jobs, before);
    let other = Command::Submit { job: job(2), spec: spec(2) };
    assert_eq!(cluster.entry(Some(request), other), Err(Refusal::KeyReused(request)));
    // Also a refusal is what it was, and all of it is forgotten after a day.
    let refused = Key(Uuid::from_u128(8));
    let wrong = Command::Cancel { job: job(9) };
    assert_eq!(cluster.entry(Some(refused), wrong.clone()), Err(Refusal::UnknownJob(job(9))));
    cluster.run(Command::Cancel { job: job(1) }).unwrap();
    cluster.wait(REMEMBERED);
    assert!(cluster.state.keys.is_empty() && cluster.state.jobs.is_empty());
}

#[test]
fn a_newer_start_of_a_node_ends_the_older_one() {
    let mut cluster = Cluster::new(2, 10);
    let id = cluster.submit(spec(4));
    cluster.place(id, &[(1, 0..4)]);
    let Task::Placed { epoch, .. } = cluster.task(id, 0) else { panic!() };
    // The same again changes nothing.
    cluster.register(1, 1, 10, &[]).unwrap();
    assert!(matches!(cluster.task(id, 0), Task::Placed { .. }));
    cluster.register(1, 2, 10, &[1, 9]).unwrap();
    assert_eq!(cluster.task(id, 0), Task::Waiting { attempt: 1, not_on: None });
    assert!(cluster.holder(1).unwrap().is_settled(), "what it says that it has");
    assert!(!cluster.state.images.contains_key(&key(9)), "what the cluster does not know is not taken up");
    let late = Command::Report {
        node: node(1),
        incarnation: 1,
        progress: vec![],
        gone: vec![],
        ended: vec![super::of(id, vec![(0, epoch, Outcome::Exited(0))])],
        local: None,
    };
    assert_eq!(cluster.run(late), Err(Refusal::OldStart { node: node(1), given: 1, current: 2 }));
    assert_eq!(cluster.register(1, 1, 10, &[]), Err(Refusal::OldStart { node: node(1), given: 1, current: 2 }));
}

#[test]
fn a_node_that_is_given_up_loses_everything_and_its_reports_do_not_count() {
    let mut cluster = Cluster::new(3, 10);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 40);
    cluster.open(3, &[2, 1]).unwrap();
    let id = cluster.submit(spec(2));
    cluster.place(id, &[(2, 0..2)]);
    // Not without being suspected first: it was heard meanwhile.
    cluster.run(Command::GiveUp { node: node(2), incarnation: 1 }).unwrap();
    assert_eq!(cluster.state.nodes[&node(2)].life, Life::Up);
    cluster.lose(2);
    assert!(cluster.holder(2).is_none());
    assert_eq!(cluster.holder(3).unwrap().sources, [node(1)], "nobody reads from it any more");
    assert_eq!(cluster.task(id, 1), Task::Waiting { attempt: 1, not_on: None });
    assert_eq!(cluster.report(2, vec![], vec![], vec![]), Err(Refusal::GivenUp(node(2))));
    assert_eq!(cluster.run(Command::Heard { node: node(2), incarnation: 1 }), Err(Refusal::GivenUp(node(2))));
    assert_eq!(cluster.register(2, 1, 10, &[]), Err(Refusal::GivenUp(node(2))), "it has to end what it did first");
    cluster.register(2, 2, 10, &[]).unwrap();
    assert_eq!(cluster.state.nodes[&node(2)].life, Life::Up);
}

#[test]
fn a_result_counts_once_and_only_of_the_order_that_is_in_force() {
    let mut cluster = Cluster::new(2, 10);
    let id = cluster.submit(spec(3));
    cluster.place(id, &[(1, 0..3)]);
    let Task::Placed { epoch, .. } = cluster.task(id, 0) else { panic!() };
    let ended = |task, epoch, status| vec![super::of(id, vec![(task, epoch, Outcome::Exited(status))])];
    // Another node, another order, a task that there is not, a job that there is not.
    cluster.report(2, vec![], vec![], ended(0, epoch, 1)).unwrap();
    cluster.report(1, vec![], vec![], ended(0, Epoch(epoch.0 - 1), 1)).unwrap();
    cluster.report(1, vec![], vec![], ended(99, epoch, 1)).unwrap();
    cluster.report(1, vec![], vec![], vec![super::of(job(77), vec![(0, epoch, Outcome::Exited(1))])]).unwrap();
    assert!(matches!(cluster.task(id, 0), Task::Placed { .. }));
    cluster.report(1, vec![], vec![], ended(0, epoch, 7)).unwrap();
    cluster.report(1, vec![], vec![], ended(0, epoch, 8)).unwrap();
    assert_eq!(cluster.task(id, 0), Task::ended(Outcome::Exited(7)));
    // What is ours to blame is tried again, so often; what is the task's own is not.
    for attempt in 0..3 {
        assert!(matches!(cluster.task(id, 1), Task::Placed { attempt: tried, .. } if tried == attempt));
        cluster.ends(1, id, 1, Outcome::Failed(Reason::WorkerCrashed));
        cluster.place(id, &[(1, 1..2)]);
    }
    assert_eq!(cluster.task(id, 1), Task::ended(Outcome::Failed(Reason::WorkerCrashed)));
    cluster.ends(1, id, 2, Outcome::Failed(Reason::Oom));
    assert_eq!(cluster.task(id, 2), Task::ended(Outcome::Failed(Reason::Oom)));
    assert!(cluster.state.jobs[&id].ended.is_some());
    assert_eq!(cluster.place(id, &[(1, 0..3)]), (0, 0), "a job that has ended");
    cluster.lose(1);
    assert_eq!(cluster.task(id, 0), Task::ended(Outcome::Exited(7)));
}

#[test]
fn nothing_is_given_away_twice() {
    let mut cluster = Cluster::new(1, 5);
    let id = cluster.submit(spec(9));
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (5, 4));
    let grant = |count| Command::GrantCapacity { node: node(1), incarnation: 1, resources: machines(count), lasts_ms: 1000 };
    assert_eq!(cluster.run(grant(1)), Err(Refusal::Full(node(1))));
    for task in 0..3 {
        cluster.ends(1, id, task, Outcome::Exited(0));
    }
    let Ok(Answer::Granted(first)) = cluster.run(grant(2)) else { panic!() };
    let Ok(Answer::Granted(second)) = cluster.run(grant(3)) else { panic!("it replaces the one before") };
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (0, 4));
    cluster.run(Command::ReturnCapacity { node: node(1), epoch: first }).unwrap();
    assert!(cluster.state.nodes[&node(1)].lease.is_some(), "the number of another");
    cluster.run(Command::ReturnCapacity { node: node(1), epoch: second }).unwrap();
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (3, 1));
    for task in 3..8 {
        cluster.ends(1, id, task, Outcome::Exited(0));
    }
    cluster.run(grant(5)).unwrap();
    cluster.wait(Duration::from_secs(1));
    assert!(cluster.state.nodes[&node(1)].lease.is_none(), "it has run out");
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (1, 0));
}

#[test]
fn who_is_read_from_keeps_the_image() {
    let mut cluster = Cluster::new(4, 10);
    cluster.open(2, &[1]).unwrap();
    assert_eq!(cluster.let_go(1), Err(Refusal::HasReaders { node: node(1), key: key(1), readers: 1 }));
    cluster.open(3, &[2]).unwrap();
    for (on, from) in [(4, vec![]), (4, vec![4]), (4, vec![9]), (2, vec![3])] {
        assert_eq!(cluster.open(on, &from), Err(Refusal::BadSources { key: key(1) }), "{on} from {from:?}");
    }
    cluster.has(2, 100);
    assert!(cluster.holder(2).unwrap().sources.is_empty());
    assert_eq!(cluster.let_go(2), Err(Refusal::HasReaders { node: node(2), key: key(1), readers: 1 }));
    cluster.open(3, &[1]).unwrap();
    cluster.let_go(2).unwrap();
    // It may be gone already: nothing new relies on it, and late news about it does not count.
    let of_order = cluster.holder(2).unwrap().epoch;
    assert_eq!(cluster.open(4, &[2]), Err(Refusal::BadSources { key: key(1) }));
    assert_eq!(cluster.add_image(1, 2), Err(Refusal::NotHeld { node: node(2), key: key(1) }));
    assert_eq!(cluster.open(2, &[1]), Err(Refusal::NotHeld { node: node(2), key: key(1) }));
    cluster.has(3, 100);
    assert_eq!(cluster.let_go(1), Ok(Answer::Done));
    assert_eq!(cluster.let_go(3), Err(Refusal::LastCopy { node: node(3), key: key(1) }));
    cluster.is_gone(2, Epoch(of_order.0 - 1));
    assert!(cluster.holder(2).is_some(), "that was of an order before");
    cluster.is_gone(2, of_order);
    cluster.open(2, &[3]).unwrap();
    cluster.is_gone(2, of_order);
    assert!(cluster.holder(2).is_some(), "the same news again is about the order before");
    let id = cluster.submit(spec(1));
    cluster.has(2, 100);
    cluster.place(id, &[(2, 0..1)]);
    assert_eq!(cluster.let_go(2), Err(Refusal::Busy(node(2))));
}

#[test]
fn what_nobody_can_complete_ends_when_leases_have_run_out() {
    let mut cluster = Cluster::new(2, 10);
    cluster.open(2, &[1]).unwrap();
    let id = cluster.submit(spec(2));
    cluster.place(id, &[(2, 0..1)]);
    cluster.lose(1);
    assert_eq!(cluster.state.images[&key(1)].stranded, Some(cluster.now()));
    cluster.wait(STRANDED_MAX - Duration::from_millis(1));
    assert!(matches!(cluster.task(id, 1), Task::Waiting { .. }));
    cluster.wait(Duration::from_millis(1));
    assert_eq!(cluster.task(id, 1), Task::ended(Outcome::Failed(Reason::PageSourceLost)));
    let order = cluster.holder(2).unwrap().epoch;
    assert!(!cluster.holder(2).unwrap().is_kept());
    cluster.is_gone(2, order);
    cluster.wait(Duration::ZERO);
    assert!(cluster.state.jobs[&id].ended.is_some(), "what ran there waits, and there is nothing to wait for");
    // The name is not forgotten: who has the image may come back.
    assert!(cluster.state.images[&key(1)].holders.is_empty());
    assert_eq!(cluster.run(Command::Submit { job: job(5), spec: spec(1) }), Err(Refusal::UnknownImage(key(1))));
    cluster.register(1, 2, 10, &[1]).unwrap();
    cluster.submit(spec(1));
    assert_eq!(cluster.state.images[&key(1)].stranded, None);
}

#[test]
fn deadlines_and_cancelling_end_what_has_not_ended() {
    let mut cluster = Cluster::new(1, 10);
    let id = cluster.submit(super::JobSpec { lasts_ms: Some(5000), ..spec(3) });
    cluster.place(id, &[(1, 0..2)]);
    cluster.ends(1, id, 0, Outcome::Exited(0));
    cluster.wait(Duration::from_secs(5));
    let late = Task::ended(Outcome::Failed(Reason::DeadlineExceeded));
    assert_eq!([cluster.task(id, 0), cluster.task(id, 1), cluster.task(id, 2)], [Task::ended(Outcome::Exited(0)), late, late]);
    let other = cluster.submit(spec(2));
    assert_eq!(cluster.run(Command::Forget { job: other }), Err(Refusal::JobRuns(other)));
    cluster.place(other, &[(1, 0..1)]);
    cluster.run(Command::Cancel { job: other }).unwrap();
    assert!((0..2).all(|task| cluster.task(other, task) == Task::ended(Outcome::Failed(Reason::Killed))));
    cluster.run(Command::Forget { job: other }).unwrap();
    assert!(!cluster.state.jobs.contains_key(&other));
    let nothing = control::state::Resources { memory_bytes: 0, ..machines(1) };
    for each in [nothing, machines(2), machines(0)] {
        let greedy = super::JobSpec { each, ..spec(1) };
        assert_eq!(cluster.run(Command::Submit { job: job(8), spec: greedy }), Err(Refusal::BadResources));
    }
    for count in [0, 1_000_001] {
        let refused = cluster.run(Command::Submit { job: job(8), spec: spec(count) });
        assert_eq!(refused, Err(Refusal::BadCount { count, max: 1_000_000 }));
    }
}

#[test]
fn a_revoked_node_never_comes_back_and_a_busy_one_is_not_forgotten() {
    let mut cluster = Cluster::new(3, 10);
    assert_eq!(cluster.run(Command::Remove { node: node(1) }), Err(Refusal::Busy(node(1))));
    cluster.run(Command::Remove { node: node(3) }).unwrap();
    assert_eq!(cluster.run(Command::Remove { node: node(3) }), Err(Refusal::UnknownNode(node(3))));
    let id = cluster.submit(spec(1));
    cluster.place(id, &[(1, 0..1)]);
    cluster.run(Command::Revoke { node: node(1) }).unwrap();
    assert!(!cluster.state.nodes.contains_key(&node(1)) && cluster.holder(1).is_none());
    assert_eq!(cluster.register(1, 9, 10, &[1]), Err(Refusal::Revoked(node(1))));
    assert_eq!(cluster.task(id, 0), Task::Waiting { attempt: 1, not_on: None });
    cluster.run(Command::Cordon { node: node(2), is_cordoned: true }).unwrap();
    assert!(!cluster.state.nodes[&node(2)].is_open());
    cluster.register(2, 2, 10, &[]).unwrap();
    assert!(cluster.state.nodes[&node(2)].is_cordoned, "starting again does not uncordon it");
}

#[test]
fn names_point_at_images_that_are_there() {
    let mut cluster = Cluster::new(1, 10);
    let (tenant, name) = (Tenant::default_tenant(), Name::parse("other").unwrap());
    let put = |digest| Command::PutTemplate { tenant: tenant.clone(), name: name.clone(), digest };
    assert_eq!(
        cluster.run(put(Digest::of(b"none"))),
        Err(Refusal::UnknownImage(super::ImageKey { tenant: tenant.clone(), digest: Digest::of(b"none") }))
    );
    cluster.add_image(2, 1).unwrap();
    cluster.run(put(key(2).digest)).unwrap();
    let other_facts = control::state::ImageFacts { data_bytes: 1, ..super::image_facts() };
    let add = Command::AddImage { key: key(2), facts: other_facts, node: node(1), incarnation: 1 };
    assert_eq!(cluster.run(add), Err(Refusal::OtherFacts(key(2))));
    let remove = Command::RemoveTemplate { tenant: tenant.clone(), name: name.clone() };
    cluster.run(remove.clone()).unwrap();
    assert_eq!(cluster.run(remove), Err(Refusal::UnknownTemplate(name.clone())));
    let foreign = super::NodeFacts { profile: super::profile(2), ..node_facts(2, 10) };
    cluster.run(Command::Register { node: node(2), incarnation: 1, facts: foreign, images: vec![] }).unwrap();
    assert_eq!(cluster.open(2, &[1]), Err(Refusal::ForeignCpu { node: node(2), key: key(1) }));
    cluster.register(3, 1, 0, &[]).unwrap();
    cluster.open(3, &[1]).unwrap();
    let small = super::NodeFacts { capacity: machines(1), ..node_facts(4, 1) };
    cluster.run(Command::Register { node: node(4), incarnation: 1, facts: small, images: vec![] }).unwrap();
    assert_eq!(cluster.open(4, &[1]), Err(Refusal::Full(node(4))));
}

/// The request is passed over, and time is not.
#[test]
fn a_deadline_that_passes_with_a_request_that_comes_again_ends_its_job() {
    let mut cluster = Cluster::new(1, 10);
    let request = Key(Uuid::from_u128(7));
    let cordon = Command::Cordon { node: node(1), is_cordoned: true };
    cluster.entry(Some(request), cordon.clone()).unwrap();
    let id = cluster.submit(super::JobSpec { lasts_ms: Some(5000), ..spec(1) });
    cluster.pass(Duration::from_secs(5));
    cluster.entry(Some(request), cordon).unwrap();
    assert_eq!(cluster.state.jobs[&id].ended, Some(cluster.now()));
}

#[test]
fn a_removed_node_joins_again_only_when_it_has_started_again() {
    let mut cluster = Cluster::new(2, 10);
    cluster.run(Command::Drain { node: node(2), is_draining: true }).unwrap();
    cluster.run(Command::Remove { node: node(2) }).unwrap();
    assert_eq!(cluster.register(2, 1, 10, &[]), Err(Refusal::OldStart { node: node(2), given: 1, current: 1 }));
    let of_start = |incarnation| control::reconcile::Observed { incarnation, ..Default::default() };
    let next = |cluster: &Cluster, start| control::reconcile::reconcile(&cluster.state, node(2), &of_start(start));
    assert_eq!(next(&cluster, 1), [control::reconcile::Action::Leave]);
    assert_eq!(next(&cluster, 2), [control::reconcile::Action::Register { above: 0 }]);
    cluster.register(2, 2, 10, &[]).unwrap();
    assert!(cluster.state.nodes[&node(2)].is_open());
}

#[test]
fn a_result_counts_that_comes_with_the_news_that_its_image_is_gone() {
    let mut cluster = Cluster::new(1, 10);
    let id = cluster.submit(spec(1));
    cluster.place(id, &[(1, 0..1)]);
    let Task::Placed { epoch, .. } = cluster.task(id, 0) else { panic!() };
    let gone = vec![(key(1), cluster.holder(1).unwrap().epoch)];
    cluster.report(1, vec![], gone, vec![super::of(id, vec![(0, epoch, Outcome::Exited(0))])]).unwrap();
    assert_eq!(cluster.task(id, 0), Task::ended(Outcome::Exited(0)));
}

#[test]
fn the_last_copy_on_a_node_that_is_heard_is_kept() {
    let mut cluster = Cluster::new(2, 10);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    cluster.run(Command::Suspect { node: node(2), incarnation: 1 }).unwrap();
    assert_eq!(cluster.let_go(1), Err(Refusal::LastCopy { node: node(1), key: key(1) }));
    cluster.run(Command::Heard { node: node(2), incarnation: 1 }).unwrap();
    cluster.let_go(1).unwrap();
}

/// What was started under a lease counts when the lease is over, and not twice while it lasts.
#[test]
fn machines_that_are_no_tasks_count() {
    let mut cluster = Cluster::new(1, 10);
    let report = |local| Command::Report {
        node: node(1),
        incarnation: 1,
        progress: vec![],
        gone: vec![],
        ended: vec![],
        local: Some(local),
    };
    let grant = |count| Command::GrantCapacity { node: node(1), incarnation: 1, resources: machines(count), lasts_ms: 1000 };
    cluster.run(report(machines(2))).unwrap();
    assert_eq!(cluster.run(grant(11)), Err(Refusal::Full(node(1))), "with the two that are there");
    cluster.run(grant(6)).unwrap();
    let id = cluster.submit(spec(9));
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (4, 5), "two are there, and four may be started");
    cluster.run(report(machines(6))).unwrap();
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (0, 5), "they were");
    cluster.wait(Duration::from_secs(1));
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (0, 5), "and are there when the lease is over");
    cluster.run(report(machines(1))).unwrap();
    assert_eq!(cluster.place(id, &[(1, 0..9)]), (5, 0));
}

#[test]
fn a_token_lets_one_node_in_under_its_name_for_a_while() {
    let mut cluster = Cluster::new(1, 10);
    let name = |text| Name::parse(text).unwrap();
    let token = |number: u8| Digest::of(&[number]);
    let add = |number, named| Command::AddToken { token: token(number), name: name(named), role: Role::Voter };
    let show = |number, by, named| Command::UseToken {
        token: token(number),
        node: node(by),
        proven: Digest::of(&[7]),
        name: name(named),
    };
    assert_eq!(cluster.run(add(1, "node-1")), Err(Refusal::NameTaken(name("node-1"))));
    cluster.run(add(1, "node-2")).unwrap();
    assert_eq!(cluster.run(show(9, 2, "node-2")), Err(Refusal::BadToken), "nobody made it");
    assert_eq!(cluster.run(show(1, 2, "node-3")), Err(Refusal::OtherName(name("node-2"))));
    assert_eq!(cluster.run(show(1, 2, "node-2")), Ok(Answer::Admitted(Role::Voter)));
    assert_eq!(cluster.run(show(1, 2, "node-2")), Ok(Answer::Admitted(Role::Voter)), "it did not hear the answer");
    assert_eq!(cluster.run(show(1, 3, "node-2")), Err(Refusal::BadToken), "used");
    let other_key = Command::UseToken { token: token(1), node: node(2), proven: Digest::of(&[8]), name: name("node-2") };
    assert_eq!(cluster.run(other_key), Err(Refusal::BadToken), "used, by another that claims the same id");
    let taken = Command::UseToken { token: token(1), node: node(1), proven: Digest::of(&[7]), name: name("node-2") };
    assert_eq!(cluster.run(taken), Err(Refusal::NodeExists(node(1))));
    cluster.register(2, 1, 10, &[]).unwrap();
    let facts = NodeFacts { name: name("node-2"), ..node_facts(3, 10) };
    let same_name = Command::Register { node: node(3), incarnation: 1, facts, images: vec![] };
    assert_eq!(cluster.run(same_name), Err(Refusal::NameTaken(name("node-2"))));
    cluster.run(add(2, "node-4")).unwrap();
    cluster.run(Command::Revoke { node: node(4) }).unwrap();
    assert_eq!(cluster.run(show(2, 4, "node-4")), Err(Refusal::Revoked(node(4))));
    cluster.wait(control::apply::TOKEN_TERM);
    assert_eq!(cluster.run(show(2, 5, "node-4")), Err(Refusal::BadToken), "out of date");
    assert!(cluster.state.tokens.is_empty());
}
