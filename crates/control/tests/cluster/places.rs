//! Where tasks go, what a leader sees to, and what a node makes of it.

use std::collections::BTreeMap;
use std::time::Duration;

use control::command::Command;
use control::command::Kept;
use control::leader::{Heard, LOST_AFTER, SUSPECT_AFTER, UNNEEDED_AFTER, tend};
use control::place::{DEGREE, Plan, Tier, Verdict, ZONE, plan, wanted};
use control::reconcile::{Action, Observed, Run, Seen, reconcile};
use control::state::{JobSpec, Outcome, Spread, Task};
use types::NodeId;

use super::{Cluster, job, key, node, node_facts, spec};

fn planned(cluster: &mut Cluster, spec: JobSpec) -> Plan {
    let count = u64::from(spec.count);
    let id = cluster.submit(spec);
    let plan = plan(&cluster.state, &wanted(&cluster.state.jobs[&id], count, None));
    cluster.run(Command::Cancel { job: id }).unwrap();
    cluster.run(Command::Forget { job: id }).unwrap();
    plan
}

fn on(plan: &Plan) -> Vec<(NodeId, u64)> {
    let mut on = plan.on.clone();
    on.sort_unstable();
    on
}

#[test]
fn tasks_go_where_the_image_is_and_then_where_it_comes() {
    let mut cluster = Cluster::new(4, 10);
    assert_eq!(on(&planned(&mut cluster, spec(10))), [(node(1), 10)]);
    let more = planned(&mut cluster, spec(12));
    assert_eq!(more.on[0], (node(1), 10));
    assert_eq!((more.on.len(), more.opens.len(), more.left), (2, 1, 0), "one new node is enough");
    assert!(matches!(more.verdicts[&more.on[1].0], Verdict::Takes { count: 2, because: Tier::Far }));
    // One that reads it already comes before one that does not, and one that has most of it before that.
    cluster.open(3, &[1]).unwrap();
    cluster.open(4, &[1]).unwrap();
    cluster.has(4, 30);
    assert_eq!(on(&planned(&mut cluster, spec(25))), [(node(1), 10), (node(3), 5), (node(4), 10)]);
    let all = planned(&mut cluster, spec(50));
    assert_eq!((all.on.len(), all.left), (4, 10));
    assert!(all.on.iter().all(|(id, _)| matches!(all.verdicts[id], Verdict::Takes { .. })));
}

#[test]
fn spreading_and_packing_and_the_last_failure() {
    let mut cluster = Cluster::new(3, 10);
    for other in [2, 3] {
        cluster.open(other, &[1]).unwrap();
        cluster.has(other, 100);
    }
    assert_eq!(on(&planned(&mut cluster, spec(9))), [(node(1), 3), (node(2), 3), (node(3), 3)]);
    assert_eq!(on(&planned(&mut cluster, JobSpec { spread: Spread::Pack, ..spec(9) })), [(node(1), 9)]);
    cluster.register(4, 1, 3, &[1]).unwrap();
    assert_eq!(on(&planned(&mut cluster, JobSpec { spread: Spread::Pack, ..spec(9) })), [(node(1), 9)], "one that holds all");
    assert_eq!(
        on(&planned(&mut cluster, JobSpec { spread: Spread::Pack, ..spec(2) })),
        [(node(4), 2)],
        "the fullest that does"
    );
    assert_eq!(planned(&mut cluster, JobSpec { spread: Spread::Pack, ..spec(20) }).on.len(), 2);
    cluster.run(Command::Cordon { node: node(4), is_cordoned: true }).unwrap();
    let id = cluster.submit(spec(3));
    let others = plan(&cluster.state, &wanted(&cluster.state.jobs[&id], 3, Some(node(2))));
    assert!(others.on.iter().all(|(id, _)| *id != node(2)));
    assert_eq!(others.verdicts[&node(2)], Verdict::FailedLast);
    let alone = plan(&cluster.state, &wanted(&cluster.state.jobs[&id], 25, Some(node(2))));
    assert!(alone.on.iter().all(|(id, _)| *id != node(2)), "not even if the others do not take all");
}

#[test]
fn every_node_that_takes_nothing_has_a_reason() {
    let mut cluster = Cluster::new(6, 10);
    let foreign = super::NodeFacts { profile: super::profile(2), ..node_facts(7, 10) };
    cluster.run(Command::Register { node: node(7), incarnation: 1, facts: foreign, images: vec![] }).unwrap();
    cluster.run(Command::Cordon { node: node(2), is_cordoned: true }).unwrap();
    cluster.run(Command::Suspect { node: node(3), incarnation: 1 }).unwrap();
    let id = cluster.submit(spec(10));
    cluster.place(id, &[(1, 0..10)]);
    cluster.open(5, &[1]).unwrap();
    cluster.has(5, 100);
    cluster.let_go(5).unwrap();
    let labels = BTreeMap::from([("disk".to_owned(), "fast".to_owned())]);
    let labelled = planned(&mut cluster, JobSpec { labels, ..spec(1) });
    assert_eq!(labelled.verdicts[&node(4)], Verdict::Label("disk=fast".into()));
    assert_eq!(labelled.left, 1);
    let plain = planned(&mut cluster, spec(1));
    assert!(matches!(plain.verdicts[&node(1)], Verdict::Full { .. }));
    assert!(
        matches!(plain.verdicts[&node(2)], Verdict::Closed { .. })
            && matches!(plain.verdicts[&node(3)], Verdict::Closed { .. })
    );
    assert_eq!((&plain.verdicts[&node(5)], &plain.verdicts[&node(7)]), (&Verdict::LetsGo, &Verdict::ForeignCpu));
    assert!(plain.verdicts.values().all(|verdict| !verdict.to_string().is_empty()));
}

#[test]
fn bulk_goes_down_a_tree_and_near_nodes_first() {
    let mut cluster = Cluster::new(1, 1);
    for number in 2..=40 {
        let mut facts = node_facts(number, 1);
        facts.labels.insert(ZONE.into(), if number <= 20 { "a" } else { "b" }.into());
        cluster.run(Command::Register { node: node(number), incarnation: 1, facts, images: vec![] }).unwrap();
    }
    let id = cluster.submit(spec(40));
    let heard = Heard::since(cluster.now());
    for command in tend(&cluster.state, &heard, cluster.now()) {
        cluster.run(command).unwrap();
    }
    assert!(cluster.state.jobs[&id].tasks.iter().all(|(_, task)| matches!(task, Task::Placed { .. })));
    let image = &cluster.state.images[&key(1)];
    let mut readers: BTreeMap<NodeId, usize> = BTreeMap::new();
    for first in image.holders.values().filter_map(|holder| holder.sources.first()) {
        *readers.entry(*first).or_default() += 1;
    }
    assert!(readers.values().all(|readers| *readers <= DEGREE), "{readers:?}");
    assert_eq!(readers.values().sum::<usize>(), 39);
    // A page that is asked for goes up all the way.
    let source = |id: &NodeId| image.holders[id].sources.first();
    let hops = |id: &NodeId| std::iter::successors(source(id), |id| source(id)).count();
    let most = image.holders.keys().map(hops).max().unwrap();
    assert!(most <= 8, "{most} nodes between the last reader and who has it all");
}

#[test]
fn a_leader_gives_nodes_time_and_then_gives_them_up() {
    let mut cluster = Cluster::new(2, 10);
    let began = cluster.now();
    let mut heard = Heard::since(began);
    let at = |time: Duration| began + time;
    assert!(tend(&cluster.state, &heard, at(SUSPECT_AFTER - Duration::from_millis(1))).is_empty());
    heard.hear(node(1), at(SUSPECT_AFTER));
    let suspects = tend(&cluster.state, &heard, at(SUSPECT_AFTER));
    assert_eq!(suspects, [Command::Suspect { node: node(2), incarnation: 1 }]);
    suspects.into_iter().for_each(|command| drop(cluster.run(command).unwrap()));
    heard.hear(node(1), at(LOST_AFTER));
    let lost = tend(&cluster.state, &heard, at(LOST_AFTER));
    assert_eq!(lost, [Command::GiveUp { node: node(2), incarnation: 1 }]);
    // A new leader begins anew.
    assert!(tend(&cluster.state, &Heard::since(at(LOST_AFTER)), at(LOST_AFTER)).is_empty());
    heard.hear(node(2), at(LOST_AFTER));
    assert_eq!(tend(&cluster.state, &heard, at(LOST_AFTER)), [Command::Heard { node: node(2), incarnation: 1 }]);
}

#[test]
fn a_leader_saves_what_only_a_drained_node_has_and_lets_go_of_what_nothing_needs() {
    let mut cluster = Cluster::new(2, 10);
    cluster.run(Command::Drain { node: node(1), is_draining: true }).unwrap();
    let tend_at =
        |cluster: &Cluster, after: Duration| tend(&cluster.state, &Heard::since(cluster.now() + after), cluster.now() + after);
    let saves = tend_at(&cluster, Duration::ZERO);
    assert_eq!(saves, [Command::Open { key: key(1), node: node(2), sources: vec![node(1)] }]);
    saves.into_iter().for_each(|command| drop(cluster.run(command).unwrap()));
    assert!(tend_at(&cluster, Duration::ZERO).is_empty(), "it is on its way");
    cluster.has(2, 100);
    let goes = tend_at(&cluster, Duration::ZERO);
    assert_eq!(goes, [Command::LetGo { key: key(1), node: node(1) }]);
    goes.into_iter().for_each(|command| drop(cluster.run(command).unwrap()));
    let (tenant, name) = cluster.state.templates.keys().next().unwrap().clone();
    cluster.run(Command::RemoveTemplate { tenant, name }).unwrap();
    assert!(tend_at(&cluster, UNNEEDED_AFTER - Duration::from_millis(1)).iter().all(|command| *command == Command::Note));
    assert_eq!(tend_at(&cluster, UNNEEDED_AFTER), [Command::LetGo { key: key(1), node: node(2) }]);
}

#[test]
fn a_reader_whose_source_is_gone_is_given_others() {
    let mut cluster = Cluster::new(3, 10);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    cluster.open(3, &[2]).unwrap();
    cluster.lose(2);
    assert!(cluster.holder(3).unwrap().sources.is_empty());
    let orders = tend(&cluster.state, &Heard::since(cluster.now()), cluster.now());
    assert_eq!(orders, [Command::Open { key: key(1), node: node(3), sources: vec![node(1)] }]);
    orders.into_iter().for_each(|command| drop(cluster.run(command).unwrap()));
    // The node, which read from the other one, is told.
    let reading = Seen { percent: 10, sources: vec![node(2)] };
    let observed = Observed { incarnation: 1, images: BTreeMap::from([(key(1), reading)]), ..Observed::default() };
    let actions = reconcile(&cluster.state, node(3), &observed);
    assert!(
        actions.iter().any(|action| matches!(action, Action::Open { sources, .. } if *sources == [node(1)])),
        "{actions:?}"
    );
}

#[test]
fn a_node_becomes_what_the_state_says() {
    let mut cluster = Cluster::new(2, 10);
    let at_first = Observed { incarnation: 1, ..Observed::default() };
    let unknown = Observed { incarnation: 2, ..Observed::default() };
    assert_eq!(reconcile(&cluster.state, node(2), &at_first), []);
    assert_eq!(reconcile(&cluster.state, node(2), &unknown), [Action::Register { above: 1 }]);
    assert_eq!(reconcile(&cluster.state, node(9), &at_first), [Action::Register { above: 0 }]);

    cluster.open(2, &[1]).unwrap();
    let id = cluster.submit(spec(3));
    cluster.place(id, &[(2, 0..2)]);
    let epoch = cluster.holder(2).unwrap().epoch;
    let open = Action::Open { key: key(1), epoch, sources: vec![node(1)] };
    assert_eq!(reconcile(&cluster.state, node(2), &at_first), [open], "no child before the image is opened");
    let mut observed = at_first.clone();
    observed.images.insert(key(1), Seen { percent: 50, sources: vec![node(1)] });
    let Task::Placed { epoch: order, .. } = cluster.task(id, 0) else { panic!() };
    let actions = reconcile(&cluster.state, node(2), &observed);
    let starts = |task| Action::Start { job: id, task, epoch: order };
    assert!(actions.contains(&starts(0)) && actions.contains(&starts(1)) && actions.len() == 3, "{actions:?}");

    // A child of an order before, one that has ended, one that was taken note of, and an image of nobody's.
    observed.tasks.insert((id, 0), Run { epoch: types::Epoch(order.0 - 1), ended: None });
    observed.tasks.insert((id, 1), Run { epoch: order, ended: Some((Outcome::Exited(3), Kept::Nowhere)) });
    observed.tasks.insert((job(9), 0), Run { epoch: order, ended: Some((Outcome::Exited(3), Kept::Nowhere)) });
    observed.images.insert(key(7), Seen { percent: 100, sources: vec![] });
    let actions = reconcile(&cluster.state, node(2), &observed);
    assert!(actions.contains(&Action::End { job: id, task: 0 }), "{actions:?}");
    assert!(actions.contains(&Action::Forget { job: job(9), task: 0 }) && actions.contains(&Action::Drop { key: key(7) }));
    let Some(Action::Report(report)) = actions.last() else { panic!("{actions:?}") };
    cluster.run((**report).clone()).unwrap();
    assert_eq!(cluster.task(id, 1), Task::ended(Outcome::Exited(3)));
    assert_eq!(cluster.holder(2).unwrap().percent, 50);

    // An order that it cannot carry out, and one to let go.
    let failed = Observed { failed: [(key(1), epoch)].into(), ..at_first.clone() };
    let Some(Action::Report(report)) = reconcile(&cluster.state, node(2), &failed).pop() else { panic!() };
    cluster.run(*report).unwrap();
    assert!(cluster.holder(2).is_none());
    assert!(matches!(cluster.task(id, 0), Task::Waiting { attempt: 1, .. }));
    // What it had all of is gone: it says so, and is not believed to have it.
    let Some(Action::Report(report)) = reconcile(&cluster.state, node(1), &at_first).pop() else { panic!() };
    cluster.run(*report).unwrap();
    assert!(cluster.holder(1).is_none());
}

#[test]
fn a_copy_that_can_be_spared_makes_room() {
    let mut cluster = Cluster::new(2, 10);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    // Another image on node 1, whose memory is then full; its job finds no place.
    cluster.add_image(2, 1).unwrap();
    let id = cluster.submit(JobSpec { image: key(2), ..spec(1) });
    let orders = tend(&cluster.state, &Heard::since(cluster.now()), cluster.now());
    let spared = |on| Command::LetGo { key: key(1), node: node(on) };
    assert!(orders == [spared(1)] || orders == [spared(2)], "{orders:?}");
    orders.into_iter().for_each(|command| drop(cluster.run(command).unwrap()));
    assert!(cluster.state.jobs[&id].ended.is_none());
}
