//! Puts outputs where they are safe: on this node's disk, and on that of another one. Only then is it reported that a task has
//! ended. What cannot be put anywhere has not ended: its task runs again, or ends `OUTPUT_LOST`.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use axum::http::Method;
use bytes::Bytes;
use control::command::Kept;
use control::state::{Life, Outcome};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use types::{NodeId, Reason};

use super::record::{Record, Try};
use super::store::Store;
use super::tasks::Tasks;
use crate::member::Membership;

/// Outputs that go to another node in one message, in all and in bytes: less than what one of that size may take there.
const BATCH: usize = 2000;
const BATCH_BYTES: usize = 16 << 20;
/// Outputs that wait to be kept, in KiB: tasks that end meanwhile wait, and are counted as running.
const WAITING_KIB: usize = 256 << 10;
/// Messages under way at once.
const MESSAGES: usize = 4;
/// What more comes within this time goes with the first.
const GATHER: Duration = Duration::from_millis(20);
/// How long another node may take to keep a batch, and more for each MiB of it: links are slow, and some go over them at once.
const COPY_WITHIN: Duration = Duration::from_secs(5);
const COPY_A_MIB_WITHIN: Duration = Duration::from_secs(1);
/// How long it is tried to find one that does.
const COPIED_WITHIN: Duration = Duration::from_secs(30);
const TRY_EVERY: Duration = Duration::from_millis(500);
/// The most bytes of such a message.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Where another node takes them.
pub const PATH: &str = "/v1/between/outputs";

/// A task that has run, or could not.
pub struct Finished {
    /// Which try.
    pub of: Try,
    /// What came of it.
    pub record: Record,
}

/// What one node has another keep.
#[derive(Serialize, Deserialize)]
pub struct Copies {
    /// Outputs of the node that sends them.
    pub records: Vec<(Try, Record)>,
}

impl Copies {
    /// Reads what another node sends, which can only be its own.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8], from: NodeId) -> Result<Self, String> {
        let copies: Self = match postcard::take_from_bytes(bytes) {
            Ok((copies, [])) => copies,
            Ok(_) => return Err("bytes after their end".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        match copies.records.iter().find(|(of, _)| of.node != from) {
            Some((of, _)) => Err(format!("an output of node {}", of.node)),
            None => Ok(copies),
        }
    }
}

/// See the module.
#[derive(Clone)]
pub struct Keeper {
    finished: mpsc::UnboundedSender<(Finished, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    tasks: Arc<OnceLock<Weak<Tasks>>>,
}

struct Keeping {
    store: Arc<Store>,
    member: Arc<Membership>,
    tasks: Arc<OnceLock<Weak<Tasks>>>,
}

impl Keeper {
    /// Begins. Within a runtime.
    #[must_use]
    pub fn start(store: Arc<Store>, member: Arc<Membership>) -> Self {
        let (finished, coming) = mpsc::unbounded_channel();
        let tasks = Arc::<OnceLock<Weak<Tasks>>>::default();
        let keeping = Arc::new(Keeping { store, member, tasks: Arc::clone(&tasks) });
        tokio::spawn(keeping.run(coming));
        Self { finished, room: Arc::new(Semaphore::new(WAITING_KIB)), tasks }
    }

    /// Whom it tells.
    pub fn tells(&self, tasks: &Arc<Tasks>) {
        self.tasks.get_or_init(|| Arc::downgrade(tasks));
    }

    /// Keeps what a task came to, when there is room for it to wait; its end is told when that is done.
    pub async fn keep(&self, finished: Finished) {
        let kib = u32::try_from(finished.record.bytes().div_ceil(1024).min(WAITING_KIB)).expect("some thousands");
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.expect("never closed");
        if self.finished.send((finished, room)).is_err() {
            tracing::debug!("nobody keeps outputs any more");
        }
    }
}

impl Keeping {
    async fn run(self: Arc<Self>, mut coming: mpsc::UnboundedReceiver<(Finished, OwnedSemaphorePermit)>) {
        let messages = Arc::new(Semaphore::new(MESSAGES));
        while let Some((first, mut rooms)) = coming.recv().await {
            let turn = Arc::clone(&messages).acquire_owned().await.expect("never closed");
            tokio::time::sleep(GATHER).await;
            let mut bytes = first.record.bytes();
            let mut batch = vec![(first.of, first.record)];
            while batch.len() < BATCH && bytes < BATCH_BYTES {
                let Ok((Finished { of, record }, room)) = coming.try_recv() else { break };
                rooms.merge(room);
                bytes += record.bytes();
                batch.push((of, record));
            }
            let keeping = Arc::clone(&self);
            tokio::spawn(async move {
                keeping.keep(batch).await;
                drop((turn, rooms));
            });
        }
    }

    async fn keep(&self, batch: Vec<(Try, Record)>) {
        let ended: Vec<(Try, Outcome)> = batch.iter().map(|(of, record)| (*of, record.outcome)).collect();
        let without: Vec<(Try, Outcome)> = batch.iter().map(|(of, record)| (*of, lost(record))).collect();
        let (ended, kept) = match self.kept(batch).await {
            Ok(kept) => (ended, kept),
            Err(detail) => {
                tracing::error!(detail, tasks = ended.len(), "outputs of tasks cannot be kept: they run again");
                (without, Kept::Nowhere)
            }
        };
        if let Some(tasks) = self.tasks.get().and_then(Weak::upgrade) {
            tasks.ended(&ended, kept);
        }
    }

    /// Where they are by now.
    async fn kept(&self, batch: Vec<(Try, Record)>) -> Result<Kept, String> {
        let (store, copies) = (Arc::clone(&self.store), Copies { records: batch });
        let here = tokio::task::spawn_blocking(move || {
            let put = store.put(&copies.records);
            (put, copies)
        });
        let (here, mut copies) = here.await.map_err(|error| error.to_string())?;
        here.map_err(|error| format!("{error}; {}", error.remedy()))?;
        let until = Instant::now() + COPIED_WITHIN;
        let mut last = String::new();
        loop {
            let others = self.others();
            let message = {
                // Of a job that was forgotten meanwhile nobody keeps anything, and nobody asks; others in this batch must not wait for it.
                let state = self.member.consensus.stale();
                copies.records.retain(|(of, _)| state.jobs.contains_key(&of.job));
                if others.is_empty() || copies.records.is_empty() {
                    return Ok(Kept::Here);
                }
                Bytes::from(postcard::to_stdvec(&copies).expect("plain data"))
            };
            for other in others {
                match self.copied(other, &message).await {
                    Ok(()) => return Ok(Kept::HereAnd(other)),
                    Err(error) => last = error,
                }
            }
            if Instant::now() >= until {
                return Err(format!("no other node keeps a copy: {last}"));
            }
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Nodes that may keep a copy, those that are heard first; each node begins with another one. None: this node is alone.
    fn others(&self) -> Vec<NodeId> {
        let state = self.member.consensus.stale();
        let own = self.member.node();
        let mut others: Vec<_> = state.nodes.iter().filter(|(id, node)| **id != own && node.life != Life::Lost).collect();
        others.sort_by_key(|(id, node)| (node.life != Life::Up, node.is_draining, **id < own, **id));
        others.into_iter().map(|(id, _)| *id).collect()
    }

    async fn copied(&self, other: NodeId, message: &Bytes) -> Result<(), String> {
        let asked = self.member.ask_node(other, None, Method::PUT, PATH, Some(message.clone()));
        let within = COPY_WITHIN + COPY_A_MIB_WITHIN * u32::try_from(message.len() >> 20).expect("some tens");
        match tokio::time::timeout(within, asked).await {
            Ok(Ok((status, _))) if status.is_success() => Ok(()),
            Ok(Ok((status, bytes))) => Err(format!("node {other} answers {status}: {}", String::from_utf8_lossy(&bytes))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("node {other} does not answer within {within:?}")),
        }
    }
}

/// What a task ends with whose output is nowhere: what has not run had none, and what is tried again for its own reason is.
fn lost(record: &Record) -> Outcome {
    match record.outcome {
        failed @ Outcome::Failed(_) if record.machine.is_none() || failed.may_be_tried_again() => failed,
        Outcome::Failed(_) | Outcome::Exited(_) => Outcome::Failed(Reason::OutputLost),
    }
}

#[cfg(test)]
mod tests {
    use types::MachineId;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_has_run_and_is_kept_nowhere_is_not_passed_off_as_ended() {
        let ended = |outcome, has_run: bool| {
            let machine = has_run.then(|| MachineId::from_uuid(Uuid::from_u128(1)));
            lost(&Record { machine, ..Record::ended(outcome, None, 0, 0) })
        };
        let output_lost = Outcome::Failed(Reason::OutputLost);
        assert_eq!(ended(Outcome::Exited(0), true), output_lost);
        assert_eq!(ended(Outcome::Failed(Reason::Oom), true), output_lost);
        for own in [Reason::ForkFailed, Reason::WorkerCrashed] {
            assert_eq!(ended(Outcome::Failed(own), false), Outcome::Failed(own));
        }
        assert_eq!(ended(Outcome::Failed(Reason::WorkerCrashed), true), Outcome::Failed(Reason::WorkerCrashed));
    }
}
