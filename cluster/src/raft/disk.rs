//! One file that does not forget: what a transaction wrote is on disk when it returns.
//!
//! redb keeps the file whole over crashes. It trusts what it reads, and may panic over a file that was damaged from outside; that
//! ends here: the panic is caught, and from then on every call says that the file is damaged. Each record carries a checksum of its
//! own place and bytes, so that what is read is what was written there.

use std::any::Any;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::{Arc, Mutex, PoisonError};

use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, Table, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Entries by their index.
const ENTRIES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
/// Everything else by its name.
const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
/// Memory that redb may use; the log is read once, and then written.
const CACHE_BYTES: usize = 8 << 20;
const CHECKSUM: usize = 16;
/// The record of what else there is.
const INVENTORY: &str = "inventory";

/// Which entries and records there are: what is missing has no checksum that could tell.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Inventory {
    /// The first entry and the last one.
    entries: Option<(u64, u64)>,
    /// By name.
    records: Vec<String>,
}

/// Why the file does not do what it is there for.
#[derive(Clone, Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum DiskError {
    #[error("the log {} cannot be opened: {cause}", path.display())]
    Open { path: PathBuf, cause: String },
    #[error("the log {} is used by another process", path.display())]
    InUse { path: PathBuf },
    #[error("the log is damaged: {what}")]
    Damaged { what: String },
    #[error("the log cannot be read or written: {0}")]
    Io(String),
}

impl DiskError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Open { .. } => "look at its permissions, and whether its file system is mounted",
            Self::InUse { .. } => "stop the other node of this data directory",
            Self::Damaged { .. } => {
                "stop the node, and repair it: `farfork cluster repair --from-peers` lets it in again under a new id"
            }
            Self::Io(_) => "make room on its file system, look for its cause in the kernel log, and start the node again",
        }
    }
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        Self::other(error)
    }
}

/// See the module. Clones are the same file.
#[derive(Clone)]
pub struct Disk {
    open: Arc<Mutex<Open>>,
    executor: Executor,
}

/// Where the disk's part of a call is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    /// On a thread for that: a disk is slow, and no task may wait for it.
    Thread,
    /// By the caller: in simulations, where nothing may happen beside virtual time.
    Caller,
}

enum Open {
    Good(Closing),
    /// What was found; nothing is read or written any more.
    Bad(DiskError),
}

/// A database that is closed when it is dropped, which writes, and so may be the first to find damage.
struct Closing(Option<Database>);

impl Drop for Closing {
    fn drop(&mut self) {
        let database = self.0.take();
        if let Err(error) = caught(move || drop(database)) {
            tracing::error!(%error, "closing the log");
        }
    }
}

/// A transaction that writes.
pub struct Writing<'a> {
    entries: Table<'a, u64, &'static [u8]>,
    records: Table<'a, &'static str, &'static [u8]>,
}

impl Disk {
    /// Makes the file, of a member that begins. From then on a file that is missing is damage.
    ///
    /// # Errors
    /// [`DiskError`]; also if there is one.
    pub fn create(path: &Path) -> Result<Self, DiskError> {
        let failed = |error: io::Error| DiskError::Open { path: path.to_owned(), cause: error.to_string() };
        if path.exists() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        // It gets its name when all of it is there. What a start before this one has left is none of a member's.
        let new = path.with_extension("new");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&new).map_err(failed)?;
        let disk = Self::over(path, true, |builder| builder.create_with_backend(FileBackend::new(file)?))?;
        std::fs::rename(&new, path).map_err(failed)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        Ok(disk)
    }

    /// Opens the file of a member.
    ///
    /// # Errors
    /// [`DiskError`]. The file is left as it was.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let failed = |error: io::Error| DiskError::Open { path: path.to_owned(), cause: error.to_string() };
        let file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DiskError::Damaged { what: format!("{} is missing", path.display()) });
            }
            opened => opened.map_err(failed)?,
        };
        if file.metadata().map_err(failed)?.len() == 0 {
            return Err(DiskError::Damaged { what: format!("{} is empty", path.display()) });
        }
        Self::over(path, false, |builder| builder.create_with_backend(FileBackend::new(file)?))
    }

    /// The same over something else than a file: for the tests that cut the power.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open_on(backend: impl StorageBackend) -> Result<Self, DiskError> {
        Self::over(Path::new("(not a file)"), true, |builder| builder.create_with_backend(backend))
    }

    /// The same, with its part done there.
    #[must_use]
    pub fn on(self, executor: Executor) -> Self {
        Self { executor, ..self }
    }

    /// Does something with it where that may take its time.
    ///
    /// # Errors
    /// What `work` returns, as openraft takes it.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, DiskError> + Send + 'static,
    ) -> io::Result<T> {
        let disk = self.clone();
        Ok(match self.executor {
            Executor::Thread => tokio::task::spawn_blocking(move || work(&disk)).await.map_err(io::Error::other)??,
            Executor::Caller => work(&disk)?,
        })
    }

    fn over(
        path: &Path,
        may_be_new: bool,
        open: impl FnOnce(&mut redb::Builder) -> Result<Database, redb::DatabaseError>,
    ) -> Result<Self, DiskError> {
        let opened = caught(|| open(Database::builder().set_cache_size(CACHE_BYTES)))?;
        let database = opened.map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => DiskError::InUse { path: path.to_owned() },
            redb::DatabaseError::Storage(redb::StorageError::Io(error)) if !is_cut_short(&error) => {
                DiskError::Open { path: path.to_owned(), cause: error.to_string() }
            }
            other => DiskError::Damaged { what: other.to_string() },
        })?;
        let disk = Self { open: Arc::new(Mutex::new(Open::Good(Closing(Some(database))))), executor: Executor::Thread };
        // Nothing is written into what is damaged.
        disk.check(may_be_new)?;
        // Both tables are there from now on.
        disk.write(|_| Ok(()))?;
        Ok(disk)
    }

    /// Reads all of it once: damage is found before anything is built on it. What is missing is told by the inventory that every
    /// transaction leaves behind.
    fn check(&self, may_be_new: bool) -> Result<(), DiskError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let tables = (reading.open_table(ENTRIES), reading.open_table(RECORDS));
            let (entries, records) = match tables {
                (Err(redb::TableError::TableDoesNotExist(_)), Err(redb::TableError::TableDoesNotExist(_))) if may_be_new => {
                    return Ok(());
                }
                (entries, records) => (entries.map_err(of_redb)?, records.map_err(of_redb)?),
            };
            let mut there = Inventory::default();
            for item in entries.iter().map_err(of_redb)? {
                let (index, bytes) = item.map_err(of_redb)?;
                let index = index.value();
                let (first, last) = there.entries.unwrap_or((index, index.wrapping_sub(1)));
                if last.wrapping_add(1) != index {
                    return Err(DiskError::Damaged { what: format!("entry {} is missing", last.wrapping_add(1)) });
                }
                checked(&place_of_entry(index), bytes.value())?;
                there.entries = Some((first, index));
            }
            let mut expected = None;
            for item in records.iter().map_err(of_redb)? {
                let (name, bytes) = item.map_err(of_redb)?;
                if name.value() == INVENTORY {
                    expected = Some(decoded::<Inventory>(INVENTORY, bytes.value())?);
                } else {
                    checked(name.value(), bytes.value())?;
                    there.records.push(name.value().to_owned());
                }
            }
            if expected.as_ref() != Some(&there) {
                return Err(DiskError::Damaged { what: format!("{there:?} is there, and {expected:?} was written") });
            }
            Ok(())
        })
    }

    /// Changes what is there. When it returns all of it is on disk, or nothing.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn write<T>(&self, write: impl FnOnce(&mut Writing<'_>) -> Result<T, DiskError>) -> Result<T, DiskError> {
        self.with(|database| {
            let mut transaction = database.begin_write().map_err(of_redb)?;
            // Without it redb takes a last transaction whose pages are damaged for one that was cut off, and goes back behind it.
            transaction.set_two_phase_commit(true);
            let written = {
                let entries = transaction.open_table(ENTRIES).map_err(of_redb)?;
                let records = transaction.open_table(RECORDS).map_err(of_redb)?;
                let mut writing = Writing { entries, records };
                let written = write(&mut writing)?;
                writing.take_inventory()?;
                written
            };
            transaction.commit().map_err(of_redb)?;
            Ok(written)
        })
    }

    /// A record.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn record<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DiskError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let records = reading.open_table(RECORDS).map_err(of_redb)?;
            let bytes = records.get(name).map_err(of_redb)?;
            bytes.map(|bytes| decoded(name, bytes.value())).transpose()
        })
    }

    /// Entries from `from` on, before `to`, as many as fit into so many bytes, but at least one.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn entries<T: DeserializeOwned>(&self, from: u64, to: u64, bytes_max: usize) -> Result<Vec<T>, DiskError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let entries = reading.open_table(ENTRIES).map_err(of_redb)?;
            let (mut read, mut sum) = (Vec::new(), 0);
            for item in entries.range(from..to.max(from)).map_err(of_redb)? {
                let (index, bytes) = item.map_err(of_redb)?;
                sum += bytes.value().len();
                if sum > bytes_max && !read.is_empty() {
                    break;
                }
                read.push(decoded(&place_of_entry(index.value()), bytes.value())?);
            }
            Ok(read)
        })
    }

    /// The last entry.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn last_entry<T: DeserializeOwned>(&self) -> Result<Option<T>, DiskError> {
        self.with(|database| {
            let reading = database.begin_read().map_err(of_redb)?;
            let entries = reading.open_table(ENTRIES).map_err(of_redb)?;
            let last = entries.last().map_err(of_redb)?;
            last.map(|(index, bytes)| decoded(&place_of_entry(index.value()), bytes.value())).transpose()
        })
    }

    /// What has been found bad once is not touched again.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match &*open {
            Open::Good(Closing(database)) => database.as_ref().expect("it is there until it is dropped"),
            Open::Bad(error) => return Err(error.clone()),
        };
        let outcome = caught(|| work(database)).and_then(|outcome| outcome);
        if let Err(error) = &outcome {
            *open = Open::Bad(error.clone());
        }
        outcome
    }
}

impl Writing<'_> {
    /// Puts an entry there.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn put_entry(&mut self, index: u64, entry: &impl Serialize) -> Result<(), DiskError> {
        let bytes = encoded(&place_of_entry(index), entry);
        self.entries.insert(index, &*bytes).map(drop).map_err(of_redb)
    }

    /// Takes the entries of these indices away.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn remove_entries(&mut self, range: impl std::ops::RangeBounds<u64>) -> Result<(), DiskError> {
        self.entries.retain_in(range, |_, _| false).map_err(of_redb)
    }

    /// Puts a record there.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn put_record(&mut self, name: &str, record: &impl Serialize) -> Result<(), DiskError> {
        let bytes = encoded(name, record);
        self.records.insert(name, &*bytes).map(drop).map_err(of_redb)
    }

    /// Notes what is there now.
    fn take_inventory(&mut self) -> Result<(), DiskError> {
        let index = |found: Option<(redb::AccessGuard<'_, u64>, _)>| {
            found.map(|(index, _): (_, redb::AccessGuard<'_, &[u8]>)| index.value())
        };
        let (first, last) = (index(self.entries.first().map_err(of_redb)?), index(self.entries.last().map_err(of_redb)?));
        let mut records = Vec::new();
        for item in self.records.iter().map_err(of_redb)? {
            let (name, _) = item.map_err(of_redb)?;
            records.extend((name.value() != INVENTORY).then(|| name.value().to_owned()));
        }
        self.put_record(INVENTORY, &Inventory { entries: first.zip(last), records })
    }

    /// A record, as this transaction has it.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn record<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, DiskError> {
        let bytes = self.records.get(name).map_err(of_redb)?;
        bytes.map(|bytes| decoded(name, bytes.value())).transpose()
    }
}

thread_local! {
    /// Whether a panic of this thread is caught here.
    static IS_EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// redb panics over some damaged files.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, DiskError> {
    static QUIETER: Once = Once::new();
    // It becomes an error, which says what to do; a backtrace of redb's would only frighten.
    QUIETER.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_EXPECTED.get() {
                loud(panic);
            }
        }));
    });
    IS_EXPECTED.set(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    IS_EXPECTED.set(false);
    done.map_err(|panic| DiskError::Damaged { what: words_of(&*panic) })
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("redb gives it up: {}", text.unwrap_or("without a word"))
}

pub(crate) fn of_redb(error: impl Into<redb::Error>) -> DiskError {
    match error.into() {
        redb::Error::Io(error) if !is_cut_short(&error) => DiskError::Io(error.to_string()),
        redb::Error::PreviousIo => DiskError::Io("an earlier write failed".to_owned()),
        other => DiskError::Damaged { what: other.to_string() },
    }
}

/// The disk is good; what redb expects there is not.
pub(crate) fn is_cut_short(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData)
}

fn place_of_entry(index: u64) -> String {
    format!("entry {index}")
}

pub(crate) fn encoded(place: &str, value: &impl Serialize) -> Vec<u8> {
    let body = postcard::to_stdvec(value).expect("what is kept is plain data");
    [&checksum(place, &body)[..], &body].concat()
}

pub(crate) fn decoded<T: DeserializeOwned>(place: &str, bytes: &[u8]) -> Result<T, DiskError> {
    let body = checked(place, bytes)?;
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(DiskError::Damaged { what: format!("{place} has bytes after its end") }),
        Err(error) => Err(DiskError::Damaged { what: format!("{place} does not decode ({error})") }),
    }
}

fn checked<'a>(place: &str, bytes: &'a [u8]) -> Result<&'a [u8], DiskError> {
    match bytes.split_at_checked(CHECKSUM) {
        Some((said, body)) if said == checksum(place, body) => Ok(body),
        _ => Err(DiskError::Damaged { what: format!("{place} does not have its checksum") }),
    }
}

fn checksum(place: &str, body: &[u8]) -> [u8; CHECKSUM] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(place.len() as u64).to_le_bytes()).update(place.as_bytes()).update(body);
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM]);
    sum
}
