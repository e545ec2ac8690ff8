//! What jobs ask for beyond their number of tasks.

use std::time::Duration;

use control::apply::{JOBS_MAX, TASKS_IN_ALL_MAX};
use control::command::{Answer, Command, Ended, Kept, Refusal};
use control::leader::{Heard, tend};
use control::place::place_all;
use control::state::{Counts, ImageKey, JobSpec, Outcome, Output, Task};
use types::{Digest, Reason, Tenant};

use super::{Cluster, image_facts, job, key, node, spec};

fn tended(cluster: &mut Cluster) -> Vec<Command> {
    let commands = tend(&cluster.state, &Heard::since(cluster.now()), cluster.now());
    for command in &commands {
        cluster.run(command.clone()).unwrap();
    }
    commands
}

#[test]
fn a_job_that_is_submitted_again_is_the_same_job_and_another_one_is_refused() {
    let mut cluster = Cluster::new(1, 10);
    let submit =
        |job, request: &[u8], count| Command::Submit { job, spec: JobSpec { request: Digest::of(request), ..spec(count) } };
    cluster.run(submit(job(1), b"one", 3)).unwrap();
    cluster.place(job(1), &[(1, 0..2)]);
    let before = cluster.state.jobs.clone();
    // As it was put, whatever has become of what it named.
    assert_eq!(cluster.run(submit(job(1), b"one", 4)), Ok(Answer::Done));
    assert_eq!(cluster.run(submit(job(1), b"two", 3)), Err(Refusal::JobExists(job(1))));
    assert_eq!(cluster.state.jobs, before);
}

#[test]
fn who_submits_a_lot_loses_results_before_others_do() {
    let mut cluster = Cluster::new(1, 10);
    let theirs = ImageKey { tenant: "other".parse::<Tenant>().unwrap(), ..key(1) };
    let add = Command::AddImage { key: theirs.clone(), facts: image_facts(), node: node(1), incarnation: 1 };
    cluster.run(add).unwrap();
    let mut submitted = 0;
    let mut ended = |cluster: &mut Cluster, spec: JobSpec| {
        submitted += 1;
        cluster.run(Command::Submit { job: job(submitted), spec }).unwrap();
        cluster.run(Command::Cancel { job: job(submitted) }).unwrap();
        cluster.pass(Duration::from_millis(1));
        job(submitted)
    };
    let small = ended(&mut cluster, JobSpec { image: theirs, ..spec(1000) });
    let large: Vec<_> = (0..5).map(|_| ended(&mut cluster, spec(1_000_000))).collect();
    let left: Vec<_> = cluster.state.jobs.keys().copied().collect();
    assert_eq!(left, [&[small][..], &large[2..]].concat());
    // Also if nothing else of it has ended: it is refused.
    large[2..].iter().for_each(|id| drop(cluster.run(Command::Forget { job: *id }).unwrap()));
    let going = |number, count| Command::Submit { job: job(number), spec: spec(count) };
    for (number, count) in [(100, 1_000_000), (101, 1_000_000), (102, 1_000_000), (103, 999_000)] {
        cluster.run(going(number, count)).unwrap();
    }
    let refused = Refusal::TooManyJobs { max: JOBS_MAX, tasks: TASKS_IN_ALL_MAX };
    assert_eq!(cluster.run(going(104, 1)), Err(refused));
    assert!(cluster.state.jobs.contains_key(&small));
}

#[test]
fn no_more_tasks_are_placed_at_a_time_than_a_job_wants() {
    let mut cluster = Cluster::new(2, 10);
    let id = cluster.submit(JobSpec { max_parallel: Some(3), ..spec(8) });
    let counts = |cluster: &Cluster| cluster.state.jobs[&id].tasks.counts();
    tended(&mut cluster);
    assert_eq!(counts(&cluster), Counts { waiting: 5, placed: 3, ..Counts::default() });
    assert_eq!(place_all(&cluster.state), (vec![], vec![]), "nothing is wrong with those that wait");
    // A plan of before: what it would place beyond the limit waits on.
    assert_eq!(cluster.place(id, &[(1, 3..8)]), (0, 5));
    cluster.ends(1, id, 0, Outcome::Exited(0));
    cluster.ends(1, id, 1, Outcome::Exited(1));
    tended(&mut cluster);
    assert_eq!(counts(&cluster), Counts { waiting: 3, placed: 3, succeeded: 1, failed: 1 });
}

#[test]
fn the_oldest_job_is_placed_first_and_what_finds_no_place_is_looked_at_once() {
    let mut cluster = Cluster::new(1, 4);
    let first = cluster.submit(spec(3));
    cluster.pass(Duration::from_millis(1));
    let others: Vec<_> = (0..5).map(|_| cluster.submit(spec(2))).collect();
    let (commands, left) = place_all(&cluster.state);
    let placed: Vec<_> = commands
        .iter()
        .map(|command| match command {
            Command::Place { job, on, .. } => (*job, on.clone()),
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(placed, [(first, vec![(node(1), 0..3)]), (others[0], vec![(node(1), 0..1)])], "what is taken counts at once");
    assert_eq!(left, [others[1]]);
}

#[test]
fn an_image_is_on_as_many_nodes_as_its_jobs_want_while_they_go_on() {
    let mut cluster = Cluster::new(3, 10);
    let id = cluster.submit(JobSpec { replicas: 2, ..spec(1) });
    tended(&mut cluster);
    tended(&mut cluster);
    let holders = |cluster: &Cluster| cluster.state.images[&key(1)].holders.len();
    assert_eq!(holders(&cluster), 2, "the task runs where it is, and another node reads it");
    assert_eq!(tended(&mut cluster), []);
    cluster.lose(2);
    tended(&mut cluster);
    assert_eq!(holders(&cluster), 2, "another one, for the one that is lost");
    // As many as there are, if there are fewer.
    cluster.lose(3);
    assert_eq!((tended(&mut cluster), holders(&cluster)), (vec![], 1));
    assert!(cluster.state.jobs[&id].ended.is_none());
}

#[test]
fn the_state_says_where_the_output_of_a_task_is_and_of_which_order() {
    let mut cluster = Cluster::new(2, 10);
    let id = cluster.submit(JobSpec { retries: 1, ..spec(2) });
    cluster.place(id, &[(1, 0..2)]);
    let Task::Placed { epoch, .. } = cluster.task(id, 0) else { panic!() };
    let lost = Outcome::Failed(Reason::OutputLost);
    let ended = |task, outcome, kept| vec![Ended { job: id, kept, tasks: vec![(task, epoch, outcome)] }];
    cluster.report(1, vec![], vec![], ended(0, Outcome::Exited(0), Kept::HereAnd(node(2)))).unwrap();
    cluster.report(1, vec![], vec![], ended(1, lost, Kept::Nowhere)).unwrap();
    let output = Some(Output { epoch, node: node(1), copy: Some(node(2)) });
    assert_eq!(cluster.task(id, 0), Task::Done { outcome: Outcome::Exited(0), output });
    // What has run and is nowhere runs again; and ends so when its tries are used up.
    assert_eq!(cluster.task(id, 1), Task::Waiting { attempt: 1, not_on: Some(node(1)) });
    cluster.open(2, &[1]).unwrap();
    cluster.place(id, &[(2, 1..2)]);
    cluster.ends(2, id, 1, lost);
    assert_eq!(cluster.task(id, 1), Task::ended(lost));
}

#[test]
fn a_node_that_fails_fast_does_not_take_the_tries_of_a_job() {
    let mut cluster = Cluster::new(2, 2);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    let id = cluster.submit(JobSpec { retries: 1, ..spec(6) });
    let crashed = Outcome::Failed(Reason::WorkerCrashed);
    let on = |cluster: &Cluster, number| -> Vec<u32> {
        let is_there = |task: &u32| matches!(cluster.task(id, *task), Task::Placed { node: at, .. } if at == node(number));
        (0..6).filter(is_there).collect()
    };
    tended(&mut cluster);
    assert_eq!((on(&cluster, 1).len(), on(&cluster, 2).len()), (2, 2), "both are full");
    // Node 1 fails whatever it gets, at once; node 2 takes its time.
    for _ in 0..8 {
        on(&cluster, 1).into_iter().for_each(|task| cluster.ends(1, id, task, crashed));
        tended(&mut cluster);
    }
    let counts = cluster.state.jobs[&id].tasks.counts();
    assert_eq!((counts.failed, counts.placed), (0, 2), "what failed there waits for the other");
    let another = cluster.submit(spec(1));
    tended(&mut cluster);
    assert!(matches!(cluster.task(another, 0), Task::Placed { node: at, .. } if at == node(1)), "nobody else waits for that");
    for _ in 0..3 {
        on(&cluster, 2).into_iter().for_each(|task| cluster.ends(2, id, task, Outcome::Exited(0)));
        tended(&mut cluster);
    }
    assert_eq!(cluster.state.jobs[&id].tasks.counts(), Counts { succeeded: 6, ..Counts::default() });
}

#[test]
fn a_task_goes_back_to_where_it_failed_if_nothing_of_its_job_is_anywhere_else() {
    let mut cluster = Cluster::new(2, 2);
    let occupied = cluster.submit(spec(2));
    cluster.place(occupied, &[(1, 0..2)]);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    let id = cluster.submit(JobSpec { retries: 1, ..spec(1) });
    tended(&mut cluster);
    cluster.ends(2, id, 0, Outcome::Failed(Reason::WorkerCrashed));
    tended(&mut cluster);
    assert_eq!(cluster.task(id, 0), Task::Waiting { attempt: 1, not_on: Some(node(2)) }, "not at once");
    cluster.wait(Duration::from_secs(1));
    tended(&mut cluster);
    assert!(matches!(cluster.task(id, 0), Task::Placed { node: at, attempt: 1, .. } if at == node(2)));
}

#[test]
fn a_task_goes_back_after_a_while_even_if_those_elsewhere_never_end() {
    let mut cluster = Cluster::new(2, 2);
    cluster.open(2, &[1]).unwrap();
    cluster.has(2, 100);
    let id = cluster.submit(spec(4));
    tended(&mut cluster);
    let on = |cluster: &Cluster, number| -> Vec<u32> {
        let is_there = |task: &u32| matches!(cluster.task(id, *task), Task::Placed { node: at, .. } if at == node(number));
        (0..4).filter(is_there).collect()
    };
    on(&cluster, 1).into_iter().for_each(|task| cluster.ends(1, id, task, Outcome::Failed(Reason::WorkerCrashed)));
    for _ in 0..5 {
        cluster.wait(Duration::from_secs(5));
        tended(&mut cluster);
        assert_eq!(on(&cluster, 1).len(), 0);
    }
    cluster.wait(Duration::from_secs(5));
    tended(&mut cluster);
    assert_eq!(on(&cluster, 1).len(), 1, "one first, to see");
    tended(&mut cluster);
    assert_eq!(on(&cluster, 1).len(), 2);
    // A node that was only away has not failed them.
    cluster.register(1, 2, 2, &[1]).unwrap();
    tended(&mut cluster);
    assert_eq!(on(&cluster, 1).len(), 2);
}

#[test]
fn what_has_ended_is_there_after_an_hour_in_which_nobody_asked() {
    let mut cluster = Cluster::new(2, 10);
    let id = cluster.submit(spec(1));
    cluster.place(id, &[(1, 0..1)]);
    cluster.ends(1, id, 0, Outcome::Exited(0));
    let ended = cluster.task(id, 0);
    for _ in 0..120 {
        cluster.wait(Duration::from_secs(30));
        tended(&mut cluster);
    }
    assert_eq!(cluster.task(id, 0), ended);
}

#[test]
fn a_large_job_leaves_room_to_those_after_it_as_its_tasks_end() {
    let mut cluster = Cluster::new(1, 10);
    let large = cluster.submit(spec(1000));
    tended(&mut cluster);
    cluster.pass(Duration::from_secs(1));
    let small = cluster.submit(spec(3));
    let placed = |cluster: &Cluster, id| cluster.state.jobs[&id].tasks.counts().placed;
    tended(&mut cluster);
    assert_eq!((placed(&cluster, large), placed(&cluster, small)), (10, 0));
    (0..3).for_each(|task| cluster.ends(1, large, task, Outcome::Exited(0)));
    tended(&mut cluster);
    assert_eq!((placed(&cluster, large), placed(&cluster, small)), (7, 3));
}
