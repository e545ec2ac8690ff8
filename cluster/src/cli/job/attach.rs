//! Staying with a job until its end: its results to stdout, how far it is to stderr.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use types::ExitCode as Code;
use uuid::Uuid;

use super::display::Display;
use super::error::JobError;
use super::fetch::Fetcher;
use super::follow::{Following, Patience};
use crate::api::wire::JobAnswer;
use crate::cli::client::{Answer, Client};
use crate::cli::error::CliError;
use crate::cli::output::{Output, print};
use crate::cli::{Context, INTERRUPTED};

/// Where what comes of a job goes.
#[derive(Clone, Debug, Default, Args)]
pub(in crate::cli) struct To {
    /// Write the results there, a JSON object a line, not to stdout
    #[arg(long, value_name = "FILE")]
    pub(super) results: Option<PathBuf>,
    /// Fetch the files that each task kept into DIR/TASK/
    #[arg(long, value_name = "DIR")]
    pub(super) files: Option<PathBuf>,
}

/// Follows a job, and leaves it to itself when interrupted.
pub(in crate::cli) async fn attach(job: &JobAnswer, to: To, quiet: bool, context: &Context) -> Result<ExitCode, CliError> {
    let id = job.job.id;
    let followed = unless_interrupted(id, follow(&context.client, job, to, quiet, Patience::default())).await;
    if matches!(followed, Err(CliError::Closed)) {
        say_how_to_come_back(id);
    }
    followed
}

/// Does it, or says how to come back.
pub(super) async fn unless_interrupted(
    job: Uuid,
    does: impl Future<Output = Result<ExitCode, CliError>>,
) -> Result<ExitCode, CliError> {
    tokio::select! {
        done = does => done,
        _ = tokio::signal::ctrl_c() => {
            say_how_to_come_back(job);
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

pub(super) fn say_how_to_come_back(job: Uuid) {
    eprintln!("job {job} goes on; come back with: farfork job attach {job}");
}

/// All results, each as it comes; then how it went.
pub(super) async fn follow(
    client: &Client,
    job: &JobAnswer,
    to: To,
    quiet: bool,
    patience: Patience,
) -> Result<ExitCode, CliError> {
    let following = Following::new(client, job.job.id, patience);
    let fetcher = to.files.map(|directory| Fetcher::start(client, job.job.id, &directory, patience)).transpose()?;
    let mut sink = Sink::open(to.results)?;
    let display = RefCell::new(Display::start(quiet));
    display.borrow_mut().show(job);
    let lost = Cell::new(0);
    let results = following.results(job.job.tasks, |line, heard| {
        lost.set(lost.get() + usize::from(heard.is_output_lost));
        if heard.files_bytes > 0 {
            fetcher.iter().for_each(|fetcher| fetcher.fetch(heard.task));
        }
        display.borrow().aside(|| sink.write(line))
    });
    // The events also tell whether the results fall behind: who does not hear them for long waits for nothing.
    let events = async {
        match following.events(|answer| display.borrow_mut().show(answer)).await {
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
    };
    tokio::select! {
        results = results => results?,
        error = events => return Err(error),
    }
    sink.finish()?;
    let unfetched = match fetcher {
        Some(fetcher) => fetcher.finish().await,
        None => 0,
    };
    if lost.get() > 0 {
        eprintln!("{} results are without their output: no node that answers has it", lost.get());
    }
    let unfetched = unfetched + lost.get();
    let ended = following.ended().await?.value;
    let summary = display.borrow_mut().summary(&ended);
    drop(display);
    if !quiet {
        eprint!("{summary}");
    }
    Ok(exit_code(&ended, unfetched))
}

/// Until it has ended, without its results.
pub(super) async fn wait(job: &JobAnswer, quiet: bool, context: &Context) -> Result<ExitCode, CliError> {
    let following = Following::new(&context.client, job.job.id, Patience::default());
    let mut display = Display::start(quiet);
    display.show(job);
    following.events(|answer| display.show(answer)).await?;
    let Answer { raw, value } = following.ended().await?;
    let summary = display.summary(&value);
    drop(display);
    match context.output {
        Output::Json => context.output.answer(&raw, String::new)?,
        Output::Table if !quiet => eprint!("{summary}"),
        Output::Table => {}
    }
    Ok(exit_code(&value, 0))
}

/// The results that are there, or all of them as they come.
pub(super) async fn results(job: &JobAnswer, follows: bool, to: To, context: &Context) -> Result<ExitCode, CliError> {
    let (client, id, patience) = (&context.client, job.job.id, Patience::default());
    let following = Following::new(client, id, patience);
    let fetcher = to.files.map(|directory| Fetcher::start(client, id, &directory, patience)).transpose()?;
    let mut sink = Sink::open(to.results)?;
    let lost = Cell::new(0);
    let take = |line: &[u8], heard: super::follow::Heard| {
        lost.set(lost.get() + usize::from(heard.is_output_lost));
        if heard.files_bytes > 0 {
            fetcher.iter().for_each(|fetcher| fetcher.fetch(heard.task));
        }
        sink.write(line)
    };
    if follows {
        // They tell whether the results fall behind.
        let events = async {
            match following.events(|_| {}).await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            results = following.results(job.job.tasks, take) => results?,
            error = events => return Err(error),
        }
    } else {
        following.results_so_far(job.job.tasks, take).await?;
    }
    sink.finish()?;
    let unfetched = match fetcher {
        Some(fetcher) => fetcher.finish().await,
        None => 0,
    };
    Ok(if unfetched + lost.get() == 0 { Code::Ok.into() } else { Code::Partial.into() })
}

/// All, or only some of it.
fn exit_code(job: &JobAnswer, unfetched: usize) -> ExitCode {
    code(job, unfetched).into()
}

fn code(job: &JobAnswer, unfetched: usize) -> Code {
    let is_all = job.job.is_ended && job.job.counts.succeeded == job.job.tasks;
    if is_all && unfetched == 0 { Code::Ok } else { Code::Partial }
}

/// Where results go.
enum Sink {
    Stdout,
    File(PathBuf, BufWriter<File>),
}

impl Sink {
    fn open(path: Option<PathBuf>) -> Result<Self, CliError> {
        Ok(match path {
            None => Self::Stdout,
            Some(path) => match File::create(&path) {
                Ok(file) => Self::File(path, BufWriter::new(file)),
                Err(source) => return Err(JobError::Write { path, source }.into()),
            },
        })
    }

    /// A line, which somebody may be waiting for.
    fn write(&mut self, line: &[u8]) -> Result<(), CliError> {
        let line = [line, b"\n"].concat();
        match self {
            Self::Stdout => print(&line),
            Self::File(path, file) => {
                let written = file.write_all(&line).and_then(|()| file.flush());
                written.map_err(|source| JobError::Write { path: path.clone(), source }.into())
            }
        }
    }

    fn finish(self) -> Result<(), CliError> {
        match self {
            Self::Stdout => Ok(()),
            Self::File(path, file) => {
                let written = file.into_inner().map_err(|error| error.into_error()).and_then(|file| file.sync_all());
                written.map_err(|source| JobError::Write { path, source }.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::samples;

    #[test]
    fn all_is_well_if_all_succeeded_and_otherwise_some_of_it() {
        for (job, unfetched, expected) in [
            (samples::job(3, 3, 0), 0, Code::Ok),
            (samples::job(3, 3, 0), 1, Code::Partial),
            (samples::job(3, 2, 1), 0, Code::Partial),
            (samples::job(3, 0, 3), 0, Code::Partial),
            (samples::job(3, 2, 0), 0, Code::Partial),
        ] {
            assert_eq!(code(&job, unfetched), expected);
        }
    }
}
