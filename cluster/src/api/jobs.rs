//! Handlers of jobs: submitting one, and what of it can be looked at as a whole.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State as Shared;
use axum::http::Method;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::{Extension, Json};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use control::command::Command;
use control::place::{plan, wanted};
use control::state::{self, About as JobAbout, ImageKey, Job, JobId, JobSpec, Outcome, Resources, Spread, State, Task, Work};
use futures_util::stream::{self, Stream};
use types::{Digest, NodeId};
use uuid::Uuid;

use super::audit::About;
use super::caller::Caller;
use super::error::ApiError;
use super::extract::{LargeJsonBody, PathText};
use super::routes::App;
use super::wire::{
    ErrorAnswer, Inputs, JobAnswer, JobHere, JobOnNode, JobRequest, JobRow, JobSpread, JobsAnswer, RemovedAnswer, TaskCounts,
    Work as AskedWork,
};
use crate::jobs::payload::{self, Payload};
use crate::member::{ClusterError, EACH_CPU_MILLIS, Membership, fork::name_of};
use crate::node::{NodeError, ShortId};
use crate::raft::ConsensusError;

/// Work of so many bytes goes into the log; what is longer, nodes keep.
const WORK_IN_LOG_MAX: usize = 4 << 10;
/// Longest key and name of a job, in bytes.
const KEY_BYTES_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 64;
/// Between two events of a job, at least and at most.
const EVENT_AT_MOST_EVERY: Duration = Duration::from_millis(250);
const EVENT_EVERY: Duration = Duration::from_secs(2);
/// How long it is followed what this node has, until it asks whether others agree.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// How long a node may take to say what it has done for a job.
const HERE_WITHIN: Duration = Duration::from_secs(1);

/// Submits a job
///
/// It is on disk at a majority when this is answered. Sent again with the same key it is the same job.
#[utoipa::path(
    post,
    path = "/v1/jobs",
    tag = "jobs",
    request_body = JobRequest,
    responses(
        (status = 200, description = "It is submitted", body = JobAnswer),
        (status = "4XX", description = "Refused; 404 UNKNOWN_TEMPLATE, 409 REFUSED if its key came with another request", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN: send it again with the same key", body = ErrorAnswer)
    )
)]
pub(crate) async fn submit(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    Extension(about): Extension<About>,
    LargeJsonBody(request, turn): LargeJsonBody<JobRequest>,
) -> Result<Json<JobAnswer>, ApiError> {
    let (member, jobs) = (app.member()?, app.jobs()?);
    let name = caller.name(&request.template)?;
    let (key, request_digest) = (request.key.clone(), digest_of(&request));
    check_text("key", key.as_deref(), KEY_BYTES_MAX)?;
    check_text("name", request.name.as_deref(), NAME_BYTES_MAX)?;
    let id = id_of(&name.tenant.to_string(), key.as_deref());
    about.say(|| format!("{} x {}, job {id}", request.template, count_of(&request.inputs)));
    let state = member.read().await?;
    if let Some(known) = state.jobs.get(&id) {
        // Whatever its template points at by now.
        if known.spec.request != request_digest {
            return Err(ClusterError::from(control::command::Refusal::JobExists(id)).into());
        }
        return answer(&app, &state, id).await.map(Json);
    }
    let digest = Membership::template(&state, &name);
    let digest = digest.ok_or_else(|| NodeError::UnknownTemplate { name: request.template.clone() })?;
    let image = ImageKey { tenant: name.tenant.clone(), digest };
    let dirty = state.images.get(&image).map_or(0, |image| image.facts.dirty_bytes);
    let by = caller.who.to_string();
    let spec_of = |work: Work, payload: &Payload, request: &JobRequest| JobSpec {
        image: image.clone(),
        count: u32::try_from(payload.inputs.count()).unwrap_or(u32::MAX),
        request: request_digest,
        work,
        about: JobAbout {
            name: request.name.clone(),
            template: name.to_string(),
            work: payload.in_short(),
            by: by.chars().take(NAME_BYTES_MAX).collect(),
        },
        each: Resources {
            // What it prints and keeps is in the node's memory for a while, as its files are.
            memory_bytes: request.memory_bytes.unwrap_or(dirty).saturating_add(payload.output_limit.saturating_mul(2)),
            cpu_millis: request.cpu_millis.unwrap_or(EACH_CPU_MILLIS),
            machines: 1,
        },
        spread: if request.spread == JobSpread::Pack { Spread::Pack } else { Spread::Spread },
        labels: request.labels.clone(),
        retries: request.retries,
        lasts_ms: request.deadline_ms,
        max_parallel: request.max_parallel,
        replicas: request.replicas,
    };
    check_numbers(&request)?;
    // What takes time of a large one holds nobody up.
    let made = tokio::task::spawn_blocking(move || {
        let payload = payload(&request)?;
        let encoded = payload.encode();
        Ok::<_, ApiError>((request, payload, encoded))
    });
    let (request, payload, encoded) = made.await.map_err(|_| ApiError::internal())??;
    let work = if encoded.len() <= WORK_IN_LOG_MAX {
        Work::Here(encoded)
    } else if encoded.len() <= payload::PAYLOAD_BYTES_MAX {
        Work::Kept(jobs.payloads.spread(encoded).await.map_err(ClusterError::from)?)
    } else {
        return Err(ApiError::bad_request(format!(
            "command, inputs and files have {} bytes, where at most {} are allowed",
            encoded.len(),
            payload::PAYLOAD_BYTES_MAX
        )));
    };
    let spec = spec_of(work, &payload, &request);
    member.propose(None, Command::Submit { job: id, spec }).await?;
    drop(turn);
    agreed(&app, id).await
}

/// A job of which something was agreed on a moment ago. Where that cannot be read it is not said that nothing was done.
async fn agreed(app: &App, id: JobId) -> Result<Json<JobAnswer>, ApiError> {
    let member = app.member()?;
    let state = match member.read().await {
        Err(ClusterError::Consensus(ConsensusError::NoQuorum { within })) => {
            return Err(ClusterError::Consensus(ConsensusError::Unknown { within }).into());
        }
        read => read?,
    };
    answer(app, &state, id).await.map(Json)
}

/// Lists jobs
#[utoipa::path(
    get,
    path = "/v1/jobs",
    tag = "jobs",
    responses(
        (status = 200, description = "Jobs", body = JobsAnswer),
        (status = "4XX", description = "Refused; 409 NO_CLUSTER if the node stands alone", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn list(Shared(app): Shared<App>, Extension(caller): Extension<Caller>) -> Result<Json<JobsAnswer>, ApiError> {
    let state = app.member()?.read().await?;
    let own = |job: &Job| caller.tenant().is_none_or(|tenant| *tenant == job.spec.image.tenant);
    let mut rows: Vec<_> = state.jobs.iter().filter(|(_, job)| own(job)).map(|(id, job)| row(&state, *id, job)).collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.age_ms), row.id));
    Ok(Json(JobsAnswer { jobs: rows }))
}

/// Shows a job: where its tasks are, and what each node has done for it
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}",
    tag = "jobs",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "The job", body = JobAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn show(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
) -> Result<Json<JobAnswer>, ApiError> {
    let state = app.member()?.read().await?;
    let id = find(&state, &caller, &given)?;
    answer(&app, &state, id).await.map(Json)
}

/// Ends what has not ended of a job
#[utoipa::path(
    post,
    path = "/v1/jobs/{id}/cancel",
    tag = "jobs",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "It is agreed on: what tasks of it come to from now on does not count, and nodes end them as they hear of it", body = JobAnswer),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn cancel(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
) -> Result<Json<JobAnswer>, ApiError> {
    let member = app.member()?;
    let id = find(&*member.read().await?, &caller, &given)?;
    member.propose(None, Command::Cancel { job: id }).await?;
    agreed(&app, id).await
}

/// Forgets a job that has ended, with its outputs
#[utoipa::path(
    delete,
    path = "/v1/jobs/{id}",
    tag = "jobs",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "It is gone", body = RemovedAnswer),
        (status = "4XX", description = "Refused; 409 REFUSED if it goes on", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM, 504 OUTCOME_UNKNOWN", body = ErrorAnswer)
    )
)]
pub(crate) async fn remove(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
) -> Result<Json<RemovedAnswer>, ApiError> {
    let member = app.member()?;
    let id = find(&*member.read().await?, &caller, &given)?;
    member.propose(None, Command::Forget { job: id }).await?;
    Ok(Json(RemovedAnswer { removed: id.to_string() }))
}

/// Follows a job: an event `progress` whenever something of it changes and every two seconds, and `end` when all of its tasks are at their end
#[utoipa::path(
    get,
    path = "/v1/jobs/{id}/events",
    tag = "jobs",
    params(("id" = String, Path, description = "Full id, or its last 4 and more hex digits")),
    responses(
        (status = 200, description = "Server-sent events; the data of each is a JobAnswer", content_type = "text/event-stream", body = String),
        (status = "4XX", description = "Refused", body = ErrorAnswer),
        (status = "5XX", description = "503 NO_QUORUM", body = ErrorAnswer)
    )
)]
pub(crate) async fn events(
    Shared(app): Shared<App>,
    Extension(caller): Extension<Caller>,
    PathText(given): PathText,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let permit = app.hand_over()?;
    let id = find(&*app.member()?.read().await?, &caller, &given)?;
    let next = move |(app, last, (known, permit)): (App, Option<TaskCounts>, (Instant, _))| async move {
        let member = Arc::clone(app.member().ok()?);
        let is_new = |state: &State| state.jobs.get(&id).map(counts) != last;
        if last.is_some() {
            tokio::time::sleep(EVENT_AT_MOST_EVERY).await;
            let changes = async {
                while !is_new(&member.consensus.stale()) {
                    member.consensus.changed().await;
                }
            };
            let _ = tokio::time::timeout(EVENT_EVERY, changes).await;
        }
        // What others do not agree with is not told for long.
        let known = if known.elapsed() > KNOWN_FOR { member.read().await.ok().map(|_| Instant::now())? } else { known };
        let state = member.consensus.stale();
        // It was forgotten, or its end was told.
        let job = state.jobs.get(&id).filter(|_| last != Some(ENDED))?;
        let (counts, name) = if job.ended.is_some() { (ENDED, "end") } else { (counts(job), "progress") };
        let data = answer(&app, &state, id).await.ok()?;
        let event = Event::default().event(name).json_data(&data).expect("answers are maps with text keys");
        Some((Ok(event), (app, Some(counts), (known, permit))))
    };
    Ok(Sse::new(stream::unfold((app, None, (Instant::now(), permit)), next)).keep_alive(KeepAlive::default()))
}

/// What no job can count: its end was told.
const ENDED: TaskCounts = TaskCounts { waiting: u32::MAX, placed: u32::MAX, succeeded: u32::MAX, failed: u32::MAX };

/// The job that a caller means. Those of other tenants are as unknown as those that nobody has.
pub(super) fn find(state: &State, caller: &Caller, given: &str) -> Result<JobId, ApiError> {
    let short = ShortId::parse(given).map_err(NodeError::from)?;
    let own = |job: &Job| caller.tenant().is_none_or(|tenant| *tenant == job.spec.image.tenant);
    let mut found = state.jobs.iter().filter(|(id, job)| short.matches(&id.0) && own(job)).map(|(id, _)| *id);
    match (found.next(), found.count()) {
        (Some(id), 0) => Ok(id),
        (Some(_), more) => Err(ClusterError::AmbiguousJob { given: given.to_owned(), count: more + 1 }.into()),
        (None, _) => Err(ClusterError::UnknownJob(given.to_owned()).into()),
    }
}

/// The same key is the same job, of the same tenant. Without one it is a new one.
fn id_of(tenant: &str, key: Option<&str>) -> JobId {
    let Some(key) = key else { return JobId(Uuid::now_v7()) };
    let digest = blake3::hash(format!("farfork job\0{tenant}\0{key}").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_bytes()[..16]);
    JobId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// Of the request as it was put.
fn digest_of(request: &JobRequest) -> Digest {
    Digest::of(&serde_json::to_vec(request).expect("a map with text keys"))
}

fn count_of(inputs: &Inputs) -> usize {
    match inputs {
        Inputs::Count(count) => *count as usize,
        Inputs::List(list) => list.len(),
    }
}

fn check_text(what: &str, text: Option<&str>, max: usize) -> Result<(), ApiError> {
    match text {
        Some(text) if text.is_empty() || text.len() > max || text.chars().any(char::is_control) => {
            Err(ApiError::bad_request(format!("{what} has 1 to {max} bytes, and no control characters")))
        }
        _ => Ok(()),
    }
}

fn check_numbers(request: &JobRequest) -> Result<(), ApiError> {
    let check = |what: &str, number: Option<u64>, least: u64, most: u64| match number {
        Some(number) if !(least..=most).contains(&number) => {
            Err(ApiError::bad_request(format!("{what} is {number}, where {least} to {most} are allowed")))
        }
        _ => Ok(()),
    };
    const DAYS_30_MS: u64 = 30 * 24 * 60 * 60 * 1000;
    check("replicas", Some(request.replicas.into()), 1, 16)?;
    check("retries", Some(request.retries.into()), 0, 100)?;
    check("max_parallel", request.max_parallel.map(u64::from), 1, u64::from(u32::MAX))?;
    check("memory_bytes", request.memory_bytes, 1, 1 << 50)?;
    check("cpu_millis", request.cpu_millis, 1, 1 << 30)?;
    check("deadline_ms", request.deadline_ms, 1, DAYS_30_MS)?;
    check("task_deadline_ms", request.task_deadline_ms, 1, DAYS_30_MS)?;
    let labels = request.labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    check("labels, in bytes,", Some(labels as u64), 0, 4096)
}

fn payload(request: &JobRequest) -> Result<Payload, ApiError> {
    let files = request.files.as_deref().map(|text| BASE64_STANDARD.decode(text)).transpose();
    let payload = Payload {
        work: match &request.work {
            AskedWork::Exec(arguments) => payload::Work::Exec(arguments.clone()),
            AskedWork::Eval(code) => payload::Work::Eval(code.clone()),
        },
        inputs: match &request.inputs {
            Inputs::Count(count) => payload::Inputs::Count(*count),
            Inputs::List(list) => payload::Inputs::List(list.clone()),
        },
        env: request.env.clone(),
        workdir: request.workdir.clone(),
        user: request.user.clone(),
        files: files.map_err(|error| ApiError::bad_request(format!("files: {error}")))?.unwrap_or_default(),
        outputs: request.outputs.clone(),
        output_limit: request.output_limit_bytes.unwrap_or(payload::OUTPUT_BYTES),
        limit_bytes: request.memory_bytes,
        task_deadline_ms: request.task_deadline_ms,
    };
    payload.check().map_err(|error| ApiError::bad_request(error.to_string()))?;
    Ok(payload)
}

pub(super) fn counts(job: &Job) -> TaskCounts {
    let state::Counts { waiting, placed, succeeded, failed } = job.tasks.counts();
    TaskCounts { waiting, placed, succeeded, failed }
}

fn row(state: &State, id: JobId, job: &Job) -> JobRow {
    let until = job.ended.unwrap_or(state.time);
    JobRow {
        id: id.0,
        name: job.spec.about.name.clone(),
        template: job.spec.about.template.clone(),
        image: job.spec.image.digest.to_string(),
        tenant: job.spec.image.tenant.to_string(),
        submitted_by: job.spec.about.by.clone(),
        about: job.spec.about.work.clone(),
        age_ms: u64::try_from((state.time - job.submitted).as_millis()).unwrap_or(u64::MAX),
        for_ms: u64::try_from((until - job.submitted).as_millis()).unwrap_or(u64::MAX),
        is_ended: job.ended.is_some(),
        tasks: job.spec.count,
        counts: counts(job),
    }
}

/// A job with its parts, and what its nodes say themselves.
async fn answer(app: &App, state: &State, id: JobId) -> Result<JobAnswer, ApiError> {
    let member = app.member()?;
    let job = state.jobs.get(&id).ok_or_else(|| ClusterError::UnknownJob(id.to_string()))?;
    let (mut reasons, mut nodes) = (BTreeMap::<String, u32>::new(), BTreeMap::<NodeId, TaskCounts>::new());
    for (range, task) in job.tasks.iter() {
        let count = range.end - range.start;
        match task {
            Task::Waiting { .. } => {}
            Task::Placed { node, .. } => nodes.entry(node).or_default().placed += count,
            Task::Done { outcome, output } => {
                let is_success = outcome == Outcome::Exited(0);
                if let Some(output) = output {
                    let on_node = nodes.entry(output.node).or_default();
                    *(if is_success { &mut on_node.succeeded } else { &mut on_node.failed }) += count;
                }
                match outcome {
                    Outcome::Exited(0) => {}
                    Outcome::Exited(_) => *reasons.entry("EXIT".to_owned()).or_default() += count,
                    Outcome::Failed(reason) => *reasons.entry(reason.code().to_owned()).or_default() += count,
                }
            }
        }
    }
    let nodes = nodes.into_iter().map(|(node, counts)| async move {
        let TaskCounts { placed, succeeded, failed, .. } = counts;
        let here = here(app, member, node, id).await;
        JobOnNode { node, name: name_of(state, node), placed, succeeded, failed, here }
    });
    let nodes = futures_util::future::join_all(nodes).await;
    Ok(JobAnswer { job: row(state, id, job), reasons, nodes, why_waiting: why_waiting(state, job, None) })
}

/// Why the tasks that wait are not placed, node by node; of those that failed on `not_on`, if it is said.
pub(super) fn why_waiting(state: &State, job: &Job, not_on: Option<NodeId>) -> Vec<String> {
    let waiting = job.tasks.counts().waiting;
    if waiting == 0 {
        return Vec::new();
    }
    if job.may_place() == 0 {
        return vec![format!("as many as max_parallel allows are placed: {}", job.tasks.counts().placed)];
    }
    let plan = plan(state, &wanted(job, u64::from(waiting), not_on));
    if plan.verdicts.is_empty() {
        return vec!["no node that is heard has all of its image".to_owned()];
    }
    plan.verdicts.iter().map(|(node, verdict)| format!("{} {verdict}", name_of(state, *node))).collect()
}

/// What a node says that it has done for a job.
async fn here(app: &App, member: &Membership, node: NodeId, id: JobId) -> Option<JobHere> {
    if node == member.node() {
        return here_of(app, id).await.ok().flatten();
    }
    let path = format!("/v1/between/jobs/{}", id.0);
    let asked = member.ask_json::<Option<JobHere>>(node, None, Method::GET, &path, None::<&()>);
    tokio::time::timeout(HERE_WITHIN, asked).await.ok()?.ok()?.ok()?
}

/// What this node has done for a job.
pub(super) async fn here_of(app: &App, id: JobId) -> Result<Option<JobHere>, ApiError> {
    let jobs = app.jobs()?;
    let Some(here) = jobs.tasks.here(id) else { return Ok(None) };
    let key = app.member()?.consensus.stale().jobs.get(&id).map(|job| job.spec.image.clone());
    let residency = match key {
        // One that was let go meanwhile says nothing of its bytes.
        Some(key) => app.look(move |service| Ok(service.image_of_key(&key)?.residency)).await.ok().flatten(),
        None => None,
    };
    let (wire_bytes, image_bytes) = residency.map_or((0, 0), |residency| (residency.wire_bytes, residency.data_bytes));
    Ok(Some(JobHere { wire_bytes, image_bytes, ..here }))
}
