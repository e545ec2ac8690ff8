//! Rows C1, C2 through a cluster, and the last part of C4: three real nodes on loopback, with a Linux template that one of them has
//! built. What `farfork run` takes until every result is there; a fork through a node of a cluster; and from the death of a node until a
//! child of its tasks is forked on another one.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::failover::{NODES, Nodes, eventually};
use crate::linux::Given;
use crate::report::{Report, Row, Samples, announce};
use crate::{daemon, http, linux};

/// The unit of times of processes in /proc: USER_HZ.
const TICK: Duration = Duration::from_millis(10);
/// Of C1. Where KVM emulates guest kernels one takes five minutes, and is all that there is time for.
const ROUNDS: usize = 3;
const ROUNDS_WITHIN: Duration = Duration::from_secs(240);
const WARM_TASKS: u64 = 6;
const REAPED: Duration = Duration::from_millis(200);
/// Leaders, and then other nodes, whose tasks go on elsewhere.
const KILLED: usize = 5;

pub(crate) fn run(report: &mut Report, program: Option<&Path>, given: &Given, quick: bool) -> Result<()> {
    let program = daemon::program(program)?;
    let mut nodes = Nodes::start(program.clone())?;
    announce("C1: a Linux template");
    match given.template.as_deref().filter(|file| file.exists()) {
        Some(file) => linux::verb(&program, &nodes.socket(0), &["template", "import", "python"], file)?,
        None => {
            let order = linux::order(&given.guests()?, "python", 192, ("main", "python3 /usr/lib/farfork/main.py json"))?;
            nodes.ask(0, "POST", "/v1/templates", &order.to_string())?;
        }
    }
    // As long as this one goes on every node is to have the image, also one that has just come back.
    let keeps = json!({ "template": "python", "inputs": { "count": 1 }, "work": { "eval": "__import__('time').sleep(100000)" }, "replicas": NODES, "retries": 100, "cpu_millis": 1 });
    nodes.ask(0, "POST", "/v1/jobs", &keeps.to_string())?;
    announce("C1: farfork run");
    tasks(report, &nodes, &program, if quick { 6 } else { 300 })?;
    announce("C2: a fork through a node of a cluster");
    forks(report, &mut nodes, if quick { 30 } else { 300 })?;
    if quick {
        return Ok(());
    }
    announce("C4: the first child of a dead node's tasks elsewhere");
    rescheduled(report, &mut nodes)
}

/// C1: from the start of `farfork run` until it has written every result and ended.
fn tasks(report: &mut Report, nodes: &Nodes, program: &Path, each: u64) -> Result<()> {
    let (mut walls, mut overheads) = (Vec::new(), Vec::new());
    let cores = std::thread::available_parallelism()?.get();
    all_have_the_image(nodes)?;
    job(nodes, program, WARM_TASKS)?;
    let all = Instant::now();
    while walls.is_empty() || (walls.len() < ROUNDS && all.elapsed() < ROUNDS_WITHIN) {
        // Children that are gone are counted by who has waited for them.
        std::thread::sleep(REAPED);
        let (before, began) = (children_cpu(nodes)?, Instant::now());
        job(nodes, program, each)?;
        let wall = began.elapsed();
        std::thread::sleep(REAPED);
        let cpu = children_cpu(nodes)? - before;
        ensure!(!cpu.is_zero(), "the children of {each} tasks took nothing of a processor");
        let busy = cpu.as_secs_f64() / f64::from(u32::try_from(cores)?);
        overheads.push((wall.as_secs_f64() - busy) / wall.as_secs_f64() * 100.0);
        walls.push(wall);
    }
    let (walls, overheads) = (Samples::of(&walls), Samples::from_us(overheads));
    report.keep("C1 wall", &walls);
    report.keep("C1 overhead, percent", &overheads);
    report.add(Row::new(
        "C1",
        format!("farfork run -n {each} of a Linux guest, {NODES} nodes: until all results"),
        &walls,
        None,
    ));
    let is_met = overheads.p50() <= 25.0;
    report.add(
        Row::new("C1", "(wall - CPU of the children / cores) / wall", &overheads, None)
            .in_unit("%")
            .reaching("<= 25 %", is_met),
    );
    Ok(())
}

/// A job whose every task computes something; each has to have one right result.
fn job(nodes: &Nodes, program: &Path, tasks: u64) -> Result<()> {
    let results: PathBuf = nodes.directory().join("results");
    let status = Command::new(program)
        .env("FARFORK_SOCKET", nodes.socket(0))
        .args(["run", "python", "--quiet", "-n", &tasks.to_string(), "--eval", "{index} * {index} + 7", "--results"])
        .arg(&results)
        .status()?;
    ensure!(status.success(), "farfork run ended with {status}");
    let text = std::fs::read_to_string(&results)?;
    std::fs::remove_file(&results)?;
    let mut seen = vec![false; usize::try_from(tasks)?];
    let mut ran_on = BTreeSet::new();
    for line in text.lines() {
        let result: Value = serde_json::from_str(line)?;
        let task = result["task"].as_u64().context("a task")?;
        let right = (task * task + 7).to_string();
        ensure!(result["value"].as_str() == Some(&right), "a wrong result: {result}");
        ran_on.insert(result["run"]["node"].as_str().context("where it ran")?.to_owned());
        ensure!(!std::mem::replace(&mut seen[usize::try_from(task)?], true), "two results of task {task}");
    }
    ensure!(seen.iter().all(|seen| *seen), "a task has no result");
    ensure!(ran_on.len() == NODES, "all tasks ran on {ran_on:?}");
    Ok(())
}

fn all_have_the_image(nodes: &Nodes) -> Result<()> {
    eventually("all nodes have all of the image", || {
        let explained = nodes.ask(0, "GET", "/v1/explain/python", "")?;
        let settled = explained["nodes"].as_array().into_iter().flatten().filter(|node| node["settled_percent"] == 100);
        Ok((settled.count() == NODES).then_some(()))
    })
}

/// What machines have taken of processors that are gone by now: what their nodes' zygotes have waited for.
fn children_cpu(nodes: &Nodes) -> Result<Duration> {
    let mut ticks = 0;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, which may hold anything, ends with the last bracket.
        let fields: Vec<&str> = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        let is_zygote = field(1).is_some_and(|parent| nodes.pids().any(|pid| u64::from(pid) == parent));
        if is_zygote {
            ticks += field(13).unwrap_or(0) + field(14).unwrap_or(0);
        }
    }
    Ok(TICK * u32::try_from(ticks)?)
}

/// C2: one fork of a guest without an agent, asked of the node of a cluster that has its image, and of one that has not.
fn forks(report: &mut Report, nodes: &mut Nodes, n: usize) -> Result<()> {
    let warm = nodes.ask(0, "POST", "/v1/forks", r#"{"from":{"guest":"probe"},"memory_bytes":536870912,"verify":true}"#)?;
    let image = warm["image"]["id"].as_str().context("an image")?.to_owned();
    nodes.ask(0, "POST", &format!("/v1/images/{image}/save"), r#"{"name":"probe"}"#)?;
    let mut rows = Vec::new();
    let template = json!({"from": {"template": "probe"}});
    for (what, asked, order) in [
        ("of an image that only the node asked has", 0, &json!({"from": {"image": image}})),
        ("of a template that the node asked has, out of its lease", 0, &template),
        ("of a template that another node has, where the cluster places it", 1, &template),
    ] {
        let (mut trips, mut firsts) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let mut connection = UnixStream::connect(nodes.socket(asked))?;
        for _ in 0..n {
            std::thread::sleep(Duration::from_millis(10));
            let started = Instant::now();
            let answer = http::request(&mut connection, "POST", "/v1/forks", &order.to_string())?;
            trips.push(started.elapsed());
            let child = http::json(&answer)?["children"][0].clone();
            firsts.push(child["first_us"].as_f64().context("no child")?);
            let id = child["id"].as_str().context("an id")?;
            nodes.ask(0, "DELETE", &format!("/v1/machines/{id}"), "")?;
        }
        rows.push((what, Samples::of(&trips), Samples::from_us(firsts)));
    }
    for (what, trips, firsts) in rows {
        report.keep(&format!("C2 in a cluster, {what}"), &trips);
        let met = trips.p50() <= 2000.0;
        let what = format!("in a cluster of {NODES}: API round trip of one fork {what}; beside the fork in it");
        report.add(Row::new("C2", what, &trips, Some(firsts.p50())).reaching("p50 <= 2 ms", met));
    }
    Ok(())
}

/// C4: a node dies, and a child of one of its tasks is forked elsewhere.
fn rescheduled(report: &mut Report, nodes: &mut Nodes) -> Result<()> {
    let (mut leaders, mut followers) = (Vec::new(), Vec::new());
    for of_leader in [true, false] {
        for _ in 0..KILLED {
            all_have_the_image(nodes)?;
            let leader = nodes.leader(0)?;
            let victim = if of_leader { leader } else { (leader + 1) % NODES };
            let at = (victim + 1) % NODES;
            let order = json!({
                "template": "python", "inputs": {"count": 2 * NODES}, "work": {"eval": "__import__('time').sleep(1000)"}, "replicas": NODES,
                // Two on each, and on each room for one more.
                "cpu_millis": 600,
            });
            let id = nodes.ask(at, "POST", "/v1/jobs", &order.to_string())?["job"]["id"].as_str().context("an id")?.to_owned();
            let path = format!("/v1/jobs/{id}");
            let name = format!("node-{victim}");
            let forked = |job: &Value| -> u64 {
                let nodes = job["nodes"].as_array().into_iter().flatten();
                nodes.filter(|node| node["name"] != *name).filter_map(|node| node["here"]["forked"].as_u64()).sum()
            };
            let running = |job: &Value| -> u64 {
                job["nodes"].as_array().into_iter().flatten().filter_map(|node| node["here"]["running"].as_u64()).sum()
            };
            let before = eventually("all tasks run, and on the one that dies", || {
                let job = nodes.ask(at, "GET", &path, "")?;
                let is_there = job["nodes"].as_array().is_some_and(|nodes| nodes.iter().any(|node| node["name"] == *name));
                Ok((is_there && running(&job) == 2 * NODES as u64).then(|| forked(&job)))
            })?;
            let killed = Instant::now();
            nodes.kill(victim)?;
            let took = eventually("a child of its tasks is forked elsewhere", || {
                let job = nodes.ask(at, "GET", &path, "").ok();
                Ok(job.filter(|job| forked(job) > before).map(|_| killed.elapsed()))
            })?;
            if of_leader { &mut leaders } else { &mut followers }.push(took);
            nodes.run(victim)?;
            nodes.settle()?;
            nodes.ask(at, "POST", &format!("{path}/cancel"), "")?;
        }
    }
    for (what, took, most) in [("the leader dies", leaders, 23.0), ("another node dies", followers, 18.0)] {
        let samples = Samples::of(&took);
        report.keep(&format!("C4 first child elsewhere, {what}"), &samples);
        let is_met = samples.percentile(99) <= most * 1e6;
        let row =
            Row::new("C4", format!("{what}, until a child of one of its tasks has been forked elsewhere"), &samples, None);
        report.add(row.reaching(format!("<= {most} s"), is_met));
    }
    Ok(())
}
