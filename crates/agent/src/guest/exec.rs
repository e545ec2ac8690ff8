//! Programs: run for a session with their streams, left to themselves, or kept warm.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use vsock::VsockStream;

use super::boot::ENVIRONMENT;
use super::reaper::pid_of;
use super::session::{answer, failed, refused};
use super::users::user;
use super::warm::Warm;
use super::{Guest, say};
use crate::protocol::{Exec, FrameError, FromAgent, MAIN_MESSAGE_MAX, PIECE, ToAgent, receive, send};
use crate::sys;

/// What a program's descendants write after its end is waited for so long, and so much of it is passed on.
const LAST_WORDS: Duration = Duration::from_millis(200);
const DRAINED_MAX: usize = 1 << 20;
/// What came for a program and was not taken by it: no more is read from the host until it is less.
const PENDING_MAX: usize = 64 << 10;

/// Runs a program for a session.
pub(super) fn run(guest: &Guest, stream: &mut VsockStream, program: &Exec) -> Result<(), FrameError> {
    match start(guest, program) {
        Ok(Running::Detached(pid)) => send(stream, &FromAgent::Started { pid }),
        Ok(Running::Attached(mut attached)) => {
            let ended = attached.converse(stream);
            let exit = guest.reaper.wait(attached.pid);
            ended.and_then(|()| send(stream, &FromAgent::Exited(exit)))
        }
        Err(error) => {
            let name = program.arguments.first().map_or("nothing", String::as_str);
            send(stream, &failed(&format!("starting {name}"), &error))
        }
    }
}

/// Starts the warm main process.
pub(super) fn start_main(guest: &Guest, program: &Exec) -> io::Result<()> {
    let mut warm = guest.warm.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if warm.is_some() {
        return Err(io::Error::other("there is a main process already"));
    }
    let mut command = command(program)?;
    let console = console()?;
    command.stdout(console.try_clone()?).stderr(console);
    *warm = Some(Warm::start(&guest.reaper, &mut command)?);
    Ok(())
}

/// Passes a request on to the main process, and its answer back.
pub(super) fn ask(guest: &Guest, stream: &mut VsockStream, bytes: u32) -> Result<(), FrameError> {
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    if len > MAIN_MESSAGE_MAX {
        return send(stream, &refused(&format!("a request of {len} bytes, where at most {MAIN_MESSAGE_MAX} are allowed")));
    }
    let mut request = Vec::new();
    while request.len() < len {
        match receive(stream)? {
            ToAgent::Data(piece) => request.extend(piece),
            _ => return send(stream, &refused("a request of the main process is cut short")),
        }
    }
    let mut warm = guest.warm.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let asked = match warm.as_mut() {
        None => Err(io::Error::other("the machine has no warm main process")),
        Some(warm) => warm.ask(&request),
    };
    drop(warm);
    match asked {
        Err(error) => answer(stream, Err(error)),
        Ok(reply) => {
            send(stream, &FromAgent::Reply { bytes: u32::try_from(reply.len()).expect("at most 1 MiB") })?;
            reply.chunks(PIECE).try_for_each(|piece| send(stream, &FromAgent::Data(piece.to_vec())))
        }
    }
}

/// OpenSSL's mask takes away XSAVE, AVX, AVX2, AVX-512 and the vector forms of AES; numpy's list what it would choose among.
const NO_AVX: [(&str, &str); 2] = [
    ("OPENSSL_ia32cap", "~0x1c00000000000000:~0x600dc230020"),
    ("NPY_DISABLE_CPU_FEATURES", "AVX F16C FMA3 AVX2 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"),
];

enum Running {
    Attached(Attached),
    Detached(i32),
}

/// A program and its streams.
struct Attached {
    pid: i32,
    end: OwnedFd,
    /// Its standard input, or its terminal.
    input: Option<File>,
    /// What came for it that it has not taken yet.
    pending: VecDeque<u8>,
    /// No more is to come.
    is_input_over: bool,
    /// Standard output and standard error; a terminal is both.
    outputs: [Option<File>; 2],
    terminal: Option<OwnedFd>,
}

fn start(guest: &Guest, program: &Exec) -> io::Result<Running> {
    let mut command = command(program)?;
    if program.is_detached {
        let console = console()?;
        command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console).process_group(0);
        let (child, _end) = guest.reaper.spawn(&mut command)?;
        guest.reaper.forget(pid_of(&child));
        return Ok(Running::Detached(pid_of(&child)));
    }
    if let Some((rows, columns)) = program.terminal {
        let (ours, its) = terminal(rows, columns)?;
        command.stdin(its.try_clone()?).stdout(its.try_clone()?).stderr(its);
        sys::with_terminal(&mut command);
        let (child, end) = guest.reaper.spawn(&mut command)?;
        let ours = File::from(ours);
        let (input, terminal) = (Some(ours.try_clone()?), Some(OwnedFd::from(ours.try_clone()?)));
        return attached(&child, end, input, [Some(ours), None], terminal);
    }
    command.stdin(if program.has_input { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let (mut child, end) = guest.reaper.spawn(&mut command)?;
    let input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let output = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let errors = child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    attached(&child, end, input, [output, errors], None)
}

fn attached(
    child: &Child,
    end: OwnedFd,
    input: Option<File>,
    outputs: [Option<File>; 2],
    terminal: Option<OwnedFd>,
) -> io::Result<Running> {
    for fd in input.iter().chain(outputs.iter().flatten()) {
        // One thread serves all of them: it waits for them together, and for none alone.
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let pending = VecDeque::new();
    Ok(Running::Attached(Attached { pid: pid_of(child), end, input, pending, is_input_over: false, outputs, terminal }))
}

/// The program with its environment, directory and user.
fn command(program: &Exec) -> io::Result<Command> {
    let (name, arguments) = program.arguments.split_first().ok_or_else(|| io::Error::other("no program was named"))?;
    let mut command = Command::new(name);
    command.args(arguments).env_clear().envs(ENVIRONMENT).current_dir("/");
    if let Some(tunables) = std::env::var_os("GLIBC_TUNABLES") {
        // The kernel saves no AVX state (docs/guests.md): nor do the libraries use it that choose for themselves.
        command.env("GLIBC_TUNABLES", tunables).envs(NO_AVX);
    }
    // What the image itself wants every program to have.
    for (name, value) in image_environment() {
        command.env(name, value);
    }
    if let Some(wanted) = &program.user {
        let user = user(wanted)?;
        command.uid(user.uid).gid(user.gid);
        if let Some(home) = user.home.filter(|home| Path::new(home).is_dir()) {
            command.env("HOME", home);
        }
    }
    if program.terminal.is_some() {
        command.env("TERM", "xterm");
    }
    command.envs(program.environment.iter().map(|(name, value)| (name, value)));
    if let Some(directory) = &program.directory {
        command.current_dir(directory);
    }
    Ok(command)
}

/// `/etc/farfork/environment`: a `NAME=value` on each line.
fn image_environment() -> Vec<(String, String)> {
    let text = std::fs::read_to_string("/etc/farfork/environment").unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn console() -> io::Result<File> {
    File::options().write(true).open("/dev/console")
}

/// A new terminal: our end and its.
fn terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let name = rustix::pty::ptsname(&ours, Vec::new())?;
    let its = rustix::fs::open(&name, rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY, rustix::fs::Mode::empty())?;
    resize(&ours, rows, columns)?;
    Ok((ours, its))
}

fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// Whether a descriptor is to be tried again when it is ready.
fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// What a wait was for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Host,
    End,
    Input,
    Output(usize),
}

impl Attached {
    /// Until the program has ended: its output to the host, the host's input to it. A host that is lost leaves the program
    /// running; its output is then read and forgotten, so that it does not wait for anybody.
    fn converse(&mut self, stream: &mut VsockStream) -> Result<(), FrameError> {
        let mut lost: Option<FrameError> = None;
        let mut ended = false;
        // After the end: what is in the pipes, but not all that a descendant may go on to write.
        let mut left_to_drain = DRAINED_MAX;
        loop {
            let ready = self.wait(stream.as_fd(), lost.is_none(), ended);
            ended |= ready.contains(&Source::End);
            for source in &ready {
                let said = match source {
                    Source::Output(number) => self.pass_output(*number, stream, lost.is_none()).map(|count| {
                        if ended {
                            left_to_drain = left_to_drain.saturating_sub(count);
                        }
                    }),
                    Source::Input => {
                        self.pass_input();
                        Ok(())
                    }
                    Source::Host if lost.is_none() => receive(stream).map(|message| self.take(message)),
                    _ => Ok(()),
                };
                if let Err(error) = said {
                    self.lose_host(stream);
                    lost.get_or_insert(error);
                }
            }
            let is_silent = self.outputs.iter().all(Option::is_none) || ready.is_empty();
            if ended && (is_silent || left_to_drain == 0) {
                return lost.map_or(Ok(()), Err);
            }
        }
    }

    /// Waits for something to do. Nothing is ready when the last words are over.
    fn wait(&self, stream: std::os::fd::BorrowedFd<'_>, has_host: bool, ended: bool) -> Vec<Source> {
        let mut sources = Vec::with_capacity(4);
        let mut fds = Vec::with_capacity(4);
        if has_host && self.pending.len() < PENDING_MAX {
            sources.push(Source::Host);
            fds.push(PollFd::from_borrowed_fd(stream, PollFlags::IN));
        }
        if let Some(input) = self.input.as_ref().filter(|_| !self.pending.is_empty() && !ended) {
            sources.push(Source::Input);
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        if !ended {
            sources.push(Source::End);
            fds.push(PollFd::new(&self.end, PollFlags::IN));
        }
        for (number, output) in self.outputs.iter().enumerate() {
            if let Some(output) = output {
                sources.push(Source::Output(number));
                fds.push(PollFd::new(output, PollFlags::IN));
            }
        }
        let patience = Timespec { tv_sec: 0, tv_nsec: LAST_WORDS.subsec_nanos().into() };
        if let Err(error) = poll(&mut fds, ended.then_some(&patience)).or_else(|error| match error {
            rustix::io::Errno::INTR => Ok(0),
            error => Err(error),
        }) {
            say(&format!("waiting for a program: {error}"));
        }
        sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty()).map(|(source, _)| source).collect()
    }

    /// Says how much that was.
    fn pass_output(&mut self, number: usize, stream: &mut VsockStream, has_host: bool) -> Result<usize, FrameError> {
        let Some(output) = &mut self.outputs[number] else { return Ok(0) };
        let mut buffer = vec![0; PIECE];
        match output.read(&mut buffer) {
            Err(error) if is_later(&error) => Ok(0),
            // EIO: the last program has left the terminal.
            Ok(0) | Err(_) => {
                self.outputs[number] = None;
                Ok(0)
            }
            Ok(count) if has_host => {
                buffer.truncate(count);
                let said = if number == 0 { FromAgent::Stdout(buffer) } else { FromAgent::Stderr(buffer) };
                send(stream, &said).map(|()| count)
            }
            Ok(count) => Ok(count),
        }
    }

    fn pass_input(&mut self) {
        let Some(input) = &mut self.input else { return self.pending.clear() };
        match input.write(self.pending.as_slices().0) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(error) if is_later(&error) => {}
            // A program that does not read its input any more is no failure.
            Err(_) => self.close_input(),
        }
        if self.pending.is_empty() && self.is_input_over {
            self.input = None;
        }
    }

    fn close_input(&mut self) {
        self.pending.clear();
        self.input = None;
    }

    fn take(&mut self, message: ToAgent) {
        match message {
            ToAgent::Stdin(bytes) if self.input.is_some() && !self.is_input_over => self.pending.extend(bytes),
            ToAgent::StdinEnd if self.terminal.is_none() => {
                self.is_input_over = true;
                if self.pending.is_empty() {
                    self.input = None;
                }
            }
            ToAgent::Resize { rows, columns } => {
                if let Some(Err(error)) = self.terminal.as_ref().map(|terminal| resize(terminal, rows, columns)) {
                    say(&format!("resizing a terminal: {error}"));
                }
            }
            ToAgent::Signal(number) => {
                let (group, signal) = (Pid::from_raw(self.pid), Signal::from_named_raw(number));
                if let (Some(group), Some(signal)) = (group, signal) {
                    // ESRCH: it has just ended.
                    kill_process_group(group, signal).unwrap_or_default();
                }
            }
            _ => {}
        }
    }

    /// Nobody is there to type any more, and the stream is given back. A terminal is kept: its program would be ended with it.
    fn lose_host(&mut self, stream: &VsockStream) {
        if self.terminal.is_none() {
            self.close_input();
        }
        // It may be gone already.
        stream.shutdown(Shutdown::Both).unwrap_or_default();
    }
}
