//! Rules about users.

use std::time::Duration;

use types::{Digest, Name};

use super::Outcomes;
use crate::command::{Answer, Refusal};
use crate::state::{Level, Rights, State, User};

pub(super) fn add(state: &mut State, name: &Name, credential: Digest, rights: &Rights, lasts_ms: Option<u64>) -> Outcomes {
    // Whoever may not change a cluster has no use for all of it, and could not say whose machines it forks.
    if rights.tenant.is_none() && rights.level != Level::Admin {
        return Err(Refusal::NoTenant);
    }
    let is_same = |(other, user): &(&Name, &User)| *other == name || user.credential == credential;
    if let Some((other, _)) = state.users.iter().find(is_same) {
        return Err(Refusal::UserExists(other.clone()));
    }
    let until = lasts_ms.map(|ms| state.time + Duration::from_millis(ms));
    state.users.insert(name.clone(), User { credential, rights: rights.clone(), until });
    Ok(Answer::Done)
}

pub(super) fn remove(state: &mut State, name: &Name) -> Outcomes {
    state.users.remove(name).map(|_| Answer::Done).ok_or_else(|| Refusal::UnknownUser(name.clone()))
}
