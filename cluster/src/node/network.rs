//! A node's place among others: where it listens, whom it trusts, whom it can ask.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::address::NodeAddress;
use super::error::NodeError;
use super::guest::network::GuestNetwork;
use super::peers::Peers;
use super::trust::TrustStore;

/// How a node takes part, as its command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Where it listens for other nodes (UDP). `None`: it does not; then others cannot read its images.
    pub listen: Option<SocketAddr>,
    /// How others reach it. `None`: where it listens.
    pub advertise: Option<NodeAddress>,
    /// The addresses of guests that are asked to have a network. `None`: none has.
    pub guests: Option<GuestNetwork>,
    /// How long a child waits for a page before it is ended; not zero.
    pub page_deadline: Duration,
    /// The most memory in bytes for images that others hold. `None`: as much as the host has.
    pub host_image_bytes: Option<u64>,
    /// Whether what no child has touched is fetched too, so that images settle.
    pub streams: bool,
    /// Whether what children touched first elsewhere is fetched ahead.
    pub replays: bool,
    /// Whether what is read ahead goes over the connection for demands.
    pub has_one_connection: bool,
}

/// The parts that know other nodes.
pub struct Network {
    /// Where this node listens, with its real port. `None`: it does not.
    pub listening: Option<SocketAddr>,
    /// As in [`NetworkSettings`].
    pub advertise: Option<NodeAddress>,
    /// Whom it trusts.
    pub trust: TrustStore,
    /// The way to ask them.
    pub peers: Arc<dyn Peers>,
}

impl Network {
    /// How others reach this node: at least one address.
    ///
    /// # Errors
    /// [`NodeError::NotListening`], [`NodeError::NotAdvertised`]: they cannot. [`NodeError::Address`]: they could not be told.
    pub fn advertised(&self) -> Result<Vec<SocketAddr>, NodeError> {
        let listening = self.listening.ok_or(NodeError::NotListening)?;
        match &self.advertise {
            Some(address) => Ok(address.resolve()?),
            None if listening.ip().is_unspecified() => Err(NodeError::NotAdvertised { listening }),
            None => Ok(vec![listening]),
        }
    }
}
