//! The agent of a guest that a [fake engine](super::fake) pretends to run: it speaks the protocol of real ones, and its programs
//! are a handful of words.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent::protocol::{Exit, FRAME_MAX, Failed, FrameError, FromAgent, PIECE, Phase, ToAgent, VERSION, receive, send};
use types::Reason;

/// What a program has its machine end with.
pub(super) type Crash = Box<dyn Fn(Reason) + Send>;

/// Answers until the host is gone.
pub(super) fn serve(mut stream: UnixStream, crash: &Crash) {
    while let Ok(message) = receive::<ToAgent>(&mut stream) {
        if answer(&mut stream, message, crash).is_err() {
            return;
        }
    }
}

fn answer(stream: &mut UnixStream, message: ToAgent, crash: &Crash) -> Result<(), FrameError> {
    match message {
        ToAgent::Hello { .. } => send(stream, &FromAgent::Hello { version: VERSION, phase: Phase::Running }),
        ToAgent::Exec(exec) => {
            let words: Vec<&str> = exec.arguments.iter().map(String::as_str).collect();
            run(stream, &words, crash)
        }
        ToAgent::Ask { bytes } => {
            let mut request = Vec::new();
            while request.len() < bytes as usize {
                let ToAgent::Data(piece) = receive(stream)? else { return Err(FrameError::Gone) };
                request.extend(piece);
            }
            let asked: serde_json::Value = serde_json::from_slice(&request).unwrap_or_default();
            let reply = serde_json::json!({ "ok": true, "value": asked["code"], "stdout": "" }).to_string();
            send(stream, &FromAgent::Reply { bytes: u32::try_from(reply.len()).expect("as short as the request") })?;
            reply.as_bytes().chunks(PIECE).try_for_each(|piece| send(stream, &FromAgent::Data(piece.to_vec())))
        }
        ToAgent::Put { .. } => {
            while matches!(receive(stream)?, ToAgent::Data(_)) {}
            send(stream, &FromAgent::Done)
        }
        ToAgent::Get { path } => {
            let mut archive = tar::Builder::new(Vec::new());
            let name = path.rsplit('/').next().unwrap_or("file");
            let mut header = tar::Header::new_gnu();
            header.set_size(path.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, path.as_bytes()).map_err(FrameError::Io)?;
            let archive = archive.into_inner().map_err(FrameError::Io)?;
            archive.chunks(PIECE).try_for_each(|piece| send(stream, &FromAgent::Data(piece.to_vec())))?;
            send(stream, &FromAgent::Done)
        }
        _ => send(stream, &FromAgent::Done),
    }
}

/// | program | |
/// |---|---|
/// | `echo WORD...` | prints the words |
/// | `sleep MS` | takes so long |
/// | `exit N` | ends with this status |
/// | `flood BYTES` | prints so many |
/// | `binary` | prints what is no text |
/// | `crash REASON` | its machine ends |
fn run(stream: &mut UnixStream, words: &[&str], crash: &Crash) -> Result<(), FrameError> {
    let number = words.get(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let status = match words[0] {
        "true" => 0,
        "false" => 1,
        "exit" => i32::try_from(number).unwrap_or(i32::MAX),
        "echo" => {
            send(stream, &FromAgent::Stdout(format!("{}\n", words[1..].join(" ")).into_bytes()))?;
            0
        }
        "sleep" => {
            std::thread::sleep(Duration::from_millis(number));
            0
        }
        "flood" => {
            let mut left = number;
            while left > 0 {
                let some = left.min(FRAME_MAX as u64 / 2);
                send(stream, &FromAgent::Stdout(vec![b'x'; usize::try_from(some).expect("32 KiB")]))?;
                left -= some;
            }
            0
        }
        "binary" => {
            send(stream, &FromAgent::Stdout(vec![0xFF, 0xFE, b'\n']))?;
            send(stream, &FromAgent::Stderr(b"text\n".to_vec()))?;
            0
        }
        "crash" => {
            let reason = Reason::ALL.into_iter().find(|reason| Some(&reason.code()) == words.get(1));
            crash(reason.unwrap_or(Reason::GuestPanic));
            return Err(FrameError::Gone);
        }
        other => {
            let failed = Failed { message: format!("starting {other}: No such file or directory"), errno: 2 };
            return send(stream, &FromAgent::Failed(failed));
        }
    };
    send(stream, &FromAgent::Exited(Exit::Status(status)))
}
