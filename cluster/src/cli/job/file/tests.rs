use super::*;
use crate::cli::job::limits::TASKS_MAX;

fn parsed(text: &str) -> Result<Spec, JobError> {
    parse(text.as_bytes(), Path::new("jobs/job.toml"))
}

#[test]
fn a_job_file_says_what_flags_say() {
    let text = r#"
template = "team-7/python"
name = "square"
key = "square-1"
command = ["python3", "/srv/job.py", "{index}", "{input}"]
workdir = "/srv"
user = "nobody"
inputs = { range = "0..300" }
keep = ["/srv/out"]
output_limit = "4MiB"
memory = "64MiB"
cpus = 0.5
spread = "pack"
replicas = 2
retries = 0
deadline = "2h"
task_deadline = "30s"
max_parallel = 100

[env]
SEED = "{index}"

[labels]
zone = "a"

[[files]]
source = "job.py"
target = "/srv/"

[[files]]
source = "/etc/hosts"
target = "/etc/hosts"
"#;
    let map = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
    let sent = |source: &str, target: &str| SentFile { source: source.into(), target: target.to_owned() };
    let command = ["python3", "/srv/job.py", "{index}", "{input}"].map(str::to_owned).to_vec();
    let expected = Spec {
        template: Some("team-7/python".to_owned()),
        inputs: Some(InputsFrom::Range(0..300)),
        work: Some(Work::Exec(command)),
        key: Some("square-1".to_owned()),
        name: Some("square".to_owned()),
        env: map("SEED", "{index}"),
        workdir: Some("/srv".to_owned()),
        user: Some("nobody".to_owned()),
        files: vec![sent("jobs/job.py", "/srv/"), sent("/etc/hosts", "/etc/hosts")],
        keep: vec!["/srv/out".to_owned()],
        output_limit_bytes: Some(4 << 20),
        memory_bytes: Some(64 << 20),
        cpu_millis: Some(500),
        spread: Some(JobSpread::Pack),
        labels: map("zone", "a"),
        replicas: Some(2),
        retries: Some(0),
        deadline: Some(std::time::Duration::from_secs(7_200)),
        task_deadline: Some(std::time::Duration::from_secs(30)),
        max_parallel: Some(100),
    };
    assert_eq!(parsed(text).unwrap(), expected);
}

#[test]
fn inputs_are_of_one_kind() {
    let inputs = |text: &str| parsed(text).unwrap().inputs.unwrap();
    assert_eq!(inputs("inputs = { count = 3 }"), InputsFrom::Count(3));
    assert_eq!(inputs("inputs.list = [\"a\", \"{index}\"]"), InputsFrom::List(vec!["a".to_owned(), "{index}".to_owned()]));
    assert_eq!(inputs("[inputs]\nfile = \"in.txt\""), InputsFrom::Lines("jobs/in.txt".into()));
    assert_eq!(inputs("inputs = { jsonl = \"/in.jsonl\" }"), InputsFrom::Json("/in.jsonl".into()));
    assert_eq!(parsed("").unwrap(), Spec::default());
    for (cpus, millis) in [("0.5", 500), ("2", 2_000), ("\"0.25\"", 250)] {
        assert_eq!(parsed(&format!("cpus = {cpus}")).unwrap().cpu_millis, Some(millis));
    }
}

#[test]
fn what_is_wrong_is_said_with_file_line_and_field() {
    let long = format!("inputs.list = [\n  \"a\",\n  \"{}\",\n]", "x".repeat(INPUT_MAX + 1));
    for (text, line, field, why) in [
        ("template = 3", 1, "template", "it is the number 3, and should be a text"),
        ("\n\nretries = \"two\"", 3, "retries", "it is the text \"two\", and should be a whole number"),
        ("\nretries = 1.5", 2, "retries", "it is the number 1.5, and should be a whole number"),
        ("retries = 101", 1, "retries", "101 is not within 0 to 100"),
        ("replicas = 0", 1, "replicas", "1 to 16"),
        ("max_parallel = 0", 1, "max_parallel", "0 is not within"),
        ("# a job\nretrys = 3", 2, "retrys", "there is no such field; there are `template`"),
        ("[[files]]\nsource = \"a\"\nfrom = \"b\"", 3, "files.from", "there is no such field"),
        ("inputs = { cuont = 3 }", 1, "inputs.cuont", "there is no such field"),
        ("[[files]]\nsource = \"a\"", 1, "files", "there is no `target`"),
        ("[[files]]\nsource = \"a\"\ntarget = \"b\"", 3, "files.target", "\"b\" is no absolute path"),
        ("[env]\nA = \"1\"\nB = 2", 3, "env.B", "it is the number 2, and should be a text"),
        ("env = 3", 1, "env", "it is the number 3, and should be a table"),
        ("inputs = 300", 1, "inputs", "should be a table with one of count"),
        ("\ninputs = {}", 2, "inputs", "one of count"),
        ("inputs = { count = 1, range = \"0..2\" }", 1, "inputs", "only one"),
        ("inputs = { count = 0 }", 1, "inputs.count", "1 to 1000000"),
        ("inputs = { list = [] }", 1, "inputs.list", "0 tasks"),
        ("inputs = { range = \"3\" }", 1, "inputs.range", "is no range"),
        ("inputs = { file = \"\" }", 1, "inputs.file", "empty"),
        (&long, 3, "inputs.list[1]", "32769 bytes"),
        ("command = \"echo\"", 1, "command", "it is the text \"echo\", and should be a list"),
        ("command = []", 1, "command", "names no program"),
        ("command = [\"a\"]\neval = \"1\"", 2, "eval", "there is a command too"),
        ("memory = \"64MB\"", 1, "memory", "did you mean 64MiB"),
        ("output_limit = \"17MiB\"", 1, "output_limit", "more than 16 MiB"),
        ("cpus = true", 1, "cpus", "it is true or false, and should be a number"),
        ("cpus = 0.0001", 1, "cpus", "is no number of processors"),
        ("spread = \"wide\"", 1, "spread", "neither"),
        ("deadline = \"soon\"", 1, "deadline", "is no time"),
        ("keep = [\n\"/a\",\n\"b\"]", 3, "keep", "no absolute path"),
        ("template = \"../x\"", 1, "template", ""),
        ("name = \"a\"\nname = \"b\"", 2, "name", "duplicate key"),
        ("name = \"a\"\nretries = ", 2, "retries", ""),
        ("name = \"a\nretries = 2", 1, "name", ""),
        ("name = 'a'\nwhat is this", 2, "what is this", ""),
    ] {
        let error = parsed(text).unwrap_err();
        let JobError::File { file, line: found, field: of, why: said } = &error else { panic!("{text}: {error}") };
        assert_eq!((file.as_path(), *found, of.as_str()), (Path::new("jobs/job.toml"), line, field), "{text}: {error}");
        assert!(said.contains(why) && !said.contains('\n'), "{text}: {error}");
        assert!(error.to_string().starts_with(&format!("jobs/job.toml, line {line}: {field}: ")), "{error}");
        assert_eq!(error.exit_code(), types::ExitCode::Usage);
    }
}

#[test]
fn bytes_that_are_no_text_have_a_line_too() {
    let error = parse(b"name = \"a\"\n# \xFF\n", Path::new("job.toml")).unwrap_err();
    assert_eq!(error.to_string(), "job.toml, line 2: the file: it is no UTF-8");
}

#[test]
fn a_list_of_too_many_inputs_is_refused() {
    let text = format!("inputs.list = [{}]", "'',".repeat(TASKS_MAX as usize + 1));
    assert!(parsed(&text).unwrap_err().to_string().contains("1000001 tasks"));
}

#[test]
fn each_job_file_of_the_documentation_is_taken() {
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/jobs.md")).unwrap();
    let blocks = docs.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let specs: Vec<Spec> = blocks.map(|text| parsed(text).unwrap_or_else(|error| panic!("{error}\n{text}"))).collect();
    assert!(specs.len() >= 7, "{} examples", specs.len());
    assert!(specs.iter().all(|spec| spec.inputs.is_some()));
    // The line that it shows is what is said.
    let error = parsed("\n\nretries = \"two\"").unwrap_err().to_string();
    assert!(docs.contains(error.trim_start_matches("jobs/")), "{error}");
}
