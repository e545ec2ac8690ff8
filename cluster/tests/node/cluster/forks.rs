//! Forks that a cluster places, and machines that are asked after on any node.

use std::collections::BTreeMap;

use serde_json::Value;

use super::stage::Cluster;
use crate::support::{eventually, ids};

/// How many children run on each host.
fn spread(cluster: &Cluster, answer: &Value) -> BTreeMap<String, usize> {
    let names: BTreeMap<String, String> = {
        let list = cluster.list(0, false).unwrap();
        let nodes = list["nodes"].as_array().unwrap().clone();
        nodes.iter().map(|node| (node["id"].as_str().unwrap().to_owned(), node["name"].as_str().unwrap().to_owned())).collect()
    };
    let mut spread = BTreeMap::new();
    for child in answer["children"].as_array().unwrap() {
        *spread.entry(names[child["node"].as_str().unwrap()].clone()).or_default() += 1;
    }
    spread
}

#[test]
fn forks_run_where_the_image_is_and_elsewhere_when_they_must() {
    let cluster = Cluster::new("forks", 3, 3);
    cluster.template(0, "warm");
    // Asked of a node that does not have it: they run where it is.
    let forked = cluster.node(1).json(&["fork", "warm", "-n", "4", "--verify"]);
    assert_eq!(spread(&cluster, &forked), BTreeMap::from([("node-0".to_owned(), 4)]));
    let explained = cluster.node(2).json(&["explain", "warm", "-n", "4"]);
    let why: Vec<&str> = explained["nodes"].as_array().unwrap().iter().map(|node| node["why"].as_str().unwrap()).collect();
    assert!(
        why.iter().any(|why| why.contains("all there")) && why.iter().any(|why| why.contains("others suit better")),
        "{why:?}"
    );
    let of_machine = cluster.node(2).json(&["explain", forked["children"][0]["id"].as_str().unwrap()]);
    assert_eq!((of_machine["runs_on"].clone(), &of_machine["image"]), ("node-0".into(), &explained["image"]));
    let by_digest = cluster.node(1).json(&["explain", explained["image"].as_str().unwrap()]);
    assert_eq!((by_digest["runs_on"].clone(), by_digest["nodes"].as_array().unwrap().len()), (Value::Null, 3));
    // Any node lists them, shows them, and ends them.
    let all = ids(&forked["children"]);
    assert_eq!(cluster.node(2).machines(), all);
    assert_eq!(cluster.node(2).json(&["show", &all[0]])["machine"]["id"], all[0].as_str());
    assert_eq!(ids(&cluster.node(2).json(&["branch", &all[0], "-n", "2"])["children"]).len(), 2, "there, and still here");
    cluster.node(2).json(&["kill", &all[0], &all[1]]);
    let unknown = cluster.node(2).cli(&["show", "01234567-89ab-7def-8123-456789abcdef", "--output", "json"]);
    assert_eq!((unknown.code, &*unknown.error_code()), (Some(4), "UNKNOWN_ID"));
    // With that node closed they run elsewhere, before their memory is there; which settles, and is a holder then.
    cluster.node(1).json(&["node", "cordon", "node-0"]);
    let away = cluster.node(0).json(&["fork", "warm", "-n", "6", "--verify"]);
    let on = spread(&cluster, &away);
    assert!(on.values().sum::<usize>() == 6 && !on.contains_key("node-0"), "{on:?}");
    let host: usize = on.keys().next().unwrap().strip_prefix("node-").unwrap().parse().unwrap();
    eventually("it has settled there", || {
        let explained = cluster.node(2).json(&["explain", "warm"]);
        let nodes = explained["nodes"].as_array().unwrap().clone();
        nodes.iter().any(|node| node["name"] == format!("node-{host}") && node["settled_percent"] == 100)
    });
    // What was drained has nothing left on it, can be forgotten, and the image is where it went.
    cluster.node(1).json(&["node", "drain", "node-0"]);
    eventually("nothing is left on it", || cluster.row(1, 0)["images"] == 0);
    assert_eq!(cluster.node(0).json(&["fork", "warm", "--verify"])["children"].as_array().unwrap().len(), 1);
    cluster.node(2).json(&["kill", "--all"]);
    assert!(cluster.node(1).machines().is_empty());
    // Nobody takes more than there is.
    let too_many = cluster.node(1).cli(&["fork", "warm", "--limit", "1024GiB", "--output", "json"]);
    assert_eq!((too_many.code, &*too_many.error_code()), (Some(4), "NO_PLACE"), "{too_many:?}");
    // The name goes everywhere at once, and what nobody refers to is let go of in the end.
    cluster.node(2).json(&["template", "rm", "warm"]);
    let gone = cluster.node(1).cli(&["fork", "warm", "--output", "json"]);
    assert_eq!((gone.code, &*gone.error_code()), (Some(4), "UNKNOWN_TEMPLATE"), "{gone:?}");
}

/// A node that starts again finds its templates in its store, and tells the cluster.
#[test]
fn a_template_is_there_again_when_its_only_node_has_started_again() {
    let mut cluster = Cluster::new("again", 3, 3);
    cluster.template(2, "warm");
    cluster.crash(2);
    cluster.start(2);
    eventually("it is forked there", || cluster.node(0).cli(&["fork", "warm", "-n", "2"]).code == Some(0));
    assert_eq!(cluster.node(1).machines().len(), 2);
}
