//! What tasks print and keep, and what of it is told.

use serde_json::json;

use super::{check, counts, ended, fakes, job, results, show, submit, submitted, with};
use crate::support::eventually;

#[test]
fn every_task_has_its_output_and_says_how_it_was_run() {
    let cluster = fakes("jobs-a");
    let node = cluster.node(1);
    let id = submitted(node, &job(300, &["echo", "{index}", "of", "300"]));
    let last = ended(node, &id);
    assert_eq!(counts(&last), [0, 0, 300, 0], "{last}");
    assert_eq!(last["reasons"], json!({}));
    let on: u64 = last["nodes"].as_array().unwrap().iter().map(|node| node["succeeded"].as_u64().unwrap()).sum();
    assert_eq!(on, 300, "{last}");
    // Any node tells all of them.
    for at in 0..3 {
        let told = results(cluster.node(at), &id);
        check(&told, 300, |task, result| result["stdout"] == format!("{task} of 300\n") && result["is_success"] == true);
        assert!(told.iter().all(|result| result["run"]["machine"].is_string() && result["run"]["attempt"] == 0), "{told:?}");
    }
    let again = node.http("DELETE", &format!("/v1/jobs/{id}"), b"");
    assert_eq!(again.status, 200, "{again:?}");
    node.http("GET", &format!("/v1/jobs/{id}"), b"").refused(404, "UNKNOWN_JOB");
}

#[test]
fn what_programs_do_is_told_as_it_was() {
    let cluster = fakes("jobs-b");
    let node = cluster.node(2);
    let programs = ["true", "exit 7", "missing", "binary", "flood 5000000", "crash OOM", "echo hi {index}"];
    for (number, program) in programs.iter().enumerate() {
        let words: Vec<&str> = program.split(' ').collect();
        let asked = with(job(2, &words), json!({ "name": format!("job {number}"), "retries": 0 }));
        let id = submitted(node, &asked);
        let last = ended(node, &id);
        let result = &results(node, &id)[1];
        println!("{program}: {result}");
        let is_right = match number {
            0 => result["is_success"] == true && result["status"] == 0,
            1 => result["status"] == 7 && last["reasons"] == json!({ "EXIT": 2 }),
            2 => result["status"] == 127 && result["detail"].as_str().unwrap().contains("No such file"),
            3 => result["stdout_base64"] == "//4K" && result["stderr"] == "text\n" && result["stdout"].is_null(),
            4 => {
                result["stdout"].as_str().unwrap().len() == 1 << 20
                    && result["cut_bytes"] == 5_000_000 - (1 << 20)
                    && result["status"] == 0
            }
            5 => result["reason"] == "OOM" && result["status"].is_null() && last["reasons"] == json!({ "OOM": 2 }),
            _ => result["stdout"] == "hi 1\n",
        };
        assert!(is_right, "{program}: {result} {last}");
    }
}

#[test]
fn inputs_come_files_go_in_and_out_and_code_is_evaluated() {
    let cluster = fakes("jobs-c");
    let node = cluster.node(0);
    // Too much for the log: nodes keep it.
    let inputs: Vec<String> = (0..500).map(|number| json!({ "shard": number, "pad": "x".repeat(40) }).to_string()).collect();
    let asked = with(
        job(1, &["echo", "{input.shard}", "{input.nothing}"]),
        json!({ "inputs": { "list": inputs }, "outputs": ["/tmp/result"], "files": "bm8gYXJjaGl2ZQ==" }),
    );
    let id = submitted(node, &asked);
    ended(node, &id);
    let told = results(node, &id);
    check(&told, 500, |task, result| {
        result["stdout"] == format!("{task} {{input.nothing}}\n")
            && result["input"] == inputs[task as usize].as_str()
            && result["files_bytes"].as_u64().unwrap() > 512
    });
    let files = node.http("GET", &format!("/v1/jobs/{id}/tasks/499/files"), b"");
    assert!(files.status == 200 && files.body.starts_with("tmp/result\0"), "{files:?}");
    let eval = with(job(3, &[]), json!({ "work": { "eval": "6 * {index}" } }));
    let id = submitted(node, &eval);
    ended(node, &id);
    check(&results(node, &id), 3, |task, result| result["value"] == format!("6 * {task}"));
}

#[test]
fn a_job_that_is_submitted_again_is_the_same_one_and_it_can_be_followed_and_cancelled() {
    let cluster = fakes("jobs-d");
    let node = cluster.node(0);
    let asked = with(job(40, &["sleep", "600000"]), json!({ "key": "nightly 7", "max_parallel": 10 }));
    let id = submitted(node, &asked);
    assert_eq!(submitted(cluster.node(1), &asked), id);
    submit(cluster.node(2), &with(asked.clone(), json!({ "max_parallel": 11 }))).refused(409, "REFUSED");
    eventually("ten are placed", || show(node, &id).is_some_and(|job| counts(&job) == [30, 10, 0, 0]));
    let waiting = show(node, &id).unwrap();
    assert_eq!(waiting["why_waiting"], json!(["as many as max_parallel allows are placed: 10"]));
    node.http("DELETE", &format!("/v1/jobs/{id}"), b"").refused(409, "REFUSED");
    let task = node.http("GET", &format!("/v1/jobs/{id}/tasks/39"), b"").json();
    assert_eq!((&task["state"], &task["attempt"]), (&json!("waiting"), &json!(0)), "{task}");
    let cancelled = node.http("POST", &format!("/v1/jobs/{id}/cancel"), b"");
    assert_eq!(counts(&cancelled.json()), [0, 0, 0, 40], "{cancelled:?}");
    eventually("nothing runs on", || {
        (0..3).all(|at| cluster.node(at).json(&["node", "ls"])["nodes"].is_array() && cluster.node(at).machines().is_empty())
    });
    check(&results(node, &id), 40, |_, result| result["reason"] == "KILLED");
}
