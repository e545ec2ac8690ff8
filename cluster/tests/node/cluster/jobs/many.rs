//! Many tasks, while nodes die.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use vm::harness::{count, held, seed};

use super::{check, counts, fakes_of, job, results, show, submitted, with};
use crate::cluster::stage::Cluster;
use crate::support::{DEADLINE, eventually};

/// Waits until so many tasks have ended, or all have.
fn until(cluster: &Cluster, at: usize, ids: &[String], ended: u64, deadline: Duration) {
    let until = Instant::now() + deadline;
    loop {
        let done: u64 =
            ids.iter().filter_map(|id| show(cluster.node(at), id)).map(|job| counts(&job)[2..].iter().sum::<u64>()).sum();
        if done >= ended {
            return;
        }
        assert!(Instant::now() < until, "{done} of {ended} tasks have ended after {deadline:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn each_of_very_many_tasks_has_one_result_while_leader_and_workers_die() {
    // A job has at most a million.
    let tasks = count(100_000, 2_000_000);
    let mut cluster = fakes_of("jobs-m", 4, 3);
    let jobs = tasks.div_ceil(1_000_000);
    let each = u32::try_from(tasks / jobs).unwrap();
    let asked = with(job(each, &["echo", "{index}"]), json!({ "replicas": 4, "retries": 20 }));
    // The fourth has no vote, and is asked: it outlives them all.
    let at = 3;
    let began = Instant::now();
    let ids: Vec<String> = (0..jobs).map(|_| submitted(cluster.node(at), &asked)).collect();
    let all = u64::from(each) * jobs;
    let patience = Duration::from_secs(300 + all / 500);
    for (percent, what) in [(10, "the leader is killed"), (50, "a worker is killed"), (90, "a worker stands still")] {
        until(&cluster, at, &ids, all * percent / 100, patience);
        let mut leader = None;
        eventually("one leads", || {
            leader = cluster.leader(at);
            leader.is_some()
        });
        let leader = leader.unwrap();
        let victim = if percent == 10 { leader } else { (0..3).find(|node| *node != leader).unwrap() };
        println!("{percent} % after {:?}: {what} ({victim})", began.elapsed());
        if percent == 90 {
            // As long as it takes to be given up: what it says then is of before.
            cluster.signal(victim, Signal::STOP);
            std::thread::sleep(Duration::from_secs(17));
            cluster.signal(victim, Signal::CONT);
        } else {
            cluster.crash(victim);
            std::thread::sleep(Duration::from_secs(1));
            cluster.start(victim);
        }
    }
    until(&cluster, at, &ids, all, patience);
    println!("{all} tasks after {:?}", began.elapsed());
    for id in &ids {
        let last = show(cluster.node(at), id).unwrap();
        assert_eq!(counts(&last), [0, 0, u64::from(each), 0], "{last}");
        let told = results(cluster.node(at), id);
        check(&told, each, |task, result| result["stdout"] == format!("{task}\n") && result["is_success"] == true);
        let mut attempts = BTreeMap::<u64, u64>::new();
        told.iter().for_each(|result| *attempts.entry(result["run"]["attempt"].as_u64().unwrap()).or_default() += 1);
        println!("by number of tries before: {attempts:?}");
    }
    held("tasks with one result each", all);
}

#[test]
fn cancelling_races_with_ends_and_each_task_has_one_of_both() {
    let cluster = super::fakes("jobs-r");
    let jobs = count(20, 500);
    let mut dice = fastrand::Rng::with_seed(seed());
    for _ in 0..jobs {
        // One that is forgotten while what its tasks printed is on its way to another disk holds up nobody else's.
        let forgotten = submitted(cluster.node(0), &job(200, &["echo", "{index}"]));
        std::thread::sleep(Duration::from_millis(dice.u64(0..300)));
        cluster.node(0).http("POST", &format!("/v1/jobs/{forgotten}/cancel"), b"");
        cluster.node(0).http("DELETE", &format!("/v1/jobs/{forgotten}"), b"");
        let id = submitted(cluster.node(0), &job(200, &["echo", "{index}"]));
        std::thread::sleep(Duration::from_millis(dice.u64(0..600)));
        let path = format!("/v1/jobs/{id}/cancel");
        let cancelled = cluster.node(dice.usize(0..3)).http("POST", &path, b"");
        assert_eq!(cancelled.status, 200, "{cancelled:?}");
        let then = counts(&cancelled.json());
        assert_eq!(then[..2], [0, 0]);
        std::thread::sleep(Duration::from_millis(dice.u64(0..400)));
        assert_eq!(counts(&show(cluster.node(1), &id).unwrap()), then, "what has ended stays as it ended");
        let told = results(cluster.node(2), &id);
        check(&told, 200, |task, result| match result["reason"].as_str() {
            None => result["stdout"] == format!("{task}\n"),
            reason => reason == Some("KILLED"),
        });
        let succeeded = told.iter().filter(|result| result["is_success"] == true).count() as u64;
        assert_eq!(succeeded, then[2]);
    }
    held("jobs that were cancelled while they ended", jobs);
}

#[test]
fn thousands_of_submits_at_once_are_all_there_or_were_refused() {
    let cluster = super::fakes("jobs-s");
    let (all, threads) = (count(2000, 10_000), 50_usize);
    // Nowhere to be placed: they are to be there all at once.
    let asked = with(job(1, &["true"]), json!({ "labels": { "there": "is none" } }));
    let began = Instant::now();
    let taken: Vec<String> = std::thread::scope(|scope| {
        let submitting: Vec<_> = (0..threads)
            .map(|thread| {
                let (cluster, asked) = (&cluster, &asked);
                scope.spawn(move || {
                    let mut taken = Vec::new();
                    for number in 0..all / 50 {
                        let asked = with(asked.clone(), json!({ "key": format!("{thread}-{number}") }));
                        let until = Instant::now() + DEADLINE;
                        loop {
                            let answer = super::submit(cluster.node(thread % 3), &asked);
                            match answer.status {
                                200 => break taken.push(answer.json()["job"]["id"].as_str().unwrap().to_owned()),
                                // Too many for now, or nobody knows: again, with the same key.
                                429 | 504 if Instant::now() < until => std::thread::sleep(Duration::from_millis(200)),
                                _ => panic!("{answer:?}"),
                            }
                        }
                    }
                    taken
                })
            })
            .collect();
        submitting.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    println!("{} submits in {:?}", taken.len(), began.elapsed());
    let listed = cluster.node(1).http("GET", "/v1/jobs", b"");
    let there: std::collections::BTreeSet<String> =
        listed.json()["jobs"].as_array().unwrap().iter().map(|job: &Value| job["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(there.len() as u64, all);
    assert!(taken.iter().all(|id| there.contains(id)), "what was acknowledged is there");
}
