//! Files that were damaged: refused with what is wrong, or as they were; never something else, and never a panic.

use std::fs;

use farfork::raft::{Disk, DiskError, Log, Machine, Member, Types};
use openraft::storage::{IOFlushed, RaftLogStorage, RaftSnapshotBuilder, RaftStateMachine};
use openraft::type_config::alias::{EntryOf, VoteOf};
use vm::harness::{count, held, seed};

use super::{entry, runtime};

const ENTRIES: u64 = 200;

/// redb's byte that says which of two commits is the newer: one bit of it, flipped, is a commit less, which nothing else shows.
const WHICH_COMMIT: usize = 9;

/// The file as a member leaves it that is stopped, and as one leaves it that is killed.
fn written() -> [Vec<u8>; 2] {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raft.redb");
    let disk = Disk::create(&path).unwrap();
    runtime().block_on(async {
        let mut log = Log::on(disk.clone());
        for index in 0..ENTRIES {
            log.append([entry(index)], IOFlushed::noop()).await.unwrap();
        }
        log.save_vote(&VoteOf::<Types>::new(7, Member::from(1))).await.unwrap();
        let mut machine = Machine::open(disk.clone()).unwrap();
        machine.apply(futures_util::stream::iter([Ok((entry(3), None))])).await.unwrap();
        machine.build_snapshot().await.unwrap();
        drop((log, machine));
    });
    let killed = fs::read(&path).unwrap();
    drop(disk);
    [fs::read(&path).unwrap(), killed]
}

/// Entries, the vote, and the time of the snapshot.
type All = (Vec<EntryOf<Types>>, Option<VoteOf<Types>>, u64);

/// What can be read of it; everything, or an error.
fn read(path: &std::path::Path) -> Result<All, DiskError> {
    let disk = Disk::open(path)?;
    let entries = disk.entries(0, u64::MAX, usize::MAX)?;
    let vote = disk.record("vote")?;
    let machine = Machine::open(disk)?;
    Ok((entries, vote, machine.state().time.0))
}

#[test]
fn a_damaged_file_is_refused_or_read_as_it_was() {
    let good = written();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("damaged.redb");
    let expected = good.clone().map(|bytes| {
        fs::write(&path, bytes).unwrap();
        read(&path).unwrap()
    });
    assert_eq!((expected[0].0.len() as u64, expected[0].2), (ENTRIES, 3));
    assert_eq!(expected[0], expected[1]);
    let mut dice = fastrand::Rng::with_seed(seed());
    let (mut refused, mut as_it_was) = (0, 0);
    let rounds = count(300, 10_000);
    for round in 0..rounds {
        let good = &good[usize::from(dice.bool())];
        let mut bytes = good.clone();
        match dice.u8(0..4) {
            0 => bytes.truncate(dice.usize(..bytes.len())),
            1 => {
                let from = dice.usize(..bytes.len());
                let to = (from + dice.usize(1..5000)).min(bytes.len());
                bytes[from..to].fill(0);
            }
            _ => {
                for _ in 0..dice.u8(1..4) {
                    let at = dice.usize(..bytes.len());
                    bytes[at] ^= 1 << dice.u8(0..8);
                }
            }
        }
        if let (Some(byte), Some(good)) = (bytes.get_mut(WHICH_COMMIT), good.get(WHICH_COMMIT)) {
            *byte = *good;
        }
        fs::write(&path, &bytes).unwrap();
        match std::panic::catch_unwind(|| read(&path)) {
            Ok(Ok(found)) => {
                assert!(found == expected[0], "round {round}: something else was read");
                as_it_was += 1;
            }
            Ok(Err(error)) => {
                assert!(!error.to_string().is_empty() && !error.remedy().is_empty());
                refused += 1;
            }
            Err(_) => panic!("round {round}: a panic got out"),
        }
    }
    println!("{refused} refused, {as_it_was} read as they were");
    assert!(refused > 0);
    held("damaged logs that were refused or read as they were", rounds);
}

#[test]
fn what_is_no_log_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in [("text", b"not a log".repeat(1000)), ("zeros", vec![0; 1 << 16]), ("empty", Vec::new())] {
        let path = directory.path().join(name);
        fs::write(&path, &bytes).unwrap();
        let error = Disk::open(&path).err().unwrap_or_else(|| panic!("{name} was taken for a log"));
        assert!(matches!(error, DiskError::Damaged { .. } | DiskError::Open { .. }), "{name}: {error}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{name} was changed");
    }
    let missing = Disk::open(&directory.path().join("raft.redb")).err().unwrap();
    assert!(matches!(missing, DiskError::Damaged { .. }), "a member whose log is gone must not begin anew: {missing}");
    assert!(matches!(Disk::create(&directory.path().join("none/raft.redb")), Err(DiskError::Open { .. })));
}
