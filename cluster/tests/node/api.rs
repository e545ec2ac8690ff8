//! What each route does when all is well, and how it says that something is not.

use serde_json::json;

use crate::support::{Node, eventually, ids};

#[test]
fn machines_are_forked_branched_shown_and_killed() {
    let node = Node::start("");
    let forked = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":3,"verify":true,"limit_bytes":1048576}"#);
    assert_eq!(forked.status, 200, "{forked:?}");
    let forked = forked.json();
    let children = ids(&forked["children"]);
    assert_eq!(children.len(), 3);
    assert_eq!(forked["children"][0]["verified_pages"], 16_128);
    assert_eq!(forked["children"][0]["stages_us"], json!({"shell":10,"send":20,"map":30,"restore":40,"run":50}));
    assert_eq!((&forked["freeze"], &forked["failures"]), (&json!(null), &json!([])));
    assert_eq!(forked["image"]["memory_bytes"], 64 << 20);

    let branched = node.http("POST", &format!("/v1/machines/{}/branch", children[0]), br#"{"count":2}"#).json();
    assert_eq!(branched["image"]["parent"].as_str(), Some(children[0].as_str()));
    assert_eq!(branched["freeze"]["dirty_pages"], 100);
    let grandchild = &ids(&branched["children"])[1];
    // The end of an id is enough.
    let shown = node.http("GET", &format!("/v1/machines/{}", &grandchild[grandchild.len() - 12..]), b"").json();
    assert_eq!(shown["machine"]["id"].as_str(), Some(grandchild.as_str()));
    assert_eq!(shown["machine"]["parent"].as_str(), Some(children[0].as_str()));
    assert_eq!(shown["usage"]["pss_bytes"], 2 << 20);
    assert_eq!(shown["console"]["tail"], "hello from a fake\n");

    let listed = node.http("GET", "/v1/machines", b"").json();
    assert_eq!(ids(&listed["machines"]).len(), 5);
    assert_eq!(node.http("DELETE", &format!("/v1/machines/{}", children[1]), b"").status, 200);
    let again = node.http("DELETE", &format!("/v1/machines/{}", children[1]), b"");
    again.refused(409, "ENDED");
    assert_eq!(again.json()["error"]["reason"], "KILLED");
    let body = json!({"ids": [children[0], children[1]]}).to_string();
    let some = node.http("POST", "/v1/machines/kill", body.as_bytes()).json();
    assert_eq!(some["killed"], json!([children[0]]));
    assert_eq!(some["failures"][0]["code"], "ENDED");
    assert_eq!(node.http("POST", "/v1/machines/kill", br#"{"all":true}"#).json()["killed"].as_array().unwrap().len(), 3);
    let ended = node.http("GET", "/v1/machines?state=ended", b"").json();
    assert_eq!(ids(&ended["machines"]).len(), 5);
    assert!(node.machines().is_empty());
    assert_eq!(node.http("POST", "/v1/machines/kill", br#"{"all":true}"#).json()["killed"], json!([]));
}

#[test]
fn images_are_saved_loaded_forked_and_removed() {
    let node = Node::start("");
    let image = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#).json()["image"].clone();
    let id = image["id"].as_str().unwrap();
    let save = format!("/v1/images/{id}/save");
    let saved = node.http("POST", &save, br#"{"name":"warm"}"#).json();
    assert_eq!((&saved["name"], saved["digest"].as_str().map(str::len)), (&json!("warm"), Some(64)));
    node.http("POST", &save, br#"{"name":"warm"}"#).refused(409, "NAME_TAKEN");
    let loaded = node.http("POST", "/v1/images/load", br#"{"name":"warm"}"#).json();
    assert_eq!((&loaded["origin"], &loaded["digest"]), (&json!("store"), &saved["digest"]));
    let body = json!({"from": {"image": loaded["id"]}, "count": 2}).to_string();
    assert_eq!(node.http("POST", "/v1/forks", body.as_bytes()).json()["children"].as_array().unwrap().len(), 2);
    let removed = node.http("DELETE", "/v1/images/name:warm", b"");
    assert_eq!(removed.json(), json!({"removed": "name:warm"}));
    node.http("DELETE", "/v1/images/name%3Awarm", b"").refused(404, "UNKNOWN_IMAGE");
    assert_eq!(node.http("GET", &format!("/v1/images/{id}"), b"").json()["name"], json!(null));
    assert_eq!(node.http("DELETE", &format!("/v1/images/{id}"), b"").json(), json!({"removed": id}));
    node.http("GET", &format!("/v1/images/{id}"), b"").refused(404, "UNKNOWN_IMAGE");
    let left = node.http("GET", "/v1/images", b"").json();
    assert_eq!((ids(&left["images"]).len(), &left["stored"]), (1, &json!([])));
    assert_eq!(node.machines().len(), 3, "machines go on without their image");
}

#[test]
fn some_failures_are_listed_and_only_failures_are_an_error() {
    let node = Node::start("fail_every=3");
    let some = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":5}"#);
    assert_eq!(some.status, 200);
    assert_eq!((ids(&some.json()["children"]).len(), ids(&some.json()["failures"]).len()), (4, 1));
    assert_eq!(some.json()["failures"][0]["code"], "EXHAUSTED");
    drop(node);
    let node = Node::start("fail_every=1");
    let none = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":5}"#);
    none.refused(503, "EXHAUSTED");
    assert!(none.head.contains("retry-after: 1"), "{none:?}");
    assert_eq!(node.http("GET", "/v1/images", b"").json()["images"], json!([]), "the image that was made for it is gone");
}

#[test]
fn a_child_with_a_wrong_proof_is_no_child() {
    let node = Node::start("wrong_every=2");
    let answer = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":4,"verify":true}"#).json();
    assert_eq!((ids(&answer["children"]).len(), ids(&answer["failures"]).len()), (2, 2));
    assert_eq!(answer["failures"][0]["code"], "WRONG_PROOF");
    assert_eq!(node.machines(), ids(&answer["children"]));
    let branch = json!({"from": {"machine": answer["children"][0]["id"]}, "verify": true}).to_string();
    node.http("POST", "/v1/forks", branch.as_bytes()).refused(422, "NOT_VERIFIABLE");
    assert_eq!(node.http("GET", "/v1/images", b"").json()["images"].as_array().unwrap().len(), 1);
}

#[test]
fn machines_that_end_by_themselves_are_remembered_with_their_reason() {
    let node = Node::start("end_every=2");
    let answer = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":4}"#).json();
    assert_eq!(ids(&answer["children"]).len(), 4, "all of them ran");
    eventually("two are left", || node.machines().len() == 2);
    let ended = node.http("GET", "/v1/machines?state=ended", b"").json();
    assert_eq!(ended["machines"][0]["ended"]["reason"], "GUEST_SHUTDOWN");
    let id = ended["machines"][0]["id"].as_str().unwrap();
    let shown = node.http("GET", &format!("/v1/machines/{id}"), b"").json();
    assert_eq!((&shown["usage"], &shown["console"]["tail"]), (&json!(null), &json!("hello from a fake\n")));
    let branch = node.http("POST", &format!("/v1/machines/{id}/branch"), b"{}");
    branch.refused(409, "ENDED");
    assert_eq!(branch.json()["error"]["reason"], "GUEST_SHUTDOWN");
}

#[test]
fn a_panic_is_a_500_and_the_node_goes_on() {
    let node = Node::start("kill_panics=1");
    node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#);
    for _ in 0..3 {
        node.http("POST", "/v1/machines/kill", br#"{"all":true}"#).refused(500, "INTERNAL");
    }
    assert!(node.log().contains("panicked"));
    assert_eq!(node.http("GET", "/v1/node", b"").status, 200);
}

#[test]
fn a_full_store_is_a_507() {
    let node = Node::start("store_full=1");
    let answer = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#).json();
    let path = format!("/v1/images/{}/save", answer["image"]["id"].as_str().unwrap());
    node.http("POST", &path, br#"{"name":"warm"}"#).refused(507, "STORE_FULL");
}

#[test]
fn the_node_says_who_it_is_and_who_asks() {
    let node = Node::start("");
    let answer = node.http("GET", "/v1/node", b"").json();
    assert_eq!(answer["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(answer["pid"], node.pid().as_raw_nonzero().get());
    assert_eq!(answer["caller"], format!("uid {}", rustix::process::geteuid().as_raw()));
    assert_eq!(answer["counts"], json!({"running": 0, "ended": 0, "images": 0}));
    assert!(answer["memory"]["total_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn metrics_are_prometheus_text_with_histograms_and_no_label_per_machine() {
    let node = Node::start("");
    let forked = node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"count":4}"#).json();
    let id = &ids(&forked["children"])[0];
    node.http("POST", &format!("/v1/machines/{id}/branch"), b"{}");
    node.http("GET", "/nonsense/of/a/client", b"");
    let metrics = node.http("GET", "/metrics", b"");
    assert!(metrics.head.contains("text/plain"), "{metrics:?}");
    for line in metrics.body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        assert!(series.starts_with("farfork_") && value.parse::<f64>().is_ok(), "{line:?}");
    }
    for expected in [
        "farfork_fork_stage_seconds_bucket{stage=\"map\",le=\"0.0005\"} 5",
        "farfork_fork_first_seconds_count{shell=\"ready\"} 3",
        "farfork_fork_first_seconds_bucket{shell=\"built\",le=\"+Inf\"} 2",
        "farfork_freeze_stall_seconds_count 1",
        "farfork_forks_total 5",
        "farfork_machines{state=\"running\"} 5",
        "farfork_images 2",
        "farfork_shells{state=\"ready\"} 4",
        "farfork_api_requests_total{route=\"/v1/machines/{id}/branch\",status=\"200\"} 1",
        "farfork_api_requests_total{route=\"unmatched\",status=\"404\"} 1",
    ] {
        assert!(metrics.body.contains(expected), "{expected} is not in\n{}", metrics.body);
    }
    assert!(!metrics.body.contains(id.as_str()) && !metrics.body.contains("nonsense"));
}

#[test]
fn a_node_without_a_network_for_guests_refuses_to_plug_them_in() {
    let node = Node::start("");
    node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"},"network":true}"#).refused(409, "NO_GUEST_NETWORK");
    let machine = ids(&node.http("POST", "/v1/forks", br#"{"from":{"guest":"probe"}}"#).json()["children"])[0].clone();
    let branch = format!("/v1/machines/{machine}/branch");
    node.http("POST", &branch, br#"{"network":true}"#).refused(409, "NO_GUEST_NETWORK");
    assert_eq!(node.machines(), [machine], "nothing is left behind");
}
