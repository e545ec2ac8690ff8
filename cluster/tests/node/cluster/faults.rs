//! What befalls a cluster, and what it promises all the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vm::harness::{count, held, seed};

use super::stage::Cluster;
use crate::support::eventually;

/// A minority says so within this; a test allows five times as much.
const NO_QUORUM_WITHIN: Duration = Duration::from_secs(15);

#[test]
fn a_leader_that_is_killed_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let mut cluster = Cluster::new("killed", 3, 3);
    cluster.template(0, "warm");
    let rounds = count(2, 20);
    for _ in 0..rounds {
        let at = dice.usize(..3);
        let Some(leader) = cluster.leader(at) else { continue };
        let other = (leader + 1) % 3;
        let cordoned = format!("node-{}", dice.usize(..3));
        let verb = if dice.bool() { "cordon" } else { "uncordon" };
        assert_eq!(cluster.node(other).cli(&["node", verb, &cordoned]).code, Some(0));
        let killed = Instant::now();
        cluster.crash(leader);
        println!("a new leader answered after {:?}", cluster.time_to_answer(other, killed));
        let number: usize = cordoned.strip_prefix("node-").unwrap().parse().unwrap();
        assert_eq!(cluster.row(other, number)["is_cordoned"], verb == "cordon", "what was acknowledged is there");
        cluster.start(leader);
        cluster.settles(3, 3);
    }
    held("leaders killed, with what they had acknowledged there", rounds);
}

#[test]
fn all_nodes_killed_at_once_come_back_with_everything() {
    let mut cluster = Cluster::new("all", 3, 3);
    cluster.template(1, "warm");
    cluster.node(0).json(&["node", "cordon", "node-2"]);
    for host in 0..3 {
        cluster.crash(host);
    }
    let began = Instant::now();
    for host in 0..3 {
        cluster.start(host);
    }
    cluster.settles(3, 3);
    println!("all were back after {:?}", began.elapsed());
    assert_eq!(cluster.row(2, 2)["is_cordoned"], true);
    eventually("its template can be forked", || cluster.node(2).cli(&["fork", "warm"]).code == Some(0));
}

/// A leader and one that follows, stopped for less than it takes to be suspected, for longer, and for longer than it takes to be
/// given up.
#[test]
fn a_node_that_stands_still_comes_back() {
    let cluster = Cluster::new("still", 3, 3);
    for (seconds, is_leader) in [(2, true), (8, true), (8, false), (20, true)] {
        let leader = cluster.leader(0).unwrap();
        let (stopped, other) = if is_leader { (leader, (leader + 1) % 3) } else { ((leader + 1) % 3, leader) };
        let began = Instant::now();
        cluster.signal(stopped, Signal::STOP);
        let answered = cluster.time_to_answer(other, began);
        // It can be asked for something meanwhile, and knows of it afterwards.
        let verb = if is_leader { "cordon" } else { "uncordon" };
        cluster.node(other).json(&["node", verb, "node-0"]);
        if seconds == 8 {
            eventually("it is suspected", || cluster.row(other, stopped)["life"] == "suspect");
        }
        if seconds == 20 {
            eventually("it is given up", || cluster.row(other, stopped)["life"] == "lost");
            println!("given up after {:?}", began.elapsed());
        }
        std::thread::sleep(Duration::from_secs(seconds).saturating_sub(began.elapsed()));
        cluster.signal(stopped, Signal::CONT);
        let went_on = Instant::now();
        cluster.settles(3, 3);
        println!(
            "{seconds} s (leader: {is_leader}): the others answered after {answered:?}, and it was back {:?} after it went on",
            went_on.elapsed()
        );
        // It knows by itself that it does not lead any more.
        assert_eq!(cluster.row(stopped, 0)["is_cordoned"], is_leader);
    }
}

#[test]
fn a_minority_says_so_and_the_majority_goes_on() {
    let mut cluster = Cluster::new("parts", 3, 3);
    if !cluster.is_isolated() {
        return println!("skipped: networks are cut in namespaces, which takes root");
    }
    cluster.template(0, "warm");
    for is_leader in [true, false] {
        let leader = cluster.leader(0).unwrap();
        let cut = if is_leader { leader } else { (leader + 1) % 3 };
        let other = (0..3).find(|host| *host != cut).unwrap();
        let began = Instant::now();
        cluster.set_link(cut, false);
        let refused = cluster.node(cut).cli(&["node", "cordon", "node-0", "--output", "json"]);
        println!("the minority (leader: {is_leader}) refused after {:?}", began.elapsed());
        assert_eq!(refused.code, Some(4), "{refused:?}");
        assert!(["NO_QUORUM", "OUTCOME_UNKNOWN"].contains(&&*refused.error_code()), "{refused:?}");
        let asked = Instant::now();
        let read = cluster.node(cut).cli(&["node", "ls", "--output", "json"]);
        assert_eq!((read.code, &*read.error_code()), (Some(4), "NO_QUORUM"));
        assert!(asked.elapsed() < NO_QUORUM_WITHIN, "{:?}", asked.elapsed());
        assert!(cluster.list(cut, true).is_some(), "what it has it shows");
        // What is here can be forked, whoever leads: nothing of it needs the others.
        if cut == 0 {
            assert_eq!(cluster.node(0).cli(&["fork", "warm"]).code, Some(0));
        }
        println!("the majority answered after {:?}", cluster.time_to_answer(other, began));
        assert_eq!(cluster.node(other).cli(&["node", "cordon", "node-1"]).code, Some(0));
        cluster.set_link(cut, true);
        let back = Instant::now();
        cluster.settles(3, 3);
        println!("whole again after {:?}", back.elapsed());
        assert_eq!(cluster.row(cut, 1)["is_cordoned"], true);
        cluster.node(other).json(&["node", "uncordon", "node-1"]);
    }
}

/// Five nodes, of which two die: three are enough. The third leaves no majority, until one is back.
#[test]
fn five_nodes_bear_the_loss_of_two() {
    let mut cluster = Cluster::new("five", 5, 5);
    for host in [1, 2] {
        cluster.crash(host);
    }
    let lost = Instant::now();
    println!("three of five answered after {:?}", cluster.time_to_answer(0, lost));
    assert_eq!(cluster.node(3).cli(&["node", "cordon", "node-4"]).code, Some(0));
    cluster.crash(3);
    eventually("two of five decide nothing", || {
        let said = cluster.node(0).cli(&["node", "uncordon", "node-4", "--output", "json"]);
        said.code == Some(4) && said.error_code() != "REFUSED"
    });
    cluster.start(1);
    let back = Instant::now();
    println!("three of five answered after {:?}", cluster.time_to_answer(4, back));
}

#[test]
fn a_node_that_is_revoked_under_load_is_out_at_once() {
    let cluster = Cluster::new("revoked", 3, 3);
    cluster.template(2, "warm");
    let (is_over, cluster) = (AtomicBool::new(false), &cluster);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut forked = 0;
            while !is_over.load(Ordering::Relaxed) {
                forked += u32::from(cluster.node(0).cli(&["fork", "warm", "-n", "2"]).code == Some(0));
            }
            forked
        });
        eventually("forks run", || !cluster.node(1).machines().is_empty());
        let revoked = Instant::now();
        cluster.node(1).json(&["node", "revoke", "node-2"]);
        eventually("it is no member", || cluster.row(1, 2).is_null());
        eventually("it cannot ask the others", || cluster.node(2).cli(&["node", "ls"]).code == Some(4));
        println!("out after {:?}", revoked.elapsed());
        is_over.store(true, Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
    });
    // The others have a majority of two, and the name's image is nowhere any more.
    cluster.settles(2, 2);
    let gone = cluster.node(0).cli(&["fork", "warm", "--output", "json"]);
    assert_eq!((gone.code, &*gone.error_code()), (Some(4), "NO_PLACE"), "{gone:?}");
}

/// A leader that cannot be heard, and hears; and a node that hears, and cannot be heard.
#[test]
fn who_is_heard_in_one_direction_alone_does_not_stop_the_others() {
    let cluster = Cluster::new("oneway", 3, 3);
    if !cluster.is_isolated() {
        return println!("skipped: networks are cut in namespaces, which takes root");
    }
    let leader = cluster.leader(0).unwrap();
    let others: Vec<usize> = (0..3).filter(|host| *host != leader).collect();
    others.iter().for_each(|other| cluster.set_one_way(leader, *other, false));
    let began = Instant::now();
    println!("without its leader's word the others answered after {:?}", cluster.time_to_answer(others[0], began));
    assert_eq!(cluster.node(others[1]).cli(&["node", "cordon", "node-0"]).code, Some(0));
    others.iter().for_each(|other| cluster.set_one_way(leader, *other, true));
    cluster.settles(3, 3);
    assert_eq!(cluster.row(leader, 0)["is_cordoned"], true);
    // One that hears all and is heard by nobody: the others go on, and it is given up.
    let leader = cluster.leader(0).unwrap();
    let mute = (leader + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|host| *host != mute).collect();
    others.iter().for_each(|other| cluster.set_one_way(mute, *other, false));
    assert_eq!(cluster.node(leader).cli(&["node", "uncordon", "node-0"]).code, Some(0));
    eventually("it is given up", || cluster.row(leader, mute)["life"] == "lost");
    let refused = cluster.node(mute).cli(&["node", "ls", "--output", "json"]);
    assert_eq!((refused.code, &*refused.error_code()), (Some(4), "NO_QUORUM"));
    others.iter().for_each(|other| cluster.set_one_way(mute, *other, true));
    cluster.settles(3, 3);
}

#[test]
fn a_node_whose_disk_is_full_says_so_and_comes_back_with_room() {
    if !crate::support::is_root() {
        return println!("skipped: a small disk is mounted, which takes root");
    }
    let mut cluster = Cluster::apart("full", 3);
    let disk = cluster.on_small_disk(2, "16m");
    cluster.begin(0);
    cluster.admit(1, true);
    cluster.admit(2, true);
    cluster.settles(3, 3);
    disk.fill();
    // The others go on, whether that one leads or follows; what they acknowledge stays.
    let mut turn = 0;
    eventually("it cannot write its log", || {
        turn += 1;
        cluster.node(0).cli(&["node", ["uncordon", "cordon"][turn % 2], "node-1"]);
        let said = cluster.node(2).cli(&["node", "ls", "--output", "json"]);
        said.code == Some(4) && said.error_code() == "LOG_FAILED"
    });
    eventually("it says so", || cluster.node(2).log().contains("takes no part in its cluster"));
    eventually("the others decide", || cluster.node(0).cli(&["node", "cordon", "node-1"]).code == Some(0));
    // With room it goes on where it was.
    cluster.crash(2);
    disk.make_room();
    cluster.start(2);
    cluster.settles(3, 3);
    assert_eq!(cluster.row(2, 1)["is_cordoned"], true);
}
