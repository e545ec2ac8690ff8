//! Finds payloads and outputs again, on whichever node they are.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use axum::http::Method;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use control::State;
use control::state::{Job, JobId, JobSpec, Life, Outcome, Output, Task, Work};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use types::{Digest, NodeId};

use super::payload::{OUTPUT_BYTES_MAX, Payload, PayloadError};
use super::record::{Record, Told, Try};
use super::store::{Store, StoreError};
use crate::api::wire::{TaskResult, TaskRun};
use crate::member::{ClusterError, Membership, fork::name_of};

/// Where another node is asked for outputs.
pub const OUTPUTS: &str = "/v1/between/outputs/read";
/// Where another node is asked for, or given, a payload: this and its digest.
pub const PAYLOADS: &str = "/v1/between/payloads/";
/// The most bytes of outputs in one answer, unless one alone has more.
pub const ANSWER_BYTES: usize = 8 << 20;
/// How long a node that did not answer is not asked again.
const SILENT_FOR: Duration = Duration::from_secs(10);
/// How long another node may take to answer,
const ASK_WITHIN: Duration = Duration::from_secs(5);
/// with outputs, a second for each MiB more, since links are slow,
const OUTPUTS_WITHIN: Duration = ASK_WITHIN.saturating_add(Duration::from_secs(ANSWER_BYTES as u64 >> 20));
/// and with the files of one, which may be larger than that.
const FILES_WITHIN: Duration = ASK_WITHIN.saturating_add(Duration::from_secs((2 * OUTPUT_BYTES_MAX) >> 20));
/// How long all may take together to give a payload, if none gave it in that time: it may be large, and the link slow.
const GIVE_WITHIN: Duration = Duration::from_secs(60);
/// How long a payload that nobody gave is not asked for again.
const LOST_FOR: Duration = Duration::from_secs(5);
/// Payloads in memory.
const CACHED: usize = 4;

/// Why the payload of a job is not here.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum PayloadLost {
    #[error("no node that answers has what the job's tasks do ({0})")]
    Nowhere(Digest),
    #[error("what the job's tasks do is not understood: {0}")]
    Malformed(#[from] PayloadError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Payloads that were read of late, and those that somebody still has: no payload is in memory twice.
#[derive(Default)]
struct Recent {
    /// The oldest first.
    kept: VecDeque<Arc<Payload>>,
    known: BTreeMap<Digest, Weak<Payload>>,
    /// Those that are being read: many batches of a job want one at once.
    reading: BTreeMap<Digest, Weak<tokio::sync::Mutex<()>>>,
    lost: Option<(Digest, Instant)>,
}

impl Recent {
    fn get(&self, digest: Digest) -> Option<Arc<Payload>> {
        self.known.get(&digest)?.upgrade()
    }

    fn add(&mut self, digest: Digest, payload: &Arc<Payload>) {
        self.kept.push_back(Arc::clone(payload));
        if self.kept.len() > CACHED {
            self.kept.pop_front();
        }
        self.known.retain(|_, payload| payload.strong_count() > 0);
        self.known.insert(digest, Arc::downgrade(payload));
    }

    /// Whose turn it is to read it.
    fn turn(&mut self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        self.reading.retain(|_, turn| turn.strong_count() > 0);
        let turn = self.reading.get(&digest).and_then(Weak::upgrade).unwrap_or_default();
        self.reading.insert(digest, Arc::downgrade(&turn));
        turn
    }

    fn is_lost(&self, digest: Digest) -> bool {
        self.lost.is_some_and(|(lost, since)| lost == digest && since.elapsed() < LOST_FOR)
    }
}

/// What tasks do, by job.
#[derive(Clone)]
pub struct Payloads {
    store: Arc<Store>,
    member: Arc<Membership>,
    recent: Arc<Mutex<Recent>>,
}

impl Payloads {
    /// Of this node.
    #[must_use]
    pub fn new(store: Arc<Store>, member: Arc<Membership>) -> Self {
        Self { store, member, recent: Arc::default() }
    }

    /// What the tasks of a job do. It is fetched from another node if need be, and kept here.
    ///
    /// # Errors
    /// [`PayloadLost`].
    pub async fn of(&self, spec: &JobSpec) -> Result<Arc<Payload>, PayloadLost> {
        let digest = match &spec.work {
            Work::Here(bytes) => return Ok(Arc::new(Payload::decode(bytes)?)),
            Work::Kept(digest) => *digest,
        };
        if let Some(known) = self.recent().get(digest) {
            return Ok(known);
        }
        let turn = self.recent().turn(digest);
        let _one_at_a_time = turn.lock().await;
        if let Some(known) = self.recent().get(digest) {
            return Ok(known);
        }
        let bytes = match self.stored(digest).await? {
            Some(bytes) => bytes.into(),
            None if self.recent().is_lost(digest) => return Err(PayloadLost::Nowhere(digest)),
            None => match self.fetch(digest).await {
                Some(bytes) => bytes,
                None => {
                    self.recent().lost = Some((digest, Instant::now()));
                    return Err(PayloadLost::Nowhere(digest));
                }
            },
        };
        let payload = Arc::new(Payload::decode(&bytes)?);
        self.recent().add(digest, &payload);
        Ok(payload)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stored(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let store = Arc::clone(&self.store);
        blocking(move || store.payload(digest)).await
    }

    /// From whom has it: one after the other, and then, with more patience, from all at once.
    async fn fetch(&self, digest: Digest) -> Option<Bytes> {
        let mut late = Vec::new();
        for node in self.member.others() {
            match tokio::time::timeout(ASK_WITHIN, self.given(node, digest)).await {
                Ok(Some(bytes)) => return Some(bytes),
                Ok(None) => {}
                Err(_) => late.push(node),
            }
        }
        let mut asks: FuturesUnordered<_> = late.into_iter().map(|node| self.given(node, digest)).collect();
        let first = async {
            while let Some(given) = asks.next().await {
                if given.is_some() {
                    return given;
                }
            }
            None
        };
        tokio::time::timeout(GIVE_WITHIN, first).await.ok().flatten()
    }

    /// What a node gives as this payload, if it is; it is kept here.
    async fn given(&self, node: NodeId, digest: Digest) -> Option<Bytes> {
        let path = format!("{PAYLOADS}{digest}");
        let asked = self.member.ask_node(node, None, Method::GET, &path, None);
        let (_, bytes) = asked.await.ok().filter(|(status, bytes)| status.is_success() && Digest::of(bytes) == digest)?;
        let (store, kept) = (Arc::clone(&self.store), bytes.clone());
        // The next one asks again, if this node cannot keep it.
        let kept = blocking(move || store.put_payload(&kept)).await;
        kept.map(drop).unwrap_or_else(|error| tracing::warn!(%error, "a payload is not kept"));
        Some(bytes)
    }

    /// Puts a payload on this node's disk and on those of others, until a majority of the voters has it.
    ///
    /// # Errors
    /// [`StoreError`] of this node, or [`ClusterError`] if no majority keeps it in time.
    pub async fn spread(&self, payload: Vec<u8>) -> Result<Digest, SpreadError> {
        let payload = Bytes::from(payload);
        let (store, here) = (Arc::clone(&self.store), payload.clone());
        let digest = blocking(move || store.put_payload(&here)).await?;
        let (own, voters) = (self.member.node(), self.member.consensus.voters());
        let mut have = usize::from(voters.contains(&own));
        // The others fetch it when they run tasks of it.
        let asks = voters.iter().filter(|node| **node != own).map(|node| {
            let (member, payload, node) = (Arc::clone(&self.member), payload.clone(), *node);
            let path = format!("{PAYLOADS}{digest}");
            // Those that nobody waits for any more go on: the more have it the better.
            tokio::spawn(async move {
                let asked = member.ask_node(node, None, Method::PUT, &path, Some(payload)).await;
                asked.is_ok_and(|(status, _)| status.is_success())
            })
        });
        let mut asks: FuturesUnordered<_> = asks.collect();
        let until = tokio::time::Instant::now() + SPREAD_WITHIN;
        while have <= voters.len() / 2 {
            match tokio::time::timeout_at(until, asks.next()).await {
                Ok(Some(kept)) => have += usize::from(kept.unwrap_or(false)),
                Ok(None) | Err(_) => return Err(SpreadError::NoMajority { have, voters: voters.len() }),
            }
        }
        Ok(digest)
    }
}

/// How long a payload may take to reach a majority.
const SPREAD_WITHIN: Duration = Duration::from_secs(30);

/// Why a payload is not where it has to be.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message says what its fields are")]
pub enum SpreadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{have} of {voters} voters keep what the job's tasks do, where a majority has to")]
    NoMajority { have: usize, voters: usize },
}

/// A question for outputs.
#[derive(Serialize, Deserialize)]
pub struct Asked {
    /// Which tries.
    pub tries: Vec<Try>,
    /// Whether their files are wanted, too.
    pub with_files: bool,
}

/// Outputs, wherever they are.
#[derive(Clone)]
pub struct Results {
    store: Arc<Store>,
    member: Arc<Membership>,
    /// Nodes that did not answer, and when: they are not waited for again at once.
    silent: Arc<Mutex<BTreeMap<NodeId, Instant>>>,
}

/// What was found of some tasks.
#[derive(Default)]
struct Found {
    records: BTreeMap<u32, Record>,
    /// Tasks that were not looked for: what was found is enough at a time.
    left: Vec<u32>,
}

impl Results {
    /// As this node finds them.
    #[must_use]
    pub fn new(store: Arc<Store>, member: Arc<Membership>) -> Self {
        Self { store, member, silent: Arc::default() }
    }

    /// What is kept of a task, with its files; `None`: nobody has anything who answers.
    pub async fn record(&self, state: &State, job: JobId, task: u32, output: Output) -> Option<Record> {
        self.find(state, job, &[(task, output)], true).await.records.remove(&task)
    }

    /// What is kept of these tasks, as much as one answer of each node holds.
    async fn find(&self, state: &State, job: JobId, wanted: &[(u32, Output)], with_files: bool) -> Found {
        let mut found = Found::default();
        let mut left: Vec<(u32, Output)> = wanted.to_vec();
        // First those that are heard, and of two of them the one that ran it.
        for turn in 0..2 {
            let mut by_node: BTreeMap<NodeId, Vec<Try>> = BTreeMap::new();
            for (task, output) in &left {
                let of = Try { job, task: *task, epoch: output.epoch, node: output.node };
                let mut at: Vec<NodeId> = [Some(output.node), output.copy].into_iter().flatten().collect();
                at.sort_by_key(|node| state.nodes.get(node).is_none_or(|node| node.life != Life::Up) || self.is_silent(*node));
                if let Some(at) = at.get(turn) {
                    by_node.entry(*at).or_default().push(of);
                }
            }
            let asks = by_node.into_iter().map(|(node, tries)| async move {
                let told = self.at(node, &tries, with_files).await;
                (tries, told)
            });
            for (tries, told) in futures_util::future::join_all(asks).await {
                found.left.extend(after_the_last(&tries, &told));
                let ours = told.records.into_iter().filter(|(of, _)| tries.contains(of));
                found.records.extend(ours.map(|(of, record)| (of.task, record)));
            }
            left.retain(|(task, _)| !found.records.contains_key(task) && !found.left.contains(task));
            if left.is_empty() {
                break;
            }
        }
        found
    }

    /// What a node tells of these, in their order; nothing if it does not answer.
    async fn at(&self, node: NodeId, tries: &[Try], with_files: bool) -> Told {
        let nothing = || Told { records: Vec::new(), is_cut: false };
        if node == self.member.node() {
            let (store, asked) = (Arc::clone(&self.store), tries.to_vec());
            let read = blocking(move || store.get(&asked, with_files, ANSWER_BYTES)).await;
            return read.inspect_err(|error| tracing::error!(%error, "outputs are not read")).unwrap_or_else(|_| nothing());
        }
        if self.is_silent(node) {
            return nothing();
        }
        let asked = postcard::to_stdvec(&Asked { tries: tries.to_vec(), with_files }).expect("plain data");
        let asking = self.member.ask_node(node, None, Method::POST, OUTPUTS, Some(asked.into()));
        match tokio::time::timeout(if with_files { FILES_WITHIN } else { OUTPUTS_WITHIN }, asking).await {
            Ok(Ok((status, bytes))) if status.is_success() => match postcard::from_bytes(&bytes) {
                Ok(told) => return told,
                Err(error) => tracing::warn!(%node, %error, "its outputs are not understood"),
            },
            Ok(Ok((status, _))) => tracing::warn!(%node, %status, "does not tell outputs"),
            Ok(Err(error)) => tracing::debug!(%node, %error, "cannot be asked for outputs"),
            Err(_) => tracing::warn!(%node, "does not tell outputs in time"),
        }
        self.silent.lock().unwrap_or_else(PoisonError::into_inner).insert(node, Instant::now());
        nothing()
    }

    fn is_silent(&self, node: NodeId) -> bool {
        let silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.get(&node).is_some_and(|since| since.elapsed() < SILENT_FOR)
    }

    /// How these tasks of a job ended, in words, and which of them are left for the next time. Those that have not ended are left out.
    pub async fn of(
        &self,
        state: &State,
        id: JobId,
        job: &Job,
        tasks: &[u32],
        payload: Option<&Payload>,
    ) -> (Vec<TaskResult>, Vec<u32>) {
        let ended: Vec<(u32, Outcome, Option<Output>)> = tasks
            .iter()
            .filter_map(|task| match job.tasks.get(*task)? {
                Task::Done { outcome, output } => Some((*task, outcome, output)),
                Task::Waiting { .. } | Task::Placed { .. } => None,
            })
            .collect();
        let wanted: Vec<(u32, Output)> = ended.iter().filter_map(|(task, _, output)| Some((*task, (*output)?))).collect();
        let Found { mut records, left } = self.find(state, id, &wanted, false).await;
        // In the order of tasks: what is after the first that is left comes the next time.
        let first = left.into_iter().min().unwrap_or(u32::MAX);
        let left: Vec<u32> = ended.iter().map(|(task, ..)| *task).filter(|task| *task >= first).collect();
        let told = ended.into_iter().filter(|(task, ..)| *task < first);
        let results = told.map(|(task, outcome, output)| {
            let input = payload.and_then(|payload| payload.inputs.of(task)).map(str::to_owned);
            let record = records.remove(&task);
            let is_output_lost = output.is_some() && record.is_none();
            let node = output.map(|output| name_of(state, output.node)).unwrap_or_default();
            TaskResult { is_output_lost, ..result(task, outcome, input, record, node) }
        });
        (results.collect(), left)
    }
}

/// Of tries that a node was asked for in this order, those that its answer had no room for: it says nothing of any after its last one.
fn after_the_last<'a>(tries: &'a [Try], told: &Told) -> impl Iterator<Item = u32> + use<'a> {
    let last = told.records.last().filter(|_| told.is_cut).map(|(of, _)| *of);
    let from = last.and_then(|last| tries.iter().position(|of| *of == last)).map_or(tries.len(), |last| last + 1);
    tries[from..].iter().map(|of| of.task)
}

/// How a task ended, in words.
fn result(task: u32, outcome: Outcome, input: Option<String>, record: Option<Record>, node: String) -> TaskResult {
    let (status, reason) = match outcome {
        Outcome::Exited(status) => (Some(status), None),
        Outcome::Failed(reason) => (None, Some(reason.code().to_owned())),
    };
    let mut result = TaskResult {
        task,
        input,
        is_success: status == Some(0),
        status,
        reason,
        detail: None,
        stdout: None,
        stdout_base64: None,
        stderr: None,
        stderr_base64: None,
        value: None,
        cut_bytes: 0,
        files_bytes: 0,
        is_output_lost: false,
        run: None,
    };
    let Some(record) = record else { return result };
    (result.stdout, result.stdout_base64) = text(record.printed.stdout);
    (result.stderr, result.stderr_base64) = text(record.printed.stderr);
    result.detail = record.detail;
    result.value = record.value;
    result.cut_bytes = record.printed.cut_bytes;
    result.files_bytes = record.files_bytes;
    result.run = Some(TaskRun {
        attempt: record.attempt,
        node,
        machine: record.machine,
        from: record.from,
        first_us: record.first_us,
        ready_us: record.ready_us,
        done_us: record.done_us,
        began_ms: record.began_ms,
    });
    result
}

/// As text, or in base64 if it is none; nothing if it is empty.
fn text(bytes: Vec<u8>) -> (Option<String>, Option<String>) {
    match String::from_utf8(bytes) {
        Ok(text) if text.is_empty() => (None, None),
        Ok(text) => (Some(text), None),
        Err(error) => (None, Some(BASE64_STANDARD.encode(error.as_bytes()))),
    }
}

/// Does what waits for the disk where that holds nobody up.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let panicked = |error: tokio::task::JoinError| StoreError::Io { path: "jobs.redb".into(), cause: error.to_string() };
    tokio::task::spawn_blocking(work).await.map_err(panicked)?
}

impl From<SpreadError> for ClusterError {
    fn from(error: SpreadError) -> Self {
        Self::NotKept(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_an_answer_had_no_room_for_is_left_in_whatever_order_it_was_asked_for() {
        let of = |task| Try { job: JobId(Uuid::nil()), task, epoch: types::Epoch(1), node: NodeId::from_uuid(Uuid::nil()) };
        let tries = [7, 8, 9, 1, 2].map(of);
        let told = |tasks: &[u32], is_cut| {
            let record = || Record::ended(Outcome::Exited(0), None, 0, 0);
            Told { records: tasks.iter().map(|task| (of(*task), record())).collect(), is_cut }
        };
        let left = |told| after_the_last(&tries, &told).collect::<Vec<_>>();
        assert_eq!(left(told(&[7, 8], true)), [9, 1, 2]);
        assert_eq!(left(told(&[7, 8, 9, 1], true)), [2]);
        assert_eq!(left(told(&[7, 9, 2], false)), [0; 0]);
        assert_eq!(left(told(&[], false)), [0; 0]);
    }

    #[test]
    fn a_payload_that_somebody_has_is_in_memory_once() {
        let payload = || {
            Arc::new(crate::jobs::payload::tests::payload(
                super::super::payload::Work::Eval("1".into()),
                super::super::payload::Inputs::Count(1),
            ))
        };
        let (mut recent, digest) = (Recent::default(), |number: usize| Digest::of(&number.to_le_bytes()));
        let held = payload();
        recent.add(digest(0), &held);
        (1..=CACHED + 1).for_each(|number| recent.add(digest(number), &payload()));
        assert!(Arc::ptr_eq(&recent.get(digest(0)).unwrap(), &held), "its job goes on");
        assert!(recent.get(digest(1)).is_none(), "nobody has it any more");
        drop(held);
        assert!(recent.get(digest(0)).is_none());
    }
}
