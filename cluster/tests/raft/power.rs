//! Power that is cut: what was not synced may be there, or not, or half of it, in any order. What was told to be kept is.

use std::io;

use farfork::raft::{Disk, Log, Member, Types};
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::alias::VoteOf;
use vm::harness::{count, held, seed};

use super::fickle::Fickle;
use super::{entry_of, log_id, runtime};

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
        disk.forget_to_sync(forgets_to_sync);
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
