//! Tasks that are this node's: children are forked for them, told what to do, and ended.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use control::State;
use control::command::Kept;
use control::reconcile::Run;
use control::state::{ImageKey, JobId, JobSpec, Outcome, Task};
use tokio::sync::{Notify, Semaphore, watch};
use types::{Epoch, MachineId, NodeId, Reason};

use super::keeper::{Finished, Keeper};
use super::payload::{Payload, Told};
use super::perform::{Done, Log, perform};
use super::record::{Printed, Record, Try};
use super::results::Payloads;
use crate::api::App;
use crate::api::wire::{JobHere, LogQuery, TaskFrom};
use crate::node::guest::words::GuestError;
use crate::node::peers::ForkedChild;
use crate::node::registry::{MachineState, Origin};
use crate::node::service::{ForkFrom, ForkOrder, ForkReport};
use crate::node::{NodeError, Service, metrics};

/// Children that are forked in one call: the first of them waits for the last to know who it is, and costs its ticks meanwhile.
const BATCH: usize = 4;
/// Calls at once: with more the children of one wait for those of another.
const BATCHES: usize = 4;
/// How long it may take until it is known why a guest broke off.
const ENDS_WITHIN: Duration = Duration::from_secs(2);
const KILL_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// See the module.
pub struct Tasks {
    app: App,
    node: NodeId,
    payloads: Payloads,
    keeper: Keeper,
    forks: Semaphore,
    inner: Mutex<Inner>,
    /// Something has ended, and is to be reported.
    pub news: Notify,
}

#[derive(Default)]
struct Inner {
    runs: BTreeMap<(JobId, u32), OnNode>,
    here: HashMap<JobId, JobHere>,
}

/// A task that is this node's, or was.
struct OnNode {
    epoch: Epoch,
    ended: Option<(Outcome, Kept)>,
    is_over: watch::Sender<bool>,
    /// It prints no more; what it has printed is being kept.
    is_done: bool,
    log: Arc<Log>,
}

/// A task that is to be run.
#[derive(Clone)]
struct Order {
    of: Try,
    attempt: u32,
    log: Arc<Log>,
    is_over: watch::Receiver<bool>,
}

/// What all tasks of a batch have in common.
struct Batch {
    key: ImageKey,
    payload: Arc<Payload>,
    began: Instant,
    began_ms: u64,
}

impl Tasks {
    /// Of this node.
    #[must_use]
    pub fn new(app: App, node: NodeId, payloads: Payloads, keeper: Keeper) -> Arc<Self> {
        let (forks, inner, news) = (Semaphore::new(BATCHES), Mutex::default(), Notify::new());
        Arc::new(Self { app, node, payloads, keeper, forks, inner, news })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tasks that run, or have ended and were not taken note of yet.
    #[must_use]
    pub fn observed(&self) -> BTreeMap<(JobId, u32), Run> {
        let inner = self.lock();
        inner.runs.iter().map(|(task, run)| (*task, Run { epoch: run.epoch, ended: run.ended })).collect()
    }

    /// What this node has done for a job since it started.
    #[must_use]
    pub fn here(&self, job: JobId) -> Option<JobHere> {
        self.lock().here.get(&job).copied()
    }

    /// What a task has printed from there on; `None`: it does not run here, or not any more.
    #[must_use]
    pub fn printed(&self, job: JobId, task: u32, from: LogQuery) -> Option<Printed> {
        let log = Arc::clone(&self.lock().runs.get(&(job, task)).filter(|run| !run.is_done)?.log);
        let printed = log.printed().from(from.stdout, from.stderr);
        Some(printed)
    }

    /// Runs these, each of its order.
    pub fn start(self: &Arc<Self>, orders: &[(JobId, u32, Epoch)], state: &State) {
        let mut by_job: BTreeMap<JobId, Vec<Order>> = BTreeMap::new();
        for (job, task, epoch) in orders {
            let Some(Task::Placed { attempt, .. }) = state.jobs.get(job).and_then(|job| job.tasks.get(*task)) else { continue };
            let (over, is_over) = watch::channel(false);
            let log = Arc::<Log>::default();
            let run = OnNode { epoch: *epoch, ended: None, is_over: over, is_done: false, log: Arc::clone(&log) };
            self.lock().runs.insert((*job, *task), run);
            let of = Try { job: *job, task: *task, epoch: *epoch, node: self.node };
            by_job.entry(*job).or_default().push(Order { of, attempt, log, is_over });
        }
        for (job, orders) in by_job {
            let spec = Arc::new(state.jobs[&job].spec.clone());
            for batch in orders.chunks(BATCH) {
                tokio::spawn(Arc::clone(self).run(Arc::clone(&spec), batch.to_vec()));
            }
        }
    }

    /// Ends a task: what it comes to does not count.
    pub fn end(&self, job: JobId, task: u32) {
        if let Some(run) = self.lock().runs.get(&(job, task)) {
            run.is_over.send_replace(true);
        }
    }

    /// Forgets how a task ended.
    pub fn forget(&self, job: JobId, task: u32) {
        self.lock().runs.remove(&(job, task));
    }

    /// Ends all of them: this node is another one by now, or nobody's.
    pub fn end_all(&self) {
        let mut inner = self.lock();
        for run in inner.runs.values() {
            run.is_over.send_replace(true);
        }
        // None of them is reported: the orders were another start's.
        inner.runs.clear();
    }

    /// Forgets what was done for jobs that there are no more.
    pub fn tidy(&self, state: &State) {
        self.lock().here.retain(|job, _| state.jobs.contains_key(job));
    }

    async fn run(self: Arc<Self>, spec: Arc<JobSpec>, orders: Vec<Order>) {
        // Before it is this batch's turn: others need not wait for what comes from another node.
        let payload = self.payloads.of(&spec).await;
        let turn = self.forks.acquire().await.expect("never closed");
        let (wanted, over): (Vec<Order>, Vec<Order>) = orders.into_iter().partition(|order| !*order.is_over.borrow());
        over.iter().for_each(|order| self.drop_run(&order.of));
        if wanted.is_empty() {
            return;
        }
        let began_ms = pages::clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let began_ms = u64::try_from(began_ms).unwrap_or(u64::MAX);
        let payload = match payload {
            Ok(payload) => payload,
            Err(error) => return self.fail(wanted, Reason::ForkFailed, &error.to_string(), began_ms).await,
        };
        let batch = Arc::new(Batch { key: spec.image.clone(), payload, began: Instant::now(), began_ms });
        let forked = self.fork(&batch, wanted.len()).await;
        drop(turn);
        let (report, from) = match forked {
            Ok(forked) => forked,
            Err(error) => {
                let reason = error.reason().unwrap_or(Reason::ForkFailed);
                return self.fail(wanted, reason, &error.to_string(), began_ms).await;
            }
        };
        let mut orders = wanted.into_iter();
        for (child, order) in report.children.iter().zip(&mut orders) {
            let (tasks, batch, child) = (Arc::clone(&self), Arc::clone(&batch), *child);
            tokio::spawn(async move {
                let (performs, again) = (Arc::clone(&tasks), order.clone());
                let performed = tokio::spawn(async move { performs.task(&batch, &child, from, order).await });
                if let Err(error) = performed.await {
                    tracing::error!(%error, "a task's conversation");
                    tasks.fail(vec![again], Reason::ForkFailed, "something of farfork failed", began_ms).await;
                }
            });
        }
        for ((id, error), order) in report.failures.into_iter().zip(&mut orders) {
            // One that broke off while it was told who it is may have ended for a reason that says more.
            let state = self.app.work(move |service: &Service| Ok(service.machine(&id.to_string())?.machine.state)).await;
            let reason = match state {
                Ok(MachineState::Ended { ended, .. }) if ended.reason != Reason::Killed => ended.reason,
                _ => error.reason().unwrap_or(Reason::ForkFailed),
            };
            self.fail(vec![order], reason, &error.to_string(), began_ms).await;
        }
        // Children that have ended and were forgotten before they were told of.
        self.fail(orders.collect(), Reason::ForkFailed, "its child is gone", began_ms).await;
    }

    async fn fork(&self, batch: &Batch, count: usize) -> Result<(ForkReport, TaskFrom), NodeError> {
        let (key, limit_bytes) = (batch.key.clone(), batch.payload.limit_bytes);
        let forked = self.app.work(move |service: &Service| {
            let image = service.image_of_key(&key)?;
            let is_settled = image.residency.as_ref().is_none_or(|residency| residency.is_settled);
            let from = match image.image.origin {
                Origin::Remote if is_settled => TaskFrom::Settled,
                Origin::Remote => TaskFrom::Remote,
                _ => TaskFrom::Local,
            };
            let report = service.fork(&ForkOrder {
                from: ForkFrom::Image(image.image.facts.id.to_string()),
                count: count as u64,
                limit_bytes,
                verify: false,
                network: false,
                tenant: Some(key.tenant),
                on: None,
                is_task: true,
            })?;
            Ok((report, from))
        });
        let (report, from) = forked.await?;
        Ok((report, from))
    }

    async fn task(&self, batch: &Batch, child: &ForkedChild, from: TaskFrom, order: Order) {
        let id = child.forked.id;
        self.forked(order.of.job, |here| {
            here.running += 1;
            here.forked += 1;
            match from {
                TaskFrom::Local => here.local += 1,
                TaskFrom::Remote => here.remote += 1,
                TaskFrom::Settled => here.settled += 1,
            }
        });
        let mut is_over = order.is_over.clone();
        let (job, task) = (order.of.job.0, order.of.task);
        self.app.note(|service| service.runs_task(id, job, task));
        let work = self.work(batch, id, &order);
        let deadline = batch.payload.task_deadline_ms.map_or(Duration::MAX, Duration::from_millis);
        let ended = tokio::select! {
            ended = tokio::time::timeout(deadline, work) => Some(ended.unwrap_or_else(|_| {
                (Outcome::Failed(Reason::DeadlineExceeded), Done { detail: Some(late(deadline)), ..Done::default() })
            })),
            // Whoever would have it ended is gone with the node.
            _ = is_over.wait_for(|is_over| *is_over) => None,
        };
        let ended_after = batch.began.elapsed();
        self.kill(id).await;
        // A job that is forgotten meanwhile is not counted any more.
        if let Some(here) = self.lock().here.get_mut(&order.of.job) {
            here.running = here.running.saturating_sub(1);
        }
        let Some((outcome, Done { value, detail, files, .. })) = ended else { return self.drop_run(&order.of) };
        let us = |time: Duration| u64::try_from(time.as_micros()).ok();
        // Whoever follows it finds it where it is kept, from then on.
        if let Some(run) = self.lock().runs.get_mut(&(order.of.job, order.of.task)).filter(|run| run.epoch == order.of.epoch) {
            run.is_done = true;
        }
        let printed = std::mem::take(&mut *order.log.printed());
        let record = Record {
            machine: Some(id),
            from: Some(from),
            first_us: us(child.forked.first),
            ready_us: child.ready.and_then(us),
            done_us: us(ended_after),
            printed,
            value,
            files_bytes: files.len() as u64,
            files,
            ..Record::ended(outcome, detail, order.attempt, batch.began_ms)
        };
        self.keeper.keep(Finished { of: order.of, record }).await;
    }

    /// Has the child do the work, and says how that ended.
    async fn work(&self, batch: &Batch, id: MachineId, order: &Order) -> (Outcome, Done) {
        let job = order.of.job.to_string();
        let told = Told { job: &job, task: order.of.task, attempt: order.attempt };
        let connected = self.app.work(move |service: &Service| service.connect(&id.to_string())).await;
        let done = match connected {
            Ok(stream) => perform(stream, &batch.payload, told, &order.log).await,
            Err(error) => Err(GuestError::Refused(error.to_string())),
        };
        match done {
            Ok(done) => (Outcome::Exited(done.status), done),
            Err(error) => {
                let (reason, detail) = self.why(id, &error).await;
                (Outcome::Failed(reason), Done { detail: Some(detail), ..Done::default() })
            }
        }
    }

    /// Why a guest broke off: its machine's end says more than its agent's silence.
    async fn why(&self, id: MachineId, error: &GuestError) -> (Reason, String) {
        let until = Instant::now() + ENDS_WITHIN;
        loop {
            let state = self.app.work(move |service: &Service| Ok(service.machine(&id.to_string())?.machine.state)).await;
            match state {
                Ok(MachineState::Ended { ended, .. }) => return (ended.reason, ended.detail),
                // Of an agent that answers in another way than it should more is not learned by waiting.
                Ok(_) if matches!(error, GuestError::Gone | GuestError::Refused(_)) && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                _ => return (Reason::GuestProtocol, error.to_string()),
            }
        }
    }

    /// Ends a child. Its room is not given to others before it is gone.
    async fn kill(&self, id: MachineId) {
        loop {
            match self.app.work(move |service: &Service| service.kill(&[id.to_string()], false, None)).await {
                // It has ended by itself, long ago perhaps; or all of them end with the node.
                Ok(_) | Err(NodeError::Ended { .. } | NodeError::UnknownMachine { .. } | NodeError::Stopping) => return,
                Err(error) => tracing::warn!(machine = %id, %error, "the child of a task is not ended yet"),
            }
            tokio::time::sleep(KILL_AGAIN_AFTER).await;
        }
    }

    async fn fail(&self, orders: Vec<Order>, reason: Reason, detail: &str, began_ms: u64) {
        for order in orders {
            tracing::debug!(job = %order.of.job, task = order.of.task, %reason, detail, "not run");
            if *order.is_over.borrow() {
                self.drop_run(&order.of);
                continue;
            }
            let record = Record::ended(Outcome::Failed(reason), Some(detail.to_owned()), order.attempt, began_ms);
            self.keeper.keep(Finished { of: order.of, record }).await;
        }
    }

    /// A task of this order is not here any more.
    fn drop_run(&self, of: &Try) {
        let mut inner = self.lock();
        if inner.runs.get(&(of.job, of.task)).is_some_and(|run| run.epoch == of.epoch) {
            inner.runs.remove(&(of.job, of.task));
        }
        drop(inner);
        self.news.notify_one();
    }

    /// What has ended is kept there by now.
    pub(super) fn ended(&self, finished: &[(Try, Outcome)], kept: Kept) {
        let mut inner = self.lock();
        for (of, outcome) in finished {
            match inner.runs.get_mut(&(of.job, of.task)).filter(|run| run.epoch == of.epoch) {
                // It was to be ended meanwhile.
                Some(run) if *run.is_over.borrow() => drop(inner.runs.remove(&(of.job, of.task))),
                Some(run) => {
                    run.ended = Some((*outcome, kept));
                    metrics::task_ended(match outcome {
                        Outcome::Exited(0) => "SUCCESS",
                        Outcome::Exited(_) => "EXIT",
                        Outcome::Failed(reason) => reason.code(),
                    });
                }
                None => {}
            }
        }
        drop(inner);
        self.news.notify_one();
    }

    fn forked(&self, job: JobId, change: impl FnOnce(&mut JobHere)) {
        change(self.lock().here.entry(job).or_default());
    }
}

fn late(deadline: Duration) -> String {
    format!("not done within {} ms", deadline.as_millis())
}
