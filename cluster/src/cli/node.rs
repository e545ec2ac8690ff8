//! `farfork node`.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::error::CliError;
use super::network::{self, Parts};
use super::{nodes, paths, size};
use crate::api::{Access, App, Https, Limits, Socket, serve};
use crate::node::audit::Audit;
use crate::node::guest::network::{GuestNetwork, GuestNetworkError};
use crate::node::{DataDirectory, NetworkSettings, NodeAddress, Service};

/// Run a node: what machines live in, and what all other verbs ask
///
/// It logs to stderr; the line `ready` says that it serves. SIGTERM and SIGINT stop it: requests in flight end, then every
/// machine. A second signal ends it at once. FARFORK_LOG sets what is logged, for example `debug`.
///
/// With --listen it also takes part in remote forks: other nodes that it trusts (`farfork trust`) may read its images and fork
/// here. Without it nothing of it can be reached from outside of this host.
///
/// Of a cluster (`farfork cluster`), the verbs below look at its nodes and change what becomes of them.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  farfork node
  farfork node --socket /tmp/ff.sock --data /tmp/ff-data --log json
  farfork node --allow-uid 1000
  farfork node --guest-network 10.90.0.0/16                        # machines may have a network
  farfork node --listen 192.0.2.7:7117                             # others may fork from and to this node
  farfork node --listen 0.0.0.0:7117 --advertise node-7.example:7117"
)]
pub struct Arguments {
    #[command(subcommand)]
    pub(super) verb: Option<nodes::Verb>,
    /// The directory that is this node's alone [default: $XDG_STATE_HOME/farfork; of root: /var/lib/farfork]
    #[arg(long, env = "FARFORK_DATA", value_name = "PATH")]
    data: Option<PathBuf>,
    /// Also serve this user; the socket's mode has to let it in as well
    #[arg(long, value_name = "UID")]
    allow_uid: Vec<u32>,
    /// Also listen for other nodes, here (UDP)
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Remote forks")]
    listen: Option<SocketAddr>,
    /// How other nodes reach this one [default: where it listens]
    #[arg(long, value_name = "HOST:PORT", requires = "listen", help_heading = "Remote forks")]
    advertise: Option<NodeAddress>,
    /// How long a child may wait for memory that another node has, before it is ended with PAGE_SOURCE_LOST
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = size::duration, help_heading = "Remote forks")]
    page_deadline: Duration,
    /// The most memory for images that other nodes hold [default: what the host has]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Remote forks")]
    host_image_memory: Option<u64>,
    /// IPv4 addresses for guests that are forked with --network; each machine takes four. Takes CAP_NET_ADMIN
    #[arg(long, value_name = "RANGE", value_parser = guest_network)]
    guest_network: Option<GuestNetwork>,
    /// What placement may ask for, of a node of a cluster: KEY=VALUE; `zone` says what is near to what
    #[arg(long, value_name = "KEY=VALUE", value_parser = network::label, help_heading = "Cluster")]
    pub(super) label: Vec<(String, String)>,
    /// The most memory that machines may use, as the cluster places them [default: nine tenths of the host's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Cluster")]
    machine_memory: Option<u64>,
    /// Where a voter finds the passphrase of its cluster's authority [default: ~/.config/farfork/ca-passphrase; of root: /etc/farfork/ca-passphrase]
    #[arg(long, env = "FARFORK_CA_PASSPHRASE_FILE", value_name = "PATH", help_heading = "Cluster")]
    pub(super) ca_passphrase_file: Option<PathBuf>,
    /// Answer users of the cluster there, over HTTPS (TCP): see `farfork user`
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = "Cluster")]
    https: Option<SocketAddr>,
    /// A certificate to show there instead of the node's own, which only farfork's clients know how to check (PEM, whole chain)
    #[arg(long, value_name = "PATH", requires_all = ["https", "https_key"], help_heading = "Cluster")]
    https_certificate: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "PATH", requires = "https_certificate", help_heading = "Cluster")]
    https_key: Option<PathBuf>,
    /// Fetch only what children touch: images never settle
    #[arg(long, hide = true)]
    no_stream: bool,
    /// Do not fetch ahead what children touched first elsewhere
    #[arg(long, hide = true)]
    no_replay: bool,
    /// Demands and what is read ahead on one connection
    #[arg(long, hide = true)]
    one_connection: bool,
    /// Leave the session of `farfork up`, and begin once that has written down who this is
    #[arg(long, hide = true)]
    detached: bool,
    /// How to log
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
    /// Run without KVM, on an engine that only pretends
    #[cfg(feature = "testing")]
    #[arg(long, hide = true, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "")]
    pub(super) fake_engine: Option<crate::node::fake::FakeOptions>,
}

fn guest_network(text: &str) -> Result<GuestNetwork, String> {
    text.parse().map_err(|error: GuestNetworkError| format!("{error}: {}", error.remedy()))
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Log {
    /// For people
    Text,
    /// For programs, an object a line
    Json,
}

pub(crate) fn run(arguments: &Arguments, socket: Option<PathBuf>) -> Result<ExitCode, CliError> {
    if arguments.detached && !detach().map_err(CliError::Runtime)? {
        return Ok(types::ExitCode::Ok.into());
    }
    start_log(arguments.log);
    // Whatever is made here is nobody else's to read.
    rustix::process::umask(Mode::from(0o077));
    raise_descriptor_limit();
    #[cfg(any(feature = "testing", feature = "bench"))]
    take_guards_out();
    let socket = socket.map_or_else(paths::socket, Ok)?;
    let data = arguments.data.clone().map_or_else(paths::data, Ok)?;
    let data = DataDirectory::open(&data)?;
    let socket = Socket::bind(&socket)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(CliError::Runtime)?;
    let data = Arc::new(data);
    let Parts { engine, network, serve: let_others_in, cluster } = {
        let _within = runtime.enter();
        network::open(arguments, &data)?
    };
    let listening = network.as_ref().and_then(|network| network.listening);
    let service = Service::start(engine, network);
    let app = App::new(Arc::clone(&service), data.node(), Limits::default());
    app.write_down(Audit::open(data.path())?);
    if arguments.https.is_some() && cluster.is_none() {
        return Err(CliError::Usage {
            message: "only a node of a cluster answers over HTTPS: users are its cluster's".to_owned(),
            remedy: "begin a cluster first: farfork cluster init".to_owned(),
        });
    }
    let access = Access::of_this_process(arguments.allow_uid.iter().copied());
    let served = runtime.block_on(async {
        let stop = Stop::listen().map_err(CliError::Runtime)?;
        #[cfg(feature = "testing")]
        testing::listen().map_err(CliError::Runtime)?;
        let others = let_others_in(app.clone()).map_err(CliError::Runtime)?;
        let mut https = None;
        if let Some(cluster) = cluster {
            https = arguments.https.map(|address| arguments.https(address, cluster.identity())).transpose()?;
            cluster.join(&data, &app, network::capacity(arguments.machine_memory)).await?;
        }
        if let Some(https) = &https {
            let address = https.address().map_err(CliError::Runtime)?;
            tracing::info!(%address, "answering users over HTTPS");
            app.answers_users_at(address);
        }
        if let Some(listening) = listening {
            tracing::info!(%listening, "listening for other nodes");
        }
        tracing::info!(socket = %socket.path().display(), data = %data.path().display(), node = %data.node(), "ready");
        let served = serve(socket, https, service, app, access, stop.first()).await;
        others.stop().await;
        served.map_err(CliError::Runtime)
    });
    // A call that hangs must not keep the process.
    runtime.shutdown_background();
    served?;
    tracing::info!("stopped");
    Ok(types::ExitCode::Ok.into())
}

impl Arguments {
    fn https(&self, address: SocketAddr, identity: &pages::Identity) -> Result<Https, CliError> {
        let shown = match (&self.https_certificate, &self.https_key) {
            (Some(certificate), Some(key)) => Some(super::contexts::shown(certificate, key)?),
            _ => None,
        };
        let tls = pages::https::server(identity, shown.as_ref()).map_err(|error| CliError::Usage {
            message: error.to_string(),
            remedy: "give PEM files of a certificate and its own key".to_owned(),
        })?;
        Https::bind(address, tls).map_err(|error| CliError::Usage {
            message: format!("{address} cannot be listened on: {error}"),
            remedy: "give another address or port with --https".to_owned(),
        })
    }

    pub(super) fn network_settings(&self) -> NetworkSettings {
        NetworkSettings {
            listen: self.listen,
            advertise: self.advertise.clone(),
            guests: self.guest_network,
            page_deadline: self.page_deadline,
            host_image_bytes: self.host_image_memory,
            streams: !self.no_stream,
            replays: !self.no_replay,
            has_one_connection: self.one_connection,
        }
    }
}

/// Leaves the session of whoever has started this, and waits for a byte of stdin. If none comes, that is gone before it has written
/// down who this is: what nobody knows of must not run.
fn detach() -> io::Result<bool> {
    rustix::process::setsid()?;
    Ok(io::stdin().read(&mut [0])? == 1)
}

fn start_log(log: Log) {
    let filter = EnvFilter::try_from_env("FARFORK_LOG").unwrap_or_else(|_| EnvFilter::new("info,openraft=error"));
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

/// What tests do to a node.
#[cfg(feature = "testing")]
mod testing {
    use tokio::signal::unix::{SignalKind, signal};

    /// SIGUSR1 has the pager's thread panic, SIGUSR2 a task of each of its fetches.
    pub(super) fn listen() -> std::io::Result<()> {
        for (kind, of_task) in [(SignalKind::user_defined1(), false), (SignalKind::user_defined2(), true)] {
            let mut panics = signal(kind)?;
            tokio::spawn(async move {
                while panics.recv().await.is_some() {
                    crate::node::pager::testing::panic(of_task);
                }
            });
        }
        Ok(())
    }
}

/// `FARFORK_TEST_WITHOUT` names guards to take out, with commas: for the tests that see what happens then, and for measuring what
/// they cost.
#[cfg(any(feature = "testing", feature = "bench"))]
fn take_guards_out() {
    use vm::harness::guards::{Guard, take_out};
    let without = std::env::var("FARFORK_TEST_WITHOUT").unwrap_or_default();
    for guard in without.split(',').filter(|guard| !guard.is_empty()) {
        take_out(match guard {
            "verification" => Guard::Verification,
            "presence-on-exists" => Guard::PresenceOnExists,
            "workers-watch" => Guard::WorkersWatch,
            other => panic!("no guard is called {other}"),
        });
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
