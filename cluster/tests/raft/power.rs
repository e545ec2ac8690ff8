//! Power that is cut: what was not synced may be there, or not, or half of it, in any order. What was told to be kept is.

use std::io;
use std::sync::{Arc, Mutex};

use farfork::raft::{Disk, Log, Member, Types};
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::alias::VoteOf;
use redb::StorageBackend;
use vm::harness::{count, held, seed};

use super::{entry_of, log_id, runtime};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// A disk with a cache of its own that forgets.
#[derive(Clone, Debug, Default)]
struct Fickle(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    /// As a reader sees it.
    now: Vec<u8>,
    /// As it was when it was synced last.
    synced: Vec<u8>,
    /// What was done since.
    since: Vec<Change>,
    /// After so many more calls the power is gone.
    calls_left: Option<u64>,
    /// Syncing does nothing: the flaw that this is to find.
    forgets_to_sync: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

impl Contents {
    fn call(&mut self) -> io::Result<()> {
        match &mut self.calls_left {
            None => Ok(()),
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

fn change(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(len) => bytes.resize(usize::try_from(*len).unwrap(), 0),
        Change::Write(at, data) => {
            let at = usize::try_from(*at).unwrap();
            if bytes.len() < at + data.len() {
                bytes.resize(at + data.len(), 0);
            }
            bytes[at..at + data.len()].copy_from_slice(data);
        }
    }
}

impl StorageBackend for Fickle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut contents = self.0.lock().unwrap();
        contents.call()?;
        let at = usize::try_from(offset).unwrap();
        let there = contents.now.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(there);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut contents = self.0.lock().unwrap();
        contents.call()?;
        let what = Change::Length(len);
        change(&mut contents.now, &what);
        contents.since.push(what);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut contents = self.0.lock().unwrap();
        contents.call()?;
        if !contents.forgets_to_sync {
            contents.synced = contents.now.clone();
            contents.since.clear();
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut contents = self.0.lock().unwrap();
        contents.call()?;
        let what = Change::Write(offset, data.to_vec());
        change(&mut contents.now, &what);
        contents.since.push(what);
        Ok(())
    }
}

impl Fickle {
    /// What is there when the power is back: of what was not synced some sectors, in any order.
    fn after_power(&self, dice: &mut fastrand::Rng) -> Self {
        let contents = self.0.lock().unwrap();
        let mut bytes = contents.synced.clone();
        let mut parts: Vec<Change> = Vec::new();
        for change in &contents.since {
            match change {
                Change::Length(_) => parts.push(change.clone()),
                Change::Write(at, data) => {
                    for (number, sector) in (0u64..).zip(data.chunks(SECTOR)) {
                        parts.push(Change::Write(at + number * SECTOR as u64, sector.to_vec()));
                    }
                }
            }
        }
        parts.retain(|_| dice.bool());
        dice.shuffle(&mut parts);
        parts.iter().for_each(|part| change(&mut bytes, part));
        let contents = Contents { now: bytes.clone(), synced: bytes, ..Contents::default() };
        Self(Arc::new(Mutex::new(contents)))
    }

    fn cut_after(&self, calls: u64) {
        self.0.lock().unwrap().calls_left = Some(calls);
    }
}

/// What was told to be kept.
#[derive(Clone, Debug, Default, PartialEq)]
struct Kept {
    /// The index of the first entry.
    first: u64,
    /// Which leader wrote each.
    terms: Vec<u64>,
    vote: u64,
}

impl Kept {
    /// The index after the last.
    fn end(&self) -> u64 {
        self.first + self.terms.len() as u64
    }

    fn id(&self, index: u64) -> openraft::type_config::alias::LogIdOf<Types> {
        log_id(self.terms[usize::try_from(index - self.first).unwrap()], index)
    }
}

/// Writes until the power goes, starts again, and looks; several times over. An error says what was lost.
fn live(seed: u64, forgets_to_sync: bool) -> Result<(), String> {
    let mut dice = fastrand::Rng::with_seed(seed);
    let mut disk = Fickle::default();
    let (mut kept, mut under_way) = (Kept { first: 1, ..Kept::default() }, None::<Kept>);
    for round in 0..6 {
        disk.0.lock().unwrap().forgets_to_sync = forgets_to_sync;
        let opened = Disk::open_on(disk.clone()).map_err(|error| format!("round {round}: {error}"))?;
        let mut log = Log::on(opened);
        runtime().block_on(async {
            let found = look(&mut log).await.map_err(|error| format!("round {round}: {error}"))?;
            // What was on its way when the power went is there or not, as a whole.
            if found != kept && Some(&found) != under_way.as_ref() {
                return Err(format!("round {round}: {found:?} where {kept:?} was kept, and {under_way:?} under way"));
            }
            kept = found;
            disk.cut_after(dice.u64(5..400));
            loop {
                let mut next = kept.clone();
                let done = match dice.u8(0..10) {
                    0..=5 => {
                        let new: Vec<u64> = (0..dice.u64(1..8)).map(|_| kept.vote).collect();
                        next.terms.extend(&new);
                        let entries = (kept.end()..next.end()).map(|index| entry_of(kept.vote, index));
                        log.append(entries, IOFlushed::noop()).await
                    }
                    6 if kept.terms.len() > 1 => {
                        next.terms.truncate(dice.usize(1..kept.terms.len()));
                        log.truncate_after(Some(kept.id(next.end() - 1))).await
                    }
                    7 if kept.terms.len() > 1 => {
                        let gone = dice.usize(1..kept.terms.len());
                        next.terms.drain(..gone);
                        next.first += gone as u64;
                        log.purge(kept.id(next.first - 1)).await
                    }
                    _ => {
                        next.vote += 1;
                        log.save_vote(&VoteOf::<Types>::new(next.vote, Member::from(1))).await
                    }
                };
                match done {
                    Ok(()) => kept = next,
                    Err(_) => {
                        under_way = Some(next);
                        return Ok(());
                    }
                }
            }
        })?;
        drop(log);
        disk = disk.after_power(&mut dice);
    }
    Ok(())
}

async fn look(log: &mut Log) -> io::Result<Kept> {
    let state = log.get_log_state().await?;
    let entries = log.try_get_log_entries(..).await?;
    let first = state.last_purged_log_id.map_or(1, |purged| purged.index + 1);
    let terms: Vec<u64> = entries.iter().map(|read| read.log_id.committed_leader_id().term).collect();
    let expected: Vec<_> = (first..).zip(&terms).map(|(index, term)| entry_of(*term, index)).collect();
    let last = state.last_log_id.map_or(0, |last| last.index);
    if entries != expected || last + 1 != first + terms.len() as u64 {
        return Err(io::Error::other(format!("{first} to {last} should be there, and {entries:?} is")));
    }
    let vote = log.read_vote().await?.map_or(0, |vote| vote.leader_id.term);
    Ok(Kept { first, terms, vote })
}

#[test]
fn what_was_told_to_be_kept_is_there_when_the_power_is_back() {
    let first = seed();
    let seeds = count(100, 3000);
    for seed in first..first + seeds {
        live(seed, false).unwrap_or_else(|lost| panic!("FARFORK_SEED={seed}: {lost}"));
    }
    held("cuts of the power that lost nothing that was kept", seeds * 5);
}

/// Without syncing the same test finds losses.
#[test]
fn a_disk_that_is_not_synced_is_found_out() {
    let first = seed();
    let lost = (first..first + 20).find_map(|seed| live(seed, true).err());
    println!("found: {}", lost.expect("nothing was lost, and nothing was synced"));
}
