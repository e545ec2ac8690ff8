//! `farfork run`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::client::Answer;
use super::error::CliError;
use super::job::attach::{self, To};
use super::job::file;
use super::job::follow::{Patience, submit};
use super::job::limits;
use super::job::or_interrupted;
use super::job::spec::{InputsFrom, SentFile, Spec};
use super::{Context, INTERRUPTED};
use crate::api::wire::{JobAnswer, JobRequest, JobSpread, Work};

/// Run a task in each of many children of a template, over all nodes
///
/// Each task gets a child of its own, forked from the template wherever there is room. Results go to stdout, a JSON object a line, as
/// they come; progress goes to stderr. In the command, in --eval and in the values of --env, {index} stands for the task's number,
/// {input} for its input, and {input.NAME} for a field of an input that is a JSON object.
///
/// Ctrl-C leaves the job to itself: it goes on, and `farfork job attach` comes back to it. Exits with 0 if all tasks succeeded, and
/// with 5 if not. Instead of a template a job file may be named (docs/jobs.md).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  farfork run py -n 300 -- python3 /srv/task.py {index}
  seq 1 9 | farfork run base --inputs - -- sh -c 'echo $(( {input} * {input} ))'
  farfork run py --jsonl tasks.jsonl --eval 'solve({input.seed})' > results.jsonl
  farfork run py --range 0..300 --file ./task.py:/srv/ --keep /srv/out --files ./out -- python3 /srv/task.py {input}
  farfork run job.toml --detach")]
#[command(group(ArgGroup::new("tasks").args(["count", "inputs", "input", "range", "jsonl"])))]
pub struct Arguments {
    /// What to fork: a template; or a job file, whose name ends with .toml
    #[arg(value_name = "TEMPLATE|FILE.toml")]
    template: String,
    /// So many tasks, without inputs
    #[arg(short = 'n', long, value_name = "N", value_parser = |text: &str| limits::whole(text, limits::count))]
    count: Option<u32>,
    /// One task for each line of a file; - is stdin
    #[arg(long, value_name = "FILE")]
    inputs: Option<PathBuf>,
    /// One task with this input; may be given several times
    #[arg(long, value_name = "VALUE", allow_hyphen_values = true)]
    input: Vec<String>,
    /// One task for each number from A on, without B
    #[arg(long, value_name = "A..B", allow_hyphen_values = true, value_parser = limits::range)]
    range: Option<std::ops::Range<i64>>,
    /// One task for each line of a file, all of which are JSON; - is stdin
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// Have the template's warm main process evaluate this, instead of running a command
    #[arg(long, value_name = "CODE", conflicts_with = "program")]
    eval: Option<String>,
    /// What to call the job
    #[arg(long, value_parser = limits::name)]
    name: Option<String>,
    /// Submitted again under the same key it is the same job [default: drawn]
    #[arg(long, value_parser = limits::key)]
    key: Option<String>,
    /// Add to the environment of each task; may be given several times
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = limits::pair)]
    env: Vec<(String, String)>,
    /// The directory that the command starts in
    #[arg(short = 'w', long, value_name = "PATH")]
    workdir: Option<String>,
    /// Whom it runs as
    #[arg(short, long, value_name = "NAME|UID[:GROUP]")]
    user: Option<String>,
    /// Put a file or directory into each child; a GUEST that ends with / is the directory to put it into. May be given several times
    #[arg(long, value_name = "LOCAL:GUEST", value_parser = SentFile::parse)]
    file: Vec<SentFile>,
    /// Keep this file or directory of each child when its task is done; may be given several times
    #[arg(long, value_name = "PATH", value_parser = limits::guest_path)]
    keep: Vec<String>,
    /// The most that is kept of a task's output, and again of its files, up to 16MiB [default: 1MiB]
    #[arg(long, value_name = "SIZE", value_parser = limits::output_limit)]
    output_limit: Option<u64>,
    /// The most memory of its own that each child may have [default: what the template is expected to need]
    #[arg(long, value_name = "SIZE", value_parser = limits::memory)]
    memory: Option<u64>,
    /// How many processors placement counts each child as [default: 0.01]
    #[arg(long, value_name = "NUMBER", value_parser = limits::cpus)]
    cpus: Option<u64>,
    /// On as few nodes as possible [default: over all that suit equally]
    #[arg(long)]
    pack: bool,
    /// Only on nodes with this label; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = limits::pair)]
    label: Vec<(String, String)>,
    /// On how many nodes the template's image is to be meanwhile, 1 to 16 [default: 1]
    #[arg(long, value_name = "N", value_parser = |text: &str| limits::whole(text, limits::replicas))]
    replicas: Option<u8>,
    /// How often a task is tried again after a failure that is not its own, up to 100 [default: 2]
    #[arg(long, value_name = "N", value_parser = |text: &str| limits::whole(text, limits::retries))]
    retries: Option<u32>,
    /// End what has not ended after so long [default: never]
    #[arg(long, value_name = "TIME", value_parser = limits::deadline)]
    deadline: Option<Duration>,
    /// The same for each try of a task, from its child's first instruction on
    #[arg(long, value_name = "TIME", value_parser = limits::deadline)]
    task_deadline: Option<Duration>,
    /// The most tasks that are placed at a time [default: as many as there is room for]
    #[arg(long, value_name = "N", value_parser = |text: &str| limits::whole(text, limits::max_parallel))]
    max_parallel: Option<u32>,
    /// Print the job's id, and leave it to itself
    #[arg(short, long, conflicts_with_all = ["results", "files"])]
    detach: bool,
    #[command(flatten)]
    to: To,
    /// No progress and no summary
    #[arg(short, long)]
    quiet: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

pub(crate) async fn run(arguments: Arguments, context: &Context) -> Result<ExitCode, CliError> {
    let (detach, to, quiet) = (arguments.detach, arguments.to.clone(), arguments.quiet);
    // Before anything listens for Ctrl-C: reading a standard input to which nobody writes has to end by it.
    let request = described(arguments)?.request()?;
    let submitting = submit(&context.client, &request, Patience::default());
    let Some(Answer { raw, value: job }) = or_interrupted(submitting).await? else {
        say_how_to_ask_again(&request);
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let id = job.job.id;
    if detach {
        context.output.answer(&raw, || format!("{id}\n"))?;
        return Ok(types::ExitCode::Ok.into());
    }
    if !quiet {
        eprintln!("{}", submitted(&job));
    }
    attach::attach(&job, to, quiet, context).await
}

/// It may be known under its key.
fn say_how_to_ask_again(request: &JobRequest) {
    let key = request.key.as_deref().unwrap_or_default();
    eprintln!(
        "it is not known whether the job was taken; submitted with --key {key} it is the same job, and `farfork job ls` lists it"
    );
}

fn submitted(job: &JobAnswer) -> String {
    let tasks = if job.job.tasks == 1 { "1 task".to_owned() } else { format!("{} tasks", job.job.tasks) };
    format!("job {}: {tasks}", job.job.id)
}

/// What the job file says, if one is named, and the flags.
fn described(arguments: Arguments) -> Result<Spec, CliError> {
    let named = Path::new(&arguments.template);
    let is_file_name = named.extension().is_some_and(|extension| extension == "toml");
    // A template may be called so. Without anything to do a file was meant, and its error says that it is not there.
    let is_template = !named.is_file() && (arguments.eval.is_some() || !arguments.program.is_empty());
    if is_file_name && !is_template {
        let spec = file::read(named)?;
        return Ok(spec.and(flags(arguments, None))?);
    }
    let template = limits::template(&arguments.template).map_err(|why| CliError::Usage {
        message: format!("no name of a template: {why}"),
        remedy: "name a template (`farfork template ls`), or a job file, whose name ends with .toml".to_owned(),
    })?;
    Ok(flags(arguments, Some(template)))
}

fn flags(arguments: Arguments, template: Option<String>) -> Spec {
    // One of them at most: they are one group.
    let inputs = arguments.count.map(InputsFrom::Count);
    let inputs = inputs.or(arguments.inputs.map(InputsFrom::Lines)).or(arguments.jsonl.map(InputsFrom::Json));
    let inputs = inputs.or(arguments.range.map(InputsFrom::Range));
    let inputs = inputs.or(Some(arguments.input).filter(|list| !list.is_empty()).map(InputsFrom::List));
    let work = arguments.eval.map(Work::Eval);
    Spec {
        template,
        inputs,
        work: work.or(Some(arguments.program).filter(|program| !program.is_empty()).map(Work::Exec)),
        key: arguments.key,
        name: arguments.name,
        env: arguments.env.into_iter().collect(),
        workdir: arguments.workdir,
        user: arguments.user,
        files: arguments.file,
        keep: arguments.keep,
        output_limit_bytes: arguments.output_limit,
        memory_bytes: arguments.memory,
        cpu_millis: arguments.cpus,
        spread: arguments.pack.then_some(JobSpread::Pack),
        labels: arguments.label.into_iter().collect(),
        replicas: arguments.replicas,
        retries: arguments.retries,
        deadline: arguments.deadline,
        task_deadline: arguments.task_deadline,
        max_parallel: arguments.max_parallel,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::api::wire::Inputs;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn typed(line: &[&str]) -> Result<JobRequest, String> {
        let line = Line::try_parse_from([&["run"], line].concat()).map_err(|error| error.to_string())?;
        described(line.arguments).and_then(Spec::request).map_err(|error| {
            assert_eq!(error.code(), types::ExitCode::Usage, "{error}");
            error.to_string()
        })
    }

    fn list(inputs: &[&str]) -> Inputs {
        Inputs::List(inputs.iter().map(|input| (*input).to_owned()).collect())
    }

    #[test]
    fn flags_are_the_request() {
        let line = "py -n 300 --name sq --key k -e A={index} -e B=b=c -w /srv -u nobody --keep /out --output-limit 2MiB --memory 64MiB \
            --cpus 0.5 --pack --label zone=a --replicas 2 --retries 0 --deadline 2h --task-deadline 30s --max-parallel 9 -- echo {index}";
        let request = typed(&line.split_whitespace().collect::<Vec<_>>()).unwrap();
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let expected = JobRequest {
            template: "py".to_owned(),
            inputs: Inputs::Count(300),
            work: Work::Exec(vec!["echo".to_owned(), "{index}".to_owned()]),
            key: Some("k".to_owned()),
            name: Some("sq".to_owned()),
            env: map(&[("A", "{index}"), ("B", "b=c")]),
            workdir: Some("/srv".to_owned()),
            user: Some("nobody".to_owned()),
            files: None,
            outputs: vec!["/out".to_owned()],
            output_limit_bytes: Some(2 << 20),
            memory_bytes: Some(64 << 20),
            cpu_millis: Some(500),
            spread: JobSpread::Pack,
            labels: map(&[("zone", "a")]),
            replicas: 2,
            retries: 0,
            deadline_ms: Some(7_200_000),
            task_deadline_ms: Some(30_000),
            max_parallel: Some(9),
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn inputs_come_from_one_place() {
        assert_eq!(typed(&["py", "--range", "-1..1", "--eval", "{input}"]).unwrap().inputs, list(&["-1", "0"]));
        assert_eq!(typed(&["py", "--input", "a", "--input", "-b", "--", "x"]).unwrap().inputs, list(&["a", "-b"]));
        for bad in [
            &["py", "--", "x"][..],
            &["py", "-n", "3"],
            &["py", "-n", "0", "--", "x"],
            &["py", "-n", "1000001", "--", "x"],
            &["py", "-n", "1", "--range", "0..1", "--", "x"],
            &["py", "-n", "1", "--eval", "1", "--", "x"],
            &["../py", "-n", "1", "--", "x"],
            &["nothere.toml"],
            &["py", "-n", "1", "--detach", "--results", "r", "--", "x"],
        ] {
            typed(bad).unwrap_err();
        }
        assert_eq!(typed(&["py.toml", "-n", "1", "--", "x"]).unwrap().template, "py.toml", "a template may be called so");
    }

    #[test]
    fn a_job_file_is_named_in_place_of_a_template() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("in"), "a\nb\n").unwrap();
        let path = at.path().join("job.toml");
        std::fs::write(&path, "template = 'py'\ninputs.file = 'in'\ncommand = ['echo', '{input}']\nretries = 1\n").unwrap();
        let path = path.to_str().unwrap();
        let request = typed(&[path, "--key", "k"]).unwrap();
        assert_eq!((request.template.as_str(), request.inputs, request.retries), ("py", list(&["a", "b"]), 1));
        assert!(typed(&[path, "--retries", "2"]).unwrap_err().contains("--retries"));
        assert!(typed(&[path, "--", "false"]).unwrap_err().contains("the command or --eval"));
    }
}
