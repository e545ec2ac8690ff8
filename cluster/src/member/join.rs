//! How a node is let into a cluster: it shows a token, and gets a certificate. And how it gets the next one, before that runs out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use control::command::{Answer, Command, Refusal};
use control::state::Role;
use futures_util::future::BoxFuture;
use pages::identity::Fingerprint;
use pages::server::Answers;
use pages::{Certificate, Identity, LinkError, join};
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
}

impl JoinError {
    /// What to do about it, in one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Refused { remedy, .. } => remedy.clone(),
            Self::Unreached(error) => error.remedy().to_owned(),
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
    let request = Bytes::from(postcard::to_stdvec(&Request { version: VERSION, what }).expect("plain data"));
    let mut last = JoinError::Unable { message: "none is known".to_owned() };
    for address in voters {
        let answered = join::ask(identity, *address, authority, request.clone(), WITHIN).await;
        match answered.map(|bytes| postcard::from_bytes::<Reply>(&bytes)) {
            Ok(Ok(Reply::Admitted(admitted))) => return Ok(*admitted),
            Ok(Ok(Reply::Refused { message, remedy })) => return Err(JoinError::Refused { message, remedy }),
            Ok(Ok(Reply::Elsewhere { message })) => last = JoinError::Unable { message },
            Ok(Err(error)) => last = JoinError::Unable { message: format!("its answer is none: {error}") },
            Err(error) => last = JoinError::Unreached(error),
        }
    }
    Err(last)
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
        let Some(authority) = &self.authority else {
            return elsewhere("this voter does not have the authority's key open".to_owned());
        };
        let (name, role) = match what {
            What::Renew => match self.renewable(shown) {
                Ok(known) => known,
                Err(reply) => return reply,
            },
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
