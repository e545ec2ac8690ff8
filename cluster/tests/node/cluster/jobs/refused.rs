//! Jobs that are no jobs.

use serde_json::json;

use super::{counts, ended, fakes, job, show, submit, submitted, with};
use crate::support::eventually;

#[test]
fn what_is_no_job_is_refused_with_what_is_wrong() {
    let cluster = fakes("jobs-j");
    let node = cluster.node(0);
    let plain = || job(3, &["true"]);
    let cases = [
        (json!({ "inputs": { "count": 0 } }), "the number of tasks is 0, where 1 to 1000000 are allowed"),
        (json!({ "inputs": { "count": 1_000_001 } }), "the number of tasks is 1000001"),
        (json!({ "inputs": { "list": [] } }), "the number of tasks is 0"),
        (json!({ "inputs": { "list": ["ok", "x".repeat(40_000)] } }), "input 1 of 40000 bytes, where at most 32768"),
        (json!({ "work": { "exec": [] } }), "the command is empty"),
        (json!({ "work": { "exec": ["a\0b"] } }), "has a zero byte"),
        (json!({ "work": { "exec": ["echo", "x".repeat(70_000)] } }), "has more than 65536 bytes"),
        (json!({ "env": { "A=B": "c" } }), "\"A=B\" cannot be the name of a variable"),
        (json!({ "replicas": 0 }), "replicas is 0, where 1 to 16 are allowed"),
        (json!({ "max_parallel": 0 }), "max_parallel is 0"),
        (json!({ "memory_bytes": 0 }), "memory_bytes is 0"),
        (json!({ "deadline_ms": 0 }), "deadline_ms is 0"),
        (json!({ "key": "" }), "key has 1 to 128 bytes"),
        (json!({ "name": "two\nlines" }), "name has 1 to 64 bytes"),
        (json!({ "output_limit_bytes": 17 << 20 }), "the limit of a task's output in bytes is"),
        (json!({ "files": "no base64" }), "files: "),
    ];
    for (more, what) in cases {
        let answer = submit(node, &with(plain(), more.clone()));
        answer.refused(400, "BAD_REQUEST");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(what), "{answer:?}");
    }
    for bad in ["", "[]", "{", "{\"template\":\"warm\"}"] {
        node.http("POST", "/v1/jobs", bad.as_bytes()).refused(400, "BAD_JSON");
    }
    submit(node, &with(plain(), json!({ "what": "else" }))).refused(400, "BAD_JSON");
    submit(node, &with(plain(), json!({ "template": "none" }))).refused(404, "UNKNOWN_TEMPLATE");
    // A line of ten million bytes, and a body that is longer than any may be.
    let long = with(plain(), json!({ "inputs": { "list": ["x".repeat(10_000_000)] } }));
    submit(node, &long).refused(400, "BAD_REQUEST");
    let giant = with(plain(), json!({ "files": "x".repeat(65 << 20) }));
    submit(node, &giant).refused(413, "BODY_TOO_LARGE");
    for (method, path) in
        [("GET", ""), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/results"), ("GET", "/events"), ("GET", "/tasks/0")]
    {
        node.http(method, &format!("/v1/jobs/0000abcd{path}"), b"").refused(404, "UNKNOWN_JOB");
        node.http(method, &format!("/v1/jobs/xyz{path}"), b"").refused(400, "BAD_ID");
    }
    let id = submitted(node, &plain());
    ended(node, &id);
    node.http("GET", &format!("/v1/jobs/{id}/tasks/3"), b"").refused(404, "UNKNOWN_JOB");
    node.http("GET", &format!("/v1/jobs/{id}/tasks/x"), b"").refused(400, "BAD_REQUEST");
    // What nodes ask one another is for nobody else.
    for (method, path) in [("PUT", "outputs"), ("POST", "outputs/read"), ("GET", "jobs/00000000-0000-0000-0000-000000000000")] {
        node.http(method, &format!("/v1/between/{path}"), b"").refused(403, "FORBIDDEN");
    }
    assert!(!node.log().contains("panicked"));
}

#[test]
fn a_million_inputs_are_taken_and_survive_a_restart() {
    let mut cluster = fakes("jobs-k");
    let inputs: Vec<String> = (0..1_000_000).map(|number| number.to_string()).collect();
    let asked = with(job(1, &["echo", "{input}"]), json!({ "inputs": { "list": inputs }, "max_parallel": 100, "replicas": 3 }));
    let id = submitted(cluster.node(0), &asked);
    eventually("some have ended", || show(cluster.node(1), &id).is_some_and(|job| counts(&job)[2] > 100));
    for host in 0..3 {
        cluster.crash(host);
    }
    for host in 0..3 {
        cluster.start(host);
    }
    eventually("it is there again", || show(cluster.node(2), &id).is_some_and(|job| job["job"]["tasks"] == 1_000_000));
    let answer = cluster.node(2).http("POST", &format!("/v1/jobs/{id}/cancel"), b"");
    let [waiting, placed, succeeded, failed] = counts(&answer.json());
    assert!((waiting, placed) == (0, 0) && succeeded > 100 && succeeded + failed == 1_000_000, "{answer:?}");
}
