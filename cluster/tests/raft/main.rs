//! What consensus must not forget: openraft's own tests of a store, power that is cut, files that are damaged. And members, with
//! all of that, in virtual time.

mod damage;
mod fickle;
mod members;
mod power;

use control::Tick;
use control::command::{Command, Entry};
use farfork::raft::{Disk, Log, Machine, Member, Types};
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftSnapshotBuilder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::alias::{EntryOf, LogIdOf, VoteOf};
use openraft::vote::RaftLeaderIdExt;
use openraft::{EntryPayload, StorageError};
use tempfile::TempDir;

/// Stores in directories of their own.
struct Builder;

impl StoreBuilder<Types, Log, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, Machine), StorageError<Types>> {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::create(&directory.path().join("raft.redb")).unwrap();
        Ok((directory, Log::on(disk.clone()), Machine::open(disk).unwrap()))
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn log_id(term: u64, index: u64) -> LogIdOf<Types> {
    type Leader = openraft::type_config::alias::LeaderIdOf<Types>;
    LogIdOf::<Types>::new(Leader::new_committed(term, Member::from(1)), index)
}

pub(crate) fn entry(index: u64) -> EntryOf<Types> {
    entry_of(1, index)
}

/// The entry of this index that a leader of this term wrote.
pub(crate) fn entry_of(term: u64, index: u64) -> EntryOf<Types> {
    let name = types::Name::parse(&format!("template-{term}-{index}")).unwrap();
    let command = Command::RemoveTemplate { tenant: types::Tenant::default_tenant(), name };
    let entry = Entry { at: Tick(index), key: None, command };
    EntryOf::<Types>::new(log_id(term, index), EntryPayload::Normal(entry))
}

#[test]
fn the_store_passes_openrafts_own_tests() {
    runtime().block_on(Suite::<Types, Log, Machine, Builder, TempDir>::test_all(Builder)).unwrap();
}

#[test]
fn what_was_kept_is_there_after_a_start_and_what_was_taken_away_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raft.redb");
    runtime().block_on(async {
        let mut log = Log::on(Disk::create(&path).unwrap());
        log.append((1..=20).map(entry), IOFlushed::noop()).await.unwrap();
        log.truncate_after(Some(log_id(1, 15))).await.unwrap();
        log.purge(log_id(1, 5)).await.unwrap();
        log.purge(log_id(1, 3)).await.unwrap();
        log.save_vote(&VoteOf::<Types>::new(3, Member::from(2))).await.unwrap();
        log.save_committed(Some(log_id(1, 9))).await.unwrap();
    });
    let second = Disk::open(&path);
    assert!(second.is_ok(), "the first one is closed: {:?}", second.err());
    let mut log = Log::on(second.unwrap());
    runtime().block_on(async {
        let state = log.get_log_state().await.unwrap();
        assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(log_id(1, 5)), Some(log_id(1, 15))));
        assert_eq!(log.read_vote().await.unwrap(), Some(VoteOf::<Types>::new(3, Member::from(2))));
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 9)));
        let indices: Vec<u64> = log.try_get_log_entries(..).await.unwrap().iter().map(|entry| entry.log_id.index).collect();
        assert_eq!(indices, (6..=15).collect::<Vec<_>>());
    });
    assert!(matches!(Disk::create(&path), Err(farfork::raft::DiskError::Open { .. })), "there is one");
    let in_use = Disk::open(&path).err().unwrap();
    assert!(matches!(in_use, farfork::raft::DiskError::InUse { .. }) && !in_use.remedy().is_empty(), "{in_use}");
}

/// What is read for a follower fits into a message.
#[test]
fn reading_for_a_follower_is_bounded_in_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::create(&directory.path().join("raft.redb")).unwrap();
    let mut log = Log::on(disk.clone());
    runtime().block_on(async {
        log.append((0..100).map(entry), IOFlushed::noop()).await.unwrap();
        assert_eq!(log.limited_get_log_entries(0, 100).await.unwrap().len(), 100, "these are small");
    });
    let some: Vec<EntryOf<Types>> = disk.entries(0, 100, 1).unwrap();
    assert_eq!(some.len(), 1, "at least one, however long");
    let some: Vec<EntryOf<Types>> = disk.entries(10, 100, 1000).unwrap();
    assert!((2..90).contains(&some.len()) && some[0].log_id.index == 10);
    assert!(disk.entries::<EntryOf<Types>>(7, 3, 1000).unwrap().is_empty());
}

#[test]
fn a_snapshot_is_the_state_as_of_its_entry_and_none_is_kept_over_a_newer_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raft.redb");
    let disk = Disk::create(&path).unwrap();
    let (newer, older) = runtime().block_on(async {
        let mut machine = Machine::open(disk.clone()).unwrap();
        let apply = |index: u64| futures_util::stream::iter([Ok((entry(index), None))]);
        machine.apply(apply(1)).await.unwrap();
        let older = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        machine.apply(apply(2)).await.unwrap();
        let newer = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        assert_eq!((older.meta.last_log_id, newer.meta.last_log_id), (Some(log_id(1, 1)), Some(log_id(1, 2))));
        assert_ne!(older.snapshot, newer.snapshot, "time has passed");
        (newer, older)
    });
    let mut machine = Machine::open(disk.clone()).unwrap();
    assert_eq!(machine.state().time, Tick(2), "as of the last snapshot");
    runtime().block_on(async {
        // One that comes from a leader is taken, one that is older than what is there is not written over it.
        machine.install_snapshot(&older.meta, older.snapshot.clone()).await.unwrap();
        let kept = machine.get_current_snapshot().await.unwrap().unwrap();
        assert_eq!(kept.meta, newer.meta);
        for bad in [&newer.snapshot[..newer.snapshot.len() - 1], &[&newer.snapshot[..], &[0]].concat(), &[0xFF; 20]] {
            assert!(machine.install_snapshot(&newer.meta, bad.to_vec()).await.is_err(), "{} bytes", bad.len());
        }
    });
}
