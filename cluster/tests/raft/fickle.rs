//! A disk whose power can be cut.

use std::io;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// A disk with a cache of its own that forgets.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fickle(Arc<Mutex<Contents>>);

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
            for what in std::mem::take(&mut contents.since) {
                change(&mut contents.synced, &what);
            }
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
    pub(crate) fn after_power(&self, dice: &mut fastrand::Rng) -> Self {
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

    /// After so many more calls nothing is read or written any more.
    pub(crate) fn cut_after(&self, calls: u64) {
        self.0.lock().unwrap().calls_left = Some(calls);
    }

    /// Whether it has failed, or is about to.
    pub(crate) fn is_cut(&self) -> bool {
        self.0.lock().unwrap().calls_left.is_some()
    }

    /// Syncing does nothing from now on, or does something again.
    pub(crate) fn forget_to_sync(&self, forgets: bool) {
        self.0.lock().unwrap().forgets_to_sync = forgets;
    }
}
