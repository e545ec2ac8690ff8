//! How a node gets its place among others.

use std::io;

use super::error::CliError;
use crate::api::App;
use crate::node::{DataDirectory, Network, NetworkSettings, NodeError};

/// A node's place among others, if it has one.
pub(super) struct Joined {
    /// Whom it trusts and how it asks them.
    pub(super) network: Option<Network>,
    /// Lets others in. To be called within the node's runtime.
    pub(super) serve: Box<dyn FnOnce(App) -> io::Result<()>>,
}

/// Opens what knows other nodes. Nobody is let in before [`Joined::serve`].
#[cfg(feature = "testing")]
pub(super) fn open(is_fake: bool, settings: &NetworkSettings, data: &DataDirectory) -> Result<Joined, CliError> {
    if !is_fake {
        return alone(settings);
    }
    let (network, listener) = crate::node::fake_network::open(settings, data)?;
    let serve = Box::new(move |app: App| {
        let Some(listener) = listener else { return Ok(()) };
        listener.serve(move |peer, bytes| {
            let app = app.clone();
            async move { app.order(peer, bytes).await }
        })
    });
    Ok(Joined { network: Some(network), serve })
}

/// Opens what knows other nodes. Nobody is let in before [`Joined::serve`].
#[cfg(not(feature = "testing"))]
pub(super) fn open(_is_fake: bool, settings: &NetworkSettings, _data: &DataDirectory) -> Result<Joined, CliError> {
    alone(settings)
}

fn alone(settings: &NetworkSettings) -> Result<Joined, CliError> {
    if settings.listen.is_some() {
        return Err(NodeError::NoNetwork.into());
    }
    Ok(Joined { network: None, serve: Box::new(|_| Ok(())) })
}
