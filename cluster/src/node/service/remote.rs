//! What other nodes ask of this one, and which nodes may.

use std::collections::BTreeSet;
use std::time::Instant;

use types::{NodeId, Tenant};

use super::{ForkFrom, ForkOrder, Service};
use crate::node::NodeAddress;
use crate::node::error::NodeError;
use crate::node::network::Network;
use crate::node::peers::{Answer, Order, PeerFailure, PeerForkOrder, PeerForkReport, PeerRefusal};
use crate::node::trust::{Certificate, Trusted};

impl Service {
    /// Does what another node sent as bytes, and says how that went.
    #[must_use]
    pub fn order(&self, peer: NodeId, bytes: &[u8]) -> Answer {
        match Order::decode(bytes) {
            Ok(Order::Fork(order)) => match self.fork_for_peer(peer, &order) {
                Ok(report) => Answer::Forked(report),
                Err(error) => Answer::Refused(PeerRefusal::of(&error)),
            },
            Err(error) => {
                tracing::warn!(%peer, %error, "an order that cannot be read");
                Answer::Refused(PeerRefusal::of(&error.into()))
            }
        }
    }

    /// Forks children of an image that another node holds, because that node asked. If it does not wait any more when they
    /// run, they are ended: nobody else knows of them.
    ///
    /// # Errors
    /// [`NodeError`] if nothing was forked.
    pub fn fork_for_peer(&self, peer: NodeId, order: &PeerForkOrder) -> Result<PeerForkReport, NodeError> {
        let began = Instant::now();
        let network = self.network()?;
        if !network.trust.allows(peer, &order.tenant) {
            return Err(NodeError::NotTrusted { node: peer, tenant: order.tenant.clone() });
        }
        tracing::info!(%peer, image = %order.image, tenant = %order.tenant, count = order.count, "asked to fork");
        let report = self.fork(&ForkOrder {
            from: ForkFrom::Remote {
                image: order.image,
                holders: order.holders.iter().copied().map(NodeAddress::from).collect(),
            },
            count: order.count,
            limit_bytes: order.limit_bytes,
            verify: order.verify,
            network: order.network,
            tenant: Some(order.tenant.clone()),
            on: None,
            is_task: false,
        })?;
        if began.elapsed() >= order.deadline {
            let ids: Vec<String> = report.children.iter().map(|child| child.forked.id.to_string()).collect();
            // Those that ended by themselves cannot be ended; the others are.
            let ended = self.kill(&ids, false, None);
            tracing::warn!(%peer, children = ids.len(), is_ended = ended.is_ok(), "nobody waits for these children any more");
            return Err(NodeError::Late { deadline: order.deadline });
        }
        let failures = report.failures.iter().map(|(id, error)| PeerFailure { id: *id, refusal: PeerRefusal::of(error) });
        let node = network.trust.own().node;
        Ok(PeerForkReport { node, failures: failures.collect(), children: report.children })
    }

    /// This node's own certificate.
    ///
    /// # Errors
    /// [`NodeError::NoNetwork`].
    pub fn own_certificate(&self) -> Result<Certificate, NodeError> {
        Ok(self.network()?.trust.own())
    }

    /// Nodes that are trusted.
    ///
    /// # Errors
    /// [`NodeError::NoNetwork`].
    pub fn trusted(&self) -> Result<Vec<Trusted>, NodeError> {
        Ok(self.network()?.trust.list())
    }

    /// Trusts a node with these tenants' images.
    ///
    /// # Errors
    /// [`NodeError`]; everything is as it was.
    pub fn trust(&self, pem: &str, tenants: BTreeSet<Tenant>) -> Result<Trusted, NodeError> {
        Ok(self.network()?.trust.add(pem, tenants)?)
    }

    /// Trusts a node no longer, given by its id or the end of it.
    ///
    /// # Errors
    /// [`NodeError`]; it is still trusted.
    pub fn distrust(&self, given: &str) -> Result<Trusted, NodeError> {
        Ok(self.network()?.trust.remove(given)?)
    }

    /// This node's place among others, if it has one.
    ///
    /// # Errors
    /// [`NodeError::NoNetwork`].
    pub fn network(&self) -> Result<&Network, NodeError> {
        self.network.as_ref().ok_or(NodeError::NoNetwork)
    }
}
