//! What becomes of jobs when nodes die, stand still, are drained or started again, and when outputs cannot be kept.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::{check, counts, ended, fakes, job, results, show, submitted, with};
use crate::cluster::stage::Cluster;
use crate::support::eventually;

#[test]
fn what_has_run_and_was_kept_nowhere_else_when_its_node_died_runs_again() {
    let mut cluster = fakes("jobs-e");
    // All of it runs on one node, which the others then do not answer.
    for other in [1, 2] {
        cluster.node(0).json(&["node", "cordon", &format!("node-{other}")]);
    }
    let id = submitted(cluster.node(0), &job(50, &["sleep", "1500"]));
    eventually("all run", || show(cluster.node(0), &id).is_some_and(|job| job["nodes"][0]["here"]["running"] == 50));
    for other in [1, 2] {
        cluster.signal(other, Signal::STOP);
    }
    // They are done by then, and on one disk.
    std::thread::sleep(Duration::from_secs(3));
    cluster.crash(0);
    for other in [1, 2] {
        cluster.signal(other, Signal::CONT);
    }
    for other in [1, 2] {
        eventually("it takes tasks", || cluster.node(1).cli(&["node", "uncordon", &format!("node-{other}")]).code == Some(0));
    }
    let last = ended(cluster.node(1), &id);
    let told = results(cluster.node(2), &id);
    check(&told, 50, |_, result| result["is_success"] == true && result["run"]["attempt"] == 1);
    assert_eq!(counts(&last), [0, 0, 50, 0], "{last}");
}

#[test]
fn a_node_that_stands_still_and_comes_back_adds_nothing() {
    let cluster = fakes("jobs-f");
    let asked = with(job(60, &["sleep", "3000"]), json!({ "replicas": 3 }));
    let id = submitted(cluster.node(0), &asked);
    eventually("each node runs some", || {
        show(cluster.node(0), &id).is_some_and(|job| job["nodes"].as_array().unwrap().len() == 3)
    });
    let leader = cluster.leader(0).unwrap();
    let victim = (0..3).find(|node| *node != leader).unwrap();
    let at = leader;
    cluster.signal(victim, Signal::STOP);
    // It is given up meanwhile, and its tasks run elsewhere.
    let last = ended(cluster.node(at), &id);
    assert_eq!(counts(&last), [0, 0, 60, 0], "{last}");
    let before = results(cluster.node(at), &id);
    assert!(before.iter().any(|result| result["run"]["attempt"] == 1), "{before:?}");
    cluster.signal(victim, Signal::CONT);
    eventually("it is back", || cluster.row(at, victim)["life"] == "up");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(results(cluster.node(victim), &id), before);
    assert!(cluster.node(victim).machines().is_empty(), "what it ran for its tasks is ended");
}

#[test]
fn deadlines_of_jobs_and_tasks_end_them() {
    let cluster = fakes("jobs-g");
    let node = cluster.node(0);
    let sleepy = |more| submitted(node, &with(job(6, &["sleep", "600000"]), more));
    let (whole, each) = (sleepy(json!({ "deadline_ms": 1500 })), sleepy(json!({ "task_deadline_ms": 700 })));
    for (id, detail) in [(whole, None), (each, Some("not done within 700 ms"))] {
        let last = ended(node, &id);
        assert_eq!(last["reasons"], json!({ "DEADLINE_EXCEEDED": 6 }), "{last}");
        check(&results(node, &id), 6, |_, result| result["detail"].as_str() == detail);
    }
    eventually("their children are gone", || (0..3).all(|at| cluster.node(at).machines().is_empty()));
}

#[test]
fn nodes_are_drained_and_started_again_under_load_and_every_task_succeeds() {
    let mut cluster = fakes("jobs-h");
    let asked = with(job(600, &["sleep", "200"]), json!({ "replicas": 3, "retries": 20, "max_parallel": 30 }));
    let id = submitted(cluster.node(0), &asked);
    eventually("some have ended", || show(cluster.node(0), &id).is_some_and(|job| counts(&job)[2] > 30));
    cluster.node(0).json(&["node", "drain", "node-2"]);
    eventually("nothing runs on the one that is drained", || {
        let job = show(cluster.node(0), &id).unwrap_or_default();
        job["nodes"].as_array().is_some_and(|nodes| nodes.iter().all(|node| node["name"] != "node-2" || node["placed"] == 0))
    });
    cluster.node(0).json(&["node", "undrain", "node-2"]);
    for host in [2, 1, 0] {
        let at = (host + 1) % 3;
        cluster.signal(host, Signal::TERM);
        cluster.wait(host);
        cluster.start(host);
        eventually("it is back, and has the template", || {
            cluster.row(at, host)["life"] == "up" && cluster.row(at, host)["images"] == 1
        });
        println!("node {host} is back: {}", show(cluster.node(at), &id).unwrap()["job"]["counts"]);
    }
    let last = ended(cluster.node(0), &id);
    assert_eq!(counts(&last), [0, 0, 600, 0], "{last}");
    check(&results(cluster.node(1), &id), 600, |_, result| result["is_success"] == true);
}

#[test]
fn what_cannot_be_kept_on_two_disks_ends_output_lost_and_on_one_runs_elsewhere() {
    // A disk has less than a node leaves for itself.
    let mut cluster = Cluster::apart("jobs-i", 3);
    if !cluster.is_isolated() {
        return println!("SKIPPED: without root no disk of a test's own can be made");
    }
    cluster.always = vec!["--fake-engine".to_owned(), "opens_all=1".to_owned()];
    let _small = [1, 2].map(|host| cluster.on_small_disk(host, "60m"));
    cluster.begin(0);
    cluster.admit(1, true);
    cluster.admit(2, true);
    cluster.settles(3, 3);
    cluster.template(0, "warm");
    let node = cluster.node(0);
    node.json(&["node", "cordon", "node-0"]);
    let id = submitted(node, &with(job(4, &["true"]), json!({ "retries": 1 })));
    let last = ended(node, &id);
    assert_eq!(last["reasons"], json!({ "OUTPUT_LOST": 4 }), "{last}");
    // Where one disk has room and the others have none, there is still only one copy.
    node.json(&["node", "uncordon", "node-0"]);
    let id = submitted(node, &with(job(4, &["true"]), json!({ "retries": 0 })));
    let last = ended(node, &id);
    assert_eq!(last["reasons"], json!({ "OUTPUT_LOST": 4 }), "{last}");
}
