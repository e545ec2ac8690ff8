//! What nodes say of themselves, whichever one is asked, and what is seen of them with `farfork top`.

use serde_json::Value;

use super::stage::Cluster;
use crate::support::eventually;

#[test]
fn any_node_says_what_each_of_them_runs_and_has() {
    let mut cluster = Cluster::new("watch", 2, 1);
    cluster.template(1, "warm");
    cluster.node(1).json(&["fork", "warm", "-n", "3"]);
    let ask = |cluster: &Cluster, name: &str| cluster.node(0).http("GET", &format!("/v1/nodes/{name}"), b"");
    let there = ask(&cluster, "node-1").json();
    assert_eq!((&there["name"], &there["running"], &there["forks"]), (&"node-1".into(), &3.into(), &4.into()), "{there}");
    let warm = |facts: &Value| facts["images"].as_array().unwrap().iter().find(|image| image["name"] == "warm").cloned();
    let image = warm(&there).unwrap();
    assert_eq!((&image["running"], &image["settled_percent"], &image["tenant"]), (&3.into(), &100.into(), &"default".into()));
    let here = ask(&cluster, "node-0").json();
    assert_eq!((&here["name"], &here["forks"]), (&"node-0".into(), &0.into()));
    assert_eq!(ask(&cluster, here["node"].as_str().unwrap()).json()["name"], "node-0");
    ask(&cluster, "node-7").refused(404, "UNKNOWN_NODE");
    // What is forked elsewhere comes over the wire, and is counted on both sides.
    cluster.node(0).json(&["node", "cordon", "node-1"]);
    cluster.node(0).json(&["fork", "warm", "-n", "1"]);
    eventually("it has settled there", || ask(&cluster, "node-0").json()["host_images"]["settled"] == 1);
    let (here, there) = (ask(&cluster, "node-0").json(), ask(&cluster, "node-1").json());
    assert!(here["wire_bytes"].as_u64() > Some(0) && there["served_bytes"].as_u64() > Some(0), "{here} {there}");
    // Seen at once.
    let seen = cluster.node(0).json(&["top", "--once"]);
    let hosts = seen["hosts"].as_array().unwrap();
    assert_eq!((hosts.len(), seen["troubles"].as_array().unwrap().len()), (2, 0), "{seen}");
    assert!(hosts.iter().all(|host| host["forks_per_s"].is_number() && host["capacity_bytes"].is_number()), "{seen}");
    let template = &seen["templates"][0];
    assert_eq!(
        (&template["name"], &template["holders"], &template["children"]),
        (&"warm".into(), &2.into(), &4.into()),
        "{seen}"
    );
    let text = cluster.node(0).cli(&["top", "--once"]);
    assert!(text.out.contains("node-1") && text.out.contains("cordoned") && text.out.contains("warm"), "{text:?}");
    let counted = cluster.node(0).http("GET", "/metrics", b"").body;
    for expected in [
        "farfork_cluster_nodes{state=\"up\"} 2",
        "farfork_cluster_quorum 1",
        "farfork_cluster_tasks{state=\"waiting\"} 0",
        "farfork_certificate_expires_seconds ",
    ] {
        assert!(counted.contains(expected), "{expected} is not in\n{counted}");
    }
    // One that is gone is said to be, and the others are seen all the same.
    cluster.crash(1);
    let answer = ask(&cluster, "node-1");
    assert!(matches!(answer.status, 502 | 504), "{answer:?}");
    let seen = cluster.node(0).json(&["top", "--once"]);
    let gone = seen["hosts"].as_array().unwrap().iter().find(|host| host["name"] == "node-1").unwrap();
    assert!(gone["forks_per_s"].is_null() && seen["hosts"].as_array().unwrap().len() == 2, "{seen}");
    assert!(gone["life"] != "up" || seen["troubles"].to_string().contains("node-1"), "{seen}");
}
