//! As [`crate::node::fuzzing`], for what the command line reads that somebody else may have written.

use std::path::Path;

use super::job::limits::{INPUT_MAX, OUTPUT_MAX, TASKS_MAX};
use super::job::spec::InputsFrom;
use super::job::{JobError, file};
use crate::node::fuzzing::Target;

/// All of them.
pub const TARGETS: [Target; 1] = [("job_file", job_file)];

/// A job file: what is taken keeps to the limits, and what is not is wrong in a line that it has.
pub fn job_file(bytes: &[u8]) {
    match file::parse(bytes, Path::new("job.toml")) {
        Ok(spec) => {
            match spec.inputs {
                Some(InputsFrom::Count(count)) => assert!((1..=TASKS_MAX).contains(&count)),
                Some(InputsFrom::Range(range)) => assert!((1..=i64::from(TASKS_MAX)).contains(&(range.end - range.start))),
                Some(InputsFrom::List(list)) => {
                    assert!((1..=TASKS_MAX as usize).contains(&list.len()));
                    assert!(list.iter().all(|input| input.len() <= INPUT_MAX));
                }
                Some(InputsFrom::Lines(_) | InputsFrom::Json(_)) | None => {}
            }
            assert!(spec.output_limit_bytes.is_none_or(|bytes| bytes <= OUTPUT_MAX));
            assert!(spec.replicas.is_none_or(|replicas| (1..=16).contains(&replicas)));
            assert!(spec.files.iter().all(|file| file.target.starts_with('/') && !file.target.contains("/../")));
        }
        Err(JobError::File { line, field, why, .. }) => {
            let lines = 1 + bytes.iter().filter(|byte| **byte == b'\n').count();
            assert!((1..=lines).contains(&line), "line {line} of {lines}");
            assert!(!field.is_empty() && !why.is_empty());
        }
        Err(other) => panic!("not of a job file: {other}"),
    }
}

/// Job files for the corpus: a target, a name, and bytes that it accepts.
#[must_use]
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    const WHOLE: &str = r#"# All there is.
template = "team-7/python"
name = "square"
key = "square-1"
command = ["python3", "/srv/task.py", "{index}", "{input.seed}"]
workdir = "/srv"
user = "nobody:nogroup"
inputs = { jsonl = "tasks.jsonl" }
keep = ["/srv/out"]
output_limit = "4MiB"
memory = "64MiB"
cpus = 0.5
spread = "pack"
replicas = 2
retries = 0
deadline = "10m"
task_deadline = "30s"
max_parallel = 100

[env]
SEED = "{index}"

[labels]
zone = "a"

[[files]]
source = "task.py"
target = "/srv/"
"#;
    let seeds = [
        ("whole", WHOLE),
        ("count", "template = 'base'\ninputs = { count = 300 }\ncommand = ['echo', '{index}']\n"),
        ("list", "template = 'base'\ninputs = { list = ['a', \"b\\n\"] }\neval = 'f({input})'\ncpus = '2'\n"),
        ("range", "inputs.range = '-5..300'\nspread = 'spread'\n"),
        ("file", "[inputs]\nfile = '/srv/inputs.txt'\n"),
        ("wrong", "template = 3\nretrys = 2\n"),
    ];
    seeds.map(|(name, text)| ("job_file", name, text.as_bytes().to_vec())).to_vec()
}
