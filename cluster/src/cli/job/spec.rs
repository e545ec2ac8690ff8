//! A job as the command line and a job file describe it, and the request that comes of both.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

use super::error::JobError;
use super::{inputs, pack};
use crate::api::wire::{JobRequest, JobSpread, Work};
use crate::cli::error::CliError;

/// What flags or a file say. What neither says is for the node to decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// A template's name.
    pub template: Option<String>,
    /// What the tasks are given.
    pub inputs: Option<InputsFrom>,
    /// What they do; placeholders are the node's to fill.
    pub work: Option<Work>,
    /// Under which it may be sent again.
    pub key: Option<String>,
    /// For people.
    pub name: Option<String>,
    /// Added to the environment.
    pub env: BTreeMap<String, String>,
    /// Where the program starts.
    pub workdir: Option<String>,
    /// As whom.
    pub user: Option<String>,
    /// What is sent along.
    pub files: Vec<SentFile>,
    /// What is kept of each child.
    pub keep: Vec<String>,
    /// The most of it.
    pub output_limit_bytes: Option<u64>,
    /// Of each child.
    pub memory_bytes: Option<u64>,
    /// Of each child.
    pub cpu_millis: Option<u64>,
    /// Over how many nodes.
    pub spread: Option<JobSpread>,
    /// Of the nodes.
    pub labels: BTreeMap<String, String>,
    /// Of the image.
    pub replicas: Option<u8>,
    /// Of a task.
    pub retries: Option<u32>,
    /// Of the job.
    pub deadline: Option<Duration>,
    /// Of a try.
    pub task_deadline: Option<Duration>,
    /// Tasks that are placed.
    pub max_parallel: Option<u32>,
}

/// Where inputs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputsFrom {
    /// So many tasks, which have none.
    Count(u32),
    /// These.
    List(Vec<String>),
    /// These numbers.
    Range(Range<i64>),
    /// The lines of a file; `-` is standard input.
    Lines(PathBuf),
    /// The same, each of them JSON.
    Json(PathBuf),
}

/// A file or directory that is sent along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentFile {
    /// Here.
    pub source: PathBuf,
    /// In the child; one that ends with `/` is the directory that it goes into under its own name.
    pub target: String,
}

impl SentFile {
    /// Reads `LOCAL:GUEST`.
    pub(in crate::cli) fn parse(text: &str) -> Result<Self, String> {
        // The last one: a path here may have a colon, and one in a child begins with a slash.
        let at = text.rfind(":/").filter(|at| *at > 0).ok_or_else(|| format!("{text:?} is no PATH:/PATH"))?;
        Ok(Self { source: text[..at].into(), target: super::limits::guest_path(&text[at + 1..])? })
    }
}

/// One of two, or the one that both are.
fn either<T: PartialEq>(file: Option<T>, flag: Option<T>, field: &str, flag_name: &'static str) -> Result<Option<T>, JobError> {
    match (file, flag) {
        (Some(file), Some(flag)) if file != flag => Err(JobError::Contradiction { field: field.to_owned(), flag: flag_name }),
        (file, flag) => Ok(file.or(flag)),
    }
}

/// Both, if none of them says otherwise of the same name.
fn both(
    mut file: BTreeMap<String, String>,
    flags: BTreeMap<String, String>,
    field: &str,
    flag_name: &'static str,
) -> Result<BTreeMap<String, String>, JobError> {
    for (name, value) in flags {
        let field = format!("{field}.{name}");
        let value = either(file.remove(&name), Some(value), &field, flag_name)?;
        file.extend(value.map(|value| (name, value)));
    }
    Ok(file)
}

impl Spec {
    /// What a job file says and what the flags add to it.
    ///
    /// # Errors
    /// [`JobError::Contradiction`].
    pub fn and(self, flags: Self) -> Result<Self, JobError> {
        Ok(Self {
            template: either(self.template, flags.template, "template", "TEMPLATE")?,
            inputs: either(self.inputs, flags.inputs, "inputs", "one of -n, --inputs, --input, --range and --jsonl")?,
            work: either(self.work, flags.work, "what the tasks do", "the command or --eval")?,
            key: either(self.key, flags.key, "key", "--key")?,
            name: either(self.name, flags.name, "name", "--name")?,
            env: both(self.env, flags.env, "env", "--env")?,
            workdir: either(self.workdir, flags.workdir, "workdir", "--workdir")?,
            user: either(self.user, flags.user, "user", "--user")?,
            files: [self.files, flags.files].concat(),
            keep: [self.keep, flags.keep].concat(),
            output_limit_bytes: either(self.output_limit_bytes, flags.output_limit_bytes, "output_limit", "--output-limit")?,
            memory_bytes: either(self.memory_bytes, flags.memory_bytes, "memory", "--memory")?,
            cpu_millis: either(self.cpu_millis, flags.cpu_millis, "cpus", "--cpus")?,
            spread: either(self.spread, flags.spread, "spread", "--pack")?,
            labels: both(self.labels, flags.labels, "labels", "--label")?,
            replicas: either(self.replicas, flags.replicas, "replicas", "--replicas")?,
            retries: either(self.retries, flags.retries, "retries", "--retries")?,
            deadline: either(self.deadline, flags.deadline, "deadline", "--deadline")?,
            task_deadline: either(self.task_deadline, flags.task_deadline, "task_deadline", "--task-deadline")?,
            max_parallel: either(self.max_parallel, flags.max_parallel, "max_parallel", "--max-parallel")?,
        })
    }

    /// The request, with all that it names read. It has a key in any case, so that it can be sent again.
    ///
    /// # Errors
    /// [`CliError`].
    pub fn request(self) -> Result<JobRequest, CliError> {
        let missing = |field, why: &str| JobError::Field { field, why: why.to_owned() };
        let template = self.template.ok_or_else(|| missing("template", "it is not said what to fork"))?;
        let work = self
            .work
            .ok_or_else(|| missing("command", "it is not said what the tasks do: give a command after --, or --eval CODE"))?;
        let from = self.inputs.ok_or_else(|| {
            missing("inputs", "it is not said how many tasks there are: give -n, --inputs, --input, --range or --jsonl")
        })?;
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Ok(JobRequest {
            template,
            inputs: inputs::read(from)?,
            work,
            key: Some(self.key.unwrap_or_else(|| Uuid::now_v7().to_string())),
            name: self.name,
            env: self.env,
            workdir: self.workdir,
            user: self.user,
            files: pack::pack(&self.files)?,
            outputs: self.keep,
            output_limit_bytes: self.output_limit_bytes,
            memory_bytes: self.memory_bytes,
            cpu_millis: self.cpu_millis,
            spread: self.spread.unwrap_or_default(),
            labels: self.labels,
            replicas: self.replicas.unwrap_or(1),
            retries: self.retries.unwrap_or(2),
            deadline_ms: self.deadline.map(millis),
            task_deadline_ms: self.task_deadline.map(millis),
            max_parallel: self.max_parallel,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Spec {
        let work = Some(Work::Exec(vec!["echo".to_owned(), "{index} {input} {input.a}".to_owned()]));
        let template = Some("python".to_owned());
        Spec { template, work, inputs: Some(InputsFrom::Count(3)), ..Spec::default() }
    }

    #[test]
    fn placeholders_are_for_the_node() {
        let env = BTreeMap::from([("SEED".to_owned(), "{index}".to_owned())]);
        let request = Spec { env, ..whole() }.request().unwrap();
        assert_eq!(request.work, Work::Exec(vec!["echo".to_owned(), "{index} {input} {input.a}".to_owned()]));
        assert_eq!(request.env["SEED"], "{index}");
    }

    #[test]
    fn a_request_has_a_key_that_is_drawn_or_given() {
        let (one, other) = (whole().request().unwrap(), whole().request().unwrap());
        assert!(one.key.is_some() && one.key != other.key);
        let given = Spec { key: Some("mine".to_owned()), ..whole() }.request().unwrap();
        assert_eq!(given.key.as_deref(), Some("mine"));
    }

    #[test]
    fn what_is_missing_is_a_wrong_command_line() {
        for (spec, what) in [
            (Spec { template: None, ..whole() }, "template"),
            (Spec { work: None, ..whole() }, "command"),
            (Spec { inputs: None, ..whole() }, "inputs"),
        ] {
            let error = spec.request().unwrap_err();
            assert!(error.to_string().starts_with(what), "{error}");
            assert_eq!(error.code(), types::ExitCode::Usage);
        }
    }

    #[test]
    fn flags_add_to_a_job_file_and_may_not_contradict_it() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let file = Spec { retries: Some(1), env: map(&[("A", "1")]), ..whole() };
        let flags = Spec { retries: Some(1), replicas: Some(2), env: map(&[("A", "1"), ("B", "2")]), ..Spec::default() };
        let merged = file.clone().and(flags).unwrap();
        assert_eq!((merged.retries, merged.replicas, merged.env), (Some(1), Some(2), map(&[("A", "1"), ("B", "2")])));
        for (flags, flag) in [
            (Spec { retries: Some(2), ..Spec::default() }, "--retries"),
            (Spec { env: map(&[("A", "2")]), ..Spec::default() }, "--env"),
            (Spec { inputs: Some(InputsFrom::Count(4)), ..Spec::default() }, "-n"),
            (Spec { work: Some(Work::Eval("1".to_owned())), ..Spec::default() }, "--eval"),
        ] {
            let error = file.clone().and(flags).unwrap_err();
            assert!(matches!(error, JobError::Contradiction { .. }) && error.to_string().contains(flag), "{error}");
            assert_eq!(error.exit_code(), types::ExitCode::Usage);
        }
    }

    #[test]
    fn what_is_sent_along_is_named_here_and_there() {
        let parsed = SentFile::parse("a:b/c:/srv/x").unwrap();
        assert_eq!(parsed, SentFile { source: "a:b/c".into(), target: "/srv/x".to_owned() });
        for bad in ["a", "a:b", ":/x", "a:/../x"] {
            assert!(SentFile::parse(bad).is_err(), "{bad}");
        }
    }
}
