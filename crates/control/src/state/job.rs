//! Jobs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ImageKey, Resources, Tasks};
use crate::clock::Tick;

/// One job, drawn by whoever submits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub Uuid);

/// A fan-out request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What was asked for.
    pub spec: JobSpec,
    /// When.
    pub submitted: Tick,
    /// Where its tasks are.
    pub tasks: Tasks,
    /// Since when all of them are at their end.
    pub ended: Option<Tick>,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// What its children are forked from.
    pub image: ImageKey,
    /// How many.
    pub count: u32,
    /// What each runs.
    pub command: Vec<String>,
    /// What each may take.
    pub each: Resources,
    /// How they are spread.
    pub spread: Spread,
    /// Labels that a node has to have.
    pub labels: BTreeMap<String, String>,
    /// How often a task is tried again after a failure that is not its own.
    pub retries: u32,
    /// When what has not ended is ended.
    pub deadline: Option<Tick>,
}

/// How tasks are spread over nodes that suit them equally.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Spread {
    /// Over all.
    Spread,
    /// On as few as possible.
    Pack,
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
