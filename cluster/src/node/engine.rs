//! The seam between the node and what runs machines: [`Engine`]. The real one is [`kvm`](super::kvm); tests of the API have a
//! fake without KVM. Its calls block (a fork takes a fraction of a millisecond, a freeze some, a load seconds): the node calls
//! them where that does not hurt.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{CpuProfile, Digest, FullName, ImageId, MachineId, NodeId, Reason, Tenant};
use vm::Class;

use super::guest::network::Link;
use super::guest::template::{BuildOrder, Stage, StageTime};

/// Forks, freezes and kills machines of one host. Ids of machines are drawn by the node, ids of images by the engine.
pub trait Engine: Send + Sync + 'static {
    /// Starts a first parent with a guest of ours, lets it write its pattern into a quarter of its memory, freezes it, and ends
    /// it: what comes back is a warm image of this tenant that verified children can be forked from.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is left behind.
    fn prepare(&self, guest: Guest, class: Class, tenant: &Tenant) -> Result<ImageFacts, EngineError>;

    /// Boots a Linux guest, warms it up, and freezes it in its agent's gate. `progress` is called as each stage begins.
    ///
    /// # Errors
    /// [`EngineError`], of kind [`ErrorKind::Guest`] if it is the guest's; nothing is left behind.
    fn build(
        &self,
        _order: &BuildOrder,
        _tenant: &Tenant,
        _progress: &mut dyn FnMut(Stage),
    ) -> Result<(ImageFacts, Vec<StageTime>), EngineError> {
        Err(no_guests())
    }

    /// A stream to the agent of a running Linux guest, which says nothing yet.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownMachine`], [`ErrorKind::Ended`], or [`ErrorKind::Guest`] if it has no agent.
    fn connect(&self, _machine: MachineId) -> Result<UnixStream, EngineError> {
        Err(no_guests())
    }

    /// Whether machines can be plugged in here.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::NoGuestNetwork`].
    fn check_guest_network(&self) -> Result<(), EngineError> {
        Err(no_guest_network())
    }

    /// Plugs a machine's network card into this host: it gets a place in the network of guests, for as long as it lives.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownMachine`], [`ErrorKind::Ended`], [`ErrorKind::NoGuestNetwork`], or
    /// [`ErrorKind::Exhausted`] if all places are taken.
    fn plug(&self, _machine: MachineId) -> Result<Link, EngineError> {
        Err(no_guests())
    }

    /// Opens an image that other nodes hold: its children can be forked at once, before any of its memory is here. Opening one
    /// that is open or here already gives that one, and lets it know of holders that are new.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::Unreachable`], [`ErrorKind::NotTrusted`] or [`ErrorKind::Refused`] if no holder
    /// gave the image's head; nothing is left behind.
    fn open(&self, order: &OpenOrder) -> Result<ImageFacts, EngineError>;

    /// The image's name everywhere. Hashes the image if that has not been done, which takes about a second per GiB.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownImage`].
    fn digest(&self, image: ImageId) -> Result<Digest, EngineError>;

    /// What of an image is here now. Of one that was made or loaded here: all of it, without sources.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownImage`]. An image that was forgotten is known as long as it has children.
    fn residency(&self, image: ImageId) -> Result<Residency, EngineError>;

    /// Memory of an image in bytes that is not zero, wherever it is. Nobody else is asked.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownImage`].
    fn data_bytes(&self, image: ImageId) -> Result<u64, EngineError>;

    /// Forks one child of `image` for each id, all at once. The outcomes are in the order of the ids.
    fn fork(&self, image: ImageId, ids: &[MachineId], options: ForkOptions) -> Vec<Result<Forked, EngineError>>;

    /// Makes an image of this instant of a running machine, which goes on.
    ///
    /// # Errors
    /// [`EngineError`]; the machine goes on as it was.
    fn freeze(&self, machine: MachineId) -> Result<(ImageFacts, FreezeFacts), EngineError>;

    /// Lets the guest prove with its own instructions that its memory is its image's, and that it knows who it is. Only for
    /// children of images that [`Engine::prepare`] made, which have not been told to do anything since.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::WrongProof`] if the proof is wrong.
    fn verify(&self, machine: MachineId) -> Result<Proof, EngineError>;

    /// Has the probe on a machine's first vCPU carry out commands, one after the other.
    ///
    /// # Errors
    /// [`EngineError`] of the first command without a reply, or of kind [`ErrorKind::Host`] if this engine runs no guests.
    #[cfg(feature = "bench")]
    fn probe(&self, _machine: MachineId, _commands: &[vm::probe::Command]) -> Result<Vec<Probed>, EngineError> {
        Err(no_guests())
    }

    /// Ends a machine and gives back what it had. Ending one that has ended by itself forgets it.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownMachine`].
    fn kill(&self, machine: MachineId) -> Result<(), EngineError>;

    /// What a machine costs now.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownMachine`].
    fn usage(&self, machine: MachineId) -> Result<Usage, EngineError>;

    /// What a machine printed on its serial port, newest 64 KiB, oldest first, and how many older bytes made room for it.
    ///
    /// # Errors
    /// [`EngineError`].
    fn console(&self, machine: MachineId) -> Result<(Vec<u8>, u64), EngineError>;

    /// What is known of an image.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownImage`].
    fn image(&self, image: ImageId) -> Result<ImageFacts, EngineError>;

    /// Saves an image under a name into the node's store. `progress` is called with bytes done and bytes in all.
    ///
    /// # Errors
    /// [`EngineError`]; the store is as it was.
    fn save(&self, image: ImageId, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError>;

    /// Loads a saved image, verified, for the tenant of the name.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is loaded.
    fn load(&self, name: &FullName, progress: &mut dyn FnMut(u64, u64)) -> Result<ImageFacts, EngineError>;

    /// The file of a saved image, to read: all that it takes to import it elsewhere, verified there.
    ///
    /// # Errors
    /// [`EngineError`].
    fn export(&self, _name: &FullName) -> Result<File, EngineError> {
        Err(no_guests())
    }

    /// Saves what `export` gave elsewhere under a name, and loads it, verified, for the tenant of the name.
    ///
    /// # Errors
    /// [`EngineError`], of kind [`ErrorKind::BadImage`] if it is damaged or cannot run here; the store is as it was.
    fn import(&self, _name: &FullName, _archive: &mut dyn Read) -> Result<ImageFacts, EngineError> {
        Err(no_guests())
    }

    /// The names in the node's store, with the size of each file in bytes.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::Store`].
    fn stored(&self) -> Result<Vec<(FullName, u64)>, EngineError>;

    /// Forgets an image. Machines that were forked from it go on; its memory is given back with the last of them.
    ///
    /// # Errors
    /// [`EngineError`] of kind [`ErrorKind::UnknownImage`].
    fn forget(&self, image: ImageId) -> Result<(), EngineError>;

    /// Deletes a saved image from the node's store.
    ///
    /// # Errors
    /// [`EngineError`].
    fn delete(&self, name: &FullName) -> Result<(), EngineError>;

    /// The CPU as guests see it here: what images can run.
    fn cpu(&self) -> CpuProfile;

    /// The shells that wait, by class.
    fn pool(&self) -> Vec<PoolFacts>;

    /// Machines that end by themselves, from now on. Called once, by the node.
    fn ended(&self) -> Receiver<(MachineId, Ended)>;

    /// Ends every machine and shell and waits until their memory is given back. No other call comes after it.
    fn stop(&self);
}

/// What an engine without KVM says of guests.
fn no_guests() -> EngineError {
    let message = "this engine runs no guests".to_owned();
    EngineError { kind: ErrorKind::Host, message, remedy: "use a node with KVM".to_owned() }
}

/// What a node says that was not given a network of guests.
pub(crate) fn no_guest_network() -> EngineError {
    let message = "this node has no network for guests".to_owned();
    let remedy = "start it with --guest-network RANGE, or leave --network out".to_owned();
    EngineError { kind: ErrorKind::NoGuestNetwork, message, remedy }
}

/// A guest that is part of farfork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// A small program that proves what its memory holds.
    Probe,
}

/// Which image to open, and where it can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOrder {
    /// Its name everywhere.
    pub image: Digest,
    /// Whose it is.
    pub tenant: Tenant,
    /// Nodes that hold it, wholly or in part; at least one.
    pub holders: Vec<SocketAddr>,
}

/// What a fork may be told besides its image.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForkOptions {
    /// The most memory in bytes that the machine may have of its own (pages it has written, and what runs it). `None`: all of
    /// its RAM.
    pub limit_bytes: Option<u64>,
}

/// A child that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// The child.
    pub id: MachineId,
    /// From the call until its first instruction was observed.
    pub first: Duration,
    /// How that time was spent, in this order.
    pub stages: ForkStages,
    /// Whether a shell was ready for it.
    pub had_shell: bool,
}

/// The stages of a fork. Their sum is [`Forked::first`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkStages {
    /// Until a shell was there: taken from the pool, or built.
    pub shell: Duration,
    /// Until the worker had the image's descriptors and the child's identity.
    pub send: Duration,
    /// Mapping the image's runs.
    pub map: Duration,
    /// Restoring registers and devices.
    pub restore: Duration,
    /// Until the first exit of the guest.
    pub run: Duration,
}

/// An image.
#[derive(Clone, Debug)]
pub struct ImageFacts {
    /// On this node.
    pub id: ImageId,
    /// Everywhere, once it has been hashed.
    pub digest: Option<Digest>,
    /// Whose it is. Nodes of other tenants do not get to read it.
    pub tenant: Tenant,
    /// What a shell must be built for.
    pub class: Class,
    /// Branches between it and the first parent.
    pub depth: u32,
    /// Memory in bytes of the layers made for it.
    pub own_bytes: u64,
    /// Memory in bytes of all its layers.
    pub stored_bytes: u64,
    /// Whether its children can be asked for a [`Proof`].
    pub verifiable: bool,
}

/// What of an image is here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Memory in bytes that is not zero: what has to be here.
    pub data_bytes: u64,
    /// How much of it is here.
    pub resident_bytes: u64,
    /// All of it is here and checked: no fault waits for another node any more.
    pub is_settled: bool,
    /// From opening it until that was so. `None` of an image that was made or loaded here.
    pub settled_after: Option<Duration>,
    /// Faults of children on memory that was not here yet.
    pub faults: u64,
    /// Bytes of extents that came over the wire, as they were sent (compressed ones count compressed).
    pub wire_bytes: u64,
    /// Machines that were forked from it here and run.
    pub children: u32,
    /// Where it comes from, in the order in which they were named.
    pub sources: Vec<SourceFacts>,
    /// Why its children can no longer be given what they lack, if that is so.
    pub failed: Option<Ended>,
}

impl Residency {
    /// How much of the memory is here, in percent: 100 only once the image is settled.
    #[must_use]
    pub fn settled_percent(&self) -> u8 {
        if self.is_settled {
            return 100;
        }
        let percent = u128::from(self.resident_bytes) * 100 / u128::from(self.data_bytes.max(1));
        u8::try_from(percent.min(99)).unwrap_or(99)
    }
}

/// A node that an image's memory is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFacts {
    /// Where it listens.
    pub address: SocketAddr,
    /// Who it is, once it has been reached.
    pub node: Option<NodeId>,
    /// Extents that came from it.
    pub extents: u64,
    /// Their bytes on the wire.
    pub bytes: u64,
    /// Requests that it did not answer as asked.
    pub failures: u64,
    /// Whether it is asked.
    pub state: SourceState,
}

/// Whether a source is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SourceState {
    /// It is.
    Good,
    /// Only if no good one can be: it failed several times in a row.
    Suspect,
    /// Never again: it sent bytes that did not verify.
    Quarantined,
    /// It cannot be reached, or no longer lets this node read.
    Gone,
}

impl SourceState {
    /// Whether it may still give something.
    #[must_use]
    pub fn is_asked(self) -> bool {
        matches!(self, Self::Good | Self::Suspect)
    }
}

/// What a freeze cost.
#[derive(Clone, Copy, Debug)]
pub struct FreezeFacts {
    /// The machine was kept from running for so long.
    pub stall: Duration,
    /// Until the image was complete, after the stall.
    pub copy: Duration,
    /// Pages that were written since the fork.
    pub dirty_pages: u64,
    /// Extents that were copied.
    pub copied_extents: u64,
}

/// A proof that holds.
#[derive(Clone, Copy, Debug)]
pub struct Proof {
    /// Pages that the guest compared.
    pub pages: u64,
}

/// What a probe answered to a command.
#[cfg(feature = "bench")]
#[derive(Clone, Copy, Debug)]
pub struct Probed {
    /// Its words.
    pub reply: vm::probe::Reply,
    /// From the command's leaving this process until its reply was here.
    pub took: Duration,
}

/// What a machine costs, in bytes. Read from the kernel at the time of the call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Its share of all memory that it maps.
    pub pss_bytes: u64,
    /// Memory that it alone maps.
    pub private_bytes: u64,
    /// Its page tables.
    pub page_table_bytes: u64,
    /// CPU time so far.
    pub cpu: Duration,
    /// Times that it touched memory of its image that was not here, so far.
    pub faults: u64,
}

/// Why a machine ended, or an image failed its children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// From the closed list.
    pub reason: Reason,
    /// The numbers.
    pub detail: String,
}

/// Shells of one class.
#[derive(Clone, Copy, Debug)]
pub struct PoolFacts {
    /// Which.
    pub class: Class,
    /// How many wait.
    pub ready: u32,
    /// How many are being built.
    pub building: u32,
    /// How many the pool wants.
    pub wanted: u32,
}

/// Why the engine did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct EngineError {
    /// What kind, for programs.
    pub kind: ErrorKind,
    /// What and where, in one line.
    pub message: String,
    /// What to do about it, in one line.
    pub remedy: String,
}

/// Kinds of [`EngineError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No such machine on this node.
    UnknownMachine,
    /// No such image on this node, or no such name in its store.
    UnknownImage,
    /// The name is taken in the store.
    NameTaken,
    /// The host has not enough memory, processes or descriptors for it.
    Exhausted,
    /// What was asked for does not fit: more memory than the host has at all, a limit below what a machine needs.
    Unfit,
    /// The machine has ended, with this reason.
    Ended(Reason),
    /// The image cannot run here, or is damaged.
    BadImage,
    /// The store cannot be read or written (read-only, damaged).
    Store,
    /// The store's file system has no room.
    StoreFull,
    /// The guest's proof is wrong, or it cannot give one.
    WrongProof,
    /// The guest, or what it was to be made from, is not what it has to be.
    Guest,
    /// The host cannot run machines (no /dev/kvm, say).
    Host,
    /// The node has no network for guests.
    NoGuestNetwork,
    /// Another node cannot be reached.
    Unreachable,
    /// Another node is not trusted by this one, or does not trust it.
    NotTrusted,
    /// Another node refused: it has no such image, or not for this tenant.
    Refused,
    /// No holder is left that could give what is missing of an image.
    SourceLost,
    /// Some of the image is still on its way from another node.
    NotSettled,
    /// The engine is stopping.
    Stopping,
    /// Something of ours failed: a worker, the zygote, a system call.
    Internal,
}
