//! The first process of a guest: prepares it, listens, reaps, and stands between a fork and the code of users.
//!
//! ```text
//! boot ──▶ Running ── Gate ──▶ Gated ── (frozen; forked) ── Identity ──▶ Ready ── Go ──▶ Running
//!             └───────────────── Identity (a branch of what runs) ─────────────────────────▲
//! ```
//!
//! One thread for each connection. A connection that is lost ends no program: after a branch, every connection is.

mod boot;
mod exec;
mod files;
mod gate;
mod identity;
mod reaper;
mod session;
mod users;
mod warm;

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::protocol::{PORT, Phase};
use reaper::Reaper;
use warm::Warm;

/// Room for a session: buffers are on the heap.
const STACK_SIZE: usize = 256 << 10;

/// What all sessions share.
struct Guest {
    phase: Mutex<Phase>,
    reaper: Arc<Reaper>,
    /// The warm main process, if there is one. Locked for as long as a request takes.
    warm: Mutex<Option<Warm>>,
}

impl Guest {
    fn phase(&self) -> Phase {
        *self.lock_phase()
    }

    fn lock_phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    if let Err(error) = boot::prepare() {
        say(&format!("cannot start: {error}"));
        return ExitCode::FAILURE;
    }
    let listener = match VsockListener::bind_with_cid_port(VMADDR_CID_ANY, PORT) {
        Ok(listener) => listener,
        Err(error) => {
            say(&format!("cannot listen on vsock port {PORT}: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let reaper = Reaper::start();
    let guest = Arc::new(Guest { phase: Mutex::new(Phase::Running), reaper, warm: Mutex::default() });
    say("ready");
    loop {
        let connection = listener.accept();
        match connection {
            // Programs of the guest itself, by the kernel's loopback, are not obeyed: this is root.
            Ok((_, address)) if address.cid() != VMADDR_CID_HOST => say("somebody in the guest asks, and is turned away"),
            Ok((stream, _)) => {
                let guest = Arc::clone(&guest);
                let life = move || session::serve(&guest, stream);
                if let Err(error) = std::thread::Builder::new().stack_size(STACK_SIZE).spawn(life) {
                    say(&format!("no thread for a session: {error}"));
                }
            }
            // The connection is gone already, or a child has just been born: the next one is waited for.
            Err(error) => say(&format!("accepting a connection: {error}")),
        }
    }
}

/// A line on the guest's console.
fn say(text: &str) {
    // Where there is no console there is nobody to be told.
    writeln!(std::io::stderr(), "farfork-agent: {text}").unwrap_or_default();
}
