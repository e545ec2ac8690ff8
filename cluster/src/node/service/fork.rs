//! Fork: find or make the image, then its children, here or on another node.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use types::{Digest, FullName, MachineId, NodeId, Tenant};
use uuid::Uuid;
use vm::Class;
use vm::class::Devices;

use super::cluster::expected_dirty;
use super::{OnDrop, Outcome, Service, check_count, first_if_none, in_parallel};
use crate::node::address::NodeAddress;
use crate::node::engine::{Ended, EngineError, ErrorKind, ForkOptions, Forked, FreezeFacts, Guest, OpenOrder};
use crate::node::error::NodeError;
use crate::node::guest::guest_error;
use crate::node::guest::identity::{self, Fork};
use crate::node::metrics;
use crate::node::peers::{ForkedChild, HOLDERS_MAX, PeerError, PeerForkOrder, PeerForkReport};
use crate::node::registry::{Image, Machine, MachineState, Origin};

/// How long another node may take to fork. Within it the image's head has to get there, and shells be built.
const ELSEWHERE_DEADLINE: Duration = Duration::from_secs(60);
/// How much longer it may take for each child: a Linux guest becomes somebody, which an emulated kernel takes a second for.
const ELSEWHERE_DEADLINE_EACH: Duration = Duration::from_secs(1);

/// What to fork, and how.
#[derive(Clone, Debug)]
pub struct ForkOrder {
    /// From what.
    pub from: ForkFrom,
    /// How many children.
    pub count: u64,
    /// The most memory of its own in bytes that each may have.
    pub limit_bytes: Option<u64>,
    /// Whether each has to prove its memory and identity.
    pub verify: bool,
    /// Whether each is plugged into the network of guests.
    pub network: bool,
    /// Whose the image is. `None`: of one that is made or opened for this, the default tenant's; of another, whoever's it is.
    pub tenant: Option<Tenant>,
    /// The node that the children are to run on. `None`: this one.
    pub on: Option<NodeAddress>,
    /// Whether they run tasks of a job.
    pub is_task: bool,
}

/// What a fork starts from. Ids are as the client gave them.
#[derive(Clone, Debug)]
pub enum ForkFrom {
    /// A guest of ours is started and frozen first.
    Guest(Guest, Class),
    /// An image in memory.
    Image(String),
    /// The image of this name, which is loaded from the store if it is not in memory.
    Template(FullName),
    /// A running machine, which is frozen first and goes on.
    Machine(String),
    /// An image that other nodes hold: it is opened first, and stays open.
    Remote {
        /// Its name everywhere.
        image: Digest,
        /// Nodes that hold it; 1 to [`HOLDERS_MAX`].
        holders: Vec<NodeAddress>,
    },
}

/// What a fork has done.
#[derive(Clone, Debug)]
pub struct ForkReport {
    /// What the children were forked from.
    pub image: Image,
    /// The node that they run on, if it is another one.
    pub on: Option<OtherNode>,
    /// What it cost the parent, if a machine was frozen.
    pub freeze: Option<FreezeFacts>,
    /// Children that run.
    pub children: Vec<ForkedChild>,
    /// Children that do not.
    pub failures: Vec<(MachineId, NodeError)>,
    /// When it was called.
    pub began: Instant,
}

/// Another node that runs children. They are its machines, not this one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OtherNode {
    /// Who it is.
    pub node: NodeId,
    /// Where it listens.
    pub address: SocketAddr,
}

/// How long another node may take to fork so many.
pub(crate) fn elsewhere_deadline(children: u64) -> Duration {
    ELSEWHERE_DEADLINE + ELSEWHERE_DEADLINE_EACH * u32::try_from(children).unwrap_or(u32::MAX)
}

type Children = Outcome<ForkedChild, MachineId>;

impl Service {
    /// Forks children of a guest, an image or a machine.
    ///
    /// # Errors
    /// [`NodeError`] if nothing was forked; nothing is left behind then but an image that was opened, and, after
    /// [`PeerError::NoAnswer`], the image that the other node may have children of.
    pub fn fork(&self, order: &ForkOrder) -> Result<ForkReport, NodeError> {
        let began = Instant::now();
        check_count(order.count)?;
        if order.limit_bytes == Some(0) {
            return Err(NodeError::Limit);
        }
        if order.on.is_some() && matches!(order.from, ForkFrom::Remote { .. }) {
            return Err(NodeError::RemoteElsewhere);
        }
        if order.network && order.on.is_none() {
            // Before anything is frozen or forked for it.
            self.engine.check_guest_network()?;
        }
        let (image, freeze) = self.origin_of(order)?;
        match self.fork_image(&image, order) {
            Ok((on, (children, failures))) => Ok(ForkReport { image, on, freeze, children, failures, began }),
            Err(error) => {
                // An image that was made for this fork goes if the fork comes to nothing.
                let made_for_it = matches!(order.from, ForkFrom::Guest(..) | ForkFrom::Machine(_));
                if made_for_it && !matches!(error, NodeError::Peer(PeerError::NoAnswer { .. })) {
                    self.forget_image(image.facts.id).unwrap_or_else(|error| tracing::warn!(%error, "an image stays"));
                }
                Err(error)
            }
        }
    }

    fn fork_image(&self, image: &Image, order: &ForkOrder) -> Result<(Option<OtherNode>, Children), NodeError> {
        let (facts, id) = (&image.facts, || image.facts.id.to_string());
        if let Some(asked) = order.tenant.as_ref().filter(|asked| **asked != facts.tenant) {
            return Err(NodeError::OtherTenant { id: id(), owner: facts.tenant.clone(), asked: asked.clone() });
        }
        if order.verify && !facts.verifiable {
            return Err(NodeError::NotVerifiable { id: id() });
        }
        let has_card = matches!(facts.class.devices(), Devices::Linux { network: true, .. });
        if order.network && !has_card {
            return Err(NodeError::NoNetworkCard { id: id() });
        }
        match &order.on {
            None => Ok((None, self.children(image, order)?)),
            Some(address) => {
                let (on, children) = self.children_elsewhere(address, image, order)?;
                Ok((Some(on), children))
            }
        }
    }

    fn origin_of(&self, order: &ForkOrder) -> Result<(Image, Option<FreezeFacts>), NodeError> {
        let tenant = || order.tenant.clone().unwrap_or_default();
        match &order.from {
            ForkFrom::Guest(guest, class) => {
                let facts = self.engine.prepare(*guest, *class, &tenant())?;
                Ok((self.note_image(facts, Origin::Guest(*guest), None), None))
            }
            ForkFrom::Image(given) => Ok((self.image_of(given, order.tenant.as_ref())?, None)),
            ForkFrom::Template(name) => Ok((self.template_image(name)?, None)),
            ForkFrom::Machine(given) => {
                let id = self.registry.running_machine(given)?;
                let (facts, freeze) = self.engine.freeze(id)?;
                metrics::frozen(&freeze);
                Ok((self.note_image(facts, Origin::Machine(id), None), Some(freeze)))
            }
            ForkFrom::Remote { image, holders } => {
                self.network()?;
                if holders.is_empty() || holders.len() > HOLDERS_MAX {
                    return Err(NodeError::Holders { count: holders.len() });
                }
                let holders: Vec<_> = holders.iter().map(NodeAddress::resolve).collect::<Result<_, _>>()?;
                let open = OpenOrder { image: *image, tenant: tenant(), holders: holders.concat() };
                Ok((self.note_image(self.engine.open(&open)?, Origin::Remote, None), None))
            }
        }
    }

    /// Children on another node; an error if none runs there.
    fn children_elsewhere(
        &self,
        address: &NodeAddress,
        image: &Image,
        order: &ForkOrder,
    ) -> Result<(OtherNode, Children), NodeError> {
        let network = self.network()?;
        let order = PeerForkOrder {
            holders: self.holders(network, image)?,
            image: self.digest_of(image.facts.id)?,
            tenant: image.facts.tenant.clone(),
            count: order.count,
            limit_bytes: order.limit_bytes,
            verify: order.verify,
            network: order.network,
            deadline: elsewhere_deadline(order.count),
        };
        let mut unreachable = None;
        for address in address.resolve()? {
            match network.peers.fork_on(address, &order) {
                Err(error @ PeerError::Unreachable { .. }) => unreachable = Some(error),
                outcome => return of_report(outcome?, address, &order),
            }
        }
        Err(unreachable.expect("a name that was looked up has an address").into())
    }

    /// Where another node can read an image: here, and wherever this node reads it itself.
    fn holders(&self, network: &crate::node::Network, image: &Image) -> Result<Vec<SocketAddr>, NodeError> {
        let mut holders = network.advertised()?;
        let sources = self.residency(image.facts.id).map(|residency| residency.sources).unwrap_or_default();
        holders.extend(sources.iter().filter(|source| source.state.is_asked()).map(|source| source.address));
        holders.truncate(HOLDERS_MAX);
        Ok(holders)
    }

    /// Children that run and those that do not; an error if none does.
    fn children(&self, image: &Image, order: &ForkOrder) -> Result<Children, NodeError> {
        let ids: Vec<MachineId> = (0..order.count).map(|_| MachineId::from_uuid(Uuid::now_v7())).collect();
        self.registry.starting(&ids);
        let _starting = OnDrop(|| self.registry.not_starting(&ids));
        let began = Instant::now();
        // Before: afterwards its image may have been forgotten.
        let claim_bytes = order.limit_bytes.unwrap_or_else(|| expected_dirty(self.image_bytes(image)));
        let outcomes = self.engine.fork(image.facts.id, &ids, ForkOptions { limit_bytes: order.limit_bytes });
        assert_eq!(outcomes.len(), ids.len(), "the engine answers for each id");
        let (mut running, mut failures) = (Vec::new(), Vec::new());
        for (id, outcome) in ids.iter().zip(outcomes) {
            match outcome {
                Ok(forked) => {
                    assert_eq!(forked.id, *id, "the engine answers in the order of the ids");
                    self.note_child(forked, image, order, claim_bytes);
                    running.push(*id);
                }
                Err(error) => failures.push((*id, NodeError::Engine(error))),
            }
        }
        if image.facts.class.devices() != Devices::None {
            running = self.identified(running, began, order.network, &mut failures);
        }
        if order.verify {
            running = self.verified(running, &mut failures);
        }
        tracing::info!(image = %image.facts.id, children = running.len(), failures = failures.len(), "fork");
        let (running, failures) = first_if_none(running, failures)?;
        let machines = running.iter().filter_map(|id| self.registry.machine(&id.to_string()).ok());
        let children = machines.map(|machine| ForkedChild {
            forked: machine.forked,
            verified_pages: machine.verified_pages,
            ready: machine.readiness.as_ref().map(|readiness| readiness.after),
            link: machine.readiness.as_ref().and_then(|readiness| readiness.link),
        });
        Ok((children.collect(), failures))
    }

    fn note_child(&self, forked: Forked, image: &Image, order: &ForkOrder, claim_bytes: u64) {
        metrics::forked(&forked);
        let id = forked.id;
        let early_end = self.registry.started(Machine {
            forked,
            image: image.facts.id,
            tenant: image.facts.tenant.clone(),
            parent: if let Origin::Machine(parent) = image.origin { Some(parent) } else { None },
            created: pages::clock::wall(),
            limit_bytes: order.limit_bytes,
            claim_bytes,
            is_task: order.is_task,
            task: None,
            verified_pages: None,
            readiness: None,
            state: MachineState::Running,
        });
        if let Some(ended) = early_end
            && self.registry.says_ended(id, &ended)
        {
            self.reap_claimed(id, ended);
        }
    }

    /// Tells each child who it is. One that cannot be told is ended: it may be like another.
    fn identified(
        &self,
        ids: Vec<MachineId>,
        began: Instant,
        network: bool,
        failures: &mut Vec<(MachineId, NodeError)>,
    ) -> Vec<MachineId> {
        let fork = Fork { since: began, children: u32::try_from(ids.len()).unwrap_or(u32::MAX) };
        let told = in_parallel(&ids, |id| {
            let link = network.then(|| self.engine.plug(*id)).transpose()?;
            let stream = self.engine.connect(*id)?;
            identity::tell(stream, *id, link, &Self::left_out_steps(), fork).map_err(|error| {
                let (console, _) = self.engine.console(*id).unwrap_or_default();
                guest_error(&format!("telling machine {id} who it is"), &error, &console)
            })
        });
        let mut ready = Vec::with_capacity(ids.len());
        for (id, told) in ids.into_iter().zip(told) {
            match told {
                Ok(readiness) => {
                    tracing::debug!(machine = %id, after = ?readiness.after, "ready");
                    metrics::ready(&readiness);
                    self.registry.ready(id, readiness);
                    ready.push(id);
                }
                Err(error) => {
                    tracing::warn!(machine = %id, %error, "not ready");
                    let error = self.has_failed(id, error);
                    failures.push((id, error));
                }
            }
        }
        ready
    }

    /// Lets each child prove itself. One that cannot is ended: it must not be mistaken for a good one.
    fn verified(&self, ids: Vec<MachineId>, failures: &mut Vec<(MachineId, NodeError)>) -> Vec<MachineId> {
        let proofs = in_parallel(&ids, |id| self.engine.verify(*id));
        let mut good = Vec::with_capacity(ids.len());
        for (id, proof) in ids.into_iter().zip(proofs) {
            match proof {
                Ok(proof) => {
                    self.registry.verified(id, proof.pages);
                    good.push(id);
                }
                Err(error) => {
                    tracing::error!(machine = %id, %error, "proof");
                    let error = self.has_failed(id, error);
                    failures.push((id, error));
                }
            }
        }
        good
    }

    /// Ends a child whose proof, or readiness, has failed. One that has ended by itself did so for a reason that says more than its proof.
    fn has_failed(&self, id: MachineId, proof: EngineError) -> NodeError {
        match (self.registry.claim(&id.to_string()), proof.kind) {
            (Ok(id), ErrorKind::Ended(reason)) => {
                self.reap_claimed(id, Ended { reason, detail: proof.message.clone() });
                proof.into()
            }
            (Ok(id), _) => {
                if let Err(error) = self.end_claimed(id) {
                    tracing::warn!(machine = %id, %error, "not ended after its proof failed");
                }
                proof.into()
            }
            (Err(ended @ NodeError::Ended { .. }), ErrorKind::UnknownMachine) => ended,
            (Err(_), _) => proof.into(),
        }
    }
}

/// What another node says about a fork, if it can be true.
fn of_report(report: PeerForkReport, address: SocketAddr, order: &PeerForkOrder) -> Result<(OtherNode, Children), NodeError> {
    let PeerForkReport { node, children, failures } = report;
    let told = (children.len() + failures.len()) as u64;
    if told != order.count {
        let detail = format!("its answer is about {told} children of {}", order.count);
        return Err(PeerError::NoAnswer { address, detail }.into());
    }
    let failures = failures.into_iter().map(|failure| {
        let error = PeerError::Refused { address, refusal: failure.refusal };
        (failure.id, NodeError::Peer(error))
    });
    Ok((OtherNode { node, address }, first_if_none(children, failures.collect())?))
}
