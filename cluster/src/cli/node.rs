//! `farfork node`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::error::CliError;
use super::paths;
use crate::api::{Access, App, Limits, Socket, serve};
use crate::node::engine::EngineError;
use crate::node::{DataDirectory, Engine, Service, kvm};

/// Run a node: what machines live in, and what all other verbs ask
///
/// It logs to stderr; the line `ready` says that it serves. SIGTERM and SIGINT stop it: requests in flight end, then every
/// machine. A second signal ends it at once. FARFORK_LOG sets what is logged, for example `debug`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork node
  farfork node --socket /tmp/ff.sock --data /tmp/ff-data --log json
  farfork node --allow-uid 1000")]
pub struct Arguments {
    /// The directory that is this node's alone [default: $XDG_STATE_HOME/farfork; of root: /var/lib/farfork]
    #[arg(long, env = "FARFORK_DATA", value_name = "PATH")]
    data: Option<PathBuf>,
    /// Also serve this user; the socket's mode has to let it in as well
    #[arg(long, value_name = "UID")]
    allow_uid: Vec<u32>,
    /// How to log
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
    /// Run without KVM, on an engine that only pretends
    #[cfg(feature = "testing")]
    #[arg(long, hide = true, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "")]
    fake_engine: Option<crate::node::fake::FakeOptions>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Log {
    /// For people
    Text,
    /// For programs, an object a line
    Json,
}

pub(crate) fn run(arguments: &Arguments, socket: Option<PathBuf>) -> Result<ExitCode, CliError> {
    start_log(arguments.log);
    // Whatever is made here is nobody else's to read.
    rustix::process::umask(Mode::from(0o077));
    raise_descriptor_limit();
    let socket = socket.map_or_else(paths::socket, Ok)?;
    let data = arguments.data.clone().map_or_else(paths::data, Ok)?;
    let data = DataDirectory::open(&data)?;
    let socket = Socket::bind(&socket)?;
    let service = Service::start(open_engine(arguments, &data)?);
    let app = App::new(Arc::clone(&service), data.node(), Limits::default());
    let access = Access::of_this_process(arguments.allow_uid.iter().copied());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(CliError::Runtime)?;
    let served = runtime.block_on(async {
        let stop = Stop::listen()?;
        tracing::info!(socket = %socket.path().display(), data = %data.path().display(), node = %data.node(), "ready");
        serve(socket, service, app, access, stop.first()).await
    });
    // A call that hangs must not keep the process.
    runtime.shutdown_background();
    served.map_err(CliError::Runtime)?;
    tracing::info!("stopped");
    Ok(types::ExitCode::Ok.into())
}

#[cfg(feature = "testing")]
fn open_engine(arguments: &Arguments, data: &DataDirectory) -> Result<Arc<dyn Engine>, EngineError> {
    match &arguments.fake_engine {
        Some(options) => Ok(Arc::new(crate::node::fake::FakeEngine::new(options.clone()))),
        None => kvm::open(data),
    }
}

#[cfg(not(feature = "testing"))]
fn open_engine(_arguments: &Arguments, data: &DataDirectory) -> Result<Arc<dyn Engine>, EngineError> {
    kvm::open(data)
}

fn start_log(log: Log) {
    let filter = EnvFilter::try_from_env("FARFORK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log {
        Log::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        Log::Json => builder.json().init(),
    }
}

/// Machines cost descriptors; what the administrator allows is taken.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of descriptors stays");
    }
}

/// The signals that stop a node.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the first signal. From then on another one ends the process at once.
    async fn first(mut self) {
        let number = self.next().await;
        tracing::info!(signal = number, "stopping");
        tokio::spawn(async move {
            let number = self.next().await;
            tracing::warn!(signal = number, "ended at once");
            std::process::exit(128 + number);
        });
    }

    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        }
    }
}
