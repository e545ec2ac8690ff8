//! Hosts whose wall clocks are wrong. Nothing that the cluster agrees on looks at them; dates of certificates do.

use std::fs;

use super::stage::Cluster;
use crate::support::eventually;

const TWO_HOURS: i64 = 2 * 60 * 60;
/// Far more than a test lasts, and far less than clocks are off here.
const HALF_AN_HOUR_MS: u64 = 30 * 60 * 1000;

#[test]
fn a_node_whose_clock_is_off_is_not_let_in_and_its_token_is_as_good_as_before() {
    let mut cluster = Cluster::apart("off", 2);
    cluster.begin(0);
    let token = cluster.token(0, "node-1", true);
    for (seconds, how) in [(TWO_HOURS, "2 h 0 min ahead of"), (-TWO_HOURS, "2 h 0 min behind")] {
        cluster.set_clock(1, seconds);
        let refused = cluster.offline(1, &["cluster", "join", &token, "--output", "json"]);
        println!("{}", refused.err);
        assert_eq!((refused.code, &*refused.error_code()), (Some(4), "CLOCKS_DIFFER"), "{refused:?}");
        assert!(refused.err.contains(how) && refused.err.contains("set the clocks"), "{refused:?}");
        let files: Vec<String> = fs::read_dir(cluster.directory(1).join("data"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(!files.iter().any(|file| ["cluster.json", "ca.pem", "raft.redb"].contains(&&**file)), "{files:?}");
    }
    // A quarter of an hour is borne, as is what it left in its directory while its clock was wrong.
    cluster.set_clock(1, 15 * 60);
    let joined = cluster.offline(1, &["cluster", "join", &token]);
    assert_eq!(joined.code, Some(0), "{joined:?}");
    cluster.start(1);
    cluster.settles(2, 2);
}

/// It says why it hears nobody, and nobody waits for it; with the clock set it is back.
#[test]
fn a_member_whose_clock_goes_wrong_takes_part_or_says_why_it_cannot() {
    let mut cluster = Cluster::new("wrong", 3, 3);
    // Ahead: certificates are good for 90 days.
    cluster.crash(2);
    cluster.set_clock(2, TWO_HOURS);
    cluster.start(2);
    cluster.settles(3, 3);
    cluster.node(2).json(&["node", "cordon", "node-0"]);
    assert_eq!(cluster.row(1, 0)["is_cordoned"], true);
    // Behind: to it those of the others, which are young, are of a time to come.
    cluster.crash(2);
    cluster.set_clock(2, -TWO_HOURS);
    cluster.start(2);
    eventually("its log says why", || cluster.node(2).log().contains("do not hold by the clock of this host"));
    eventually("that of another says whose", || {
        [0, 1].iter().any(|node| cluster.node(*node).log().contains("do not hold by the clock of the other host"))
    });
    let refused = cluster.node(2).cli(&["node", "ls", "--output", "json"]);
    assert_eq!((refused.code, &*refused.error_code()), (Some(4), "NO_QUORUM"), "{refused:?}");
    eventually("it is given up", || cluster.row(0, 2)["life"] == "lost");
    assert_eq!(cluster.node(1).cli(&["node", "uncordon", "node-0"]).code, Some(0));
    cluster.crash(2);
    cluster.set_clock(2, 0);
    cluster.start(2);
    cluster.settles(3, 3);
    assert_eq!(cluster.row(2, 0)["is_cordoned"], false);
}

/// The cluster's time is counted by who leads, from what was agreed on, by a clock that only goes forward.
#[test]
fn a_leader_whose_clock_is_off_moves_no_time_neither_there_nor_back() {
    let mut cluster = Cluster::apart("ahead", 4);
    cluster.begin(0);
    cluster.admit(1, true);
    cluster.admit(2, true);
    cluster.settles(3, 3);
    cluster.template(0, "warm");
    let time = |cluster: &Cluster, at: usize| cluster.list(at, false).map(|list| list["time_ms"].as_u64().unwrap());
    let began = time(&cluster, 0).unwrap();
    // Both that may lead next have a wrong clock.
    let right = cluster.leader(0).unwrap();
    let others = [(right + 1) % 3, (right + 2) % 3];
    for other in others {
        cluster.crash(other);
        cluster.set_clock(other, TWO_HOURS);
        cluster.start(other);
        cluster.settles(3, 3);
    }
    if cluster.leader(right) == Some(right) {
        cluster.crash(right);
        eventually("another one leads", || cluster.leader(others[0]).is_some());
        cluster.start(right);
        cluster.settles(3, 3);
    }
    let leader = cluster.leader(right).unwrap();
    assert!(others.contains(&leader));
    let led = time(&cluster, right).unwrap();
    assert!((began..began + HALF_AN_HOUR_MS).contains(&led), "from {began} to {led} ms");
    // A token of its time, and forks of what was there; then one with the right clock leads.
    let token = cluster.token(right, "node-3", false);
    eventually("forks run", || cluster.node(leader).cli(&["fork", "warm", "-n", "2"]).code == Some(0));
    let follower = others[usize::from(others[0] == leader)];
    for wrong in [follower, leader] {
        cluster.crash(wrong);
        eventually("the others decide", || cluster.leader(right).is_some());
        cluster.set_clock(wrong, 0);
        cluster.start(wrong);
        cluster.settles(3, 3);
    }
    let after = time(&cluster, right).unwrap();
    assert!((led..led + HALF_AN_HOUR_MS).contains(&after), "from {led} to {after} ms");
    let joined = cluster.offline(3, &["cluster", "join", &token]);
    assert_eq!(joined.code, Some(0), "{joined:?}");
    cluster.start(3);
    cluster.settles(4, 3);
    eventually("forks run", || cluster.node(3).cli(&["fork", "warm", "-n", "2"]).code == Some(0));
}
