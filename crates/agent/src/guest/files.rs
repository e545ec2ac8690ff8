//! Files and trees in and out, as tar archives.

use std::io::{self, Read, Write};
use std::path::Path;

use vsock::VsockStream;

use super::session::{answer, failed};
use crate::protocol::{FrameError, FromAgent, PIECE, ToAgent, receive, send};

/// Unpacks what comes into a directory.
pub(super) fn put(stream: &mut VsockStream, path: &str) -> Result<(), FrameError> {
    let mut pieces = Pieces { stream, piece: Vec::new(), at: 0, is_done: false };
    let unpacked = unpack(&mut pieces, Path::new(path));
    // To its end, also of what could not be unpacked: the answer comes after it.
    let drained = io::copy(&mut pieces, &mut io::sink());
    answer(stream, unpacked.and(drained.map(drop)))
}

fn unpack(from: &mut impl Read, directory: &Path) -> io::Result<()> {
    if !directory.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("the guest has no directory {}", directory.display())));
    }
    let mut archive = tar::Archive::new(from);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.unpack(directory)
}

/// Packs a file or directory, under its own name.
pub(super) fn get(stream: &mut VsockStream, path: &str) -> Result<(), FrameError> {
    let path = Path::new(path);
    let mut builder = tar::Builder::new(Sender { stream, buffer: Vec::with_capacity(PIECE) });
    builder.follow_symlinks(false);
    // Whoever takes them believes no file that is larger than what comes of it.
    builder.sparse(false);
    let name = path.file_name().unwrap_or(std::ffi::OsStr::new("root")).to_owned();
    let packed = path.symlink_metadata().and_then(|metadata| {
        if metadata.is_dir() { builder.append_dir_all(&name, path) } else { builder.append_path_with_name(path, &name) }
    });
    let sent = packed.and_then(|()| builder.finish()).and_then(|()| builder.get_mut().flush());
    drop(builder);
    match sent {
        Ok(()) => send(stream, &FromAgent::Done),
        Err(error) => send(stream, &failed(&path.display().to_string(), &error)),
    }
}

/// A stream of [`ToAgent::Data`], as bytes to read.
struct Pieces<'a> {
    stream: &'a mut VsockStream,
    piece: Vec<u8>,
    at: usize,
    is_done: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            if self.is_done {
                return Ok(0);
            }
            match receive(self.stream).map_err(io::Error::other)? {
                ToAgent::Data(piece) => (self.piece, self.at) = (piece, 0),
                ToAgent::DataEnd => self.is_done = true,
                _ => return Err(io::Error::other("a piece of another stream")),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.at);
        buffer[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Bytes to write, as a stream of [`FromAgent::Data`].
struct Sender<'a> {
    stream: &'a mut VsockStream,
    buffer: Vec<u8>,
}

impl Write for Sender<'_> {
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
        let piece = std::mem::take(&mut self.buffer);
        send(self.stream, &FromAgent::Data(piece)).map_err(io::Error::other)
    }
}
