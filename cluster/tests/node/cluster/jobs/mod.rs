//! Jobs on clusters of real nodes: each task gets one result, whatever becomes of nodes meanwhile.

mod faults;
mod many;
mod real;
mod refused;
mod results;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::stage::Cluster;
use crate::support::{Answer, Node, eventually};

/// A job of `count` tasks that run `program`, of which a node's share is bounded by nothing but what placement counts.
fn job(count: u32, program: &[&str]) -> Value {
    json!({ "template": "warm", "inputs": { "count": count }, "work": { "exec": program }, "cpu_millis": 1 })
}

/// `job` with more of it said.
fn with(mut job: Value, more: Value) -> Value {
    job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    job
}

fn submit(node: &Node, job: &Value) -> Answer {
    node.http("POST", "/v1/jobs", job.to_string().as_bytes())
}

/// Submits it, which has to be taken, and says its id.
fn submitted(node: &Node, job: &Value) -> String {
    let answer = submit(node, job);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["job"]["id"].as_str().unwrap().to_owned()
}

/// The job, if the node can say.
fn show(node: &Node, id: &str) -> Option<Value> {
    let answer = node.http("GET", &format!("/v1/jobs/{id}"), b"");
    (answer.status == 200).then(|| answer.json())
}

fn counts(job: &Value) -> [u64; 4] {
    ["waiting", "placed", "succeeded", "failed"].map(|count| job["job"]["counts"][count].as_u64().unwrap())
}

/// Waits for its end, and says what it is then.
fn ended(node: &Node, id: &str) -> Value {
    let mut last = Value::Null;
    eventually(&format!("job {id} ends"), || {
        last = show(node, id).unwrap_or_default();
        last["job"]["is_ended"] == true
    });
    last
}

/// All results that there are, in the order of tasks.
fn results(node: &Node, id: &str) -> Vec<Value> {
    let answer = node.http("GET", &format!("/v1/jobs/{id}/results"), b"");
    assert_eq!(answer.status, 200, "{answer:?}");
    lines(&answer)
}

/// The lines of a body that came in pieces.
fn lines(answer: &Answer) -> Vec<Value> {
    let (mut body, mut rest) = (String::new(), answer.body.as_str());
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or_else(|error| panic!("{error}: {size:?}"));
        body.push_str(&after[..size]);
        rest = after[size..].strip_prefix("\r\n").unwrap_or_default();
    }
    body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Each task of 0..count has one result, and all are as `is_right` says.
fn check(results: &[Value], count: u32, is_right: impl Fn(u32, &Value) -> bool) {
    let tasks: BTreeSet<u64> = results.iter().map(|result| result["task"].as_u64().unwrap()).collect();
    assert_eq!((results.len(), tasks.len()), (count as usize, count as usize));
    for result in results {
        let task = u32::try_from(result["task"].as_u64().unwrap()).unwrap();
        assert!(task < count && is_right(task, result), "{result}");
    }
}

/// Three nodes with fake engines, of which all vote, and a template that all of them have.
fn fakes(name: &str) -> Cluster {
    fakes_of(name, 3, 3)
}

/// The same, of as many nodes.
fn fakes_of(name: &str, nodes: usize, voters: usize) -> Cluster {
    let cluster = Cluster::of_fakes(name, nodes, voters);
    cluster.template(0, "warm");
    // A job that goes on until it is there.
    let waits = with(job(1, &["sleep", "600000"]), json!({ "replicas": nodes }));
    let id = submitted(cluster.node(0), &waits);
    eventually("all nodes have all of the template", || {
        let explained = cluster.node(0).json(&["explain", "warm"]);
        explained["nodes"].as_array().unwrap().iter().filter(|node| node["settled_percent"] == 100).count() == nodes
    });
    cluster.node(0).http("POST", &format!("/v1/jobs/{id}/cancel"), b"");
    cluster.node(0).http("DELETE", &format!("/v1/jobs/{id}"), b"");
    cluster
}
