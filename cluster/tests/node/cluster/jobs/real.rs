//! Jobs on real engines: Linux guests that are forked on three nodes. Needs what the tests of `linux` need.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm::harness::{count, held};

use super::{check, counts, job, results, show, submitted, with};
use crate::cluster::stage::Cluster;
use crate::linux::{BASE, PYTHON, Shared, in_time, node_with};
use crate::support::eventually;

/// Three nodes, and a template that one of them has.
fn real(name: &str, template: Shared, more: &[&str]) -> Cluster {
    let mut cluster = Cluster::apart(name, 3);
    cluster.always = more.iter().map(|text| (*text).to_owned()).collect();
    cluster.begin(0);
    cluster.admit(1, true);
    cluster.admit(2, true);
    cluster.settles(3, 3);
    let builder = node_with(template);
    let file = builder.path().join("data/images").join(format!("{}.img", template.name));
    cluster.node(0).json(&["template", "import", "warm", file.to_str().unwrap()]);
    cluster
}

fn sh(script: &str) -> Value {
    job(1, &["sh", "-c", script])
}

/// Waits for the end, with the patience that guests take.
fn ended(cluster: &Cluster, at: usize, id: &str) -> Value {
    let mut last = Value::Null;
    in_time("the job ends", || {
        last = show(cluster.node(at), id).unwrap_or_default();
        last["job"]["is_ended"] == true
    });
    last
}

/// Waits until so many tasks have ended, for as long as now and then one more does; says which node knows.
fn so_many_end(cluster: &Cluster, id: &str, wanted: u64) -> usize {
    let (mut at, mut ended) = (0, 0);
    while ended < wanted {
        in_time("another task ends", || {
            // What outlives the others is not asked for by number.
            at = (at + 1) % 3;
            let before = ended;
            ended = show(cluster.node(at), id).map_or(0, |job| counts(&job)[2..].iter().sum::<u64>()).max(before);
            ended > before
        });
    }
    at
}

#[test]
fn real_tasks_have_one_result_each_while_leader_and_workers_die() {
    let tasks = u32::try_from(count(200, 2000)).unwrap();
    let mut cluster = real("jobs-x", PYTHON, &[]);
    // Where KVM emulates guest kernels a program takes seconds to start; an interpreter that runs is asked at once.
    let code = "[uuid.uuid4().hex, {index} * 7]";
    let asked = with(
        job(tasks, &[]),
        json!({ "work": { "eval": code }, "replicas": 3, "retries": 20, "max_parallel": 60, "cpu_millis": 100 }),
    );
    let began = Instant::now();
    let id = submitted(cluster.node(0), &asked);
    for percent in [10, 50, 90] {
        let at = so_many_end(&cluster, &id, u64::from(tasks) * percent / 100);
        let mut leader = None;
        eventually("one leads", || {
            leader = cluster.leader(at);
            leader.is_some()
        });
        let leader = leader.unwrap();
        let victim = if percent == 50 { (0..3).find(|node| *node != leader).unwrap() } else { leader };
        println!("{percent} % after {:?}: node {victim} is killed, node {leader} leads", began.elapsed());
        cluster.crash(victim);
        cluster.start(victim);
    }
    so_many_end(&cluster, &id, u64::from(tasks));
    let last = ended(&cluster, 0, &id);
    println!("{tasks} tasks after {:?}: {last}", began.elapsed());
    assert_eq!(counts(&last), [0, 0, u64::from(tasks), 0], "{last}");
    let told = results(cluster.node(1), &id);
    check(&told, tasks, |task, result| {
        result["value"].as_str().is_some_and(|value| value.ends_with(&format!(", {}]", task * 7)))
    });
    let ids: BTreeSet<&str> = told.iter().filter_map(|result| result["value"].as_str()?.split(',').next()).collect();
    assert_eq!(ids.len(), told.len(), "no two machines are one");
    held("real tasks with one result each", u64::from(tasks));
}

/// Children on two nodes that have some of their memory on the third, which dies.
fn holder_dies(name: &str, replicas: u8) -> (Value, Vec<Value>) {
    let tasks = 12;
    let mut cluster = real(name, BASE, &["--page-deadline", "4s"]);
    cluster.node(0).json(&["node", "cordon", "node-2"]);
    if replicas > 1 {
        // All of it is on a second node before.
        let waits = with(sh("sleep 1000"), json!({ "replicas": 2 }));
        let id = submitted(cluster.node(0), &waits);
        in_time("another node has all of it", || {
            let explained = cluster.node(0).json(&["explain", "warm"]);
            let settled = |node: &&Value| node["settled_percent"] == 100;
            explained["nodes"].as_array().unwrap().iter().filter(settled).count() >= 2
        });
        cluster.node(0).http("POST", &format!("/v1/jobs/{id}/cancel"), b"");
    }
    // There nothing comes that nobody touches.
    cluster.crash(2);
    cluster.start_with(2, &["--no-stream", "--no-replay", "--label", "lazy=yes"]);
    eventually("it is back", || cluster.row(0, 2)["life"] == "up");
    cluster.node(0).json(&["node", "uncordon", "node-2"]);
    let asked = with(
        sh("sleep 6; cat $(busybox find / -xdev -type f -size +0 2>/dev/null) > /dev/null; echo read"),
        json!({ "inputs": { "count": tasks }, "labels": { "lazy": "yes" }, "replicas": replicas, "retries": 1 }),
    );
    let id = submitted(cluster.node(0), &asked);
    in_time("children run on the node that has little of it", || {
        show(cluster.node(0), &id).is_some_and(|job| {
            job["nodes"]
                .as_array()
                .unwrap()
                .iter()
                .any(|node| node["name"] == "node-2" && node["here"]["remote"].as_u64() > Some(0))
        })
    });
    std::thread::sleep(Duration::from_secs(1));
    cluster.crash(0);
    let last = ended(&cluster, 2, &id);
    let told = results(cluster.node(2), &id);
    check(&told, tasks, |_, result| result["is_success"] == true || result["reason"].is_string());
    (last, told)
}

#[test]
fn real_children_whose_only_holder_dies_end_page_source_lost_or_had_all_that_they_read() {
    let (last, told) = holder_dies("jobs-y", 1);
    println!("{last}");
    for result in &told {
        let is_right = result["is_success"] == true && result["stdout"] == "read\n" || result["reason"] == "PAGE_SOURCE_LOST";
        assert!(is_right, "{result}");
    }
    assert!(told.iter().any(|result| result["reason"] == "PAGE_SOURCE_LOST"), "{last}");
}

#[test]
fn real_children_whose_holder_dies_go_on_with_another_one() {
    let (last, told) = holder_dies("jobs-z", 2);
    assert!(told.iter().all(|result| result["is_success"] == true && result["stdout"] == "read\n"), "{last} {told:?}");
}
