//! Nodes whose log is damaged, cut short or gone, and that are let in again.

use std::fs;
use std::path::Path;

use farfork::raft::{Disk, Machine};
use serde_json::Value;
use vm::harness::seed;

use super::stage::Cluster;
use crate::support::{Said, eventually};

const REPAIR: [&str; 5] = ["cluster", "repair", "--from-peers", "--output", "json"];

fn repaired(said: &Said) -> Value {
    assert_eq!(said.code, Some(0), "{said:?}");
    serde_json::from_str(&said.out).unwrap()
}

fn refused(said: &Said, code: i32, words: &str) {
    assert!(said.code == Some(code) && said.err.contains(words), "{words}: {said:?}");
}

/// Every file of a directory, but for the lock, which names the last process.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let named = files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()));
    let mut contents: Vec<_> = named.filter(|(name, _)| name != "lock").collect();
    contents.sort();
    contents
}

/// Damages a log until it can be seen: what redb has not used yet may be anything.
fn damage(log: &Path, dice: &mut fastrand::Rng, cut: bool) {
    let good = fs::read(log).unwrap();
    let look = tempfile::tempdir().unwrap();
    let copy = look.path().join("copy.redb");
    let used = good.iter().rposition(|byte| *byte != 0).unwrap();
    loop {
        let mut bytes = good.clone();
        if cut {
            bytes.truncate(dice.usize(..used));
        } else {
            for _ in 0..dice.usize(1..32) {
                bytes[dice.usize(..used)] ^= dice.u8(1..);
            }
        }
        fs::write(&copy, &bytes).unwrap();
        // Looking may write a note into the file: it is looked at as often as it will be.
        let is_good = || Disk::open(&copy).and_then(Machine::open).is_ok();
        if !is_good() && !is_good() && !is_good() {
            println!("{} of {} bytes are left", bytes.len(), good.len());
            return fs::write(log, &bytes).unwrap();
        }
    }
}

#[test]
fn a_node_whose_log_is_damaged_comes_back_under_a_new_id_with_its_name_and_its_templates() {
    let mut cluster = Cluster::new("repair", 3, 3);
    cluster.template(2, "warm");
    let mut dice = fastrand::Rng::with_seed(seed());
    // Cut short, changed, gone, and something else; also of the one that began the cluster, and never joined it.
    for (host, kind) in [(2, "cut"), (0, "flipped"), (2, "gone"), (1, "foreign")] {
        let at = (host + 1) % 3;
        let before = cluster.row(at, host)["id"].clone();
        eventually("it has noted where the others are", || {
            let place = fs::read_to_string(cluster.node(host).path().join("data/cluster.json")).unwrap();
            let place: Value = serde_json::from_str(&place).unwrap();
            place["seeds"].as_array().unwrap().iter().any(|seed| seed == &*cluster.address(at))
        });
        let running = cluster.node(host).path().join("data");
        let said = Said::of(cluster.node(host).command(&REPAIR).arg("--data").arg(running).output().unwrap());
        refused(&said, 4, "another node");
        cluster.crash(host);
        let data = cluster.directory(host).join("data");
        refused(&cluster.offline(host, &REPAIR), 4, "nothing to repair");
        let log = data.join("raft.redb");
        match kind {
            "gone" => fs::remove_file(&log).unwrap(),
            "foreign" => fs::write(&log, b"another program's".repeat(1000)).unwrap(),
            kind => damage(&log, &mut dice, kind == "cut"),
        }
        let left = fs::read(&log).ok();
        let start = ["node", "--listen", "127.0.0.1:0", "--socket", "/nonexistent/s", "--output", "json"];
        refused(&cluster.offline(host, &start), 4, "cluster repair --from-peers");
        let became = repaired(&cluster.offline(host, &REPAIR));
        assert_eq!((&became["name"], &became["role"]), (&Value::from(format!("node-{host}")), &Value::from("voter")));
        assert_eq!(became["set_aside"].is_null(), left.is_none());
        if let Some(file) = became["set_aside"].as_str() {
            // The log's store may have noted in it that it was looked at.
            assert!(!fs::read(file).unwrap().is_empty());
        }
        refused(&cluster.offline(host, &REPAIR), 4, "nothing to repair");
        cluster.start(host);
        cluster.settles(3, 3);
        eventually("it is known by its new id", || cluster.row(at, host)["id"] == became["node"]);
        assert_ne!(became["node"], before);
        // What was in its store is there, and is forked there: it is nowhere else.
        eventually("its template runs on it", || {
            let said = cluster.node(at).cli(&["fork", "warm", "--output", "json"]);
            let Ok(answer) = serde_json::from_str::<Value>(&said.out) else { return false };
            said.code == Some(0) && answer["children"].as_array().unwrap().len() == 1
        });
        cluster.node(at).json(&["kill", "--all"]);
    }
    // Each lost node has a vote again: any two decide.
    cluster.crash(1);
    eventually("the others decide", || cluster.node(0).cli(&["node", "cordon", "node-1"]).code == Some(0));
}

#[test]
fn without_a_majority_or_anybody_at_all_the_old_node_stays_as_it_was() {
    let mut cluster = Cluster::new("unrepaired", 3, 2);
    let begun = [1, 2].map(|host| {
        cluster.crash(host);
        cluster.directory(host).join("data")
    });
    for data in &begun {
        fs::remove_file(data.join("raft.redb")).unwrap();
    }
    // No majority: it is asked, and nothing is done.
    let said = cluster.offline(2, &REPAIR);
    refused(&said, 3, "no voter could do it");
    let asked = begun[1].join("repair.json");
    let plan = fs::read(&asked).unwrap();
    // Nobody.
    let before = contents(&begun[0]);
    cluster.crash(0);
    refused(&cluster.offline(1, &REPAIR), 3, "no voter could be asked");
    assert_eq!(contents(&begun[0]), before, "it is as it was");
    // Without its key it proves nothing, and none is made in its place.
    let key = fs::read(begun[0].join("node.key")).unwrap();
    fs::remove_file(begun[0].join("node.key")).unwrap();
    refused(&cluster.offline(1, &REPAIR), 4, "node.key");
    fs::write(begun[0].join("node.key"), key).unwrap();
    assert_eq!(fs::read(&asked).unwrap(), plan, "the same id and key are asked for again");
}

#[test]
fn one_without_a_vote_is_repaired_and_one_that_was_revoked_or_forgotten_is_refused() {
    let mut cluster = Cluster::new("outcast", 4, 3);
    let lose_log = |cluster: &mut Cluster, host| {
        cluster.crash(host);
        fs::remove_file(cluster.directory(host).join("data/raft.redb")).unwrap();
    };
    lose_log(&mut cluster, 3);
    assert_eq!(repaired(&cluster.offline(3, &REPAIR))["role"], "learner");
    cluster.start(3);
    cluster.settles(4, 3);
    lose_log(&mut cluster, 3);
    lose_log(&mut cluster, 2);
    cluster.node(0).json(&["node", "revoke", "node-2"]);
    refused(&cluster.offline(2, &REPAIR), 4, "was revoked");
    eventually("it is given up", || cluster.row(0, 3)["life"] == "lost");
    cluster.node(0).json(&["node", "rm", "node-3"]);
    refused(&cluster.offline(3, &REPAIR), 4, "no node");
    cluster.settles(2, 2);
}
