//! What a node may start without asking: its capacity lease.

use serde_json::Value;

use super::stage::Cluster;
use crate::support::{eventually, ids};

const EACH: &str = "16MiB";
const FORK: [&str; 7] = ["fork", "--guest", "probe", "--memory", "16MiB", "--limit", EACH];

/// Two voters, each with room for sixteen machines of the size above.
fn small(name: &str) -> Cluster {
    let mut cluster = Cluster::new(name, 2, 2);
    for host in 0..2 {
        cluster.crash(host);
        cluster.start_with(host, &["--machine-memory", "256MiB"]);
    }
    cluster.settles(2, 2);
    eventually("both have said how much they have", || {
        (0..2).all(|host| cluster.row(0, host)["capacity"]["memory_bytes"] == 256 << 20)
    });
    cluster
}

#[test]
fn forks_that_nobody_placed_take_no_more_than_the_node_has() {
    let cluster = small("capacity");
    let node = cluster.node(0);
    let fork = |count: &str| node.cli(&[&FORK[..], &["-n", count, "--output", "json"]].concat());
    let refused = fork("17");
    assert_eq!((refused.code, &*refused.error_code()), (Some(4), "NO_PLACE"), "{refused:?}");
    assert_eq!(node.machines().len(), 0);
    // Six times four at once, where four times four find room.
    let codes: Vec<Option<i32>> = std::thread::scope(|scope| {
        let forks: Vec<_> = (0..6).map(|_| scope.spawn(|| fork("4").code)).collect();
        forks.into_iter().map(|fork| fork.join().unwrap()).collect()
    });
    let running = node.machines().len();
    let done = codes.iter().filter(|code| **code == Some(0)).count();
    assert_eq!(running, done * 4, "{codes:?}");
    assert!((1..=4).contains(&done), "{codes:?}");
    // The cluster counts them, and no more than once.
    eventually("the cluster knows of them", || {
        let taken = cluster.row(1, 0)["taken"]["memory_bytes"].as_u64().unwrap_or_default();
        taken >= (running as u64) << 24 && taken <= 256 << 20
    });
    let branched = node.cli(&["branch", &node.machines()[0], "-n", "17", "--limit", EACH, "--output", "json"]);
    assert_eq!((branched.code, &*branched.error_code()), (Some(4), "NO_PLACE"), "{branched:?}");
    // Room that is given back is there again.
    node.json(&["kill", "--all"]);
    assert_eq!(fork("8").code, Some(0));
}

#[test]
fn a_closed_node_gives_its_lease_back_and_one_that_is_cut_off_goes_on() {
    let mut cluster = small("lease");
    assert_eq!(cluster.node(0).cli(&FORK).code, Some(0));
    cluster.node(1).json(&["node", "drain", "node-0"]);
    let refused = cluster.node(0).cli(&[&FORK[..], &["-n", "15", "--output", "json"]].concat());
    assert_eq!((refused.code, &*refused.error_code()), (Some(4), "REFUSED"), "{refused:?}");
    // What ran goes on; with it gone nothing is left that the node would have to keep.
    let machines = cluster.node(0).machines();
    cluster.node(0).json(&["kill", &machines[0]]);
    eventually("nothing is left on it", || {
        let row = cluster.row(1, 0);
        row["taken"]["machines"] == 0 && row["taken"]["memory_bytes"] == 0
    });
    cluster.node(1).json(&["node", "undrain", "node-0"]);
    // Nobody can decide any more, and nobody can place anything there either.
    cluster.crash(1);
    eventually("no majority is there", || cluster.node(0).cli(&["node", "ls"]).code == Some(4));
    let forked = cluster.node(0).json(&[&FORK[..], &["-n", "2"]].concat());
    assert_eq!(ids(&forked["children"]).len(), 2);
}

#[test]
fn single_forks_of_what_is_here_ask_nobody_within_the_lease_and_are_placed_beyond_it() {
    let mut cluster = small("single");
    cluster.template(0, "warm");
    let fork = |cluster: &Cluster| cluster.node(0).json(&["fork", "warm", "--limit", EACH])["children"][0]["node"].clone();
    // The first is placed where the image is, which asks for a lease.
    let here = fork(&cluster);
    let on: Vec<Value> = (0..20).map(|_| fork(&cluster)).collect();
    let count_here = 1 + on.iter().filter(|node| **node == here).count();
    assert!(here.is_string() && (2..=16).contains(&count_here) && on.iter().all(Value::is_string), "{here}: {on:?}");
    cluster.node(0).json(&["kill", "--all"]);
    // While nobody can place anything only what the lease gave a place says where it is.
    assert_eq!(fork(&cluster), here);
    cluster.crash(1);
    eventually("no majority is there", || cluster.node(0).cli(&["node", "ls"]).code == Some(4));
    assert_eq!(fork(&cluster), here);
    // A closed node has the image, and perhaps its lease, and starts nothing all the same.
    cluster.start_with(1, &["--machine-memory", "256MiB"]);
    cluster.settles(2, 2);
    cluster.node(0).json(&["node", "cordon", "node-0"]);
    assert_eq!(cluster.row(0, 0)["is_cordoned"], true);
    // The other one has just come back: a connection from before may have to be lost first.
    let mut said = None;
    eventually("it is forked", || {
        said = Some(cluster.node(0).cli(&["fork", "warm", "--limit", EACH, "--output", "json"]));
        said.as_ref().is_some_and(|said| said.code == Some(0))
    });
    let forked: Value = serde_json::from_str(&said.unwrap().out).unwrap();
    assert_ne!(forked["children"][0]["node"], here);
}

/// One that failed may have run: it is for who asked to try again.
#[test]
fn a_fork_out_of_the_lease_is_tried_once() {
    let mut cluster = Cluster::apart("once", 1);
    cluster.always = vec!["--fake-engine".to_owned(), "fail_every=3".to_owned()];
    cluster.begin(0);
    cluster.settles(1, 1);
    // The engine's first; it took the lease.
    cluster.template(0, "warm");
    let forked: Vec<bool> = (0..6).map(|_| cluster.node(0).cli(&["fork", "warm"]).code == Some(0)).collect();
    assert_eq!(forked, [true, false, true, true, false, true]);
}
