//! What a node is made of: its engine, and its place among others.

use std::io;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use types::NodeId;

use super::error::CliError;
use super::node::Arguments;
use crate::api::App;
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
}

/// Opens all of it, within the node's runtime. No orders are taken before [`Parts::serve`].
#[cfg(feature = "testing")]
pub(super) fn open(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    let Some(options) = &arguments.fake_engine else { return open_real(arguments, data) };
    let engine = Arc::new(crate::node::fake::FakeEngine::new(options.clone()));
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
    Ok(Parts { engine, network: Some(network), serve })
}

/// Opens all of it, within the node's runtime. No orders are taken before [`Parts::serve`].
#[cfg(not(feature = "testing"))]
pub(super) fn open(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    open_real(arguments, data)
}

fn open_real(arguments: &Arguments, data: &DataDirectory) -> Result<Parts, CliError> {
    let settings = arguments.network_settings();
    let credentials = Credentials::open(data)?;
    let (engine, offers) = kvm::open(data, &settings, &credentials)?;
    let (network, server) = Joined::open(&settings, data, &credentials, &offers)?.split();
    let serve = Box::new(move |app: App| Ok(server.take_orders(Verbs(app))));
    Ok(Parts { engine, network: Some(network), serve })
}

/// A node's own verbs, for others.
struct Verbs(App);

impl Serve for Verbs {
    fn order(&self, peer: NodeId, bytes: Vec<u8>) -> BoxFuture<'static, Answer> {
        let app = self.0.clone();
        Box::pin(async move { app.order(peer, bytes).await })
    }
}
