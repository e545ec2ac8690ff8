//! What is not let in, and directories that are not gone on from.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};

use super::stage::Cluster;
use crate::support::eventually;

#[test]
fn tokens_let_one_node_in_once_under_its_name() {
    let mut cluster = Cluster::apart("doors", 4);
    cluster.begin(0);
    let token = cluster.token(0, "node-1", true);
    let refused = |cluster: &Cluster, host, token: &str| {
        let said = cluster.offline(host, &["cluster", "join", token, "--output", "json"]);
        assert_ne!(said.code, Some(0), "{said:?}");
        (said.code.unwrap(), said.err)
    };
    // Damaged, of another cluster, and a name that is taken.
    let (code, err) = refused(&cluster, 1, &token[..token.len() - 3]);
    assert!(code == 2 && err.contains("no join token"), "{err}");
    let mut other = Cluster::apart("others", 1);
    other.begin(0);
    let foreign = other.token(0, "node-1", true);
    // Its authority is not the one at that address.
    let (mixed_code, mixed) = refused(&cluster, 1, &with_address_of(&token, &foreign));
    assert!(mixed_code == 3 && mixed.contains("trust"), "{mixed}");
    let taken = cluster.node(0).cli(&["cluster", "token", "node-0", "--output", "json"]);
    assert_eq!((taken.code, &*taken.error_code()), (Some(4), "REFUSED"), "{taken:?}");
    // The first one gets in, the second one does not.
    assert_eq!(cluster.offline(1, &["cluster", "join", &token]).code, Some(0));
    let (code, err) = refused(&cluster, 2, &token);
    assert!(code == 4 && err.contains("used"), "{err}");
    let again = cluster.offline(1, &["cluster", "join", &token, "--output", "json"]);
    assert!(again.code == Some(4) && again.err.contains("member's already"), "{again:?}");
    cluster.start(1);
    cluster.settles(2, 2);
    // Nobody is there to ask.
    let late = cluster.token(0, "node-3", false);
    cluster.crash(0);
    cluster.crash(1);
    let (code, err) = refused(&cluster, 3, &late);
    assert!(code == 3, "{err}");
}

/// A token for this cluster's address that carries the other one's authority.
fn with_address_of(ours: &str, theirs: &str) -> String {
    use farfork::member::token::JoinToken;
    let (ours, theirs): (JoinToken, JoinToken) = (ours.parse().unwrap(), theirs.parse().unwrap());
    JoinToken { addresses: ours.addresses, ..theirs }.to_string()
}

#[test]
fn two_nodes_cannot_have_one_directory_and_a_wiped_one_comes_back_under_a_new_id() {
    let mut cluster = Cluster::new("wiped", 3, 3);
    let data = cluster.node(1).path().join("data");
    let second = std::process::Command::new(crate::support::PROGRAM)
        .args(["node", "--listen", "127.0.0.1:0", "--socket", "/nonexistent/s", "--data"])
        .arg(&data)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(second.status.code() == Some(4) && said.contains("another node"), "{said}");
    // Its directory is gone, and with it its id: the old one is forgotten, a new one joins under the same name.
    cluster.crash(1);
    fs::remove_dir_all(cluster.directory(1).join("data")).unwrap();
    eventually("it is given up", || cluster.row(0, 1)["life"] == "lost");
    let before = cluster.row(0, 1)["id"].clone();
    cluster.node(2).json(&["node", "rm", "node-1"]);
    cluster.admit(1, true);
    cluster.settles(3, 3);
    assert_ne!(cluster.row(0, 1)["id"], before);
}

/// What is damaged is told, left as it is, and never taken for new.
#[test]
fn damaged_directories_are_refused_and_left_as_they_are() {
    let mut cluster = Cluster::new("damage", 1, 1);
    cluster.crash(0);
    let data = cluster.directory(0).join("data");
    let whole: Vec<(&str, Vec<u8>)> = ["cluster.json", "ca.pem", "raft.redb", "node.pem"]
        .into_iter()
        .map(|file| (file, fs::read(data.join(file)).unwrap()))
        .collect();
    for (file, bytes) in &whole {
        let path = data.join(file);
        let starts = |what: &str| {
            let said =
                cluster.offline(0, &["node", "--listen", "127.0.0.1:0", "--socket", "/nonexistent/s", "--output", "json"]);
            assert_eq!(said.code, Some(4), "{file} {what}: {said:?}");
            assert!(said.err.contains("remedy"), "{said:?}");
        };
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        starts("is cut short");
        // The log's store may note in it that it was looked at, and give it the length that it says; it is never begun anew.
        let left = fs::read(&path).unwrap();
        let is_left = if *file == "raft.redb" { left.len() >= bytes.len() / 2 } else { left == bytes[..bytes.len() / 2] };
        assert!(is_left, "{file} is left as it was");
        let mut foreign = bytes.clone();
        foreign[..8].copy_from_slice(b"NOTTHIS!");
        fs::write(&path, &foreign).unwrap();
        starts("is something else");
        if *file != "cluster.json" && *file != "node.pem" {
            fs::remove_file(&path).unwrap();
            starts("is missing");
        }
        fs::write(&path, bytes).unwrap();
    }
    // A page in the middle of the log.
    let log = data.join("raft.redb");
    let mut file = fs::File::options().read(true).write(true).open(&log).unwrap();
    let len = file.metadata().unwrap().len();
    let mut flipped = 0;
    for at in (4096..len).step_by(4096) {
        let mut byte = [0];
        file.seek(SeekFrom::Start(at + 100)).unwrap();
        file.read_exact(&mut byte).unwrap();
        if byte[0] != 0 {
            file.seek(SeekFrom::Start(at + 100)).unwrap();
            file.write_all(&[byte[0] ^ 0xFF]).unwrap();
            flipped += 1;
        }
    }
    drop(file);
    assert!(flipped > 0);
    let said = cluster.offline(0, &["node", "--listen", "127.0.0.1:0", "--socket", "/nonexistent/s", "--output", "json"]);
    assert_eq!(said.code, Some(4), "{said:?}");
    // Whole again, it goes on.
    for (file, bytes) in &whole {
        fs::write(data.join(file), bytes).unwrap();
    }
    cluster.start(0);
    cluster.settles(1, 1);
}
