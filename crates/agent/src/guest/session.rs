//! One connection: a greeting, then requests and their answers, one after the other.

use std::io;

use vsock::VsockStream;

use super::{Guest, exec, files, gate, identity, say};
use crate::protocol::{Failed, FrameError, FromAgent, Phase, ToAgent, VERSION, receive, send};

/// See the module.
pub(super) fn serve(guest: &Guest, mut stream: VsockStream) {
    match converse(guest, &mut stream) {
        // After a branch every connection ends like this.
        Ok(()) | Err(FrameError::Gone) => {}
        Err(FrameError::Io(error)) if is_gone(&error) => {}
        Err(error) => say(&format!("a session ended: {error}")),
    }
}

fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
}

fn converse(guest: &Guest, stream: &mut VsockStream) -> Result<(), FrameError> {
    let ToAgent::Hello { version } = receive(stream)? else {
        return send(stream, &refused("the first message is Hello"));
    };
    send(stream, &FromAgent::Hello { version: VERSION, phase: guest.phase() })?;
    if version != VERSION {
        return send(stream, &refused(&format!("this agent speaks version {VERSION}, not {version}")));
    }
    loop {
        let request = receive(stream)?;
        serve_one(guest, stream, request)?;
    }
}

fn serve_one(guest: &Guest, stream: &mut VsockStream, request: ToAgent) -> Result<(), FrameError> {
    // What runs code of users waits until the machine knows who it is.
    let is_gated = guest.phase() != Phase::Running;
    let runs_users_code = matches!(
        request,
        ToAgent::Exec(_) | ToAgent::StartMain(_) | ToAgent::Ask { .. } | ToAgent::Put { .. } | ToAgent::Get { .. }
    );
    if is_gated && runs_users_code {
        return send(stream, &refused("the machine waits in its gate: it has not been told who it is"));
    }
    match request {
        ToAgent::Identity(who) => {
            let steps = identity::become_somebody(guest, &who);
            send(stream, &FromAgent::Ready(steps))
        }
        ToAgent::Go => answer(stream, gate::open(guest)),
        ToAgent::Gate(rules) => match gate::close(guest, rules) {
            Ok(found) => send(stream, &FromAgent::Gated { found }),
            Err(error) => send(stream, &failed("closing the gate", &error)),
        },
        ToAgent::Exec(program) => exec::run(guest, stream, &program),
        ToAgent::StartMain(program) => answer(stream, exec::start_main(guest, &program)),
        ToAgent::Ask { bytes } => exec::ask(guest, stream, bytes),
        ToAgent::Put { path } => files::put(stream, &path),
        ToAgent::Get { path } => files::get(stream, &path),
        ToAgent::Address(address) => answer(stream, identity::set_address(&address)),
        ToAgent::Shutdown => answer(stream, gate::shut_down()),
        other => send(stream, &refused(&format!("{} is no request", name_of(&other)))),
    }
}

fn name_of(message: &ToAgent) -> &'static str {
    match message {
        ToAgent::Hello { .. } => "a second Hello",
        ToAgent::Stdin(_) | ToAgent::StdinEnd => "input for nothing",
        ToAgent::Resize { .. } | ToAgent::Signal(_) => "a message to nothing",
        _ => "a piece of no stream",
    }
}

/// Done, or why not.
pub(super) fn answer(stream: &mut VsockStream, result: io::Result<()>) -> Result<(), FrameError> {
    send(stream, &result.map_or_else(|error| failed("", &error), |()| FromAgent::Done))
}

pub(super) fn refused(message: &str) -> FromAgent {
    FromAgent::Failed(Failed { message: message.to_owned(), errno: 0 })
}

pub(super) fn failed(what: &str, error: &io::Error) -> FromAgent {
    let message = if what.is_empty() { error.to_string() } else { format!("{what}: {error}") };
    FromAgent::Failed(Failed { message, errno: error.raw_os_error().unwrap_or(0) })
}
