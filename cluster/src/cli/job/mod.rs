//! `farfork job`, and what it shares with `farfork run`.
//!
//! | module | holds |
//! |---|---|
//! | [`spec`] | a job as flags and files describe it, and its request |
//! | [`limits`], [`inputs`], [`pack`] | how its parts are read, and what they may have at most |
//! | [`file`] | job files |
//! | [`follow`], [`stream`] | submitting and following, over connections that may break off |
//! | [`attach`], [`fetch`] | results, files, the exit code |
//! | [`tally`], [`display`] | how far it is |

pub(super) mod attach;
mod display;
mod error;
mod fetch;
pub mod file;
pub(super) mod follow;
mod inputs;
pub mod limits;
mod pack;
#[cfg(test)]
mod samples;
pub mod spec;
mod stream;
mod tally;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use uuid::Uuid;

use super::client::{Answer, segment};
use super::error::CliError;
use super::fork::id;
use super::output::{Output, print, printable, short, table, time};
use super::{Context, INTERRUPTED, size};
use crate::api::wire::RemovedAnswer;
use crate::api::wire::{JobAnswer, JobRow, JobsAnswer, TaskLog};
use attach::To;
pub use error::JobError;

/// How often it is asked what a task has printed since.
const EVERY: Duration = Duration::from_millis(500);

/// Jobs: what `farfork run` has submitted
///
/// JOB is a job's id, or the last 4 and more digits of it. A job goes on whoever looks at it, and one that has ended is kept for a day.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork job ls
  farfork job show beef
  farfork job attach beef > results.jsonl     # come back to it, as if `farfork run` had not been interrupted
  farfork job wait beef && farfork job results beef --files ./out
  farfork job cancel beef")]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List jobs, oldest first; those that ended within a day too
    #[command(after_help = "Example:\n  farfork job ls --output json | jq -r '.jobs[].id'")]
    Ls,
    /// Show a job: its tasks, why some failed or wait, and what each node does for it
    #[command(after_help = "Example:\n  farfork job show beef")]
    Show {
        #[command(flatten)]
        job: Job,
    },
    /// Print what a task has printed
    #[command(after_help = "Examples:\n  farfork job logs beef 17\n  farfork job logs beef 17 -f")]
    Logs {
        #[command(flatten)]
        job: Job,
        /// Its number
        task: u32,
        /// Go on until it has ended
        #[arg(short, long)]
        follow: bool,
    },
    /// Wait until a job has ended; exits with 0 if all of its tasks succeeded, and with 5 if not
    #[command(after_help = "Example:\n  farfork job wait beef && echo all is well")]
    Wait {
        #[command(flatten)]
        job: Job,
        /// Say nothing
        #[arg(short, long)]
        quiet: bool,
    },
    /// End a job: tasks that have not ended end as KILLED
    #[command(after_help = "Example:\n  farfork job cancel beef")]
    Cancel {
        #[command(flatten)]
        job: Job,
    },
    /// Print the results that are there, in the order of tasks: a JSON object a line
    #[command(after_help = "\
Examples:
  farfork job results beef | jq -r 'select(.is_success | not) | .task'
  farfork job results beef --follow --files ./out")]
    Results {
        #[command(flatten)]
        job: Job,
        /// All of them, each as it comes
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        to: To,
    },
    /// Forget a job that has ended, and its results
    #[command(after_help = "Example:\n  farfork job rm beef")]
    Rm {
        #[command(flatten)]
        job: Job,
    },
    /// Follow a job as `farfork run` does: results to stdout, progress to stderr, the same exit code
    #[command(after_help = "Example:\n  farfork job attach beef > results.jsonl")]
    Attach {
        #[command(flatten)]
        job: Job,
        #[command(flatten)]
        to: To,
        /// No progress and no summary
        #[arg(short, long)]
        quiet: bool,
    },
}

/// Which.
#[derive(Debug, Args)]
struct Job {
    /// Its id, or the last 4 and more digits of it
    #[arg(value_name = "JOB", value_parser = id)]
    job: String,
}

impl Job {
    fn path(&self) -> String {
        format!("/v1/jobs/{}", segment(&self.job))
    }

    async fn asked(&self, context: &Context) -> Result<Answer<JobAnswer>, CliError> {
        Ok(context.client.get(&self.path()).await?)
    }
}

/// Does what is asked. Interrupted, a verb that stays with a job says how to come back to it.
pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    match arguments.verb {
        Verb::Attach { job, to, quiet } => {
            let job = or_interrupted(job.asked(context)).await?;
            let Some(job) = job else { return Ok(ExitCode::from(INTERRUPTED)) };
            attach::attach(&job.value, to, quiet, context).await
        }
        Verb::Wait { job, quiet } => {
            let job = or_interrupted(job.asked(context)).await?;
            let Some(job) = job else { return Ok(ExitCode::from(INTERRUPTED)) };
            attach::unless_interrupted(job.value.job.id, attach::wait(&job.value, quiet, context)).await
        }
        verb => Ok(or_interrupted(brief(verb, context)).await?.unwrap_or(ExitCode::from(INTERRUPTED))),
    }
}

/// None if it was interrupted.
pub(super) async fn or_interrupted<T>(does: impl Future<Output = Result<T, CliError>>) -> Result<Option<T>, CliError> {
    tokio::select! {
        done = does => done.map(Some),
        _ = tokio::signal::ctrl_c() => Ok(None),
    }
}

async fn brief(verb: Verb, context: &Context) -> Result<ExitCode, CliError> {
    let Context { client, output } = context;
    match verb {
        Verb::Ls => {
            let answer = client.get::<JobsAnswer>("/v1/jobs").await?;
            output.answer(&answer.raw, || listed(&answer.value))?;
        }
        Verb::Show { job } => {
            let answer = job.asked(context).await?;
            output.answer(&answer.raw, || shown(&answer.value))?;
        }
        Verb::Logs { job, task, follow } => logs(&job, task, follow, context).await?,
        Verb::Cancel { job } => {
            let answer = client.post_bytes::<JobAnswer>(&format!("{}/cancel", job.path()), Vec::new().into()).await?;
            output.answer(&answer.raw, || format!("{}\n", in_short(&answer.value.job)))?;
        }
        Verb::Results { job, follow, to } => {
            let job = job.asked(context).await?;
            return attach::results(&job.value, follow, to, context).await;
        }
        Verb::Rm { job } => {
            let answer = client.delete::<RemovedAnswer>(&job.path()).await?;
            output.answer(&answer.raw, || format!("{}\n", answer.value.removed))?;
        }
        Verb::Attach { .. } | Verb::Wait { .. } => unreachable!("these stay with a job"),
    }
    Ok(types::ExitCode::Ok.into())
}

async fn logs(job: &Job, task: u32, follow: bool, context: &Context) -> Result<(), CliError> {
    // By its full id: another may get the same end.
    let id = job.asked(context).await?.value.job.id;
    let (mut stdout, mut stderr) = (0, 0);
    loop {
        let path = format!("/v1/jobs/{id}/tasks/{task}/log?stdout={stdout}&stderr={stderr}");
        let Answer { raw, value: log } = context.client.get::<TaskLog>(&path).await?;
        match context.output {
            Output::Json => context.output.answer(&raw, String::new)?,
            Output::Table => {
                print(&for_terminal(read(id, &log.stdout)?, std::io::stdout().is_terminal()))?;
                let said = for_terminal(read(id, &log.stderr)?, std::io::stderr().is_terminal());
                std::io::stderr().lock().write_all(&said).unwrap_or_default();
            }
        }
        if log.is_all || !follow {
            return Ok(());
        }
        (stdout, stderr) = (log.next_stdout, log.next_stderr);
        tokio::time::sleep(EVERY).await;
    }
}

fn read(job: Uuid, base64: &str) -> Result<Vec<u8>, JobError> {
    STANDARD.decode(base64).map_err(|error| JobError::Nonsense { job, why: format!("a log: {error}") })
}

/// Guests command no terminal; what goes elsewhere stays as it is.
fn for_terminal(bytes: Vec<u8>, is_terminal: bool) -> Vec<u8> {
    if !is_terminal {
        return bytes;
    }
    let lines = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
    // A tab is harmless, and common.
    let parts: Vec<String> = lines.split('\t').map(printable).collect();
    parts.join("\t").into_bytes()
}

fn listed(answer: &JobsAnswer) -> String {
    let rows = answer.jobs.iter().map(|job| {
        [
            short(&job.id),
            job.name.clone().unwrap_or_else(|| "-".to_owned()),
            job.template.clone(),
            state(job).to_owned(),
            job.tasks.to_string(),
            job.counts.succeeded.saturating_add(job.counts.failed).to_string(),
            job.counts.failed.to_string(),
            size::in_short(Duration::from_millis(job.age_ms)),
        ]
    });
    table(["JOB", "NAME", "TEMPLATE", "STATE", "TASKS", "DONE", "FAILED", "AGE"], &[4, 5, 6, 7], rows.collect())
}

fn state(job: &JobRow) -> &'static str {
    match job.is_ended {
        true if job.counts.failed > 0 => "failed",
        true => "succeeded",
        false if job.counts.placed == 0 => "waiting",
        false => "running",
    }
}

/// In one line.
fn in_short(job: &JobRow) -> String {
    let counts = job.counts;
    let going = if job.is_ended { String::new() } else { format!(", {} waiting, {} placed", counts.waiting, counts.placed) };
    let (id, tasks, state) = (short(&job.id), job.tasks, state(job));
    format!("job {id}: {state}; of {tasks} tasks {} succeeded, {} failed{going}", counts.succeeded, counts.failed)
}

fn shown(answer: &JobAnswer) -> String {
    let job = &answer.job;
    let line = |name: &str, value: &str| format!("{name:<10} {value}\n");
    let mut text = line("job", &job.id.to_string());
    text.push_str(&job.name.as_ref().map_or_else(String::new, |name| line("name", name)));
    text.push_str(&line("template", &format!("{}, image {}", job.template, job.image.get(..12).unwrap_or(&job.image))));
    text.push_str(&line("does", &job.about));
    text.push_str(&line("submitted", &format!("by {} of {}", job.submitted_by, job.tenant)));
    let for_ms = time(job.for_ms.saturating_mul(1_000));
    text.push_str(&line("state", &format!("{}, {} {for_ms}", state(job), if job.is_ended { "took" } else { "for" })));
    let counts = job.counts;
    let (waiting, placed, succeeded, failed) = (counts.waiting, counts.placed, counts.succeeded, counts.failed);
    let tasks = format!("{}: {waiting} waiting, {placed} placed, {succeeded} succeeded, {failed} failed", job.tasks);
    text.push_str(&line("tasks", &tasks));
    for (reason, count) in &answer.reasons {
        text.push_str(&line("failed", &format!("{count} by {reason}")));
    }
    for why in &answer.why_waiting {
        text.push_str(&line("waits", why));
    }
    if !answer.nodes.is_empty() {
        let rows = answer.nodes.iter().map(|node| {
            let of = |value: fn(&crate::api::wire::JobHere) -> String| node.here.as_ref().map_or("?".to_owned(), value);
            [
                node.name.clone(),
                node.placed.to_string(),
                of(|here| here.running.to_string()),
                node.succeeded.to_string(),
                node.failed.to_string(),
                of(|here| format!("{}+{}+{}", here.local, here.remote, here.settled)),
                of(|here| format!("{} of {}", size::bytes(here.wire_bytes), size::bytes(here.image_bytes))),
            ]
        });
        let head = ["NODE", "PLACED", "RUNNING", "SUCCEEDED", "FAILED", "LOCAL+REMOTE+SETTLED", "STREAMED"];
        text.push_str(&table(head, &[1, 2, 3, 4], rows.collect()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_shown_in_words() {
        let mut answer = samples::job(10, 4, 1);
        assert_eq!(in_short(&answer.job), "job deadbeef: running; of 10 tasks 4 succeeded, 1 failed, 0 waiting, 5 placed");
        answer.why_waiting = vec!["node-b: no room".to_owned()];
        let text = shown(&answer);
        assert!(text.contains("failed     1 by EXIT\n") && text.contains("waits      node-b: no room\n"), "{text}");
        let listed = listed(&JobsAnswer { jobs: vec![answer.job] });
        assert!(listed.lines().nth(1).unwrap().starts_with("deadbeef  square  python    running     10     5       1  "));
        assert_eq!(state(&samples::job(3, 3, 0).job), "succeeded");
    }

    #[test]
    fn guests_command_no_terminal_and_files_get_their_bytes() {
        let said = b"a\tb\r\n\x1B[2J\xFF\n".to_vec();
        assert_eq!(for_terminal(said.clone(), false), said);
        assert_eq!(for_terminal(said, true), "a\tb\n\u{FFFD}[2J\u{FFFD}\n".as_bytes());
    }
}
