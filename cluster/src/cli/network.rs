//! What a node is made of: its engine, its place among others, and its part in a cluster.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use control::state::Resources;
use futures_util::future::BoxFuture;
use pages::{Client, Identity, Trust};
use types::NodeId;

use super::error::CliError;
use super::node::Arguments;
use super::paths;
use crate::api::{self, App};
use crate::jobs::Jobs;
use crate::member::agent::Agent;
use crate::member::files::{Member, PlaceError};
use crate::member::{Doors, Membership, Settings};
use crate::node::engine::EngineError;
use crate::node::offer::Store;
use crate::node::peers::Answer;
use crate::node::quic::{Credentials, Joined, Listening, Serve};
use crate::node::{DataDirectory, Engine, Network, kvm};

/// The parts of a node.
pub(super) struct Parts {
    /// Runs machines.
    pub(super) engine: Arc<dyn Engine>,
    /// Whom it trusts and how it asks them.
    pub(super) network: Option<Network>,
    /// Takes the orders of others. To be called within the node's runtime.
    pub(super) serve: Box<dyn FnOnce(App) -> io::Result<Listening>>,
    /// Its part in a cluster, if it has one.
    pub(super) cluster: Option<Cluster>,
}

/// What a node needs to take part in its cluster.
pub(super) struct Cluster {
    member: Member,
    doors: Doors,
    identity: Arc<Identity>,
    trust: Trust,
    client: Client,
    offers: Arc<Store>,
    settings: Settings,
}

/// Opens all of it, within the node's runtime. No orders are taken before [`Parts::serve`].
#[cfg(feature = "testing")]
pub(super) fn open(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    let Some(options) = &arguments.fake_engine else { return open_real(arguments, data) };
    let engine = Arc::new(crate::node::fake::FakeEngine::new(options.clone()));
    if Member::open(data)?.is_some() {
        // Only its engine is a fake: what the cluster agrees on, and how, is not.
        return open_with(arguments, data, |credentials| {
            Ok((engine, crate::node::fake_network::no_offers(credentials.trust.clone())))
        });
    }
    let (network, listener) = crate::node::fake_network::open(&arguments.network_settings(), data)?;
    let serve = Box::new(move |app: App| {
        if let Some(listener) = listener {
            listener.serve(move |peer, bytes| {
                let app = app.clone();
                async move { app.order(peer, bytes).await }
            })?;
        }
        Ok(Listening::nowhere())
    });
    Ok(Parts { engine, network: Some(network), serve, cluster: None })
}

/// Opens all of it, within the node's runtime. No orders are taken before [`Parts::serve`].
#[cfg(not(feature = "testing"))]
pub(super) fn open(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    open_real(arguments, data)
}

fn open_real(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    open_with(arguments, data, |credentials| kvm::open(data, &arguments.network_settings(), credentials))
}

fn open_with(
    arguments: &Arguments,
    data: &DataDirectory,
    engine: impl FnOnce(&Credentials) -> Result<(Arc<dyn Engine>, Arc<Store>), EngineError>,
) -> Result<Parts, CliError> {
    let settings = arguments.network_settings();
    let member = Member::open(data)?;
    if member.is_some() && settings.listen.is_none() {
        return Err(CliError::Usage {
            message: format!("{} is of a cluster, and the others cannot reach it", data.path().display()),
            remedy: "start it with --listen ADDRESS:PORT".to_owned(),
        });
    }
    let credentials = Credentials::open(data, member.as_ref().map(|member| &member.root))?;
    let (engine, offers) = engine(&credentials)?;
    let doors = Doors::default();
    let services = member.as_ref().map(|member| doors.services(member.sealed.is_some())).unwrap_or_default();
    let (network, client, server) = Joined::open(&settings, data, &credentials, &offers, services)?.split();
    let serve = Box::new(move |app: App| Ok(server.take_orders(Verbs(app))));
    let Credentials { identity, trust } = credentials;
    let cluster = match member {
        Some(member) => {
            let address = network.advertised()?.first().copied().expect("at least one");
            let passphrase_file = passphrase_file(arguments.ca_passphrase_file.clone())?;
            let settings = Settings { address, labels: arguments.labels(), passphrase_file };
            Some(Cluster { member, doors, identity, trust, client, offers, settings })
        }
        None => None,
    };
    Ok(Parts { engine, network: Some(network), serve, cluster })
}

impl Cluster {
    /// What the node shows.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Takes part, from now on. Within the node's runtime.
    pub(super) async fn join(self, data: &Arc<DataDirectory>, app: &App, capacity: Resources) -> Result<(), CliError> {
        let Self { member, doors, identity, trust, client, offers, settings } = self;
        let membership = Membership::start(data, member, settings, (identity, trust, client), &doors).await?;
        let grants = Arc::clone(&membership);
        offers.grant_by(move |node, tenant, image| grants.may_read(node, tenant, image));
        app.join(Arc::clone(&membership));
        let jobs = Jobs::begin(data.path(), app, &membership)?;
        let tasks = Arc::clone(&jobs.tasks);
        app.runs(jobs);
        Membership::serve(&doors, api::router(app.clone()));
        let profile = app.look(|service| Ok(service.cpu())).await.expect("it looks at nothing");
        tracing::info!(name = %membership.name(), "of a cluster");
        let agent = Agent::begin(membership, app.clone(), profile, capacity, tasks).map_err(PlaceError::from)?;
        tokio::spawn(Arc::clone(&agent).renew(Arc::clone(data)));
        tokio::spawn(Arc::clone(&agent).note_voters(Arc::clone(data)));
        tokio::spawn(agent.run());
        Ok(())
    }
}

/// What machines may use of this host: nine tenths of its memory, and all of its processors.
pub(super) fn capacity(memory_bytes: Option<u64>) -> Resources {
    const MACHINES_MAX: u64 = 10_000;
    let info = rustix::system::sysinfo();
    let all = info.totalram * u64::from(info.mem_unit);
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    Resources { memory_bytes: memory_bytes.unwrap_or(all / 10 * 9), cpu_millis: cpus * 1000, machines: MACHINES_MAX }
}

/// `key=value`, as placement looks at it.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE, for example zone=a")?;
    if key.is_empty() || value.is_empty() || text.len() > 128 {
        return Err("a label has a key and a value, of at most 127 characters together".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

impl Arguments {
    fn labels(&self) -> BTreeMap<String, String> {
        self.label.iter().cloned().collect()
    }
}

/// Where a voter's passphrase is unless it is said.
pub(super) fn passphrase_file(given: Option<PathBuf>) -> Result<PathBuf, CliError> {
    Ok(given.map_or_else(paths::passphrase, Ok)?)
}

/// A node's own verbs, for others.
struct Verbs(App);

impl Serve for Verbs {
    fn order(&self, peer: NodeId, bytes: Vec<u8>) -> BoxFuture<'static, Answer> {
        let app = self.0.clone();
        Box::pin(async move { app.order(peer, bytes).await })
    }
}
