//! Against a server that breaks off, refuses and falls silent as each test says, on a socket of its own.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::*;
use crate::api::wire::{ErrorAnswer, ErrorBody, Inputs, JobSpread, ResultsQuery, Work};
use crate::cli::client::Target;
use crate::cli::job::attach::{To, follow};
use crate::cli::job::samples;

/// Short, but far above what a local socket takes.
const SHORT: Patience =
    Patience { submit: Duration::from_secs(20), follow: Duration::from_secs(20), silence: Duration::from_millis(300) };

/// How a stream ends.
#[derive(Clone, Copy)]
enum End {
    Clean,
    Broken,
    Silent,
}

/// What is answered to one request of each kind, and what was asked.
#[derive(Default)]
struct Script {
    submits: VecDeque<Result<(), (StatusCode, &'static str)>>,
    submitted: Vec<JobRequest>,
    results: VecDeque<(String, End)>,
    from: Vec<(bool, u32)>,
    events: VecDeque<(String, End)>,
    job: Option<JobAnswer>,
}

type Shared = Arc<Mutex<Script>>;

struct Server {
    directory: TempDir,
    script: Shared,
    serving: JoinHandle<()>,
}

impl Server {
    fn start(script: Script) -> Self {
        let (directory, script) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(script)));
        let serving = serve(directory.path().join("socket"), &script);
        Self { directory, script, serving }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::new(Target::Socket(self.socket()))
    }

    fn script<R>(&self, reads: impl FnOnce(&mut Script) -> R) -> R {
        reads(&mut self.script.lock().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn serve(socket: PathBuf, script: &Shared) -> JoinHandle<()> {
    let routes = Router::new()
        .route("/v1/jobs", post(submitted))
        .route("/v1/jobs/{id}", get(asked))
        .route("/v1/jobs/{id}/results", get(results))
        .route("/v1/jobs/{id}/events", get(events))
        .route("/v1/jobs/{id}/tasks/{task}/files", get(files))
        .with_state(Arc::clone(script));
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() })
}

fn refused(status: StatusCode, code: &str) -> Response {
    let (message, remedy) = (format!("refused by {code}"), "try again".to_owned());
    let error = ErrorBody { code: code.to_owned(), message, remedy, reason: None };
    (status, Json(ErrorAnswer { error })).into_response()
}

fn streamed(text: String, end: End) -> Response {
    let first = stream::iter([Ok(text)]);
    let rest = stream::unfold(end, |end| async move {
        match end {
            End::Clean => None,
            End::Broken => {
                // What was written before is to arrive.
                sleep(Duration::from_millis(50)).await;
                Some((Err(io::Error::other("broken off")), End::Clean))
            }
            End::Silent => std::future::pending().await,
        }
    });
    Body::from_stream(futures_util::StreamExt::chain(first, rest)).into_response()
}

async fn submitted(State(script): State<Shared>, Json(request): Json<JobRequest>) -> Response {
    let mut script = script.lock().unwrap();
    script.submitted.push(request);
    match script.submits.pop_front().unwrap() {
        Ok(()) => Json(samples::job(4, 0, 0)).into_response(),
        Err((StatusCode::OK, cut)) => streamed(cut.to_owned(), End::Broken),
        Err((status, code)) => refused(status, code),
    }
}

async fn asked(State(script): State<Shared>) -> Response {
    match &script.lock().unwrap().job {
        Some(job) => Json(job).into_response(),
        None => refused(StatusCode::NOT_FOUND, "UNKNOWN_JOB"),
    }
}

async fn results(State(script): State<Shared>, Query(query): Query<ResultsQuery>) -> Response {
    let mut script = script.lock().unwrap();
    script.from.push((query.follow, query.from));
    let (text, end) = script.results.pop_front().unwrap_or((String::new(), End::Clean));
    streamed(text, end)
}

async fn events(State(script): State<Shared>) -> Response {
    let (text, end) = script.lock().unwrap().events.pop_front().unwrap_or((String::new(), End::Silent));
    streamed(text, end)
}

async fn files(Path((_, task)): Path<(Uuid, u32)>) -> Response {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    builder.append_data(&mut header, "out/number", task.to_string().as_bytes()).unwrap();
    builder.into_inner().unwrap().into_response()
}

fn request() -> JobRequest {
    JobRequest {
        template: "python".to_owned(),
        inputs: Inputs::Count(4),
        work: Work::Exec(vec!["echo".to_owned(), "{index}".to_owned()]),
        key: Some("mine".to_owned()),
        name: None,
        env: [("SEED".to_owned(), "{index}".to_owned())].into(),
        workdir: None,
        user: None,
        files: None,
        outputs: Vec::new(),
        output_limit_bytes: None,
        memory_bytes: None,
        cpu_millis: None,
        spread: JobSpread::Spread,
        labels: [].into(),
        replicas: 1,
        retries: 2,
        deadline_ms: None,
        task_deadline_ms: None,
        max_parallel: None,
    }
}

fn result(task: u32) -> String {
    format!("{{\"task\":{task},\"is_success\":true,\"status\":0,\"stdout\":\"{task}\\n\",\"unheard_of\":1}}\n")
}

fn event(name: &str, job: &JobAnswer) -> String {
    format!(": alive\n\nevent: {name}\ndata: {}\n\n", serde_json::to_string(job).unwrap())
}

fn job() -> Uuid {
    samples::job(4, 0, 0).job.id
}

#[tokio::test]
async fn a_submit_is_sent_again_as_it_was_until_it_is_known() {
    let submits = [
        Err((StatusCode::OK, "{\"job\":")),
        Err((StatusCode::SERVICE_UNAVAILABLE, "NO_QUORUM")),
        Err((StatusCode::GATEWAY_TIMEOUT, "OUTCOME_UNKNOWN")),
        Err((StatusCode::GATEWAY_TIMEOUT, "NO_ANSWER")),
        Err((StatusCode::TOO_MANY_REQUESTS, "BUSY")),
        Ok(()),
    ];
    let server = Server::start(Script { submits: submits.into(), ..Script::default() });
    let answer = submit(&server.client(), &request(), SHORT).await.unwrap();
    assert_eq!(answer.value.job.id, job());
    server.script(|script| assert_eq!(script.submitted, vec![request(); 6], "the same key, the same request"));
}

#[tokio::test]
async fn a_submit_that_is_refused_is_not_sent_again() {
    let submits = [Err((StatusCode::BAD_REQUEST, "BAD_COUNT"))];
    let server = Server::start(Script { submits: submits.into(), ..Script::default() });
    let error = submit(&server.client(), &request(), SHORT).await.unwrap_err();
    assert_eq!((error.code(), server.script(|script| script.submitted.len())), (types::ExitCode::Usage, 1));
    let nowhere = Client::new(Target::Socket(server.directory.path().join("nowhere")));
    let error = submit(&nowhere, &request(), SHORT).await.unwrap_err();
    assert!(matches!(error, CliError::Client(ClientError::NoNode { .. })), "{error}");
}

#[tokio::test]
async fn a_submit_that_stays_unknown_says_under_which_key() {
    let impatient = Patience { submit: Duration::from_millis(250), ..SHORT };
    for (code, is_unknown) in [("OUTCOME_UNKNOWN", true), ("NO_QUORUM", false)] {
        let submits = (0..100).map(|_| Err((StatusCode::SERVICE_UNAVAILABLE, code))).collect();
        let server = Server::start(Script { submits, ..Script::default() });
        let error = submit(&server.client(), &request(), impatient).await.unwrap_err();
        assert_eq!(matches!(error, CliError::Job(JobError::Unknown { .. })), is_unknown, "{error}");
        if let CliError::Job(error) = error {
            assert!(error.remedy().contains("--key mine"), "{}", error.remedy());
            assert_eq!(error.exit_code(), types::ExitCode::Unreachable);
        }
        assert!(server.script(|script| script.submitted.len()) > 1);
    }
}

#[tokio::test]
async fn each_result_is_taken_once_however_often_the_stream_breaks_off() {
    let script = Script {
        results: [
            // In the order in which they ended, and in the middle of a line.
            ([result(2), result(0), "{\"task\":1,\"is_succ".to_owned()].concat(), End::Broken),
            ([result(1), result(2)].concat(), End::Clean),
            // Silent, though the events say that all tasks have ended.
            (String::new(), End::Silent),
            (result(3).trim_end().to_owned(), End::Clean),
        ]
        .into(),
        events: [(event("progress", &samples::job(4, 4, 0)), End::Silent)].into(),
        ..Script::default()
    };
    let server = Server::start(script);
    let client = server.client();
    let following = Following::new(&client, job(), SHORT);
    let mut taken = Vec::new();
    let results = following.results(4, |line, heard| {
        assert_eq!(line, result(heard.task).trim_end().as_bytes(), "as the node wrote it");
        taken.push(heard.task);
        Ok(())
    });
    tokio::select! {
        results = results => results.unwrap(),
        events = following.events(|_| {}) => panic!("the events do not end: {events:?}"),
    }
    assert_eq!(taken, [2, 0, 1, 3]);
    server.script(|script| assert_eq!(script.from, [(true, 0), (true, 1), (true, 3), (true, 3)]));
}

#[tokio::test]
async fn results_go_on_when_the_node_comes_back() {
    let server = Server::start(Script { results: [(result(0), End::Broken)].into(), ..Script::default() });
    let (client, script, socket) = (server.client(), Arc::clone(&server.script), server.socket());
    let comes_back = tokio::spawn(async move {
        while script.lock().unwrap().from.is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        std::fs::remove_file(&socket).unwrap();
        sleep(Duration::from_millis(300)).await;
        script.lock().unwrap().results.push_back((result(1), End::Clean));
        serve(socket, &script).await.unwrap();
    });
    let mut taken = Vec::new();
    let following = Following::new(&client, job(), SHORT);
    let took = following.results(2, |_, heard| {
        taken.push(heard.task);
        Ok(())
    });
    took.await.unwrap();
    assert_eq!(taken, [0, 1]);
    comes_back.abort();
}

#[tokio::test]
async fn a_job_that_nobody_answers_for_goes_on_alone() {
    let server = Server::start(Script { results: [(result(0), End::Broken)].into(), ..Script::default() });
    let client = server.client();
    let following = Following::new(&client, job(), Patience { follow: Duration::from_millis(250), ..SHORT });
    let socket = server.socket();
    let error = following.results(2, |_, _| {
        std::fs::remove_file(&socket).unwrap();
        Ok(())
    });
    let error = error.await.unwrap_err();
    let CliError::Job(error @ JobError::Unheard { .. }) = error else { panic!("{error}") };
    assert_eq!(error.exit_code(), types::ExitCode::Unreachable);
    assert!(error.remedy().contains(&format!("farfork job attach {}", job())), "{}", error.remedy());
}

#[tokio::test]
async fn results_that_make_no_sense_or_never_come_are_no_endless_wait() {
    for (text, why) in [("{\"task\":4}\n", "of task 4"), ("no json\n", "a result: ")] {
        let server = Server::start(Script { results: [(text.to_owned(), End::Silent)].into(), ..Script::default() });
        let client = server.client();
        let error = Following::new(&client, job(), SHORT).results(4, |_, _| Ok(())).await.unwrap_err();
        assert!(matches!(error, CliError::Job(JobError::Nonsense { .. })) && error.to_string().contains(why), "{error}");
    }
    let server = Server::start(Script { job: Some(samples::job(4, 4, 0)), ..Script::default() });
    let client = server.client();
    let error = Following::new(&client, job(), SHORT).results(u32::MAX, |_, _| Ok(())).await.unwrap_err();
    assert!(matches!(error, CliError::Job(JobError::Nonsense { .. })), "{error}");
    let error = Following::new(&client, job(), SHORT).results(4, |_, _| Ok(())).await.unwrap_err();
    assert!(matches!(error, CliError::Job(JobError::Missing { missing: 4, .. })), "{error}");
}

#[tokio::test]
async fn what_is_there_is_one_stream_that_is_resumed() {
    let results = [(result(0), End::Broken), ([result(1), result(3)].concat(), End::Clean)];
    let server = Server::start(Script { results: results.into(), ..Script::default() });
    let client = server.client();
    let mut taken = Vec::new();
    let following = Following::new(&client, job(), SHORT);
    let so_far = following.results_so_far(5, |_, heard| {
        taken.push(heard.task);
        Ok(())
    });
    so_far.await.unwrap();
    assert_eq!(taken, [0, 1, 3]);
    server.script(|script| assert_eq!(script.from, [(false, 0), (false, 1)]));
}

#[tokio::test]
async fn events_are_heard_to_the_end() {
    let (half, end) = (samples::job(4, 2, 0), samples::job(4, 3, 1));
    let script = Script {
        events: [
            (event("progress", &samples::job(4, 0, 0)), End::Broken),
            (event("progress", &half), End::Silent),
            (event("something", &half), End::Clean),
            ([event("progress", &half), event("end", &end)].concat(), End::Silent),
        ]
        .into(),
        ..Script::default()
    };
    let server = Server::start(script);
    let client = server.client();
    let mut shown = Vec::new();
    let following = Following::new(&client, job(), SHORT);
    following.events(|answer| shown.push(answer.job.counts.succeeded)).await.unwrap();
    assert_eq!(shown, [0, 2, 2, 3]);
}

#[tokio::test]
async fn following_a_job_keeps_results_and_files_and_says_how_it_went() {
    let with_files = "{\"task\":1,\"is_success\":true,\"files_bytes\":1536}\n".to_owned();
    for (job, code) in [(samples::job(2, 2, 0), 0), (samples::job(2, 1, 1), 5)] {
        let results = [([with_files.clone(), result(0)].concat(), End::Clean)];
        let server = Server::start(Script { results: results.into(), job: Some(job.clone()), ..Script::default() });
        let at = server.directory.path();
        let to = To { results: Some(at.join("results")), files: Some(at.join("files")) };
        let followed = follow(&server.client(), &job, to, true, SHORT).await.unwrap();
        assert_eq!(followed, ExitCode::from(code));
        assert_eq!(std::fs::read_to_string(at.join("results")).unwrap(), [with_files.clone(), result(0)].concat());
        assert_eq!(std::fs::read_to_string(at.join("files/1/out/number")).unwrap(), "1");
        assert!(!at.join("files/0").exists(), "it kept none");
    }
}
