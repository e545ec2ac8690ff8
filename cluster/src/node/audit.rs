//! Who asked this node for what, and how it went: one line of JSON each, each with the digest of the one before it. A line that was
//! changed, taken out or put in breaks the chain; lines cut off its end are told by whoever has noted a later digest.
//!
//! ```text
//!  audit.jsonl     {"seq":1,…,"previous":"0…0","hash":"a…"}
//!                  {"seq":2,…,"previous":"a…","hash":"b…"}        hash: BLAKE3 of the line without its hash
//!  audit-1.jsonl   what came before, once a file has 64 MiB; the chain goes on from one to the next
//! ```
//!
//! A line is written when its answer is known, and is in the kernel before the client has it: it outlives the process, not a loss of
//! power. While lines cannot be written nothing is changed for anybody.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::Digest;
use utoipa::ToSchema;

const FILE: &str = "audit.jsonl";
/// A file of at least this size is set aside.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// The most characters of a text of a client's in a line, and of a method's.
const TEXT_MAX: usize = 512;
const METHOD_MAX: usize = 16;
/// The most bytes of a line: of what is in one, each character may be written as six.
const LINE_BYTES_MAX: u64 = 16 << 10;
const HASH: &str = ",\"hash\":\"";

/// What is written down of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Asked {
    /// Who asked.
    pub who: String,
    /// The only tenant that it reaches, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tenant: Option<String>,
    /// The method.
    pub method: String,
    /// The path.
    pub path: String,
    /// What it was about, if the path does not say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub about: Option<String>,
    /// The status that was answered.
    pub status: u16,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Line {
    /// Its number, from 1.
    pub seq: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What.
    #[serde(flatten)]
    pub asked: Asked,
    /// The digest of the line before it.
    pub previous: String,
    /// Its own. Not part of what is hashed.
    #[serde(skip_serializing, default)]
    pub hash: String,
}

/// A chain that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The number of its first line that is here: files that were set aside may have been taken elsewhere.
    pub first: u64,
    /// The number of its last line; 0 if there is none.
    pub last: u64,
    /// The last line's digest.
    pub hash: String,
}

impl Asked {
    /// Says that lines are missing.
    fn of_gap() -> Self {
        Self { who: "this node".to_owned(), about: Some("lines are missing before this one".to_owned()), ..Self::default() }
    }
}

/// How far a chain goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The number of the last line; 0 if there is none.
    pub seq: u64,
    /// Its digest.
    pub hash: String,
}

/// Why there is no log.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum AuditError {
    #[error("{} cannot be used: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("line {line} of {} is not as it was written: {why}", path.display())]
    Damaged { path: PathBuf, line: u64, why: String },
}

impl AuditError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::File { .. } => "look at the disk that holds the data directory, and whose it is",
            Self::Damaged { .. } => "find out who changed it; then move the file away, and the node begins another one",
        }
    }
}

/// Where lines are written.
#[derive(Clone, Debug)]
pub struct Audit {
    directory: PathBuf,
    log: Arc<Mutex<Log>>,
}

#[derive(Debug)]
struct Log {
    file: File,
    bytes: u64,
    head: Head,
    /// The last line could not be written.
    has_failed: bool,
}

impl Audit {
    /// Goes on with the log of a data directory. What a killed node had written of a line is cut off.
    ///
    /// # Errors
    /// [`AuditError`]; the log is as it was.
    pub fn open(directory: &Path) -> Result<Self, AuditError> {
        let path = directory.join(FILE);
        let failed = |source| AuditError::File { path: path.clone(), source };
        let open = || OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path);
        let file = open().map_err(failed)?;
        let whole = end_of_lines(&file).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if whole < bytes {
            tracing::warn!(path = %path.display(), bytes = bytes - whole, "a line that was not finished is cut off");
            file.set_len(whole).map_err(failed)?;
        }
        let head = match last_line(&file, whole).map_err(failed)? {
            Some(line) => read(&line).map_err(|why| AuditError::Damaged { path: path.clone(), line: 0, why })?.head(),
            None => last_set_aside(directory)?.unwrap_or_else(Head::none),
        };
        let log = Log { file, bytes: whole, head, has_failed: false };
        Ok(Self { directory: directory.to_owned(), log: Arc::new(Mutex::new(log)) })
    }

    /// Writes a line.
    ///
    /// # Errors
    /// [`AuditError`]; nothing of it is there.
    pub fn write(&self, asked: Asked) -> Result<(), AuditError> {
        let mut log = self.lock();
        let path = self.directory.join(FILE);
        let mut write = || -> io::Result<()> {
            if log.has_failed {
                log.write(Asked::of_gap(), &self.directory, &path)?;
            }
            log.write(asked.clone(), &self.directory, &path)
        };
        let written = write();
        log.has_failed = written.is_err();
        written.map_err(|source| AuditError::File { path, source })
    }

    /// Whether lines can be written: if the last one could not, that is said first.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn check(&self) -> Result<(), AuditError> {
        let mut log = self.lock();
        if !log.has_failed {
            return Ok(());
        }
        let path = self.directory.join(FILE);
        log.has_failed = log.write(Asked::of_gap(), &self.directory, &path).is_err();
        let full = || io::Error::other("the last line could not be written, and none can be now");
        if log.has_failed { Err(AuditError::File { path, source: full() }) } else { Ok(()) }
    }

    /// Lines of this log after a number, at most so many.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn lines(&self, after: u64, most: usize) -> Result<(Vec<Line>, Head), AuditError> {
        let head = self.lock().head.clone();
        let mut lines = Vec::new();
        for path in files(&self.directory)? {
            walk(&path, |_, line| {
                if let Ok(line) = read(line).map(|line| line.0)
                    && line.seq > after
                    && lines.len() < most
                {
                    lines.push(line);
                }
                Ok(())
            })?;
        }
        Ok((lines, head))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks the whole chain of a data directory.
///
/// # Errors
/// [`AuditError`] at the first line that is not as it was written.
pub fn verify(directory: &Path) -> Result<Checked, AuditError> {
    let (mut first, mut head): (u64, Option<Head>) = (1, None);
    for path in files(directory)? {
        walk(&path, |number, text| {
            let damaged = |why: String| AuditError::Damaged { path: path.clone(), line: number, why };
            let line = read(text).map_err(damaged)?;
            let before = head.clone().unwrap_or_else(|| {
                first = line.0.seq;
                Head { seq: first - 1, hash: line.0.previous.clone() }
            });
            if line.0.seq != before.seq + 1 || line.0.previous != before.hash {
                return Err(damaged(format!("it does not follow line {}", before.seq)));
            }
            head = Some(line.head());
            Ok(())
        })?;
    }
    let Head { seq, hash } = head.unwrap_or_else(Head::none);
    Ok(Checked { first, last: seq, hash })
}

impl Head {
    fn none() -> Self {
        Self { seq: 0, hash: Digest::ZERO_CONTENT.to_string() }
    }
}

/// A line with the digest that it should have, and has.
struct Good(Line);

impl Good {
    fn head(&self) -> Head {
        Head { seq: self.0.seq, hash: self.0.hash.clone() }
    }
}

impl Log {
    fn write(&mut self, mut asked: Asked, directory: &Path, path: &Path) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            match std::fs::rename(path, directory.join(format!("audit-{}.jsonl", self.head.seq))) {
                // It was set aside the last time, and then no new file could be made.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            self.file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path)?;
            self.bytes = 0;
        }
        asked.method = short(&asked.method, METHOD_MAX);
        asked.path = short(&asked.path, TEXT_MAX);
        asked.about = asked.about.as_deref().map(|about| short(about, TEXT_MAX));
        let since = pages::clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let (seq, previous) = (self.head.seq + 1, self.head.hash.clone());
        let line = Line { seq, unix_ms, asked, previous, hash: String::new() };
        let body = serde_json::to_string(&line).expect("plain data");
        let hash = Digest::of(body.as_bytes()).to_string();
        let text = format!("{}{HASH}{hash}\"}}\n", body.strip_suffix('}').expect("an object"));
        debug_assert!(text.len() as u64 <= LINE_BYTES_MAX, "{} bytes", text.len());
        if let Err(error) = self.file.write_all(text.as_bytes()) {
            // Half a line would be damage to whoever reads it.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += text.len() as u64;
        self.head = Head { seq, hash };
        Ok(())
    }
}

/// Reads a line, and checks its digest.
fn read(text: &str) -> Result<Good, String> {
    let (body, hash) = text.rsplit_once(HASH).ok_or("it has no digest")?;
    let hash = hash.strip_suffix("\"}").ok_or("it has no end")?;
    let body = format!("{body}}}");
    if Digest::of(body.as_bytes()).to_string() != hash {
        return Err("its digest is another one".to_owned());
    }
    let line: Line = serde_json::from_str(&body).map_err(|error| error.to_string())?;
    if line.seq == 0 {
        return Err("its number is 0".to_owned());
    }
    Ok(Good(Line { hash: hash.to_owned(), ..line }))
}

fn short(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

/// The files of a chain, oldest first.
fn files(directory: &Path) -> Result<Vec<PathBuf>, AuditError> {
    let mut aside = aside(directory)?;
    let current = directory.join(FILE);
    aside.sort();
    let mut all: Vec<PathBuf> = aside.into_iter().map(|(_, path)| path).collect();
    if current.exists() {
        all.push(current);
    }
    Ok(all)
}

/// Files that were set aside, with the number of the last line of each.
fn aside(directory: &Path) -> Result<Vec<(u64, PathBuf)>, AuditError> {
    let failed = |source| AuditError::File { path: directory.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let last = name.and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl")?.parse::<u64>().ok());
        found.extend(last.map(|last| (last, path)));
    }
    Ok(found)
}

/// Where the chain was when the newest file was set aside.
fn last_set_aside(directory: &Path) -> Result<Option<Head>, AuditError> {
    let Some((_, path)) = aside(directory)?.into_iter().max() else { return Ok(None) };
    let failed = |source| AuditError::File { path: path.clone(), source };
    let file = File::open(&path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let Some(line) = last_line(&file, bytes).map_err(failed)? else { return Ok(None) };
    let line = read(&line).map_err(|why| AuditError::Damaged { path: path.clone(), line: 0, why })?;
    Ok(Some(line.head()))
}

/// Where the last whole line ends.
fn end_of_lines(file: &File) -> io::Result<u64> {
    let bytes = file.metadata()?.len();
    let tail = tail(file, bytes)?;
    let cut = tail.iter().rev().take_while(|byte| **byte != b'\n').count() as u64;
    Ok(bytes - cut)
}

/// The last line of a file that ends with this many bytes.
fn last_line(file: &File, bytes: u64) -> io::Result<Option<String>> {
    let tail = tail(file, bytes)?;
    if bytes > 0 && tail.iter().filter(|byte| **byte == b'\n').count() < 2 && bytes > tail.len() as u64 {
        return Err(io::Error::other("it has a line that is longer than any that was written"));
    }
    let last = tail.strip_suffix(b"\n").and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next());
    Ok(last.map(|line| String::from_utf8_lossy(line).into_owned()))
}

fn tail(mut file: &File, bytes: u64) -> io::Result<Vec<u8>> {
    let from = bytes.saturating_sub(LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, bytes - from), &mut tail)?;
    Ok(tail)
}

fn walk(path: &Path, mut each: impl FnMut(u64, &str) -> Result<(), AuditError>) -> Result<(), AuditError> {
    let failed = |source| AuditError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    for (number, line) in (1..).zip(BufReader::new(file).split(b'\n')) {
        each(number, &String::from_utf8_lossy(&line.map_err(failed)?))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(path: &str) -> Asked {
        Asked { who: "user ann".to_owned(), method: "POST".to_owned(), path: path.to_owned(), status: 200, ..Asked::default() }
    }

    #[test]
    fn lines_are_chained_over_starts_and_a_half_line_is_cut_off() {
        let place = tempfile::tempdir().unwrap();
        for start in 0..3 {
            let audit = Audit::open(place.path()).unwrap();
            for _ in 0..5 {
                audit.write(asked("/v1/forks")).unwrap();
            }
            assert_eq!(verify(place.path()).unwrap().last, (start + 1) * 5);
            let mut file = OpenOptions::new().append(true).open(place.path().join(FILE)).unwrap();
            file.write_all(b"{\"seq\":99,\"half").unwrap();
        }
        let audit = Audit::open(place.path()).unwrap();
        let (lines, head) = audit.lines(13, 10).unwrap();
        assert_eq!(lines.iter().map(|line| line.seq).collect::<Vec<_>>(), [14, 15]);
        assert_eq!(Checked { first: 1, last: head.seq, hash: head.hash }, verify(place.path()).unwrap());
        assert_eq!(lines[1].asked, asked("/v1/forks"));
    }

    #[test]
    fn whatever_is_changed_is_found() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(FILE);
        let audit = Audit::open(place.path()).unwrap();
        (0..20).for_each(|number| audit.write(asked(&format!("/v1/machines/{number}"))).unwrap());
        let whole = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = whole.lines().collect();
        let seed = fastrand::u64(..);
        let mut dice = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let at = dice.usize(0..lines.len());
            let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            match dice.u8(0..4) {
                // Cutting off the end is what a digest that was noted elsewhere is for.
                0 if at + 1 < lines.len() => drop(changed.remove(at)),
                1 => changed.insert(at, lines[at].to_owned()),
                2 if at + 1 < lines.len() => changed.swap(at, at + 1),
                _ => {
                    let mut bytes = changed[at].clone().into_bytes();
                    let place = dice.usize(0..bytes.len());
                    bytes[place] = if bytes[place] == b'x' { b'y' } else { b'x' };
                    changed[at] = String::from_utf8(bytes).unwrap();
                }
            }
            std::fs::write(&path, changed.join("\n") + "\n").unwrap();
            // What is missing at the beginning may have been set aside and taken elsewhere: that is told.
            if changed.len() < lines.len() && at == 0 {
                assert_eq!(verify(place.path()).unwrap().first, 2);
                continue;
            }
            assert!(matches!(verify(place.path()), Err(AuditError::Damaged { .. })), "seed {seed}: {changed:?}");
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(verify(place.path()).unwrap().last, 20);
        // Not gone on from: the damage would be lost in what follows.
        std::fs::write(&path, format!("{whole}nonsense\n")).unwrap();
        assert!(matches!(Audit::open(place.path()), Err(AuditError::Damaged { .. })));
    }

    /// Whoever is turned away says what its line has in it.
    #[test]
    fn no_request_makes_a_line_that_is_not_found_again() {
        let place = tempfile::tempdir().unwrap();
        let audit = Audit::open(place.path()).unwrap();
        let long = "\u{1}\"\\\u{10FFFF}".repeat(5000);
        let asked = Asked { method: long.clone(), path: long.clone(), about: Some(long), ..asked("/") };
        (0..3).for_each(|_| audit.write(asked.clone()).unwrap());
        Audit::open(place.path()).unwrap().write(asked).unwrap();
        assert_eq!(verify(place.path()).unwrap().last, 4);
    }

    #[test]
    fn lines_that_could_not_be_written_are_told_of() {
        let place = tempfile::tempdir().unwrap();
        let audit = Audit::open(place.path()).unwrap();
        audit.write(asked("/v1/forks")).unwrap();
        // As on a full disk: nothing can be written by this.
        let (path, file) = (place.path().join(FILE), File::open("/dev/null").unwrap());
        let kept = std::mem::replace(&mut audit.lock().file, file);
        assert!(audit.write(asked("/v1/forks")).is_err() && audit.check().is_err());
        audit.lock().file = kept;
        // Whatever is written next: the gap comes first.
        audit.write(asked("/v1/machines")).unwrap();
        let (lines, _) = audit.lines(0, 10).unwrap();
        assert_eq!(lines[1].asked, Asked::of_gap());
        assert_eq!((lines.len(), verify(place.path()).unwrap().last), (3, 3));
        // Set aside, and then no new file could be made.
        audit.lock().bytes = FILE_BYTES_MAX;
        std::fs::rename(&path, place.path().join("audit-3.jsonl")).unwrap();
        audit.write(asked("/v1/forks")).unwrap();
        assert_eq!(verify(place.path()).unwrap().last, 4);
    }

    #[test]
    fn a_file_that_is_large_is_set_aside_and_the_chain_goes_on() {
        let place = tempfile::tempdir().unwrap();
        let audit = Audit::open(place.path()).unwrap();
        audit.write(asked("/v1/forks")).unwrap();
        audit.lock().bytes = FILE_BYTES_MAX;
        audit.write(asked("/v1/forks")).unwrap();
        drop(audit);
        assert!(place.path().join("audit-1.jsonl").exists());
        assert_eq!(verify(place.path()).unwrap().last, 2);
        // Killed right after a file was set aside.
        std::fs::rename(place.path().join(FILE), place.path().join("audit-2.jsonl")).unwrap();
        Audit::open(place.path()).unwrap().write(asked("/v1/forks")).unwrap();
        assert_eq!(verify(place.path()).unwrap().last, 3);
    }
}
