//! How a node is let into a cluster: it shows a token, and gets a certificate. How it gets the next one, before that runs out. And
//! how one that has lost its log is let in again, as another node: by what its old key has signed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use control::apply::check_replace;
use control::command::{Answer, Command, Refusal};
use control::state::Role;
use futures_util::future::BoxFuture;
use pages::identity::Fingerprint;
use pages::server::Answers;
use pages::{Certificate, Identity, LinkError, clock, join};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, Name, NodeId};

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
    /// To be let in again, in the place of the node of this certificate, whose key has signed [`words_of`] that.
    Replace { certificate: Vec<u8>, signature: Vec<u8> },
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
    #[error("the node's key cannot sign: {0}")]
    Key(#[from] pages::identity::IdentityError),
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
            Self::Refused { .. } | Self::Unreached(_) | Self::Key(_) | Self::Unable { .. } => "NOT_LET_IN",
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
            Self::Key(error) => error.remedy().to_owned(),
            Self::Unable { .. } => {
                "look at the voters (farfork node ls), and ask again: join with the same token, or repair".to_owned()
            }
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

/// Asks to be let in again, in the place of a node that has lost its log: its certificate and key prove that this is its host.
///
/// # Errors
/// [`JoinError`]. [`JoinError::Unreached`]: no voter has heard of it.
pub async fn replace(
    identity: &Identity,
    old: &Identity,
    voters: &[SocketAddr],
    authority: Fingerprint,
) -> Result<Admitted, JoinError> {
    let signature = old.sign(&words_of(authority, old.certificate(), identity.certificate()))?;
    let certificate = old.certificate().der().to_vec();
    ask_voters(identity, voters, authority, What::Replace { certificate, signature }).await
}

/// What an old key signs for a new one: in which cluster, which node, by which id and key. All of it has a fixed length.
fn words_of(authority: Fingerprint, old: &Certificate, new: &Certificate) -> Vec<u8> {
    let (old, id, key) = (old.peer().node, new.peer().node, new.key_digest());
    let parts: [&[u8]; 5] = [
        b"farfork: another node in the place of one that has lost its log\0",
        authority.0.as_bytes(),
        old.as_uuid().as_bytes(),
        id.as_uuid().as_bytes(),
        key.as_bytes(),
    ];
    parts.concat()
}

async fn ask_voters(
    identity: &Identity,
    voters: &[SocketAddr],
    authority: Fingerprint,
    what: What,
) -> Result<Admitted, JoinError> {
    let mut last: Option<JoinError> = None;
    for address in voters {
        match ask_voter(identity, *address, authority, &what).await {
            Err(error) if !matches!(error, JoinError::Refused { .. }) => {
                // One that may have heard it counts for more than those that have not, whatever the next ones say.
                let has_heard = !matches!(error, JoinError::Unreached(_) | JoinError::Clocks { .. });
                if has_heard || last.is_none() {
                    last = Some(error);
                }
            }
            answered => return answered,
        }
    }
    Err(last.unwrap_or_else(|| JoinError::Unable { message: "none is known".to_owned() }))
}

async fn ask_voter(
    identity: &Identity,
    address: SocketAddr,
    authority: Fingerprint,
    what: &What,
) -> Result<Admitted, JoinError> {
    // A certificate that is made by a clock which is far off is good for nothing, and where this host's is, those of others are.
    let clock = join::ask_openly(identity, address, authority, bytes_of(&What::Clock), WITHIN).await;
    match understood(&clock.map_err(JoinError::Unreached)?)? {
        Reply::Clock { unix_ms } => compare(address, unix_ms)?,
        reply => return Err(other(reply)),
    }
    let asked = join::ask(identity, address, authority, bytes_of(what), WITHIN).await.map_err(|error| match error {
        LinkError::Unreachable { .. } | LinkError::NotTrusted { .. } | LinkError::OtherProtocol { .. } => {
            JoinError::Unreached(error)
        }
        // It may have heard the question, and done what was asked.
        error => JoinError::Unable { message: error.to_string() },
    })?;
    match understood(&asked)? {
        Reply::Admitted(admitted) => Ok(*admitted),
        reply => Err(other(reply)),
    }
}

fn bytes_of(what: &What) -> Bytes {
    postcard::to_stdvec(&Request { version: VERSION, what: what.clone() }).expect("plain data").into()
}

fn understood(bytes: &Bytes) -> Result<Reply, JoinError> {
    postcard::from_bytes(bytes).map_err(|error| JoinError::Unable { message: format!("its answer is none: {error}") })
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

/// One of each kind with its name, for the corpora.
#[cfg(feature = "testing")]
pub(crate) fn requests() -> [(&'static str, Vec<u8>); 4] {
    let name = Name::parse("node-2").expect("a name");
    let replace = What::Replace { certificate: vec![0x30, 0x82, 1, 0x6d], signature: vec![0x30, 0x45, 2, 0x21] };
    [("join", What::Join { name, secret: [7; 32] }), ("renew", What::Renew), ("clock", What::Clock), ("replace", replace)]
        .map(|(name, what)| (name, postcard::to_stdvec(&Request { version: VERSION, what }).expect("plain data")))
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

fn refused(refusal: &Refusal) -> Reply {
    let remedy = match refusal {
        // Whoever asks here has no node to ask.
        Refusal::UnknownNode(_) => "let it join anew, with an empty data directory and a new token",
        other => other.remedy(),
    };
    Reply::Refused { message: refusal.to_string(), remedy: remedy.to_owned() }
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
            What::Join { .. } | What::Replace { .. } if authority.is_err() => return sealed(),
            What::Join { name, secret } => {
                let (node, token) = (shown.peer().node, JoinToken::digest(&secret));
                // Strangers write nothing into the log: only a token does.
                if let Err(reply) = self.knows(&token).await {
                    return reply;
                }
                let command = Command::UseToken { token, node, proven: shown.key_digest(), name: name.clone() };
                match self.admitted(node, &name, command).await {
                    Ok(role) => (name, role),
                    Err(reply) => return reply,
                }
            }
            What::Replace { certificate, signature } => match self.replaced(shown, &certificate, &signature).await {
                Ok(known) => known,
                Err(reply) => return reply,
            },
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

    /// Has it agreed on that a node is let in, and says as what.
    async fn admitted(&self, node: NodeId, name: &Name, command: Command) -> Result<Role, Reply> {
        let elsewhere = |message: String| Reply::Elsewhere { message };
        match self.consensus.propose(None, command, REQUEST_WITHIN).await {
            Ok(Answer::Admitted(role)) => Ok(role),
            Ok(Answer::Refused(refusal)) => {
                tracing::warn!(%node, %name, %refusal, "not let in");
                Err(refused(&refusal))
            }
            Ok(_) => Err(elsewhere("the cluster gave another answer".to_owned())),
            Err(error) => Err(elsewhere(error.to_string())),
        }
    }

    /// A node that shows a new key, and that it has that of a node of this cluster, takes its place.
    async fn replaced(&self, shown: &Certificate, certificate: &[u8], signature: &[u8]) -> Result<(Name, Role), Reply> {
        let refused_for = |why: &dyn std::fmt::Display| Reply::Refused {
            message: format!("it does not prove which node it was: {why}"),
            remedy: "let it join anew, with an empty data directory and a new token".to_owned(),
        };
        let old = Certificate::from_der(certificate).map_err(|error| refused_for(&error))?;
        let now = clock::wall();
        self.root.vouches_for(&old, now).and_then(|()| old.peer().check_dates(now)).map_err(|error| refused_for(&error))?;
        if !old.has_signed(&words_of(self.root.fingerprint(), &old, shown), signature) {
            return Err(refused_for(&"its old key has not signed this"));
        }
        let name = Name::parse(&old.peer().name).map_err(|error| refused_for(&error))?;
        let (old, new, proven) = (old.peer().node, shown.peer().node, shown.key_digest());
        // Who is out writes nothing into the log either.
        if check_replace(&self.consensus.stale(), old, (new, proven)).is_err() {
            let state = self.read().await.map_err(|error| Reply::Elsewhere { message: error.to_string() })?;
            check_replace(&state, old, (new, proven)).map_err(|refusal| {
                tracing::warn!(node = %old, %name, %refusal, "not let in again");
                refused(&refusal)
            })?;
        }
        let role = self.admitted(new, &name, Command::Replace { old, new, proven }).await?;
        tracing::info!(%old, %new, %name, "a node that has lost its log is let in again");
        Ok((name, role))
    }

    /// Whether there is such a token.
    async fn knows(&self, token: &Digest) -> Result<(), Reply> {
        if !self.consensus.stale().tokens.contains_key(token) {
            let state = self.read().await.map_err(|error| Reply::Elsewhere { message: error.to_string() })?;
            if !state.tokens.contains_key(token) {
                return Err(refused(&Refusal::BadToken));
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
