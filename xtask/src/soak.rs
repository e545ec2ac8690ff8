//! `make soak`: every test with its full counts, for a number of seeds. One row a test and seed, written as soon as it is
//! known, so that a soak that was stopped goes on where it was.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The longest that one test may take with its full counts.
const TEST_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Serialize, Deserialize)]
struct Record {
    commit: String,
    machine: String,
    held: usize,
    failed: usize,
    rows: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    test: String,
    seed: u64,
    passed: bool,
    seconds: f64,
    /// What the test says that it has held, with its counts.
    held: Vec<String>,
    /// The end of its output, if it failed.
    failure: Option<String>,
}

pub(crate) fn run(seeds: u64, only: Option<&str>) -> Result<bool> {
    let root = crate::root();
    let commit = output(Command::new("git").arg("-C").arg(&root).args(["describe", "--always", "--dirty"]))?;
    let path = root.join("target/soak/soak.json");
    let mut record = resume(&path, commit.trim())?;
    let tests = list(&root)?;
    let chosen: Vec<_> = tests.iter().filter(|test| only.is_none_or(|only| test.name.contains(only))).collect();
    ensure!(!chosen.is_empty(), "no test's name contains {:?}", only.unwrap_or_default());
    fs::create_dir_all(path.parent().context("a file in a directory")?)?;
    let total = chosen.len() as u64 * seeds;
    println!("soak of {}: {} tests, {seeds} seeds, into {}", record.commit, chosen.len(), path.display());
    let mut done = 0;
    for seed in 1..=seeds {
        for test in &chosen {
            done += 1;
            if record.rows.iter().any(|row| row.test == test.name && row.seed == seed && row.passed) {
                continue;
            }
            let log = path.with_extension("log");
            let row = soak_one(test, seed, &log)?;
            let outcome = if row.passed { "held" } else { "FAILED" };
            if !row.passed {
                let kept = log.with_file_name(format!("{}-{seed}.log", test.case.replace("::", "-")));
                fs::rename(&log, &kept)?;
                println!("all of its output: {}", kept.display());
            }
            println!("[{done}/{total}] {outcome} {} seed {seed} in {:.1} s {}", test.name, row.seconds, row.held.join("; "));
            record.rows.retain(|old| old.test != row.test || old.seed != row.seed);
            record.rows.push(row);
            record.held = record.rows.iter().filter(|row| row.passed).count();
            record.failed = record.rows.len() - record.held;
            write(&path, &record)?;
        }
    }
    println!("{} passed, {} failed", record.held, record.failed);
    Ok(record.failed == 0)
}

/// A record of another commit is no record of this one.
fn resume(path: &Path, commit: &str) -> Result<Record> {
    let old = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
    if let Some(old) = old.filter(|old| old.commit == commit && !commit.ends_with("-dirty")) {
        return Ok(old);
    }
    let machine = output(Command::new("uname").arg("-srm"))?.trim().to_owned();
    Ok(Record { commit: commit.to_owned(), machine, held: 0, failed: 0, rows: Vec::new() })
}

fn write(path: &Path, record: &Record) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec_pretty(record)?)?;
    Ok(fs::rename(&temporary, path)?)
}

/// A test, and where it is.
struct Test {
    name: String,
    binary: PathBuf,
    directory: PathBuf,
    case: String,
}

/// Builds the tests once and lists them; what is changed in the sources afterwards is not soaked.
fn list(root: &Path) -> Result<Vec<Test>> {
    let mut command = Command::new("cargo");
    command.current_dir(root).args(["nextest", "list", "--workspace", "--all-features", "--cargo-quiet"]);
    command.args(["--cargo-profile", "release", "--message-format", "json"]);
    let json: serde_json::Value = serde_json::from_str(&output(&mut command)?).context("the list of tests")?;
    let suites = json["rust-suites"].as_object().context("rust-suites")?;
    let mut tests = Vec::new();
    for (suite, content) in suites {
        let path = |field: &str| content[field].as_str().map(PathBuf::from).with_context(|| format!("{field} of {suite}"));
        let (binary, directory) = (path("binary-path")?, path("cwd")?);
        for case in content["testcases"].as_object().context("testcases")?.keys() {
            let (binary, directory) = (binary.clone(), directory.clone());
            tests.push(Test { name: format!("{suite} {case}"), binary, directory, case: case.clone() });
        }
    }
    ensure!(!tests.is_empty(), "there are no tests");
    Ok(tests)
}

fn soak_one(test: &Test, seed: u64, log: &Path) -> Result<Row> {
    File::create(log)?;
    let open_log = || File::options().append(true).open(log);
    let started = Instant::now();
    let mut process = Command::new(&test.binary)
        .current_dir(&test.directory)
        .args(["--exact", &test.case, "--nocapture"])
        .env("FARFORK_COUNT", "full")
        .env("FARFORK_SEED", seed.to_string())
        .env("CARGO_MANIFEST_DIR", &test.directory)
        .stdin(Stdio::null())
        .stdout(open_log()?)
        .stderr(open_log()?)
        .spawn()
        .with_context(|| test.binary.display().to_string())?;
    let status = loop {
        match process.try_wait()? {
            Some(status) => break status.to_string(),
            None if started.elapsed() > TEST_LIMIT => {
                process.kill()?;
                process.wait()?;
                break format!("killed after {TEST_LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let passed = status == "exit status: 0" && text.contains("test result: ok. 1 passed");
    let lines: Vec<&str> = text.lines().collect();
    let held = lines.iter().filter_map(|line| line.trim().strip_prefix("held: ")).map(str::to_owned).collect();
    let failure = (!passed).then(|| format!("{status}\n{}", lines[lines.len().saturating_sub(60)..].join("\n")));
    Ok(Row { test: test.name.clone(), seed, passed, seconds: started.elapsed().as_secs_f64(), held, failure })
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
