//! `farfork exec`.

use std::io::IsTerminal;
use std::process::ExitCode;

use agent::protocol::{Exec, Exit, FromAgent, PIECE, ToAgent};
use clap::Args;
use rustix::termios::{OptionalActions, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Context;
use super::error::CliError;
use super::fork::id;
use super::guest::{self, Guest, GuestError, Hears};

/// Run a program in a machine
///
/// Its output comes as it is written, and its exit code is this command's: 128 and the number of the signal if one ended it,
/// 126 and 127 if it cannot be run or is not there, 125 if something of farfork failed. Interrupting the command interrupts
/// the program; a command that is killed leaves the program running.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork exec a3d9 -- uname -a
  farfork exec a3d9 -it -- sh
  echo 6*7 | farfork exec a3d9 -i --env LANG=C -- bc
  farfork exec a3d9 --detach -- sh -c 'sleep 60; echo done > /tmp/done'")]
pub struct Arguments {
    /// The machine: its id, or the last 4 and more digits of it
    #[arg(value_name = "ID", value_parser = id)]
    id: String,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Leave it running by itself; what it prints goes to the machine's console
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    /// Add to its environment; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The directory that it starts in
    #[arg(short = 'w', long, value_name = "PATH")]
    workdir: Option<String>,
    /// Whom it runs as
    #[arg(short, long, value_name = "NAME|UID[:GROUP]")]
    user: Option<String>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// Words for the guest that wait to be said.
const WORDS_AHEAD: usize = 16;

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is no NAME=VALUE"))?;
    if name.is_empty() { Err("a variable without a name".to_owned()) } else { Ok((name.to_owned(), value.to_owned())) }
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let Arguments { id, interactive, tty, detach, env, workdir, user, program } = arguments;
    let mut guest = guest::connect(&id, context).await?;
    // Raw until this is dropped, however that comes about.
    let raw = (tty && interactive).then(Raw::enter).flatten();
    let terminal = tty.then(size);
    let exec = Exec {
        arguments: program,
        environment: env,
        directory: workdir,
        user,
        terminal,
        has_input: interactive,
        is_detached: detach,
    };
    guest.says.say(&ToAgent::Exec(exec)).await?;
    let exit = converse(guest, interactive, tty).await;
    drop(raw);
    Ok(match exit? {
        Some(Exit::Status(status)) => ExitCode::from(u8::try_from(status & 0xFF).unwrap_or(u8::MAX)),
        Some(Exit::Signal(signal)) => ExitCode::from(u8::try_from(128 + (signal & 0x7F)).unwrap_or(u8::MAX)),
        None => ExitCode::SUCCESS,
    })
}

/// Until the program has ended; `None` if it was left to itself.
async fn converse(guest: Guest, interactive: bool, tty: bool) -> Result<Option<Exit>, CliError> {
    let Guest { hears, mut says } = guest;
    // By a task of its own: who waits for the guest to take its input must go on hearing its output.
    let (speaker, mut words) = mpsc::channel::<ToAgent>(WORDS_AHEAD);
    let speaking = tokio::spawn(async move {
        while let Some(word) = words.recv().await {
            // The end of the conversation is heard.
            if says.say(&word).await.is_err() {
                return;
            }
        }
    });
    if interactive {
        tokio::spawn(pass_input(speaker.clone()));
    }
    let outcome = hear_out(hears, &speaker, tty).await;
    speaking.abort();
    outcome
}

/// Standard input, to its end.
async fn pass_input(speaker: mpsc::Sender<ToAgent>) {
    let mut stdin = tokio::io::stdin();
    let mut typed = vec![0; PIECE];
    loop {
        let word = match stdin.read(&mut typed).await {
            Ok(0) | Err(_) => ToAgent::StdinEnd,
            Ok(count) => ToAgent::Stdin(typed[..count].to_vec()),
        };
        let is_last = word == ToAgent::StdinEnd;
        if speaker.send(word).await.is_err() || is_last {
            return;
        }
    }
}

/// Signals that do not fit are as good as those before them.
fn pass_signal(speaker: &mpsc::Sender<ToAgent>, kind: SignalKind) {
    speaker.try_send(ToAgent::Signal(kind.as_raw_value())).unwrap_or_default();
}

async fn hear_out(hears: Hears, speaker: &mpsc::Sender<ToAgent>, tty: bool) -> Result<Option<Exit>, CliError> {
    let stream = |kind: SignalKind| signal(kind).map_err(CliError::Runtime);
    let (mut interrupts, mut ends) = (stream(SignalKind::interrupt())?, stream(SignalKind::terminate())?);
    let (mut hangups, mut resizes) = (stream(SignalKind::hangup())?, stream(SignalKind::window_change())?);
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    // What has been heard in part must not be dropped with a turn of the loop.
    let mut next = Box::pin(hear(hears));
    loop {
        tokio::select! {
            (said, hears) = &mut next => {
                match said? {
                    FromAgent::Stdout(bytes) => write(&mut stdout, &bytes).await?,
                    FromAgent::Stderr(bytes) => write(&mut stderr, &bytes).await?,
                    FromAgent::Exited(exit) => return Ok(Some(exit)),
                    FromAgent::Started { .. } => return Ok(None),
                    _ => return Err(GuestError::Nonsense.into()),
                }
                next = Box::pin(hear(hears));
            }
            _ = interrupts.recv() => pass_signal(speaker, SignalKind::interrupt()),
            _ = ends.recv() => pass_signal(speaker, SignalKind::terminate()),
            _ = hangups.recv() => pass_signal(speaker, SignalKind::hangup()),
            _ = resizes.recv(), if tty => {
                let (rows, columns) = size();
                speaker.try_send(ToAgent::Resize { rows, columns }).unwrap_or_default();
            }
        }
    }
}

async fn hear(mut hears: Hears) -> (Result<FromAgent, GuestError>, Hears) {
    (hears.hear().await, hears)
}

async fn write(to: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) -> Result<(), CliError> {
    let written = match to.write_all(bytes).await {
        Ok(()) => to.flush().await,
        error => error,
    };
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::BrokenPipe => CliError::Closed,
        _ => CliError::Print(error),
    })
}

/// Rows and columns of this terminal.
fn size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
    size.map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// This terminal, every key of which goes to the guest.
struct Raw(Termios);

impl Raw {
    /// `None` if standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = rustix::termios::tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0).unwrap_or_default();
    }
}
