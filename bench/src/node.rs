//! `bench node`: row C2 of docs/specification.md, and the API beside a child that allocates all that it may: by the real daemon.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use types::MemorySize;
use vm::pool::Settings;
use vm::probe::{self, Command as Probe};
use vm::{Class, Pool};

use crate::daemon::{self, Daemon};
use crate::report::{Report, Row, Samples, announce};
use crate::{floor, http, proof};

/// Options of the daemon.
const NO_MORE: [&str; 0] = [];

pub(crate) fn run(json: Option<&Path>, quick: bool, farfork: Option<&Path>) -> Result<()> {
    let host = floor::open_host()?;
    let mut report = Report::new(&host, quick);
    let program = daemon::program(farfork)?;
    let n = if quick { 30 } else { 300 };
    announce("C2: the daemon and a warm image");
    let mut node = Daemon::start(Command::new(&program), NO_MORE)?;
    let warm = node.ask("POST", "/v1/forks", r#"{"from":{"guest":"probe"},"memory_bytes":536870912,"verify":true}"#)?;
    ensure!(warm["children"][0]["verified_pages"].as_u64().is_some(), "the first child did not verify its memory: {warm}");
    let image = warm["image"]["id"].as_str().context("an image")?.to_owned();
    round_trips(&mut report, &mut node, &image, n)?;
    storm(&mut report, &mut node, n)?;
    report.finish(json)
}

/// C2: from the request until its answer is read, on a connection that is open.
fn round_trips(report: &mut Report, node: &mut Daemon, image: &str, n: usize) -> Result<()> {
    announce("C2: round trips of a fork");
    let order = format!(r#"{{"from":{{"image":"{image}"}}}}"#);
    let (mut trips, mut firsts) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let mut with_shell = 0;
    for _ in 0..n {
        // Long enough for a shell to be there again.
        std::thread::sleep(Duration::from_millis(10));
        let connection = node.connection()?;
        let started = Instant::now();
        let answer = http::request(connection, "POST", "/v1/forks", &order)?;
        trips.push(started.elapsed());
        let answer = http::json(&answer)?;
        let child = &answer["children"][0];
        firsts.push(child["first_us"].as_f64().with_context(|| format!("no child: {answer}"))?);
        with_shell += usize::from(child["had_shell"] == true);
        let id = child["id"].as_str().context("an id")?;
        node.ask("DELETE", &format!("/v1/machines/{id}"), "")?;
    }
    ensure!(with_shell * 10 >= n * 9, "{with_shell} of {n} forks found a shell");
    let (trips, firsts) = (Samples::of(&trips), Samples::from_us(firsts));
    report.keep("C2 round trip", &trips);
    report.keep("C2 first instruction", &firsts);
    let what = "API round trip of one fork, shell ready, 512 MiB; beside the fork in it";
    report.add(Row::new("C2", what, &trips, Some(firsts.p50())).reaching("p50 <= 2 ms", trips.p50() <= 2000.0));
    Ok(())
}

/// What the API's users feel of a child that writes over all of its memory without a pause.
fn storm(report: &mut Report, node: &mut Daemon, n: usize) -> Result<()> {
    announce("C2: the API at rest and beside an allocation storm");
    let quiet = listings(node, n)?;
    stormy_image(&node.directory().context("a node of this process")?.join("data/images"))?;
    let loaded = node.ask("POST", "/v1/images/load", r#"{"name":"storm"}"#)?;
    let image = loaded["id"].as_str().context("an image")?.to_owned();
    let order = format!(r#"{{"from":{{"image":"{image}"}}}}"#);
    let mut stormy = Vec::new();
    // A new child now and then: only fresh pages are allocated.
    for _ in 0..5 {
        let forked = node.ask("POST", "/v1/forks", &order)?;
        let id = forked["children"][0]["id"].as_str().with_context(|| format!("no child: {forked}"))?.to_owned();
        stormy.extend(listings(node, n / 5)?);
        let usage = node.ask("GET", &format!("/v1/machines/{id}"), "")?;
        let private = usage["usage"]["private_bytes"].as_u64().unwrap_or(0);
        ensure!(private > 1 << 20, "the child does not write: {usage}");
        node.ask("DELETE", &format!("/v1/machines/{id}"), "")?;
    }
    let (quiet, stormy) = (Samples::of(&quiet), Samples::of(&stormy));
    report.keep("API listing, quiet", &quiet);
    report.keep("API listing, beside an allocation storm", &stormy);
    report.add(Row::new("C2", "GET /v1/machines, quiet", &quiet, None));
    let what = "GET /v1/machines beside a child that writes over 512 MiB";
    let met = stormy.p50() <= 2.0 * quiet.p50().max(quiet.percentile(99));
    report.add(Row::new("C2", what, &stormy, Some(quiet.p50())).reaching("p50 within 2x the quiet p99", met));
    Ok(())
}

fn listings(node: &mut Daemon, n: usize) -> Result<Vec<Duration>> {
    let one = |_| -> Result<Duration> {
        std::thread::sleep(Duration::from_millis(2));
        let started = Instant::now();
        node.ask("GET", "/v1/machines", "")?;
        Ok(started.elapsed())
    };
    (0..n).map(one).collect()
}

/// Saves an image whose children write over all their memory as soon as they run.
fn stormy_image(store: &Path) -> Result<()> {
    let settings = Settings { shells_max: 0, ..Settings::new(std::env::current_exe()?, [OsString::from("zygote")]) };
    let failed = |error: vm::pool::PoolError| anyhow!("{error}; {}", error.remedy());
    let pool = Pool::open(floor::open_host()?, settings).map_err(failed)?;
    let class = Class::new(MemorySize::from_mib(512)?, 1)?;
    let parent = pool.boot_probe(class, proof::new_id()).map_err(failed)?;
    let count = probe::work_pages(class.memory());
    parent.post(0, Probe::Epochs { first: probe::first_work_page(), count }).map_err(failed)?;
    let image = parent.freeze().map_err(failed)?.image;
    let directory = std::fs::File::open(store).with_context(|| store.display().to_string())?;
    vm::image::save_in(&image, directory.as_fd(), "storm.img".as_ref(), |_, _| {})?;
    Ok(())
}
