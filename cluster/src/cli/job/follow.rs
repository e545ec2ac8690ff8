//! Submitting a job, and following it, over connections that may break off and nodes that may go.
//!
//! ```text
//!  submit ── lost, no quorum, busy: again under the same key ──▶ taken ──▶ results: a line a task ── broken off: from the first
//!                                                                  │       that is missing; what is known is not taken twice
//!                                                                  └─────▶ events: how far it is, at least every few seconds
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::error::JobError;
use super::limits::{REQUEST_MAX, TASKS_MAX};
use super::stream::{Events, Lines, Seen};
use crate::api::wire::{JobAnswer, JobRequest};
use crate::cli::client::{Answer, Client, ClientError};
use crate::cli::error::CliError;

/// How long it is tried, and waited, without an answer.
#[derive(Clone, Copy, Debug)]
pub(in crate::cli) struct Patience {
    /// To submit.
    pub(super) submit: Duration,
    /// To find it again.
    pub(super) follow: Duration,
    /// Until a connection that says nothing, where something is to be said, is taken for dead.
    pub(super) silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { submit: Duration::from_secs(30), follow: Duration::from_secs(60), silence: Duration::from_secs(30) }
    }
}

/// The first wait before it is tried again. Each is twice the one before it.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Submits it, again and again under the same key while it is not known whether it was taken.
pub(in crate::cli) async fn submit(
    client: &Client,
    request: &JobRequest,
    patience: Patience,
) -> Result<Answer<JobAnswer>, CliError> {
    let body: Bytes = serde_json::to_vec(request).expect("requests are maps with text keys").into();
    if body.len() > REQUEST_MAX {
        return Err(JobError::RequestTooLarge { bytes: body.len() as u64 }.into());
    }
    // A large one takes its time on a slow line.
    let within = patience.silence + Duration::from_secs(body.len() as u64 >> 20);
    let mut failing = Failing::new(patience.submit);
    let (mut is_reached, mut is_unknown) = (false, false);
    loop {
        let error = match timeout(within, client.post_bytes("/v1/jobs", body.clone())).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(_) => ClientError::Late { within },
        };
        let is_no_node = matches!(error, ClientError::NoNode { .. } | ClientError::NoCluster { .. });
        // Where no node ever was there is nothing to wait for.
        if !is_passing(&error) || (is_no_node && !is_reached) {
            return Err(error.into());
        }
        is_reached = true;
        is_unknown |= match &error {
            ClientError::Refused { body, .. } => matches!(body.code.as_str(), "OUTCOME_UNKNOWN" | "NO_ANSWER"),
            _ => !is_no_node,
        };
        if !failing.pause().await {
            return Err(match request.key.clone().filter(|_| is_unknown) {
                Some(key) => JobError::Unknown { key, within: patience.submit, source: error }.into(),
                None => error.into(),
            });
        }
    }
}

/// Whether another try may be answered.
fn is_passing(error: &ClientError) -> bool {
    const CODES: [&str; 6] = ["NO_QUORUM", "OUTCOME_UNKNOWN", "NO_ANSWER", "BUSY", "STOPPING", "UNREACHABLE"];
    match error {
        ClientError::Lost(_) | ClientError::Late { .. } | ClientError::NoNode { .. } | ClientError::NoCluster { .. } => true,
        ClientError::Refused { body, .. } => CODES.contains(&body.code.as_str()),
        ClientError::Request | ClientError::Answer { .. } => false,
    }
}

/// Tries since the last answer.
struct Failing {
    within: Duration,
    since: Option<Instant>,
    pause: Duration,
}

impl Failing {
    fn new(within: Duration) -> Self {
        Self { within, since: None, pause: PAUSE }
    }

    /// It was answered.
    fn heard(&mut self) {
        (self.since, self.pause) = (None, PAUSE);
    }

    /// It was not: waits before the next try, or says that it took too long.
    async fn pause(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.within {
            return false;
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        true
    }
}

/// A job, as it is followed.
pub(super) struct Following<'a> {
    client: &'a Client,
    job: Uuid,
    patience: Patience,
    /// Tasks that have ended, as the events say.
    ended: AtomicU32,
}

/// What has to be known of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Heard {
    /// Its number.
    pub(super) task: u32,
    /// Whether there are files.
    #[serde(default)]
    pub(super) files_bytes: u64,
    /// Whether no node that answers has its output.
    #[serde(default)]
    pub(super) is_output_lost: bool,
}

impl<'a> Following<'a> {
    pub(super) fn new(client: &'a Client, job: Uuid, patience: Patience) -> Self {
        Self { client, job, patience, ended: AtomicU32::new(0) }
    }

    /// Every result once, in whatever order they come: as the node wrote it, without the end of its line.
    pub(super) async fn results(
        &self,
        tasks: u32,
        mut take: impl FnMut(&[u8], Heard) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        /// Ends of the stream that brought nothing, of a job that has ended.
        const EMPTY_MAX: u32 = 3;
        let (mut seen, mut failing, mut empty) = (self.seen_none(tasks)?, Failing::new(self.patience.follow), 0);
        while let Some(first) = seen.first_missing() {
            let before = seen.count();
            match self.read_results(true, first, &mut seen, &mut failing, &mut take).await {
                Ok(()) => {
                    empty = if seen.count() == before { empty + 1 } else { 0 };
                    if empty >= EMPTY_MAX && self.asked().await?.value.job.is_ended {
                        return Err(JobError::Missing { job: self.job, missing: tasks - seen.count() }.into());
                    }
                    if seen.first_missing().is_some() {
                        sleep(PAUSE).await;
                    }
                }
                Err(error) => self.again(error, &mut failing).await?,
            }
        }
        Ok(())
    }

    /// Those that are there, in the order of tasks.
    pub(super) async fn results_so_far(
        &self,
        tasks: u32,
        mut take: impl FnMut(&[u8], Heard) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let (mut seen, mut failing) = (self.seen_none(tasks)?, Failing::new(self.patience.follow));
        loop {
            let first = seen.first_missing().unwrap_or(0);
            match self.read_results(false, first, &mut seen, &mut failing, &mut take).await {
                Ok(()) => return Ok(()),
                Err(error) => self.again(error, &mut failing).await?,
            }
        }
    }

    fn seen_none(&self, tasks: u32) -> Result<Seen, JobError> {
        if tasks > TASKS_MAX {
            return Err(JobError::Nonsense { job: self.job, why: format!("{tasks} tasks") });
        }
        Ok(Seen::new(tasks))
    }

    /// One connection's worth of them.
    async fn read_results(
        &self,
        follow: bool,
        first: u32,
        seen: &mut Seen,
        failing: &mut Failing,
        take: &mut impl FnMut(&[u8], Heard) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let nonsense = |why: String| CliError::from(JobError::Nonsense { job: self.job, why });
        let mut count = seen.count();
        let mut each = |line: &[u8]| {
            let heard: Heard = serde_json::from_slice(line).map_err(|error| nonsense(format!("a result: {error}")))?;
            match seen.see(heard.task) {
                Some(true) => take(line, heard).map(|()| seen.count()),
                Some(false) => Ok(seen.count()),
                None => Err(nonsense(format!("a result of task {}, which it does not have", heard.task))),
            }
        };
        let mut pieces = self.open(&format!("/v1/jobs/{}/results?follow={follow}&from={first}", self.job)).await?;
        failing.heard();
        let mut lines = Lines::default();
        loop {
            // A job may say nothing for hours, but not while tasks have ended whose results did not come, or nobody waits for more.
            let piece = match timeout(self.patience.silence, pieces.next()).await {
                Ok(piece) => piece?,
                Err(_) if !follow || self.ended.load(Ordering::Relaxed) > count => return Err(self.late().into()),
                Err(_) => continue,
            };
            failing.heard();
            let whole = match &piece {
                Some(piece) => lines.take(piece),
                None => lines.rest(),
            };
            for line in whole.map_err(|long| nonsense(long.to_string()))? {
                count = each(&line)?;
            }
            if piece.is_none() {
                return Ok(());
            }
        }
    }

    /// Shows how far it is, until it has ended.
    pub(super) async fn events(&self, mut show: impl FnMut(&JobAnswer)) -> Result<(), CliError> {
        let mut failing = Failing::new(self.patience.follow);
        loop {
            match self.read_events(&mut failing, &mut show).await {
                Ok(true) => return Ok(()),
                Ok(false) => sleep(PAUSE).await,
                Err(error) => self.again(error, &mut failing).await?,
            }
        }
    }

    /// One connection's worth of them; whether the last one was the end.
    async fn read_events(&self, failing: &mut Failing, show: &mut impl FnMut(&JobAnswer)) -> Result<bool, CliError> {
        let nonsense = |why: String| CliError::from(JobError::Nonsense { job: self.job, why });
        let mut pieces = self.open(&format!("/v1/jobs/{}/events", self.job)).await?;
        failing.heard();
        let mut events = Events::default();
        loop {
            let piece = timeout(self.patience.silence, pieces.next()).await.map_err(|_| self.late())??;
            let Some(piece) = piece else { return Ok(false) };
            failing.heard();
            for event in events.take(&piece).map_err(|long| nonsense(long.to_string()))? {
                if !matches!(event.name.as_str(), "progress" | "end") {
                    continue;
                }
                let answer: JobAnswer =
                    serde_json::from_slice(&event.data).map_err(|error| nonsense(format!("an event: {error}")))?;
                let counts = answer.job.counts;
                self.ended.store(counts.succeeded.saturating_add(counts.failed), Ordering::Relaxed);
                show(&answer);
                if event.name == "end" {
                    return Ok(true);
                }
            }
        }
    }

    /// The job as it is.
    pub(super) async fn asked(&self) -> Result<Answer<JobAnswer>, CliError> {
        let mut failing = Failing::new(self.patience.follow);
        let path = format!("/v1/jobs/{}", self.job);
        loop {
            match timeout(self.patience.silence, self.client.get(&path)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => self.again(error.into(), &mut failing).await?,
                Err(_) => self.again(self.late().into(), &mut failing).await?,
            }
        }
    }

    /// The job at its end. All of its results may be there before the cluster has agreed that they are.
    pub(super) async fn ended(&self) -> Result<Answer<JobAnswer>, CliError> {
        let mut waiting = Failing::new(self.patience.follow);
        loop {
            let answer = self.asked().await?;
            if answer.value.job.is_ended || !waiting.pause().await {
                return Ok(answer);
            }
        }
    }

    /// All of an answer that is no JSON.
    pub(super) async fn all_of(&self, path: &str, most: usize) -> Result<Vec<u8>, CliError> {
        let mut failing = Failing::new(self.patience.follow);
        loop {
            match self.read_all(path, most).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => self.again(error, &mut failing).await?,
            }
        }
    }

    async fn read_all(&self, path: &str, most: usize) -> Result<Vec<u8>, CliError> {
        let mut pieces = self.open(path).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = timeout(self.patience.silence, pieces.next()).await.map_err(|_| self.late())?? {
            if bytes.len() + piece.len() > most {
                return Err(JobError::Nonsense { job: self.job, why: format!("an answer of more than {most} bytes") }.into());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    async fn open(&self, path: &str) -> Result<crate::cli::client::Pieces, CliError> {
        Ok(timeout(self.patience.silence, self.client.open(path)).await.map_err(|_| self.late())??)
    }

    fn late(&self) -> ClientError {
        ClientError::Late { within: self.patience.silence }
    }

    /// Waits if another try may help, and says why it does not otherwise.
    async fn again(&self, error: CliError, failing: &mut Failing) -> Result<(), CliError> {
        match error {
            CliError::Client(error) if is_passing(&error) => {
                if failing.pause().await {
                    return Ok(());
                }
                Err(JobError::Unheard { job: self.job, within: self.patience.follow, source: error }.into())
            }
            error => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
