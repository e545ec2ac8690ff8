//! Jobs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use types::Digest;
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
    /// When what has not ended is ended.
    pub deadline: Option<Tick>,
    /// Where its tasks are.
    pub tasks: Tasks,
    /// When a try of one of them failed last for a reason that may be its node's.
    pub failed: Option<Tick>,
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
    /// Of all that was asked for, as it was put: the same job is never another one.
    pub request: Digest,
    /// What its tasks do.
    pub work: Work,
    /// For people: what it is called, what was named, who asked.
    pub about: About,
    /// What each may take.
    pub each: Resources,
    /// How they are spread.
    pub spread: Spread,
    /// Labels that a node has to have.
    pub labels: BTreeMap<String, String>,
    /// How often a task is tried again after a failure that is not its own.
    pub retries: u32,
    /// After how many milliseconds what has not ended is ended.
    pub lasts_ms: Option<u64>,
    /// The most tasks that are placed at a time.
    pub max_parallel: Option<u32>,
    /// On how many nodes its image is to be while it goes on.
    pub replicas: u8,
}

impl JobSpec {
    /// So many children of an image, each with so much, spread over all nodes and tried again twice.
    #[must_use]
    pub fn new(image: ImageKey, count: u32, each: Resources) -> Self {
        Self {
            image,
            count,
            request: Digest::of(&[]),
            work: Work::Here(Vec::new()),
            about: About::default(),
            each,
            spread: Spread::Spread,
            labels: BTreeMap::new(),
            retries: 2,
            lasts_ms: None,
            max_parallel: None,
            replicas: 1,
        }
    }
}

/// What the tasks of a job do. Nothing here is looked into: those who run them read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// All of it.
    Here(Vec<u8>),
    /// Too much for the log: nodes keep it under this digest, and a majority of the voters has it on disk.
    Kept(Digest),
}

/// What people see of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// What it is called.
    pub name: Option<String>,
    /// The template that was named.
    pub template: String,
    /// What its tasks do, in short.
    pub work: String,
    /// Who submitted it.
    pub by: String,
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
