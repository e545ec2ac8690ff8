//! What a node keeps of jobs on its disk: outputs of tasks, its own and copies of others', and payloads. What is put there is on
//! disk when that returns.
//!
//! A file that was damaged is set aside, and an empty one begun: whatever it had is on another node too, or its tasks run again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control::state::JobId;
use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use thiserror::Error;
use types::{Digest, Epoch, NodeId};
use uuid::Uuid;

use super::record::{Record, Told, Try};
use crate::raft::disk::{DiskError, caught, decoded, encoded, is_cut_short, of_redb};

/// By job, task, epoch and node.
const OUTPUTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("outputs");
/// By digest.
const PAYLOADS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("payloads");
const FILE: &str = "jobs.redb";
/// Memory that redb may use.
const CACHE_BYTES: usize = 16 << 20;
/// What is left of the disk for everything else: a node whose log cannot be written takes no part any more.
const RESERVE_BYTES: u64 = 64 << 20;
/// What nobody knows of any more goes after so long: what was just submitted may not have come here yet.
const UNKNOWN_FOR: Duration = Duration::from_mins(10);
const REMOVED_AT_ONCE: usize = 2000;

/// Why outputs or payloads cannot be kept or read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum StoreError {
    #[error("the disk of {} has {free} bytes left, and {RESERVE_BYTES} are for the node itself", path.display())]
    Full { path: PathBuf, free: u64 },
    #[error("the outputs of jobs in {} cannot be kept or read: {cause}", path.display())]
    Io { path: PathBuf, cause: String },
}

impl StoreError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Full { .. } => "make room on that disk, or have jobs forgotten that have ended: farfork job rm",
            Self::Io { .. } => "look for its cause in the kernel log, and start the node again",
        }
    }
}

/// See the module.
pub struct Store {
    directory: PathBuf,
    database: Database,
    /// What nobody knows of, and since when.
    unknown: Mutex<BTreeMap<Vec<u8>, Instant>>,
}

impl Store {
    /// Opens the file in this directory, or begins one.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let file = directory.join(FILE);
        let io = |cause: String| StoreError::Io { path: directory.to_owned(), cause };
        let database = match opened(&file) {
            Err(error @ DiskError::Damaged { .. }) => {
                let aside = directory.join(format!("{FILE}.damaged"));
                tracing::error!(%error, file = %aside.display(), "outputs of jobs are damaged: they are set aside");
                std::fs::rename(&file, &aside).map_err(|error| io(error.to_string()))?;
                opened(&file)
            }
            opened => opened,
        };
        let database = database.map_err(|error| io(error.to_string()))?;
        Ok(Self { directory: directory.to_owned(), database, unknown: Mutex::default() })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, DiskError>) -> Result<T, StoreError> {
        let done = caught(|| work(&self.database)).and_then(|done| done);
        done.map_err(|error| StoreError::Io { path: self.directory.clone(), cause: error.to_string() })
    }

    fn check_room(&self, bytes: usize) -> Result<(), StoreError> {
        let full = |free| StoreError::Full { path: self.directory.clone(), free };
        let io = |error: rustix::io::Errno| StoreError::Io { path: self.directory.clone(), cause: error.to_string() };
        let stat = rustix::fs::statvfs(&self.directory).map_err(io)?;
        let free = stat.f_bavail * stat.f_frsize;
        if free < RESERVE_BYTES + bytes as u64 { Err(full(free)) } else { Ok(()) }
    }

    /// Keeps outputs. One that is there already stays as it is.
    ///
    /// # Errors
    /// [`StoreError`]; none of them is kept.
    pub fn put(&self, records: &[(Try, Record)]) -> Result<(), StoreError> {
        self.check_room(records.iter().map(|(_, record)| record.bytes()).sum())?;
        self.with(|database| {
            let writing = database.begin_write().map_err(of_redb)?;
            {
                let mut outputs = writing.open_table(OUTPUTS).map_err(of_redb)?;
                for (of, record) in records {
                    let key = key_of(of);
                    if outputs.get(&key[..]).map_err(of_redb)?.is_none() {
                        outputs.insert(&key[..], &encoded(&place(&key), record)[..]).map_err(of_redb)?;
                    }
                }
            }
            writing.commit().map_err(of_redb)
        })
    }

    /// Outputs of these tries, with their files or without, as many as fit into so many bytes, but at least one that is there.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, tries: &[Try], with_files: bool, bytes_max: usize) -> Result<Told, StoreError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let outputs = reading.open_table(OUTPUTS).map_err(of_redb)?;
            let (mut told, mut sum) = (Told { records: Vec::new(), is_cut: false }, 0);
            for of in tries {
                let key = key_of(of);
                let Some(bytes) = outputs.get(&key[..]).map_err(of_redb)? else { continue };
                let mut record: Record = match decoded(&place(&key), bytes.value()) {
                    Ok(record) => record,
                    Err(error) => {
                        // The other node that has it is asked.
                        tracing::error!(%error, job = %of.job, task = of.task, "a damaged output");
                        continue;
                    }
                };
                if !with_files {
                    record.files = Vec::new();
                }
                sum += record.bytes();
                if sum > bytes_max && !told.records.is_empty() {
                    told.is_cut = true;
                    break;
                }
                told.records.push((*of, record));
            }
            Ok(told)
        })
    }

    /// Keeps a payload.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put_payload(&self, payload: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(payload);
        self.check_room(payload.len())?;
        self.with(|database| {
            let writing = database.begin_write().map_err(of_redb)?;
            // There is one writer at a time: who removes what nobody knows of looks for it here after this, or was done before.
            self.unknown().remove(&digest.as_bytes()[..]);
            writing.open_table(PAYLOADS).map_err(of_redb)?.insert(&digest.as_bytes()[..], payload).map_err(of_redb)?;
            writing.commit().map_err(of_redb)
        })?;
        Ok(digest)
    }

    /// A payload, if it is here and whole.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn payload(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let payloads = reading.open_table(PAYLOADS).map_err(of_redb)?;
            let bytes = payloads.get(&digest.as_bytes()[..]).map_err(of_redb)?.map(|bytes| bytes.value().to_vec());
            Ok(bytes.filter(|bytes| Digest::of(bytes) == digest))
        })
    }

    /// How many outputs of a job are here.
    #[cfg(test)]
    fn count(&self, job: JobId) -> Result<u64, StoreError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let outputs = reading.open_table(OUTPUTS).map_err(of_redb)?;
            let (first, last) = ends_of(job);
            Ok(outputs.range(&first[..]..=&last[..]).map_err(of_redb)?.count() as u64)
        })
    }

    /// Removes what has been of no job that is known for a while. How many jobs and payloads that were.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn clear(&self, jobs: &BTreeSet<JobId>, payloads: &BTreeSet<Digest>, now: Instant) -> Result<usize, StoreError> {
        let strange = self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let outputs = reading.open_table(OUTPUTS).map_err(of_redb)?;
            let mut strange = Vec::new();
            let mut from = vec![0u8; 16];
            // One look for each job, however many outputs it has.
            while let Some(item) = outputs.range(&from[..]..).map_err(of_redb)?.next() {
                let job: [u8; 16] = item.map_err(of_redb)?.0.value()[..16].try_into().expect("16 bytes");
                if !jobs.contains(&JobId(Uuid::from_bytes(job))) {
                    strange.push(job.to_vec());
                }
                let Some(next) = u128::from_be_bytes(job).checked_add(1) else { break };
                from = next.to_be_bytes().to_vec();
            }
            for item in reading.open_table(PAYLOADS).map_err(of_redb)?.iter().map_err(of_redb)? {
                let (digest, _) = item.map_err(of_redb)?;
                let is_known =
                    digest.value().try_into().is_ok_and(|bytes: [u8; 32]| payloads.contains(&Digest::from_bytes(bytes)));
                if !is_known {
                    strange.push(digest.value().to_vec());
                }
            }
            Ok(strange)
        })?;
        let gone: Vec<Vec<u8>> = {
            let mut unknown = self.unknown();
            unknown.retain(|key, _| strange.contains(key));
            for key in strange {
                unknown.entry(key).or_insert(now);
            }
            unknown.iter().filter(|(_, since)| now - **since >= UNKNOWN_FOR).map(|(key, _)| key.clone()).collect()
        };
        for key in &gone {
            match <[u8; 16]>::try_from(&key[..]) {
                Ok(job) => while self.remove_some(JobId(Uuid::from_bytes(job)))? {},
                Err(_) => self.remove_payload(key)?,
            }
        }
        Ok(gone.len())
    }

    fn unknown(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Instant>> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unless it was put here again since it was found to be nobody's.
    fn remove_payload(&self, digest: &[u8]) -> Result<(), StoreError> {
        self.with(|database| {
            let writing = database.begin_write().map_err(of_redb)?;
            if self.unknown().remove(digest).is_some() {
                writing.open_table(PAYLOADS).map_err(of_redb)?.remove(digest).map_err(of_redb)?;
            }
            writing.commit().map_err(of_redb)
        })
    }

    /// Some outputs of a job: what is put meanwhile does not wait for all of them. Whether there are more.
    fn remove_some(&self, job: JobId) -> Result<bool, StoreError> {
        self.with(|database| {
            let writing = database.begin_write().map_err(of_redb)?;
            let mut removed = 0;
            {
                let mut outputs = writing.open_table(OUTPUTS).map_err(of_redb)?;
                let (first, last) = ends_of(job);
                let some = outputs.extract_from_if(&first[..]..=&last[..], |_, _| true).map_err(of_redb)?;
                for item in some.take(REMOVED_AT_ONCE) {
                    item.map_err(of_redb)?;
                    removed += 1;
                }
            }
            writing.commit().map_err(of_redb)?;
            Ok(removed == REMOVED_AT_ONCE)
        })
    }

    /// Whether nothing is kept here.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn is_empty(&self) -> Result<bool, StoreError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let outputs = reading.open_table(OUTPUTS).map_err(of_redb)?.is_empty().map_err(of_redb)?;
            Ok(outputs && reading.open_table(PAYLOADS).map_err(of_redb)?.is_empty().map_err(of_redb)?)
        })
    }
}

/// The file, with its tables.
fn opened(file: &Path) -> Result<Database, DiskError> {
    caught(|| {
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(file);
        let database = database.map_err(|error| match error {
            redb::DatabaseError::Storage(redb::StorageError::Io(error)) if !is_cut_short(&error) => {
                DiskError::Io(error.to_string())
            }
            other => DiskError::Damaged { what: other.to_string() },
        })?;
        let writing = database.begin_write().map_err(of_redb)?;
        writing.open_table(OUTPUTS).map_err(of_redb)?;
        writing.open_table(PAYLOADS).map_err(of_redb)?;
        writing.commit().map_err(of_redb)?;
        Ok(database)
    })?
}

fn key_of(of: &Try) -> [u8; 44] {
    let mut key = [0; 44];
    key[..16].copy_from_slice(of.job.0.as_bytes());
    key[16..20].copy_from_slice(&of.task.to_be_bytes());
    key[20..28].copy_from_slice(&of.epoch.0.to_be_bytes());
    key[28..].copy_from_slice(of.node.as_uuid().as_bytes());
    key
}

fn ends_of(job: JobId) -> ([u8; 44], [u8; 44]) {
    let of =
        |task, epoch, node| key_of(&Try { job, task, epoch: Epoch(epoch), node: NodeId::from_uuid(Uuid::from_u128(node)) });
    (of(0, 0, 0), of(u32::MAX, u64::MAX, u128::MAX))
}

/// What its checksum covers besides its bytes.
fn place(key: &[u8; 44]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use control::state::Outcome;

    use super::*;
    use crate::jobs::record::Printed;

    fn of(job: u128, task: u32, epoch: u64) -> Try {
        let node = NodeId::from_uuid(Uuid::from_u128(1));
        Try { job: JobId(Uuid::from_u128(job)), task, epoch: Epoch(epoch), node }
    }

    fn record(text: &str) -> Record {
        let printed = Printed { stdout: text.as_bytes().to_vec(), ..Printed::default() };
        Record { printed, ..Record::ended(Outcome::Exited(0), None, 0, 7) }
    }

    #[test]
    fn what_is_kept_is_there_after_a_restart_and_goes_when_its_job_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let payload = vec![7; 100_000];
        let digest = {
            let store = Store::open(directory.path()).unwrap();
            store.put(&[(of(1, 0, 1), record("a")), (of(1, 1, 1), record("b")), (of(2, 0, 1), record("c"))]).unwrap();
            // A try that was kept stays: two tries are two.
            store.put(&[(of(1, 0, 1), record("z")), (of(1, 0, 2), record("y"))]).unwrap();
            store.put_payload(&payload).unwrap()
        };
        let store = Store::open(directory.path()).unwrap();
        let wanted = [of(1, 0, 1), of(1, 0, 2), of(1, 7, 1), of(2, 0, 1)];
        let found = store.get(&wanted, true, usize::MAX).unwrap().records;
        let texts: Vec<_> = found.iter().map(|(_, record)| String::from_utf8_lossy(&record.printed.stdout)).collect();
        assert_eq!(texts, ["a", "y", "c"]);
        let cut = store.get(&wanted, true, 1).unwrap();
        assert!(cut.records.len() == 1 && cut.is_cut, "one at least, and it is said that there may be more");
        assert_eq!(store.payload(digest).unwrap(), Some(payload));
        assert_eq!(store.payload(Digest::of(b"other")).unwrap(), None);
        assert_eq!(store.count(JobId(Uuid::from_u128(1))).unwrap(), 3);
        // Unknown for a moment is not gone.
        let (known, now) = (BTreeSet::from([JobId(Uuid::from_u128(2))]), Instant::now());
        assert_eq!(store.clear(&known, &BTreeSet::from([digest]), now).unwrap(), 0);
        assert_eq!(store.clear(&known, &BTreeSet::from([digest]), now + UNKNOWN_FOR).unwrap(), 1);
        assert_eq!(store.count(JobId(Uuid::from_u128(1))).unwrap(), 0);
        assert_eq!(store.count(JobId(Uuid::from_u128(2))).unwrap(), 1);
        store.clear(&BTreeSet::new(), &BTreeSet::new(), now).unwrap();
        assert_eq!(store.clear(&BTreeSet::new(), &BTreeSet::new(), now + UNKNOWN_FOR).unwrap(), 2);
        assert!(store.is_empty().unwrap());
    }

    #[test]
    fn a_payload_that_comes_again_is_not_removed_for_having_been_nobodys_before() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let (nobody, now) = (BTreeSet::new(), Instant::now());
        let digest = store.put_payload(b"what its tasks do").unwrap();
        store.clear(&BTreeSet::new(), &nobody, now).unwrap();
        // Found to be nobody's ten minutes ago, and put again before it is removed.
        store.put_payload(b"what its tasks do").unwrap();
        store.remove_payload(digest.as_bytes()).unwrap();
        assert_eq!(store.clear(&BTreeSet::new(), &nobody, now + UNKNOWN_FOR).unwrap(), 0, "its time begins anew");
        assert!(store.payload(digest).unwrap().is_some());
        assert_eq!(store.clear(&BTreeSet::new(), &nobody, now + 2 * UNKNOWN_FOR).unwrap(), 1);
        assert!(store.is_empty().unwrap());
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path()).unwrap());
        let file = directory.path().join(FILE);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[..4096].fill(0x5A);
        std::fs::write(&file, bytes).unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.put(&[(of(1, 0, 1), record("a"))]).unwrap();
        assert!(directory.path().join("jobs.redb.damaged").exists());
    }
}
