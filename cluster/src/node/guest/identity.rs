//! Telling a child who it is. One that was sealed in its agent's gate runs no code of users before that; a branch of what runs
//! cannot be held back, and is marked so.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, UNIX_EPOCH};

use agent::protocol::{Address, FromAgent, Identity, Outcome, Phase, STEPS_MAX, Step, TEXT_MAX, ToAgent};
use serde::{Deserialize, Serialize};
use types::MachineId;

use super::network::{Link, PREFIX};
use super::talk::{Talk, TalkError, nonsense};

/// How long a child may take to become somebody. Kernels that are emulated take a second; hooks may take a minute each.
const DEADLINE: Duration = Duration::from_secs(240);
/// How much longer all children of one fork may take together, for each of them.
const DEADLINE_EACH: Duration = Duration::from_secs(2);

/// What a child reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// From the call of the fork until the child was ready.
    pub after: Duration,
    /// Where it is on the network, if that was asked for.
    pub link: Option<Link>,
    /// Whether nothing of users ran before that.
    pub was_gated: bool,
    /// Its host name.
    pub hostname: String,
    /// Each step, with the time it took in the guest.
    pub steps: Vec<Step>,
}

/// The fork that a child is of.
#[derive(Clone, Copy, Debug)]
pub struct Fork {
    /// When it was called.
    pub since: Instant,
    /// How many children it has.
    pub children: u32,
}

/// A link, as the agent is told of it.
pub(crate) fn address(link: Link) -> Address {
    Address { address: link.guest.octets(), prefix: PREFIX, gateway: Some(link.host.octets()) }
}

/// Tells the child at the other end of the stream who it is. When it knows, code of users may run in it.
///
/// # Errors
/// [`TalkError`]; [`TalkError::Failed`] if a step failed without which it may be like another.
pub fn tell(
    stream: UnixStream,
    id: MachineId,
    link: Option<Link>,
    without: &[String],
    fork: Fork,
) -> Result<Readiness, TalkError> {
    let all = DEADLINE + DEADLINE_EACH * fork.children;
    let left = all.saturating_sub(fork.since.elapsed()).min(DEADLINE);
    if left.is_zero() {
        return Err(TalkError::Late { deadline: all });
    }
    let mut talk = Talk::begin(stream, left)?;
    let was_gated = talk.phase() == Phase::Gated;
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).map_err(|error| TalkError::Io(error.into()))?;
    let now = pages::clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    let hostname = hostname(id);
    let identity = Identity {
        id,
        hostname: hostname.clone(),
        seed,
        unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        address: link.map(address),
        without: without.to_vec(),
    };
    let steps = match talk.exchange(&ToAgent::Identity(identity))? {
        FromAgent::Ready(steps) => checked(steps)?,
        other => return Err(nonsense(&other)),
    };
    if was_gated {
        talk.ask_done(&ToAgent::Go)?;
    }
    Ok(Readiness { after: fork.since.elapsed(), link, was_gated, hostname, steps })
}

/// A name that no other machine has: the last 12 digits of its id.
fn hostname(id: MachineId) -> String {
    let digits = id.as_uuid().simple().to_string();
    format!("m-{}", &digits[20..])
}

fn checked(steps: Vec<Step>) -> Result<Vec<Step>, TalkError> {
    let is_too_long = |step: &Step| {
        let text = match &step.outcome {
            Outcome::Done => 0,
            Outcome::Skipped(text) | Outcome::Failed(text) => text.len(),
        };
        step.name.len().max(text) > TEXT_MAX
    };
    if steps.len() > STEPS_MAX || steps.iter().any(is_too_long) {
        return Err(TalkError::Nonsense { what: "a report that is too long".to_owned() });
    }
    let failed = steps.iter().find_map(|step| match &step.outcome {
        Outcome::Failed(why) => Some(format!("step {} after the fork failed: {why}", step.name)),
        _ => None,
    });
    match failed {
        Some(message) => Err(TalkError::Failed(agent::protocol::Failed { message, errno: 0 })),
        None => Ok(steps),
    }
}
