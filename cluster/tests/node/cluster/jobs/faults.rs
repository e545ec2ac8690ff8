//! What becomes of jobs when nodes die, stand still, are drained or started again, and when outputs cannot be kept.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

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

#[test]
fn what_is_submitted_while_nobody_leads_is_one_job_each_time() {
    let mut cluster = fakes("jobs-t");
    let mut keys = Vec::new();
    for round in 0..2 {
        let mut leads = None;
        eventually("one leads", || {
            leads = cluster.leader(0);
            leads.is_some()
        });
        let leader = leads.unwrap();
        let dead = cluster.list(leader, true).unwrap()["leader"].clone();
        cluster.crash(leader);
        // Elections take longer than it takes to ask.
        let seen = cluster.list((leader + 1) % 3, true).unwrap()["leader"].clone();
        assert!(seen.is_null() || seen == dead, "{seen} leads already");
        let said = std::thread::scope(|scope| {
            let asking = (0..12).map(|number| {
                // Twice under each key, of the two that are left.
                let (key, at) = (format!("{round}-{}", number / 2), (leader + 1 + number % 2) % 3);
                let node = cluster.node(at);
                let ask = move || {
                    let run = ["run", "warm", "-n", "2", "--detach", "--cpus", "0.001", "--key"];
                    node.cli(&[&run[..], &[&key, "--", "echo", "{index}"]].concat())
                };
                scope.spawn(ask)
            });
            let asking: Vec<_> = asking.collect();
            asking.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(said.iter().all(|said| said.code == Some(0)), "{said:?}");
        keys.extend(said.chunks(2).map(|pair| {
            assert_eq!(pair[0].out, pair[1].out, "one key, one job");
            pair[0].out.trim().to_owned()
        }));
        cluster.start(leader);
        cluster.settles(3, 3);
    }
    let jobs = cluster.node(1).json(&["job", "ls"]);
    let mut there: Vec<&str> = jobs["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap()).collect();
    there.sort_unstable();
    keys.sort_unstable();
    assert_eq!(there, keys);
    for id in &keys {
        assert_eq!(counts(&ended(cluster.node(2), id)), [0, 0, 2, 0]);
        check(&results(cluster.node(0), id), 2, |task, result| result["stdout"] == format!("{task}\n"));
    }
}

#[test]
fn a_submitter_that_is_gone_finds_everything_an_hour_later() {
    let mut cluster = fakes("jobs-u");
    let run = ["run", "warm", "-n", "60", "--cpus", "0.001", "--key", "left", "--", "echo", "{index}"];
    let mut submitter = cluster.node(1).command(&run).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    eventually("its job is there", || !cluster.node(0).json(&["job", "ls"])["jobs"].as_array().unwrap().is_empty());
    submitter.kill().unwrap();
    submitter.wait().unwrap();
    let id = cluster.node(0).json(&["job", "ls"])["jobs"][0]["id"].as_str().unwrap().to_owned();
    ended(cluster.node(0), &id);
    // An hour on all clocks, and none of the nodes that it knew goes on.
    for host in 0..3 {
        cluster.crash(host);
        cluster.set_clock(host, 60 * 60);
    }
    for host in 0..3 {
        cluster.start(host);
    }
    cluster.settles(3, 3);
    let attached = cluster.node(2).cli(&["job", "attach", &id]);
    assert_eq!(attached.code, Some(0), "{attached:?}");
    let told: Vec<Value> = attached.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    check(&told, 60, |task, result| result["stdout"] == format!("{task}\n"));
}
