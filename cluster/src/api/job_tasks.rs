//! Handlers of the tasks of a job: results, one task, what it prints and keeps.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, State as Shared};
use axum::http::{Method, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use control::state::{Job, JobId, Outcome, Output, State, Task};
use futures_util::stream;
use types::NodeId;

use super::caller::Caller;
use super::error::ApiError;
use super::extract::{PathText, PathTexts, QueryOf};
use super::jobs::{find, why_waiting};
use super::routes::App;
use super::wire::{ErrorAnswer, LogQuery, ResultsQuery, TaskAnswer, TaskLog, TaskResult};
use crate::jobs::payload::Payload;
use crate::jobs::record::{Printed, Record};
use crate::member::{ClusterError, Membership, fork::name_of};

/// Results that are looked up at once.
const PIECE: usize = 256;
/// How long nothing may have ended until it is looked again.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long it is followed what this node has, until it asks whether others agree.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// How long results wait for what their tasks were given, which may be on another node: less than their reader waits for them.
const INPUTS_WITHIN: Duration = Duration::from_secs(10);
/// How often, of all results of a job, it is looked again for outputs that nobody has: longer in all than nodes are taken for silent.
const LOST_TRIES: u32 = 30;
const LOST_TRY_EVERY: Duration = Duration::from_millis(500);
/// How long a node may take to say what a task prints.
const LOG_WITHIN: Duration = Duration::from_secs(3);

/// Results of a job, a JSON object a line
///
/// They come in the order of tasks; with `follow` as tasks end, until all have.
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}/results",
    tag = "jobs",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits"), ResultsQuery),
    responses(
        (status = 200, description = "A TaskResult a line", content_type = "application/x-ndjson", body = String),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn results(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
    QueryOf(query): QueryOf<ResultsQuery>,
) -> Result<Response, ApiError> {
    let permit = app.hand_over()?;
    let state = app.member()?.read().await?;
    let id = find(&state, &caller, &given)?;
    let job = &state.jobs[&id];
    let payload = tokio::time::timeout(INPUTS_WITHIN, app.jobs()?.payloads.of(&job.spec)).await;
    let payload = payload.map_err(|late| late.to_string()).and_then(|payload| payload.map_err(|error| error.to_string()));
    let payload = payload.inspect_err(|error| tracing::warn!(job = %id, error, "results come without inputs")).ok();
    let told = vec![false; job.spec.count as usize];
    let telling = Telling {
        app,
        id,
        payload,
        told,
        from: query.from,
        follows: query.follow,
        next: VecDeque::new(),
        lost_tries: 0,
        known: Instant::now(),
    };
    let lines = stream::unfold(Some((telling, permit)), |state| async move {
        let (mut telling, permit) = state?;
        match telling.piece().await {
            Ok(piece) => Some((Ok(piece?), Some((telling, permit)))),
            // The body breaks off: whoever reads it knows that it is not all.
            Err(error) => Some((Err(error), None)),
        }
    });
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((headers, Body::from_stream(lines)).into_response())
}

/// Results on their way to whoever asked.
struct Telling {
    app: App,
    id: JobId,
    payload: Option<Arc<Payload>>,
    /// Which tasks were told.
    told: Vec<bool>,
    from: u32,
    follows: bool,
    /// Tasks that have ended and are not told yet.
    next: VecDeque<u32>,
    /// How often outputs were asked for again that nobody had.
    lost_tries: u32,
    /// When a majority was last known to agree with what this node has.
    known: Instant,
}

impl Telling {
    /// The next lines; `None` if there are no more.
    async fn piece(&mut self) -> Result<Option<Bytes>, io::Error> {
        let member = Arc::clone(self.app.member().map_err(io::Error::other)?);
        let results = self.app.jobs().map_err(io::Error::other)?.results.clone();
        loop {
            // Not kept between pieces: a reader may take its time, and the state goes on.
            let state = member.consensus.stale();
            let forgotten = || io::Error::other("the job was forgotten");
            // One that came back under its key may be another one.
            let job =
                state.jobs.get(&self.id).filter(|job| job.spec.count as usize == self.told.len()).ok_or_else(forgotten)?;
            if self.next.is_empty() {
                self.gather(job);
            }
            let mut tasks: Vec<u32> = self.next.iter().take(PIECE).copied().collect();
            tasks.sort_unstable();
            if !tasks.is_empty() {
                let (told, left) = results.of(&state, self.id, job, &tasks, self.payload.as_deref()).await;
                // Who has one may be away for a moment.
                if told.iter().any(|result| result.is_output_lost) && self.lost_tries < LOST_TRIES {
                    self.lost_tries += 1;
                    tokio::time::sleep(LOST_TRY_EVERY).await;
                    continue;
                }
                self.next.drain(..tasks.len());
                left.iter().rev().for_each(|task| self.next.push_front(*task));
                told.iter().for_each(|result| self.told[result.task as usize] = true);
                return Ok(Some(lines(&told)));
            }
            if !self.follows || job.ended.is_some() {
                return Ok(None);
            }
            drop(state);
            let _ = tokio::time::timeout(LOOK_EVERY, member.consensus.changed()).await;
            if self.known.elapsed() > KNOWN_FOR {
                member.read().await.map_err(io::Error::other)?;
                self.known = Instant::now();
            }
        }
    }

    /// Looks what has ended since.
    fn gather(&mut self, job: &Job) {
        for (range, task) in job.tasks.iter() {
            if matches!(task, Task::Done { .. }) {
                let new = (range.start.max(self.from)..range.end).filter(|task| !self.told[*task as usize]);
                self.next.extend(new);
            }
        }
    }
}

fn lines(results: &[TaskResult]) -> Bytes {
    let mut lines = Vec::new();
    for result in results {
        serde_json::to_writer(&mut lines, result).expect("a map with text keys");
        lines.push(b'\n');
    }
    lines.into()
}

/// Shows a task
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}/tasks/{task}",
    tag = "jobs",
    params(
        ("id" = String, Path, description = "Full id of its job, or the last 4 and more hex digits"),
        ("task" = u32, Path, description = "Its number, from 0")
    ),
    responses(
        (status = 200, description = "The task", body = TaskAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn task(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathTexts(path): PathTexts,
) -> Result<Json<TaskAnswer>, ApiError> {
    let state = app.member()?.read().await?;
    let (_, number, job, task) = meant(&state, &caller, &path)?;
    let empty = TaskAnswer {
        task: number,
        state: String::new(),
        attempt: None,
        node: None,
        copy: None,
        status: None,
        reason: None,
        why_waiting: Vec::new(),
    };
    let name = |node: NodeId| name_of(&state, node);
    Ok(Json(match task {
        Task::Waiting { attempt, not_on } => TaskAnswer {
            state: "waiting".to_owned(),
            attempt: Some(attempt),
            node: not_on.map(name),
            why_waiting: why_waiting(&state, job, not_on),
            ..empty
        },
        Task::Placed { node, attempt, .. } => {
            TaskAnswer { state: "placed".to_owned(), attempt: Some(attempt), node: Some(name(node)), ..empty }
        }
        Task::Done { outcome, output } => {
            let (status, reason) = match outcome {
                Outcome::Exited(status) => (Some(status), None),
                Outcome::Failed(reason) => (None, Some(reason.code().to_owned())),
            };
            let (node, copy) = (output.map(|output| name(output.node)), output.and_then(|output| output.copy.map(name)));
            TaskAnswer { state: "ended".to_owned(), node, copy, status, reason, ..empty }
        }
    }))
}

/// What a task has printed so far
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}/tasks/{task}/log",
    tag = "jobs",
    params(
        ("id" = String, Path, description = "Full id of its job, or the last 4 and more hex digits"),
        ("task" = u32, Path, description = "Its number, from 0"),
        LogQuery
    ),
    responses(
        (status = 200, description = "What it has printed", body = TaskLog),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "502 UNREACHABLE, 504 NO_ANSWER: its node does not answer", body = ErrorAnswer)
    )
)]
pub(crate) async fn log(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathTexts(path): PathTexts,
    QueryOf(query): QueryOf<LogQuery>,
) -> Result<Json<TaskLog>, ApiError> {
    let member = app.member()?;
    let state = member.read().await?;
    let (id, number, _, task) = meant(&state, &caller, &path)?;
    let (printed, is_all) = match task {
        Task::Waiting { .. } => (Printed::default(), false),
        Task::Placed { node, .. } => (printed_on(&app, member, node, (id, number), query).await?, false),
        Task::Done { output, .. } => {
            let record = kept(&app, &state, id, number, output).await?;
            (record.map(|record| record.printed.from(query.stdout, query.stderr)).unwrap_or_default(), true)
        }
    };
    Ok(Json(TaskLog {
        stdout: BASE64_STANDARD.encode(&printed.stdout),
        stderr: BASE64_STANDARD.encode(&printed.stderr),
        next_stdout: query.stdout.saturating_add(printed.stdout.len() as u64),
        next_stderr: query.stderr.saturating_add(printed.stderr.len() as u64),
        is_all,
    }))
}

/// The files that a task has kept, as a tar archive
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}/tasks/{task}/files",
    tag = "jobs",
    params(
        ("id" = String, Path, description = "Full id of its job, or the last 4 and more hex digits"),
        ("task" = u32, Path, description = "Its number, from 0")
    ),
    responses(
        (status = 200, description = "A tar archive; empty if it has kept none", content_type = "application/x-tar", body = Vec<u8>),
        (status = "4XX", description = "Refused; 409 NOT_READY if the task has not ended, OUTPUT_LOST if no node that answers has it", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn files(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathTexts(path): PathTexts,
) -> Result<Response, ApiError> {
    let state = app.member()?.read().await?;
    let (id, number, _, task) = meant(&state, &caller, &path)?;
    let record = match task {
        Task::Done { output, .. } => kept(&app, &state, id, number, output).await?,
        Task::Waiting { .. } | Task::Placed { .. } => {
            return Err(ClusterError::TaskRuns { job: id.to_string(), task: number }.into());
        }
    };
    let headers = [(header::CONTENT_TYPE, "application/x-tar")];
    Ok((headers, record.map(|record| record.files).unwrap_or_default()).into_response())
}

/// The task that a caller means.
fn meant<'a>(state: &'a State, caller: &Caller, path: &(String, String)) -> Result<(JobId, u32, &'a Job, Task), ApiError> {
    let (given, number) = path;
    let id = find(state, caller, given)?;
    let number = number.parse().map_err(|_| ApiError::bad_request(format!("{number:?} is no number of a task")))?;
    let job = &state.jobs[&id];
    let task = job.tasks.get(number).ok_or_else(|| ClusterError::UnknownTask { job: id.to_string(), task: number })?;
    Ok((id, number, job, task))
}

/// What is kept of a task that has ended; `None` if it never ran.
async fn kept(app: &App, state: &State, id: JobId, task: u32, output: Option<Output>) -> Result<Option<Record>, ApiError> {
    let Some(output) = output else { return Ok(None) };
    let record = app.jobs()?.results.record(state, id, task, output).await;
    record.map(Some).ok_or_else(|| ClusterError::OutputLost { job: id.to_string(), task }.into())
}

async fn printed_on(
    app: &App,
    member: &Membership,
    node: NodeId,
    (id, task): (JobId, u32),
    from: LogQuery,
) -> Result<Printed, ApiError> {
    if node == member.node() {
        return Ok(app.jobs()?.tasks.printed(id, task, from).unwrap_or_default());
    }
    let path = format!("/v1/between/jobs/{}/tasks/{task}?stdout={}&stderr={}", id.0, from.stdout, from.stderr);
    let late = || ClusterError::NoAnswer { node, detail: format!("not within {LOG_WITHIN:?}") };
    let asked = tokio::time::timeout(LOG_WITHIN, member.ask_node(node, None, Method::GET, &path, None)).await;
    let (status, bytes) = asked.map_err(|_| late())??;
    let not_understood = || ClusterError::NoAnswer { node, detail: format!("it answered {status}") };
    let printed = if status.is_success() { postcard::from_bytes(&bytes).ok() } else { None };
    Ok(printed.ok_or_else(not_understood)?)
}
