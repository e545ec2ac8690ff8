//! What is said to the child of a task: its files come, its work is done, what it is to keep goes. Nothing that it answers is
//! believed but about itself.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent::protocol::{Exit, Failed, FromAgent, ToAgent};

use super::payload::{Payload, Told, Work};
use super::record::Printed;
use crate::node::guest::words::{self, Evaluate, Evaluated, GuestError};

type Guest = words::Guest<tokio::net::UnixStream>;

/// So much more than it may keep is taken from a child before it is given up.
const PATIENCE: u64 = 4;

/// What a task prints, while it does.
#[derive(Debug, Default)]
pub struct Log(Mutex<Printed>);

impl Log {
    /// What there is so far.
    pub fn printed(&self) -> MutexGuard<'_, Printed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the work of a task came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// As of a program: 0 if all is well.
    pub status: i32,
    /// What its code came to.
    pub value: Option<String>,
    /// More about what is not well.
    pub detail: Option<String>,
    /// A tar archive of what was to be kept; empty if there is none.
    pub files: Vec<u8>,
}

/// Has a child do the work of a task.
///
/// # Errors
/// [`GuestError`] if it broke off, or does not keep to what is spoken.
pub async fn perform(stream: UnixStream, payload: &Payload, told: Told<'_>, log: &Arc<Log>) -> Result<Done, GuestError> {
    let stream = stream.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(stream));
    let mut guest = Guest::greet(stream.map_err(|_| GuestError::Gone)?).await?;
    if !payload.files.is_empty() {
        guest.says.say(&ToAgent::Put { path: "/".to_owned() }).await?;
        guest.says.say_data(&payload.files).await?;
        guest.says.say(&ToAgent::DataEnd).await?;
        match guest.hears.hear().await {
            Ok(FromAgent::Done) => {}
            Err(GuestError::Failed(failed)) => return Ok(of_own_failure(&failed, "unpacking its files")),
            Ok(_) => return Err(GuestError::Nonsense),
            Err(error) => return Err(error),
        }
    }
    let done = match &payload.work {
        Work::Exec(_) => exec(&mut guest, payload, told, log).await?,
        Work::Eval(_) => eval(&mut guest, payload, told, log).await?,
    };
    if payload.outputs.is_empty() { Ok(done) } else { keep(&mut guest, payload, done, log).await }
}

async fn exec(guest: &mut Guest, payload: &Payload, told: Told<'_>, log: &Log) -> Result<Done, GuestError> {
    let exec = match payload.exec(told) {
        Ok(exec) => exec,
        Err(error) => return Ok(Done { status: 125, detail: Some(error.to_string()), ..Done::default() }),
    };
    guest.says.say(&ToAgent::Exec(exec)).await?;
    loop {
        let (is_stderr, piece) = match guest.hears.hear().await {
            Ok(FromAgent::Stdout(piece)) => (false, piece),
            Ok(FromAgent::Stderr(piece)) => (true, piece),
            Ok(FromAgent::Exited(exit)) => {
                let status = match exit {
                    Exit::Status(status) => status,
                    Exit::Signal(signal) => 128 + (signal & 0x7F),
                };
                return Ok(Done { status, ..Done::default() });
            }
            Ok(_) => return Err(GuestError::Nonsense),
            Err(GuestError::Failed(failed)) => return Ok(of_own_failure(&failed, "")),
            Err(error) => return Err(error),
        };
        log.printed().add(is_stderr, &piece, payload.output_limit);
    }
}

async fn eval(guest: &mut Guest, payload: &Payload, told: Told<'_>, log: &Log) -> Result<Done, GuestError> {
    let code = match payload.eval(told) {
        Ok(code) => code,
        Err(error) => return Ok(Done { status: 125, detail: Some(error.to_string()), ..Done::default() }),
    };
    let raw = match guest.ask(&Evaluate::bytes(&code)).await {
        Ok(raw) => raw,
        Err(GuestError::Refused(why)) => return Ok(Done { status: 125, detail: Some(why), ..Done::default() }),
        Err(GuestError::Failed(failed)) => return Ok(of_own_failure(&failed, "")),
        Err(error) => return Err(error),
    };
    let Evaluated { ok, value, stdout, error, traceback } = serde_json::from_slice(&raw).map_err(|_| GuestError::Nonsense)?;
    let mut printed = log.printed();
    printed.add(false, stdout.as_bytes(), payload.output_limit);
    printed.add(true, traceback.as_bytes(), payload.output_limit);
    // It counts against the limit as what it printed does.
    let kept = value.filter(|value| {
        let room = payload.output_limit.saturating_sub((printed.stdout.len() + printed.stderr.len()) as u64);
        let fits = value.len() as u64 <= room;
        printed.cut_bytes += if fits { 0 } else { value.len() as u64 };
        fits
    });
    let detail = (!ok).then(|| error.chars().take(1024).collect());
    Ok(Done { status: i32::from(!ok), value: kept, detail, files: Vec::new() })
}

/// What shells say of programs that are not there or not to be run; otherwise 125, as of containers' tools.
fn of_own_failure(failed: &Failed, what: &str) -> Done {
    let failure = GuestError::Failed(failed.clone());
    let message: String = failed.message.chars().take(1024).collect();
    let detail = if what.is_empty() { message } else { format!("{what}: {message}") };
    Done { status: i32::from(failure.exit_status()), detail: Some(detail), ..Done::default() }
}

/// Takes what is to be kept. What is not there is said, and is no failure of the task.
async fn keep(guest: &mut Guest, payload: &Payload, mut done: Done, log: &Log) -> Result<Done, GuestError> {
    let mut kept = tar::Builder::new(Vec::new());
    let (mut count, mut notes) = (0, Vec::new());
    'paths: for path in &payload.outputs {
        guest.says.say(&ToAgent::Get { path: path.clone() }).await?;
        let (mut archive, mut bytes) = (Vec::new(), 0);
        let failed = loop {
            match guest.hears.hear().await {
                Ok(FromAgent::Data(piece)) => {
                    bytes += piece.len() as u64;
                    if bytes <= payload.output_limit {
                        archive.extend(piece);
                    } else if bytes > payload.output_limit.saturating_mul(PATIENCE) {
                        // What it has done counts; what would come after this much is not listened to any more.
                        log.printed().cut_bytes += bytes;
                        notes.push(format!(
                            "{path} and what is after it is not kept: more than {bytes} bytes are beyond the limit"
                        ));
                        break 'paths;
                    }
                }
                Ok(FromAgent::Done) => break None,
                Ok(_) => return Err(GuestError::Nonsense),
                Err(GuestError::Failed(failed)) => break Some(failed.message),
                Err(error) => return Err(error),
            }
        };
        let so_far = kept.get_ref().len() as u64;
        if let Some(message) = failed {
            notes.push(format!("{path} is not kept: {}", message.chars().take(256).collect::<String>()));
        } else if so_far + bytes > payload.output_limit {
            log.printed().cut_bytes += bytes;
            notes.push(format!("{path} is not kept: {bytes} bytes are beyond the limit"));
        } else {
            match add_all(&mut kept, &archive, path, payload.output_limit) {
                Ok(()) => count += 1,
                Err(error) => {
                    // All of it or nothing.
                    kept.get_mut().truncate(usize::try_from(so_far).unwrap_or(usize::MAX));
                    notes.push(format!("{path} is not kept: {error}"));
                }
            }
        }
    }
    if count > 0 {
        done.files = kept.into_inner().map_err(|_| GuestError::Nonsense)?;
    }
    let notes = done.detail.take().into_iter().chain(notes).collect::<Vec<_>>().join("; ");
    done.detail = (!notes.is_empty()).then_some(notes);
    Ok(done)
}

/// Adds what a guest has packed, under the directory where it was: files, directories and links, as they are. The archive with what was
/// in it before stays below the limit, whatever the names are.
pub(super) fn add_all(kept: &mut tar::Builder<Vec<u8>>, archive: &[u8], path: &str, limit: u64) -> io::Result<()> {
    let plain = |path: &Path| path.components().filter(|part| matches!(part, Component::Normal(_))).collect::<PathBuf>();
    let parent = plain(Path::new(path).parent().unwrap_or(Path::new("")));
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let (mut header, at) = (entry.header().clone(), parent.join(plain(&entry.path()?)));
        let kind = header.entry_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link()) {
            return Err(io::Error::other(format!("{} is no file, directory or link", at.display())));
        }
        // Nobody gains rights by unpacking it.
        header.set_mode(header.mode().unwrap_or(0o644) & 0o777);
        if let Some(link) = entry.link_name()? {
            let link = link.into_owned();
            kept.append_link(&mut header, at, link)?;
        } else {
            let mut contents = Vec::new();
            let room = limit.saturating_sub(kept.get_ref().len() as u64);
            (&mut entry).take(room + 1).read_to_end(&mut contents)?;
            if contents.len() as u64 > room {
                return Err(io::Error::other("it is larger than the limit"));
            }
            header.set_size(contents.len() as u64);
            kept.append_data(&mut header, at, &contents[..])?;
        }
        if kept.get_ref().len() as u64 > limit {
            return Err(io::Error::other("packed it is larger than the limit"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use agent::protocol::{Phase, receive, send};

    use super::*;
    use crate::jobs::payload::Inputs;
    use crate::jobs::payload::tests::payload;

    /// Has a guest, played by `guest` on a thread, do the work.
    async fn played(payload: &Payload, guest: impl FnOnce(UnixStream) + Send + 'static) -> (Result<Done, GuestError>, Printed) {
        let (ours, mut its) = UnixStream::pair().unwrap();
        let playing = std::thread::spawn(move || {
            assert!(matches!(receive::<ToAgent>(&mut its), Ok(ToAgent::Hello { .. })));
            send(&mut its, &FromAgent::Hello { version: agent::protocol::VERSION, phase: Phase::Running }).unwrap();
            guest(its);
        });
        let log = Arc::<Log>::default();
        let done = perform(ours, payload, Told { job: "j", task: 3, attempt: 0 }, &log).await;
        playing.join().unwrap();
        let printed = log.printed().clone();
        (done, printed)
    }

    fn exec(arguments: &[&str]) -> Payload {
        let arguments = arguments.iter().map(|text| (*text).to_owned()).collect();
        Payload { env: BTreeMap::new(), ..payload(Work::Exec(arguments), Inputs::Count(9)) }
    }

    #[tokio::test]
    async fn a_program_is_run_with_its_files_and_what_it_prints_is_kept() {
        let payload = Payload { files: b"an archive".to_vec(), output_limit: 6, ..exec(&["cmd", "{index}"]) };
        let guest = |mut its: UnixStream| {
            assert_eq!(receive::<ToAgent>(&mut its).unwrap(), ToAgent::Put { path: "/".to_owned() });
            assert_eq!(receive::<ToAgent>(&mut its).unwrap(), ToAgent::Data(b"an archive".to_vec()));
            assert_eq!(receive::<ToAgent>(&mut its).unwrap(), ToAgent::DataEnd);
            send(&mut its, &FromAgent::Done).unwrap();
            let ToAgent::Exec(exec) = receive::<ToAgent>(&mut its).unwrap() else { panic!() };
            assert_eq!(exec.arguments, ["cmd", "3"]);
            for said in [FromAgent::Stdout(b"out".to_vec()), FromAgent::Stderr(b"\xFFerr".to_vec())] {
                send(&mut its, &said).unwrap();
            }
            send(&mut its, &FromAgent::Exited(Exit::Signal(9))).unwrap();
        };
        let (done, printed) = played(&payload, guest).await;
        assert_eq!(done.unwrap(), Done { status: 137, ..Done::default() });
        assert_eq!((&printed.stdout[..], &printed.stderr[..], printed.cut_bytes), (&b"out"[..], &b"\xFFer"[..], 1));
    }

    #[tokio::test]
    async fn what_cannot_be_run_ends_as_shells_say_it() {
        for (errno, status) in [(2, 127), (13, 126), (5, 125)] {
            let guest = move |mut its: UnixStream| {
                receive::<ToAgent>(&mut its).unwrap();
                send(&mut its, &FromAgent::Failed(Failed { message: "no".to_owned(), errno })).unwrap();
            };
            let (done, _) = played(&exec(&["cmd"]), guest).await;
            assert_eq!(done.unwrap(), Done { status, detail: Some("no".to_owned()), ..Done::default() });
        }
    }

    #[tokio::test]
    async fn what_is_kept_has_the_names_that_it_had_and_nothing_leads_outside() {
        let payload = Payload { outputs: vec!["/tmp/x/a".to_owned(), "/gone".to_owned()], ..exec(&["cmd"]) };
        let guest = |mut its: UnixStream| {
            receive::<ToAgent>(&mut its).unwrap();
            send(&mut its, &FromAgent::Exited(Exit::Status(0))).unwrap();
            receive::<ToAgent>(&mut its).unwrap();
            let mut archive = tar::Builder::new(Vec::new());
            for name in ["a", "b"] {
                let mut header = tar::Header::new_gnu();
                header.set_size(2);
                archive.append_data(&mut header, name, &b"hi"[..]).unwrap();
            }
            let mut bytes = archive.into_inner().unwrap();
            // Names as no good agent would send them.
            bytes[..8].copy_from_slice(b"../../ab");
            let sum: u32 = bytes[..148].iter().chain(&[b' '; 8]).chain(&bytes[156..512]).map(|byte| u32::from(*byte)).sum();
            bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            send(&mut its, &FromAgent::Data(bytes)).unwrap();
            send(&mut its, &FromAgent::Done).unwrap();
            receive::<ToAgent>(&mut its).unwrap();
            send(&mut its, &FromAgent::Failed(Failed { message: "not there".to_owned(), errno: 2 })).unwrap();
        };
        let (done, _) = played(&payload, guest).await;
        let done = done.unwrap();
        assert_eq!((done.status, done.detail.as_deref()), (0, Some("/gone is not kept: not there")));
        let names: Vec<_> = tar::Archive::new(&done.files[..])
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().into_owned().display().to_string())
            .collect();
        assert_eq!(names, ["tmp/x/ab", "tmp/x/b"]);
    }

    #[test]
    fn archives_that_grow_when_they_are_read_or_hold_devices_are_refused() {
        let archived = |kind: tar::EntryType, size: u64| {
            let mut header = tar::Header::new_gnu();
            header.set_path("x").unwrap();
            header.set_entry_type(kind);
            header.set_mode(0o4755);
            header.set_size(0);
            if kind == tar::EntryType::GNUSparse {
                header.as_gnu_mut().unwrap().set_real_size(size);
                let sparse = &mut header.as_gnu_mut().unwrap().sparse[0];
                sparse.set_offset(size);
                sparse.set_length(0);
            }
            header.set_cksum();
            [header.as_bytes().as_slice(), &[0; 1024]].concat()
        };
        for kind in [tar::EntryType::GNUSparse, tar::EntryType::Char, tar::EntryType::Block, tar::EntryType::Fifo] {
            let mut kept = tar::Builder::new(Vec::new());
            assert!(add_all(&mut kept, &archived(kind, 1 << 40), "/x", 1 << 20).is_err(), "{kind:?}");
        }
        let mut kept = tar::Builder::new(Vec::new());
        add_all(&mut kept, &archived(tar::EntryType::Regular, 0), "/x", 1 << 20).unwrap();
        let bytes = kept.into_inner().unwrap();
        let mode = tar::Archive::new(&bytes[..]).entries().unwrap().next().unwrap().unwrap().header().mode().unwrap();
        assert_eq!(mode, 0o755);
    }

    #[tokio::test]
    async fn a_guest_that_breaks_off_or_floods_is_told_apart_from_a_program_that_fails() {
        let (done, _) = played(&exec(&["cmd"]), drop).await;
        assert!(matches!(done, Err(GuestError::Gone)));
        let payload = Payload { outputs: vec!["/a".to_owned()], output_limit: 100, ..exec(&["cmd"]) };
        let flood = |mut its: UnixStream| {
            receive::<ToAgent>(&mut its).unwrap();
            send(&mut its, &FromAgent::Exited(Exit::Status(0))).unwrap();
            while send(&mut its, &FromAgent::Data(vec![0; 64])).is_ok() {}
        };
        let (done, printed) = played(&payload, flood).await;
        let done = done.unwrap();
        assert!(done.status == 0 && done.files.is_empty() && printed.cut_bytes > 400, "{done:?}");
        assert!(done.detail.unwrap().starts_with("/a and what is after it is not kept: more than"));
    }

    #[test]
    fn many_empty_files_under_a_long_path_are_no_larger_than_the_limit() {
        let mut archive = tar::Builder::new(Vec::new());
        for number in 0..200 {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            archive.append_data(&mut header, format!("x/{number}"), &b""[..]).unwrap();
        }
        let (archive, limit) = (archive.into_inner().unwrap(), 200_000);
        assert!(archive.len() < limit);
        let long = format!("/{}/x", "d/".repeat(2000));
        let mut kept = tar::Builder::new(Vec::new());
        assert!(add_all(&mut kept, &archive, &long, limit as u64).is_err());
        assert!(kept.get_ref().len() < limit + 16_384, "{}", kept.get_ref().len());
        let mut kept = tar::Builder::new(Vec::new());
        add_all(&mut kept, &archive, "/x", limit as u64).unwrap();
    }
}
