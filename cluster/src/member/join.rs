//! How a node is let into a cluster: it shows a token, and gets a certificate. And how it gets the next one, before that runs out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use control::command::{Answer, Command, Refusal};
use control::state::Role;
use futures_util::future::BoxFuture;
use pages::identity::Fingerprint;
use pages::server::Answers;
use pages::{Certificate, Identity, LinkError, clock, join};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, Name};

use super::seal::Sealed;
use super::token::JoinToken;
use super::{Membership, REQUEST_WITHIN};

/// Of what is said here. Nodes of another version are told so.
const VERSION: u32 = 1;
/// How long each voter may take.
const WITHIN: Duration = Duration::from_secs(10);
/// How far apart clocks of a node and a voter may be: certificates begin an hour before they are made, and two nodes may be off
/// either way.
const APART_MAX: Duration = Duration::from_mins(30);

/// What a node asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    version: u32,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum What {
    /// To be let in.
    Join { name: Name, secret: [u8; 32] },
    /// Another certificate, of one that has a good one.
    Renew,
    /// What time it is there.
    Clock,
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is of the cluster.
    Admitted(Box<Admitted>),
    /// It is not.
    Refused {
        /// What.
        message: String,
        /// What to do.
        remedy: String,
    },
    /// Another voter may know.
    Elsewhere {
        /// Why not here.
        message: String,
    },
    /// What time it is here.
    Clock {
        /// Since 1970.
        unix_ms: u64,
    },
}

/// What a node gets that is let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admitted {
    /// Its certificate, and the authority's.
    pub certificate: String,
    /// The authority's alone.
    pub root: String,
    /// The authority's key, for voters.
    pub sealed: Option<Sealed>,
    /// Where the voters are.
    pub seeds: Vec<String>,
}

/// Why a node was not let in.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum JoinError {
    #[error("{message}")]
    Refused { message: String, remedy: String },
    #[error("no voter could be asked: {0}")]
    Unreached(LinkError),
    #[error("no voter could do it: {message}")]
    Unable { message: String },
    #[error(
        "the clocks differ: this host's is {} {} that of the voter at {address}, and {} min is the most",
        hours(*by), if *is_ahead { "ahead of" } else { "behind" }, APART_MAX.as_secs() / 60
    )]
    Clocks { address: SocketAddr, is_ahead: bool, by: Duration },
}

impl JoinError {
    /// The code that programs match on.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Clocks { .. } => "CLOCKS_DIFFER",
            Self::Refused { .. } | Self::Unreached(_) | Self::Unable { .. } => "NOT_LET_IN",
        }
    }

    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Refused { remedy, .. } => remedy.clone(),
            Self::Unreached(error) => error.remedy().to_owned(),
            Self::Clocks { .. } => {
                "set the clocks of both hosts (NTP), and ask again: nothing was done, a token is as good as before".to_owned()
            }
            Self::Unable { .. } => "look at the voters (farfork node ls), and join again with the same token".to_owned(),
        }
    }
}

/// Asks the voters that a token names, one after the other.
///
/// # Errors
/// [`JoinError`].
pub async fn ask(identity: &Identity, token: &JoinToken) -> Result<Admitted, JoinError> {
    let what = What::Join { name: token.name.clone(), secret: token.secret };
    ask_voters(identity, &token.addresses, token.fingerprint(), what).await
}

/// Asks for another certificate.
///
/// # Errors
/// [`JoinError`].
pub async fn renew(identity: &Identity, voters: &[SocketAddr], authority: Fingerprint) -> Result<Admitted, JoinError> {
    ask_voters(identity, voters, authority, What::Renew).await
}

async fn ask_voters(
    identity: &Identity,
    voters: &[SocketAddr],
    authority: Fingerprint,
    what: What,
) -> Result<Admitted, JoinError> {
    let mut last = JoinError::Unable { message: "none is known".to_owned() };
    for address in voters {
        match ask_voter(identity, *address, authority, &what).await {
            Err(error) if !matches!(error, JoinError::Refused { .. }) => last = error,
            answered => return answered,
        }
    }
    Err(last)
}

async fn ask_voter(
    identity: &Identity,
    address: SocketAddr,
    authority: Fingerprint,
    what: &What,
) -> Result<Admitted, JoinError> {
    // A certificate that is made by a clock which is far off is good for nothing, and where this host's is, those of others are.
    let clock = join::ask_openly(identity, address, authority, bytes_of(&What::Clock), WITHIN).await;
    match understood(clock)? {
        Reply::Clock { unix_ms } => compare(address, unix_ms)?,
        reply => return Err(other(reply)),
    }
    match understood(join::ask(identity, address, authority, bytes_of(what), WITHIN).await)? {
        Reply::Admitted(admitted) => Ok(*admitted),
        reply => Err(other(reply)),
    }
}

fn bytes_of(what: &What) -> Bytes {
    postcard::to_stdvec(&Request { version: VERSION, what: what.clone() }).expect("plain data").into()
}

fn understood(answered: Result<Bytes, LinkError>) -> Result<Reply, JoinError> {
    let bytes = answered.map_err(JoinError::Unreached)?;
    postcard::from_bytes(&bytes).map_err(|error| JoinError::Unable { message: format!("its answer is none: {error}") })
}

/// What it means that this is the answer, and not what was asked for.
fn other(reply: Reply) -> JoinError {
    match reply {
        Reply::Refused { message, remedy } => JoinError::Refused { message, remedy },
        Reply::Elsewhere { message } => JoinError::Unable { message },
        Reply::Admitted(_) | Reply::Clock { .. } => JoinError::Unable { message: "it answers another question".to_owned() },
    }
}

fn unix_ms() -> u64 {
    let since = clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn compare(address: SocketAddr, there_ms: u64) -> Result<(), JoinError> {
    let here_ms = unix_ms();
    let by = Duration::from_millis(here_ms.abs_diff(there_ms));
    if by > APART_MAX { Err(JoinError::Clocks { address, is_ahead: here_ms > there_ms, by }) } else { Ok(()) }
}

fn hours(time: Duration) -> String {
    let minutes = (time.as_secs() + 30) / 60;
    format!("{} h {} min", minutes / 60, minutes % 60)
}

/// One, for the corpora.
#[cfg(feature = "testing")]
pub(crate) fn a_request() -> Vec<u8> {
    let what = What::Join { name: Name::parse("node-2").expect("a name"), secret: [7; 32] };
    postcard::to_stdvec(&Request { version: VERSION, what }).expect("plain data")
}

/// Lets nodes in, as a voter.
pub(super) struct Doorkeeper(pub(super) Arc<Membership>);

impl Answers for Doorkeeper {
    fn answer(&self, shown: Certificate, request: Bytes) -> BoxFuture<'static, Bytes> {
        let member = Arc::clone(&self.0);
        Box::pin(async move {
            let reply = member.answer_at_the_door(&shown, &request).await;
            postcard::to_stdvec(&reply).expect("plain data").into()
        })
    }
}

/// Reads what anybody asks.
///
/// # Errors
/// What to tell them.
pub fn read(request: &[u8]) -> Result<Request, Reply> {
    let refused = |message: &str| Reply::Refused {
        message: message.to_owned(),
        remedy: "use the same version of farfork on all nodes".to_owned(),
    };
    // The version comes first, whatever follows it.
    match postcard::take_from_bytes::<u32>(request) {
        Ok((VERSION, _)) => {}
        Ok((other, _)) => return Err(refused(&format!("it asks in version {other}; this voter knows {VERSION}"))),
        Err(_) => return Err(refused("what it asks cannot be read")),
    }
    match postcard::take_from_bytes(request) {
        Ok((request, [])) => Ok(request),
        _ => Err(refused("what it asks cannot be read")),
    }
}

impl Membership {
    async fn answer_at_the_door(&self, shown: &Certificate, request: &[u8]) -> Reply {
        let what = match read(request) {
            Ok(request) => request.what,
            Err(reply) => return reply,
        };
        let elsewhere = |message: String| Reply::Elsewhere { message };
        let sealed = || elsewhere("this voter does not have the authority's key open".to_owned());
        let authority = self.authority.as_ref().ok_or_else(sealed);
        let (name, role) = match what {
            What::Clock => return Reply::Clock { unix_ms: unix_ms() },
            What::Renew => match self.renewable(shown) {
                Ok(known) => known,
                Err(reply) => return reply,
            },
            What::Join { .. } if authority.is_err() => return sealed(),
            What::Join { name, secret } => {
                let (node, token) = (shown.peer().node, JoinToken::digest(&secret));
                // Strangers write nothing into the log: only a token does.
                if let Err(reply) = self.knows(&token).await {
                    return reply;
                }
                let command = Command::UseToken { token, node, proven: shown.key_digest(), name: name.clone() };
                match self.consensus.propose(None, command, REQUEST_WITHIN).await {
                    Ok(Answer::Admitted(role)) => (name, role),
                    Ok(Answer::Refused(refusal)) => {
                        tracing::warn!(%node, %name, %refusal, "not let in");
                        return Reply::Refused { message: refusal.to_string(), remedy: refusal.remedy().to_owned() };
                    }
                    Ok(_) => return elsewhere("the cluster gave another answer".to_owned()),
                    Err(error) => return elsewhere(error.to_string()),
                }
            }
        };
        let of_certificate = match role {
            Role::Voter => pages::Role::Voter,
            Role::Learner => pages::Role::Learner,
        };
        let authority = match authority {
            Ok(authority) => authority,
            Err(reply) => return reply,
        };
        match authority.issue(shown, &name, of_certificate) {
            Ok(certificate) => {
                tracing::info!(node = %shown.peer().node, %name, ?role, "certified");
                let sealed = self.sealed.clone().filter(|_| role == Role::Voter);
                let root = authority.root_pem().to_owned();
                Reply::Admitted(Box::new(Admitted { certificate, root, sealed, seeds: self.voter_addresses() }))
            }
            Err(error) => Reply::Refused { message: error.to_string(), remedy: error.remedy().to_owned() },
        }
    }

    /// Whether there is such a token.
    async fn knows(&self, token: &Digest) -> Result<(), Reply> {
        if !self.consensus.stale().tokens.contains_key(token) {
            let state = self.read().await.map_err(|error| Reply::Elsewhere { message: error.to_string() })?;
            if !state.tokens.contains_key(token) {
                let refusal = Refusal::BadToken;
                return Err(Reply::Refused { message: refusal.to_string(), remedy: refusal.remedy().to_owned() });
            }
        }
        Ok(())
    }

    /// A node of this cluster, as it is now.
    fn renewable(&self, shown: &Certificate) -> Result<(Name, Role), Reply> {
        let state = self.consensus.stale();
        let node = state.nodes.get(&shown.peer().node).filter(|_| self.trust.is_of_cluster(shown.peer()));
        let refused = || Reply::Refused {
            message: "its certificate is none of this cluster's".to_owned(),
            remedy: "let it join anew, with an empty data directory and a new token".to_owned(),
        };
        node.map(|node| (node.facts.name.clone(), node.role)).ok_or_else(refused)
    }
}
