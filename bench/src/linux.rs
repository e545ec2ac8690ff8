//! `bench linux`: rows G1 to G4 of docs/specification.md, of a node with templates built for this run, and how long that took by
//! stage.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::protocol::{Exec, Exit, FromAgent, Identity, ToAgent, VERSION, receive, send};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use types::MachineId;

use crate::daemon::{self, Daemon};
use crate::floor;
use crate::http;
use crate::report::{Report, Row, Samples, announce};

const NO_MORE: [&str; 0] = [];
/// What the template has imported, and the control imports.
const IMPORTS: &[&str] = &["json", "hashlib", "random", "uuid"];
const IMPORTS_QUICK: &[&str] = &["json"];
const MIB: f64 = (1u64 << 20) as f64;

/// Linux guests, and what was made of them before.
pub(crate) struct Given {
    pub(crate) guests: Option<PathBuf>,
    /// A file for the warm Python template: half a minute to build where KVM emulates guest kernels.
    pub(crate) template: Option<PathBuf>,
}

impl Given {
    pub(crate) fn guests(&self) -> Result<PathBuf> {
        self.guests.clone().map_or_else(default_guests, Ok)
    }
}

pub(crate) fn run(json: Option<&Path>, quick: bool, farfork: Option<&Path>, given: &Given) -> Result<()> {
    let host = floor::open_host()?;
    let mut report = Report::new(&host, quick);
    let program = daemon::program(farfork)?;
    let guests = given.guests()?;
    let n = if quick { 3 } else { 20 };
    let mut node = Daemon::start(Command::new(&program), NO_MORE)?;
    // What is warm is in memory: the program that G2 runs, too.
    let base = || build(&node, &guests, "base", 64, ("warm", "/bin/true"));
    let imports = if quick { IMPORTS_QUICK } else { IMPORTS };
    let main = format!("python3 /usr/lib/farfork/main.py {}", imports.join(" "));
    let python = || build(&node, &guests, "python", 192, ("main", &main));
    let built = if quick {
        report.note("--quick: the templates were built at the same time, which takes each longer where cores are few; imports: json alone");
        std::thread::scope(|scope| {
            let base = scope.spawn(base);
            let python = python();
            [base.join().expect("no panic"), python]
        })
    } else {
        [base(), python()]
    };
    for built in built {
        built?.report(&mut report)?;
    }

    let (ready, firsts, control) = readiness(&mut report, &mut node, n)?;
    report.add(Row::new("G1", "fork -> first, beside it", &firsts, None));
    let met = ready.p50() <= 3.0 * control.p50();
    report.add(
        Row::new("G1", "fork -> ready; control: the same steps once more in a child", &ready, Some(control.p50()))
            .reaching("<= 3x", met),
    );
    exec(&mut report, &mut node, n, &ready)?;
    eval(&mut report, &mut node, n, imports)?;
    memory(&mut report, &mut node, n)?;
    // Last: what is written to the disk here is in nobody's way.
    if let Some(file) = &given.template {
        std::fs::remove_file(file).or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
        verb(&program, node.socket(), &["template", "export", "python"], file)?;
    }
    report.finish(json)
}

/// Has the program do something with a file.
pub(crate) fn verb(program: &Path, socket: &Path, words: &[&str], file: &Path) -> Result<()> {
    let status = Command::new(program).env("FARFORK_SOCKET", socket).args(words).arg(file).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{words:?} {} ended with {status}", file.display());
    Ok(())
}

fn default_guests() -> Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let caches =
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).context("neither XDG_CACHE_HOME nor HOME")?;
    let guests = caches.join("farfork/guest/current");
    ensure!(guests.join("vmlinux").exists(), "there is no {}: run `make guest`, or name it with --guests", guests.display());
    Ok(guests)
}

/// What a node is asked to build a template of one of our guests.
pub(crate) fn order(guests: &Path, rootfs: &str, mib: u64, warm: (&str, &str)) -> Result<Value> {
    let file = |name: &str| guests.join(name).canonicalize().with_context(|| format!("{name} of `make guest`"));
    Ok(json!({
        "name": rootfs, "kernel": file("vmlinux")?, "initrd": file("initrd")?, "rootfs": file(&format!("{rootfs}.ext4"))?,
        "memory_bytes": mib << 20, warm.0: warm.1,
    }))
}

/// A template that was built, and what the node said of that.
struct Built {
    name: String,
    mib: u64,
    answer: Value,
}

fn build(node: &Daemon, guests: &Path, rootfs: &str, mib: u64, warm: (&str, &str)) -> Result<Built> {
    announce(&format!("template build of {rootfs}"));
    let order = order(guests, rootfs, mib, warm)?;
    let answer = http::json(&http::request(&mut node.connect()?, "POST", "/v1/templates", &order.to_string())?)?;
    Ok(Built { name: rootfs.to_owned(), mib, answer })
}

impl Built {
    fn report(&self, report: &mut Report) -> Result<()> {
        let Self { name, mib, answer } = self;
        for stage in answer["built"].as_array().context("stages")? {
            let stage_name = stage["stage"].as_str().context("a name")?;
            let samples = Samples::from_us(vec![stage["took_us"].as_f64().context("a time")?]);
            report.keep(&format!("template {name}: {stage_name}"), &samples);
            report.add(Row::new("build", format!("template {name}, {mib} MiB: {stage_name}"), &samples, None));
        }
        Ok(())
    }
}

/// One child of a template; its answer.
fn fork(node: &mut Daemon, template: &str) -> Result<Value> {
    let order = json!({"from": {"template": template}}).to_string();
    let answer = node.ask("POST", "/v1/forks", &order)?;
    let child = answer["children"][0].clone();
    ensure!(child["ready_us"].as_u64().is_some(), "no child that is ready: {answer}");
    Ok(child)
}

fn id_of(child: &Value) -> Result<String> {
    Ok(child["id"].as_str().context("an id")?.to_owned())
}

fn kill(node: &mut Daemon, id: &str) -> Result<()> {
    node.ask("DELETE", &format!("/v1/machines/{id}"), "").map(drop)
}

/// A conversation with a machine's agent, greeted.
fn agent(node: &Daemon, id: &str) -> Result<UnixStream> {
    let mut stream = node.connect()?;
    let head = format!(
        "POST /v1/machines/{id}/agent HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: farfork-agent/1\r\n\
         Content-Length: 0\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    ensure!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    match exchange(&mut stream, &ToAgent::Hello { version: VERSION })? {
        FromAgent::Hello { .. } => Ok(stream),
        other => bail!("greeted with {other:?}"),
    }
}

fn exchange(stream: &mut UnixStream, message: &ToAgent) -> Result<FromAgent> {
    send(stream, message)?;
    Ok(receive(stream)?)
}

/// Runs a program to its end, which has to be a good one.
fn run_program(stream: &mut UnixStream, program: &[&str]) -> Result<Vec<u8>> {
    let arguments = program.iter().map(|word| (*word).to_owned()).collect();
    let mut said = exchange(stream, &ToAgent::Exec(Exec { arguments, ..Exec::default() }))?;
    let mut output = Vec::new();
    loop {
        match said {
            FromAgent::Stdout(bytes) => output.extend(bytes),
            FromAgent::Exited(Exit::Status(0)) => return Ok(output),
            other => bail!("{program:?}: {other:?}"),
        }
        said = receive(stream)?;
    }
}

/// G1: fork to ready, to first, and the control: what the agent does, once more, in a machine that has done it.
fn readiness(report: &mut Report, node: &mut Daemon, n: usize) -> Result<(Samples, Samples, Samples)> {
    announce("G1: fork to ready");
    let (mut readies, mut firsts, mut controls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..n {
        let child = fork(node, "base")?;
        let id = id_of(&child)?;
        readies.push(child["ready_us"].as_f64().context("a time")?);
        firsts.push(child["first_us"].as_f64().context("a time")?);
        let own: MachineId = id.parse::<uuid::Uuid>().map(MachineId::from_uuid)?;
        for _ in 0..3 {
            let started = Instant::now();
            // As the node does: a connection, a greeting, the steps.
            let mut stream = agent(node, &id)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            let identity = Identity {
                id: own,
                hostname: "again".to_owned(),
                seed: [7; 32],
                unix_ns: u64::try_from(now.as_nanos())?,
                address: None,
                without: Vec::new(),
            };
            match exchange(&mut stream, &ToAgent::Identity(identity))? {
                FromAgent::Ready(_) => controls.push(started.elapsed()),
                other => bail!("became somebody with {other:?}"),
            }
        }
        kill(node, &id)?;
    }
    let (readies, firsts) = (Samples::from_us(readies), Samples::from_us(firsts));
    let controls = Samples::of(&controls);
    report.keep("G1 ready", &readies);
    report.keep("G1 first", &firsts);
    report.keep("G1 control", &controls);
    Ok((readies, firsts, controls))
}

/// G2: fork to the end of `true`, beside the same in a machine that has run it before.
fn exec(report: &mut Report, node: &mut Daemon, n: usize, ready: &Samples) -> Result<()> {
    announce("G2: fork to exec");
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let started = Instant::now();
        let child = fork(node, "base")?;
        let id = id_of(&child)?;
        let mut stream = agent(node, &id)?;
        run_program(&mut stream, &["/bin/true"])?;
        first.push(started.elapsed());
        for _ in 0..2 {
            let started = Instant::now();
            let mut stream = agent(node, &id)?;
            run_program(&mut stream, &["/bin/true"])?;
            again.push(started.elapsed());
        }
        kill(node, &id)?;
    }
    let (first, again) = (Samples::of(&first), Samples::of(&again));
    report.keep("G2 fork to exec", &first);
    report.keep("G2 control", &again);
    let due = ready.p50() + 1.1 * again.p50();
    report.add(
        Row::new("G2", "fork -> end of `true`; control: `true` again in that child", &first, Some(again.p50()))
            .reaching(format!("<= G1 + 1.1x = {:.0} us", due), first.p50() <= due),
    );
    Ok(())
}

/// G3: an expression in the warm interpreter, beside an interpreter that is started for it.
fn eval(report: &mut Report, node: &mut Daemon, n: usize, imports: &[&str]) -> Result<()> {
    announce("G3: warm eval, and python3 -c");
    let cold_runs = if n > 5 { 5 } else { 1 };
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    let child = fork(node, "python")?;
    let id = id_of(&child)?;
    for number in 0..n {
        let started = Instant::now();
        let mut stream = agent(node, &id)?;
        let code = format!("{{\"op\":\"eval\",\"code\":\"json.dumps({number})\"}}");
        send(&mut stream, &ToAgent::Ask { bytes: u32::try_from(code.len())? })?;
        send(&mut stream, &ToAgent::Data(code.into_bytes()))?;
        let FromAgent::Reply { bytes } = receive(&mut stream)? else { bail!("no reply") };
        let mut answer = Vec::new();
        while answer.len() < bytes as usize {
            let FromAgent::Data(piece) = receive(&mut stream)? else { bail!("no data") };
            answer.extend(piece);
        }
        warm.push(started.elapsed());
        let answer: Value = serde_json::from_slice(&answer)?;
        ensure!(answer["value"] == format!("'{number}'"), "the wrong answer: {answer}");
    }
    let imports = imports.join(",");
    for _ in 0..cold_runs {
        let started = Instant::now();
        let mut stream = agent(node, &id)?;
        let said = run_program(&mut stream, &["python3", "-c", &format!("import {imports}; print(json.dumps(7))")])?;
        cold.push(started.elapsed());
        ensure!(said == b"7\n", "the wrong answer: {said:?}");
    }
    kill(node, &id)?;
    let (warm, cold) = (Samples::of(&warm), Samples::of(&cold));
    report.keep("G3 warm", &warm);
    report.keep("G3 cold", &cold);
    let met = warm.p50() * 50.0 <= cold.p50();
    report.add(
        Row::new("G3", "warm eval in a child; control: python3 -c with the same imports there", &warm, Some(cold.p50()))
            .reaching("<= 1/50", met),
    );
    Ok(())
}

/// G4: what an idle child has of its own.
fn memory(report: &mut Report, node: &mut Daemon, n: usize) -> Result<()> {
    announce("G4: private memory of idle children");
    let mut private = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..n {
        ids.push(id_of(&fork(node, "base")?)?);
    }
    // What is on its way when a child becomes ready.
    std::thread::sleep(Duration::from_secs(1));
    for id in &ids {
        let shown = node.ask("GET", &format!("/v1/machines/{id}"), "")?;
        private.push(shown["usage"]["private_bytes"].as_f64().with_context(|| format!("{shown}"))? / MIB);
    }
    for id in &ids {
        kill(node, id)?;
    }
    let private = Samples::from_us(private);
    report.keep("G4 private", &private);
    let met = private.p50() <= 1.5e6 / MIB;
    let row = Row::new("G4", "private memory of an idle child after ready, all alive", &private, None).in_mib();
    report.add(row.reaching("<= 1.5 MB", met));
    Ok(())
}
