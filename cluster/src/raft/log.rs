//! openraft's log. Every call waits until what it wrote is on disk: so what was told to be kept is kept.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::type_config::alias::{EntryOf, LogIdOf, VoteOf};

use super::{Disk, Types};

const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
/// The most bytes that are read for one message to a follower; at least one entry.
const APPEND_BYTES_MAX: usize = 1 << 20;

/// See the module. Clones are the same log.
#[derive(Clone)]
pub struct Log {
    disk: Disk,
}

impl Log {
    /// The log in this file.
    #[must_use]
    pub fn on(disk: Disk) -> Self {
        Self { disk }
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<EntryOf<Types>>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let from = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.disk.run(move |disk| disk.entries(from, to, usize::MAX)).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<EntryOf<Types>>> {
        self.disk.run(move |disk| disk.entries(start, end, APPEND_BYTES_MAX)).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<VoteOf<Types>>> {
        self.disk.run(|disk| disk.record(VOTE)).await
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let read = |disk: &Disk| {
            let last_purged_log_id: Option<LogIdOf<Types>> = disk.record(PURGED)?;
            let last: Option<EntryOf<Types>> = disk.last_entry()?;
            Ok(LogState { last_log_id: last.map(|entry| entry.log_id()).or(last_purged_log_id), last_purged_log_id })
        };
        self.disk.run(read).await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &VoteOf<Types>) -> io::Result<()> {
        let vote = *vote;
        self.disk.run(move |disk| disk.write(|writing| writing.put_record(VOTE, &vote))).await
    }

    async fn save_committed(&mut self, committed: Option<LogIdOf<Types>>) -> io::Result<()> {
        self.disk.run(move |disk| disk.write(|writing| writing.put_record(COMMITTED, &committed))).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogIdOf<Types>>> {
        let committed: Option<Option<LogIdOf<Types>>> = self.disk.run(|disk| disk.record(COMMITTED)).await?;
        Ok(committed.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = EntryOf<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<EntryOf<Types>> = entries.into_iter().collect();
        let write = move |disk: &Disk| {
            disk.write(|writing| entries.iter().try_for_each(|entry| writing.put_entry(entry.log_id().index, entry)))
        };
        let written = self.disk.run(write).await;
        let told = written.as_ref().copied().map_err(|error| io::Error::new(error.kind(), error.to_string()));
        callback.io_completed(told);
        written
    }

    async fn truncate_after(&mut self, last: Option<LogIdOf<Types>>) -> io::Result<()> {
        let from = last.map_or(0, |last| last.index + 1);
        self.disk.run(move |disk| disk.write(|writing| writing.remove_entries(from..))).await
    }

    async fn purge(&mut self, upto: LogIdOf<Types>) -> io::Result<()> {
        let write = move |writing: &mut super::disk::Writing<'_>| {
            // Never less than before.
            let before: Option<LogIdOf<Types>> = writing.record(PURGED)?;
            if before.is_none_or(|before| before < upto) {
                writing.put_record(PURGED, &upto)?;
            }
            writing.remove_entries(..=upto.index)
        };
        self.disk.run(move |disk| disk.write(write)).await
    }
}
