//! A relay for UDP that impairs what it carries, for hosts without a network that can be made bad.
//!
//! ```text
//!  client ──▶ ┌──────────┐  fate of datagram n: block, loss    ┌────────┐ ──▶ flow's own ──▶ server
//!  client ──▶ │ listen   │ ──▶ rate, with its queue ──────────▶│ waits  │     socket         (upstream)
//!  client ◀── │ (one)    │     delay, jitter, held back,       │ by due │ ◀── (one a
//!             └──────────┘     duplicate, one bit flipped      │ time   │     client)
//!                              ◀── the same the other way ──   └────────┘
//! ```
//!
//! Each client's address is a *flow* and has a socket of its own towards the server, so that the server tells clients apart.
//! Chance is replayable: what it does to the n-th datagram of a flow in one direction depends on the seed, the flow's number
//! in the order in which flows appear, the direction and n, on nothing else (see [`Decider`]). What is not chance is the time at
//! which datagrams come, and with it what a full queue drops.
//!
//! QUIC runs through it; explicit congestion marks are carried. It works where it was started: within
//! [`Host::run_in`](crate::network::Host::run_in) that is the host's network namespace, for good.

mod bucket;
mod carrier;
mod counters;
mod decider;
mod flows;
mod impairment;
mod socket;
mod waiting;

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use thiserror::Error;

use carrier::{Carrier, Shared, lock};
pub use counters::{Counters, Tally};
pub use decider::{Decider, Fate};
pub use impairment::{Direction, Impairment, Probability, ProbabilityError, Rate};
use socket::Socket;

/// The most clients that a relay carries for at a time; another takes the place of the one that has been quiet for longest.
pub const FLOWS_MAX: usize = flows::FLOWS_MAX;

/// What a relay stands between, and what it does.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Where clients send to. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The server.
    pub upstream: SocketAddr,
    /// What all chance is drawn from.
    pub seed: u64,
    /// What is done to what clients send.
    pub to_upstream: Impairment,
    /// What is done to what the server sends.
    pub to_client: Impairment,
}

impl Config {
    /// A relay that only carries, on a free port of `upstream`'s kind of loopback.
    #[must_use]
    pub fn to(upstream: SocketAddr) -> Self {
        let loopback: std::net::IpAddr = match upstream {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        let (to_upstream, to_client) = (Impairment::default(), Impairment::default());
        Self { listen: (loopback, 0).into(), upstream, seed: 0, to_upstream, to_client }
    }
}

/// Why there is no relay.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum RelayError {
    #[error("the relay cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the relay's thread could not be started")]
    Start { source: io::Error },
}

impl RelayError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Listen { .. } => "listen on an address of this host that no other program has, or on port 0",
            Self::Start { .. } => "raise the limits on open files and threads (ulimit -n, ulimit -u)",
        }
    }
}

/// A relay that runs. It ends when it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay, in a thread of its own.
    ///
    /// # Errors
    /// [`RelayError`] if it cannot listen, or lacks files or threads.
    pub fn start(config: Config) -> Result<Self, RelayError> {
        let listen = |source| RelayError::Listen { address: config.listen, source };
        let start = |source| RelayError::Start { source };
        let listener = Socket::bind(config.listen).map_err(listen)?;
        let address = listener.address().map_err(listen)?;
        let Config { to_upstream, to_client, .. } = config;
        let shared = Arc::new(Mutex::new(Shared { to_upstream, to_client, counters: Counters::default() }));
        let carrier = Carrier::new(listener, config.upstream, config.seed, Arc::clone(&shared)).map_err(start)?;
        let stop = carrier.stop_handle();
        let thread = thread::Builder::new().name("relay".into()).spawn(move || carrier.run()).map_err(start)?;
        Ok(Self { address, shared, stop, thread: Some(thread) })
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does this from now on to what goes in `direction`. What is on its way already arrives as it would have.
    pub fn set(&self, direction: Direction, impairment: Impairment) {
        let mut shared = lock(&self.shared);
        match direction {
            Direction::ToUpstream => shared.to_upstream = impairment,
            Direction::ToClient => shared.to_client = impairment,
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        lock(&self.shared).counters
    }

    /// Stops it, and says what it has done. What waits in it is dropped.
    ///
    /// # Panics
    /// If the relay's thread has.
    #[must_use]
    pub fn stop(mut self) -> Counters {
        if let Err(panic) = self.end() {
            std::panic::resume_unwind(panic);
        }
        self.counters()
    }

    fn end(&mut self) -> thread::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).expect("an event counter at zero takes a one");
        thread.join()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // A panic of the thread has been printed; to panic here would hide the one that may be under way.
        let _ = self.end();
    }
}
