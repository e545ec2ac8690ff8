//! Why a node did not do what it was asked.

use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use types::id::{DigestError, TenantError};
use types::unit::MemorySizeError;
use types::{MemorySize, NameError, NodeId, Reason, Tenant};
use vm::class::VcpuCountError;

use super::address::AddressError;
use super::engine::{EngineError, ErrorKind};
use super::peers::{HOLDERS_MAX, MessageError, PeerError};
use super::short_id::ShortIdError;
use super::trust::TrustError;
use crate::member::ClusterError;

/// Of the verbs of [`Service`](super::Service). The [code](NodeError::code) is for programs, `Display` for people.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum NodeError {
    #[error("a count of {asked} where 1 to {max} are allowed")]
    Count { asked: u64, max: u64 },
    #[error(transparent)]
    Memory(#[from] MemorySizeError),
    #[error("{asked} virtual CPUs where a machine has 1 to 8")]
    Vcpus { asked: u64 },
    #[error("a memory limit of 0 bytes")]
    Limit,
    #[error("memory and vCPUs belong to the image: only a guest can be given them")]
    ClassIsGiven,
    #[error("no ids, and not all")]
    NothingNamed,
    #[error("ids and all at once")]
    IdsAndAll,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Id(#[from] ShortIdError),
    #[error(transparent)]
    Digest(#[from] DigestError),
    #[error(transparent)]
    Tenant(#[from] TenantError),
    #[error("no machine {id}")]
    UnknownMachine { id: String },
    #[error("no image {id}")]
    UnknownImage { id: String },
    #[error("no template {name}")]
    UnknownTemplate { name: String },
    #[error("machine {id} has not been told who it is yet, or has no agent")]
    NotReady { id: String },
    #[error("{who} may not have the node read or keep files")]
    NotOwner { who: String },
    #[error("{given} could be {}", candidates.join(", "))]
    Ambiguous { given: String, candidates: Vec<String> },
    #[error("machine {id} has ended: {reason} ({detail})")]
    Ended { id: String, reason: Reason, detail: String },
    #[error("children of image {id} cannot be asked for a proof")]
    NotVerifiable { id: String },
    #[error("machines of image {id} have no network card")]
    NoNetworkCard { id: String },
    #[error("{count} holders where 1 to {HOLDERS_MAX} are allowed")]
    Holders { count: usize },
    #[error("an image that others hold is to be forked on yet another node")]
    RemoteElsewhere,
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("image {id} is of tenant {owner}, not of {asked}")]
    OtherTenant { id: String, owner: Tenant, asked: Tenant },
    #[error("this node takes no part in a network of nodes")]
    NoNetwork,
    #[error("this node does not listen for others, so they cannot read its images")]
    NotListening,
    #[error("this node listens on {listening}, which does not say how others reach it")]
    NotAdvertised { listening: SocketAddr },
    #[error("node {node} is not trusted with images of tenant {tenant} here")]
    NotTrusted { node: NodeId, tenant: Tenant },
    #[error("nobody waits any more: the order's {} ms have passed", deadline.as_millis())]
    Late { deadline: Duration },
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("{queued} calls wait already")]
    Busy { queued: usize },
    #[error("the node is stopping")]
    Stopping,
    #[error("a call of the node failed in a way that was not foreseen")]
    Panicked,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Cluster(ClusterError),
}

impl NodeError {
    /// The code that programs match on. Codes never change their meaning.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Count { .. } => "BAD_COUNT",
            Self::Memory(_) => "BAD_MEMORY",
            Self::Vcpus { .. } => "BAD_VCPUS",
            Self::Limit => "BAD_LIMIT",
            Self::ClassIsGiven | Self::NothingNamed | Self::IdsAndAll | Self::RemoteElsewhere => "BAD_REQUEST",
            Self::NoNetworkCard { .. } => "NO_NETWORK_CARD",
            Self::Holders { .. } => "BAD_HOLDERS",
            Self::Address(AddressError::Malformed { .. }) => "BAD_ADDRESS",
            Self::Address(AddressError::Unknown { .. }) => "UNREACHABLE",
            Self::OtherTenant { .. } => "OTHER_TENANT",
            Self::NoNetwork => "NO_NETWORK",
            Self::NotListening => "NOT_LISTENING",
            Self::NotAdvertised { .. } => "NOT_ADVERTISED",
            Self::NotTrusted { .. } => "NOT_TRUSTED",
            Self::Late { .. } => "DEADLINE_EXCEEDED",
            Self::Message(_) => "BAD_MESSAGE",
            Self::Trust(error) => error.code(),
            Self::Peer(error) => error.code(),
            Self::Name(_) => "BAD_NAME",
            Self::Id(_) => "BAD_ID",
            Self::Digest(_) => "BAD_DIGEST",
            Self::Tenant(_) => "BAD_TENANT",
            Self::UnknownMachine { .. } => "UNKNOWN_MACHINE",
            Self::UnknownImage { .. } => "UNKNOWN_IMAGE",
            Self::UnknownTemplate { .. } => "UNKNOWN_TEMPLATE",
            Self::NotReady { .. } => "NOT_READY",
            Self::NotOwner { .. } => "FORBIDDEN",
            Self::Ambiguous { .. } => "AMBIGUOUS_ID",
            Self::Ended { .. } => "ENDED",
            Self::NotVerifiable { .. } => "NOT_VERIFIABLE",
            Self::Busy { .. } => "BUSY",
            Self::Stopping => "STOPPING",
            Self::Panicked => "INTERNAL",
            Self::Engine(error) => engine_code(error.kind),
            Self::Cluster(error) => error.code(),
        }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        let fixed = match self {
            Self::Engine(error) => return error.remedy.clone(),
            Self::Cluster(error) => return error.remedy(),
            Self::Trust(error) => return error.remedy(),
            Self::Peer(error) => return error.remedy(),
            Self::Message(error) => error.remedy(),
            Self::Address(error) => error.remedy(),
            Self::Holders { .. } => "name the nodes that hold the image, as HOST:PORT",
            Self::RemoteElsewhere => "ask that node itself, or fork it here first",
            Self::OtherTenant { .. } => "leave the tenant out, or name the image's own",
            Self::NoNetwork => "use a farfork that was built with one",
            Self::NotListening => "start it with --listen ADDRESS:PORT",
            Self::NotAdvertised { .. } => "start it with --advertise HOST:PORT, an address at which others reach it",
            Self::NotTrusted { .. } => "on the node that refused: `farfork trust add FILE --tenant NAME`",
            Self::Late { .. } => "ask again: what was slow then may be there now",
            Self::Count { max, .. } => return format!("ask for 1 to {max}, several times if need be"),
            Self::Memory(_) => {
                return format!("use a multiple of 2 MiB (2097152) up to {} bytes", MemorySize::MAX);
            }
            Self::Vcpus { asked } => VcpuCountError { asked: u8::try_from(*asked).unwrap_or(u8::MAX) }.remedy(),
            Self::Limit => "leave the limit out, or ask for more than nothing",
            Self::ClassIsGiven => "leave memory and vCPUs out",
            Self::NothingNamed => "name at least one id, or say all",
            Self::IdsAndAll => "name ids or say all, not both",
            Self::Name(error) => error.remedy(),
            Self::Id(error) => error.remedy(),
            Self::Digest(_) => "`farfork image digest` prints the digest of an image, on a node that has it",
            Self::Tenant(_) => "leave it out for the tenant called default, or write it as you did on the other node",
            Self::UnknownMachine { .. } => "`farfork ls --all` lists machines",
            Self::UnknownImage { .. } => "`farfork image ls` lists images; a saved one is loaded with `farfork image load`",
            Self::UnknownTemplate { .. } => "`farfork template ls` lists templates, `farfork template build` makes them",
            Self::NotReady { .. } => "wait a moment and ask again; `farfork show` says what it is at",
            Self::NotOwner { .. } => "build templates as the user who runs the node, or as root",
            Self::Ambiguous { .. } => "give more digits from the end of the id",
            Self::Ended { .. } => "fork another one",
            Self::NotVerifiable { .. } => "fork without verifying, or from a guest that proves its memory",
            Self::NoNetworkCard { .. } => "build its template with --network, or leave --network out",
            Self::Busy { .. } => "wait a little and ask again",
            Self::Stopping => "ask again when the node is back",
            Self::Panicked => "look for its cause in the node's log, and report it",
        };
        fixed.to_owned()
    }

    /// Why a machine ended, if that is what stands in the way.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Ended { reason, .. } => Some(*reason),
            Self::Engine(EngineError { kind: ErrorKind::Ended(reason), .. }) => Some(*reason),
            Self::Peer(PeerError::Refused { refusal, .. }) => refusal.reason,
            _ => None,
        }
    }
}

fn engine_code(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::UnknownMachine => "UNKNOWN_MACHINE",
        ErrorKind::UnknownImage => "UNKNOWN_IMAGE",
        ErrorKind::NameTaken => "NAME_TAKEN",
        ErrorKind::Exhausted => "EXHAUSTED",
        ErrorKind::Unfit => "UNFIT",
        ErrorKind::Ended(_) => "ENDED",
        ErrorKind::BadImage => "BAD_IMAGE",
        ErrorKind::Store => "STORE",
        ErrorKind::StoreFull => "STORE_FULL",
        ErrorKind::WrongProof => "WRONG_PROOF",
        ErrorKind::Guest => "GUEST",
        ErrorKind::Host => "HOST",
        ErrorKind::NoGuestNetwork => "NO_GUEST_NETWORK",
        ErrorKind::Unreachable => "UNREACHABLE",
        ErrorKind::NotTrusted => "NOT_TRUSTED",
        ErrorKind::Refused => "REFUSED",
        ErrorKind::SourceLost => "SOURCE_LOST",
        ErrorKind::NotSettled => "NOT_SETTLED",
        ErrorKind::Stopping => "STOPPING",
        ErrorKind::Internal => "INTERNAL",
    }
}
