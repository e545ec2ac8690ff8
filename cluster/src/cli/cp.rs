//! `farfork cp`.

use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use agent::protocol::{FromAgent, PIECE, ToAgent};
use clap::Args;
use tokio::sync::mpsc;

use super::Context;
use super::error::CliError;
use super::fork::id;
use super::guest::{self, GuestError};
use super::progress::Progress;

/// Pieces between the disk and the guest at any time.
const AHEAD: usize = 8;

/// Copy files and directories into a machine or out of it
///
/// What is copied gets the name that it has, in the directory that is named. Owners become those who copy; modes and times are
/// kept. What comes out of a machine is never written outside of that directory, whatever the guest says.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork cp ./data a3d9:/srv          # /srv/data in the machine
  farfork cp a3d9:/var/log/run.log .   # ./run.log here")]
pub struct Arguments {
    /// From where: PATH, or ID:PATH in a machine
    #[arg(value_name = "FROM", value_parser = Place::parse)]
    from: Place,
    /// Into which directory: PATH, or ID:PATH in a machine
    #[arg(value_name = "TO", value_parser = Place::parse)]
    to: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There { id: String, path: String },
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            // A path with a colon is written with a slash before it.
            Some((machine, path)) if !machine.contains('/') => {
                let id = id(machine).map_err(|error| error.to_string())?;
                if path.starts_with('/') {
                    Ok(Self::There { id, path: path.to_owned() })
                } else {
                    Err(format!("{path:?} is no absolute path in the machine"))
                }
            }
            _ => Ok(Self::Here(text.into())),
        }
    }
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let progress = Progress::start("copying".to_owned());
    match (arguments.from, arguments.to) {
        (Place::Here(from), Place::There { id, path }) => put(&from, &id, path, context).await?,
        (Place::There { id, path }, Place::Here(to)) => get(&id, path, to, context).await?,
        _ => {
            return Err(CliError::Usage {
                message: "one of the two places is in a machine".to_owned(),
                remedy: "name it as ID:/PATH".to_owned(),
            });
        }
    }
    drop(progress);
    Ok(types::ExitCode::Ok.into())
}

async fn put(from: &Path, id: &str, path: String, context: &Context) -> Result<(), CliError> {
    let input = |source| CliError::Input { file: from.to_owned(), source };
    let metadata = from.symlink_metadata().map_err(input)?;
    let name = from.canonicalize().map_err(input)?.file_name().map_or_else(|| "root".into(), ToOwned::to_owned);
    let mut guest = guest::connect(id, context).await?;
    guest.says.say(&ToAgent::Put { path }).await?;
    let (sender, mut pieces) = mpsc::channel(AHEAD);
    let source = from.to_owned();
    let packing = tokio::task::spawn_blocking(move || {
        let mut builder = tar::Builder::new(Pieces { sender, buffer: Vec::with_capacity(PIECE) });
        builder.follow_symlinks(false);
        if metadata.is_dir() {
            builder.append_dir_all(&name, &source)?;
        } else {
            builder.append_path_with_name(&source, &name)?;
        }
        builder.finish()?;
        builder.get_mut().flush()
    });
    while let Some(piece) = pieces.recv().await {
        guest.says.say(&ToAgent::Data(piece)).await?;
    }
    let packed = packing.await.map_err(io::Error::other).and_then(|packed| packed);
    guest.says.say(&ToAgent::DataEnd).await?;
    let answer = guest.hears.hear().await;
    packed.map_err(input)?;
    match answer? {
        FromAgent::Done => Ok(()),
        _ => Err(GuestError::Nonsense.into()),
    }
}

async fn get(id: &str, path: String, to: PathBuf, context: &Context) -> Result<(), CliError> {
    let output = |source| CliError::Input { file: to.clone(), source };
    if !to.is_dir() {
        return Err(output(io::ErrorKind::NotADirectory.into()));
    }
    let mut guest = guest::connect(id, context).await?;
    // What was asked for, and nothing else that the guest may send along.
    let asked = Path::new(&path).file_name().map_or_else(|| "root".into(), ToOwned::to_owned);
    guest.says.say(&ToAgent::Get { path }).await?;
    let (sender, receiver) = mpsc::channel::<Vec<u8>>(AHEAD);
    let into = to.clone();
    let unpacking = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Archive::new(Received { receiver, piece: Vec::new(), at: 0 });
        archive.set_preserve_permissions(false);
        for entry in archive.entries()? {
            let mut entry = entry?;
            if entry.path()?.components().next() != Some(Component::Normal(&asked)) {
                return Err(io::Error::other("the guest sends a file that was not asked for"));
            }
            let kind = entry.header().entry_type();
            // Devices and the like are nothing that a guest could have us make.
            let is_plain = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link();
            if is_plain && !entry.unpack_in(&into)? {
                return Err(io::Error::other("the guest names a file outside of the directory"));
            }
        }
        Ok(())
    });
    let heard = loop {
        match guest.hears.hear().await {
            Ok(FromAgent::Data(piece)) => {
                if sender.send(piece).await.is_err() {
                    // It could not be unpacked: its error says why.
                    break Ok(());
                }
            }
            Ok(FromAgent::Done) => break Ok(()),
            Ok(_) => break Err(GuestError::Nonsense),
            Err(error) => break Err(error),
        }
    };
    drop(sender);
    let unpacked = unpacking.await.map_err(io::Error::other).and_then(|unpacked| unpacked);
    heard?;
    unpacked.map_err(output)
}

/// What is written to it, in pieces.
struct Pieces {
    sender: mpsc::Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.sender.blocking_send(std::mem::take(&mut self.buffer)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Pieces, to be read.
struct Received {
    receiver: mpsc::Receiver<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.receiver.blocking_recv() {
                Some(piece) => (self.piece, self.at) = (piece, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_here_or_in_a_machine() {
        assert_eq!(Place::parse("./a:b"), Ok(Place::Here("./a:b".into())));
        assert_eq!(Place::parse("a3d9:/srv"), Ok(Place::There { id: "a3d9".into(), path: "/srv".into() }));
        Place::parse("a3d9:srv").unwrap_err();
        Place::parse("no id:/srv").unwrap_err();
    }
}
